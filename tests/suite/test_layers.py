"""Factorised linears, and skeletons rebuilt from their specs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from suite.layers import LowRankLinear, ModuleSpec, default_dtype, replace, spec_of
from suite.packed_layers import PackedEmbedding, PackedLinear, TiedHead


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 8), st.booleans(), st.integers(0, 999))
def test_a_low_rank_linear_multiplies_by_its_factors_and_keeps_the_bias(
    rows: int, columns: int, rank: int, bias: bool, seed: int
) -> None:
    linear = nn.Linear(columns, rows, bias=bias)
    torch.manual_seed(seed)
    left, right = torch.randn(rows, rank), torch.randn(rank, columns)
    made = LowRankLinear.from_factors(left, right, linear)
    x = torch.randn(3, columns)
    expected = x @ (left @ right).T + (linear.bias if bias else 0)
    torch.testing.assert_close(made(x), expected)
    assert made.arguments() == {
        "in_features": columns,
        "out_features": rows,
        "rank": rank,
        "bias": bias,
    }
    assert sum(p.numel() for p in made.parameters()) == rank * (rows + columns) + bias * rows


def test_factors_are_stored_in_the_dtype_of_the_linear_they_replace() -> None:
    linear = nn.Linear(4, 3, dtype=torch.bfloat16)
    made = LowRankLinear.from_factors(torch.randn(3, 2).double(), torch.randn(2, 4).double(), linear)
    assert {p.dtype for p in made.parameters()} == {torch.bfloat16}


def examples() -> list[nn.Module]:
    linear, plain = nn.Linear(20, 12), nn.Linear(20, 12, bias=False)
    low_rank = LowRankLinear.from_factors(torch.randn(12, 3), torch.randn(3, 20), linear)
    return [
        low_rank,
        LowRankLinear(20, 12, 4),
        PackedLinear.from_linear(linear, 4, 16, True),
        PackedLinear.from_linear(plain, 3, 7, False),
        PackedLinear.from_linear(plain, 8, 1000, True),
        PackedEmbedding.from_embedding(nn.Embedding(9, 10), 4, 4, False),
        PackedLinear(20, 12, 4, 16, grid="normal-float"),
        PackedLinear(20, 12, 3, 16, False, True, grid="float-zero"),
        PackedEmbedding(9, 10, 4, 4, False, grid="float-zero"),
        TiedHead("model.embed_tokens"),
    ]


@pytest.mark.parametrize("module", examples(), ids=lambda module: str(spec_of(module)))
def test_a_spec_rebuilds_an_equal_skeleton(module: nn.Module) -> None:
    spec = spec_of(module)
    assert spec is not None
    spec = ModuleSpec.model_validate_json(spec.model_dump_json())
    for device in ("meta", "cpu"):
        rebuilt = spec.build(torch.float32, device)
        assert type(rebuilt) is type(module)
        assert spec_of(rebuilt) == spec
        shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in rebuilt.state_dict().items()}
        assert shapes == {name: (tensor.shape, tensor.dtype) for name, tensor in module.state_dict().items()}
        assert all(tensor.device.type == device for tensor in rebuilt.state_dict().values())


def test_an_ordinary_module_has_no_spec() -> None:
    assert spec_of(nn.Linear(2, 2)) is None


def test_equal_specs_have_equal_hashes() -> None:
    first = ModuleSpec(type="low_rank", arguments={"rank": 1, "bias": True})
    second = ModuleSpec(type="low_rank", arguments={"bias": True, "rank": 1})
    assert first == second
    assert hash(first) == hash(second)


def test_the_default_dtype_comes_back_even_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), default_dtype(torch.bfloat16):
        1 / 0  # noqa: B018
    assert torch.get_default_dtype() == torch.float32


def test_a_replaced_module_takes_over_the_mode_of_the_old_one() -> None:
    model = nn.Sequential(nn.Linear(4, 4)).eval()
    replace(model, "0", LowRankLinear(4, 4, 1))
    assert isinstance(model[0], LowRankLinear)
    assert not model[0].training


def test_a_spec_with_sequences_is_the_same_after_json() -> None:
    spec = ModuleSpec(type="mpo_linear", arguments={"rows": (2, 3), "bias": False})
    again = ModuleSpec.model_validate_json(spec.model_dump_json())
    assert again == spec
    assert hash(again) == hash(spec)
