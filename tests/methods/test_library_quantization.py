"""Weights that torchao and bitsandbytes round."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from methods.library_quantization import store
from suite.conformance import tiny
from suite.dynamic_layers import OutlierInt8Linear
from suite.errors import InputError, MissingExtra
from suite.kernels import signed_codes
from suite.models.anatomy import anatomy_of
from suite.models.layouts import layout_of
from suite.packed_layers import PackedLinear
from suite.recipe import Recipe
from suite.specs import Budget


@pytest.fixture
def torchao() -> Any:
    return pytest.importorskip("torchao.quantization")


@pytest.fixture
def bitsandbytes() -> Any:
    return pytest.importorskip("bitsandbytes.functional")


def pairs(family: str, recipe: str, dtype: torch.dtype) -> list[tuple[nn.Linear, PackedLinear]]:
    """Every decoder linear of a tiny model and what the recipe makes of it."""
    dense, model = tiny.build(family, dtype), tiny.build(family, dtype)
    tiny.compress(model, recipe)
    found = []
    for line in anatomy_of(dense).linears:
        linear, packed = dense.get_submodule(line.path), model.get_submodule(line.path)
        assert isinstance(linear, nn.Linear)
        assert type(packed) is PackedLinear
        found.append((linear, packed))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_and_scales_are_those_of_torchao(family: str, dtype: torch.dtype, torchao: Any) -> None:
    for linear, packed in pairs(family, "torchao-int8", dtype):
        torchao.quantize_(linear, torchao.Int8WeightOnlyConfig())
        weight: Any = linear.weight
        assert torch.equal(signed_codes(packed), weight.qdata)
        assert torch.equal(packed.scales, weight.scale.reshape(-1, 1).half())
        x = torch.randn(3, linear.in_features).to(dtype)
        torch.testing.assert_close(packed(x), linear(x), rtol=0.02, atol=1e-3 if x.itemsize == 4 else 2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_and_scales_are_those_of_bitsandbytes(
    family: str, dtype: torch.dtype, bitsandbytes: Any
) -> None:
    for linear, packed in pairs(family, "bitsandbytes-int8", dtype):
        codes, largest, _ = bitsandbytes.int8_vectorwise_quant(linear.weight.detach().half())
        assert torch.equal(signed_codes(packed), codes)
        assert torch.equal(packed.scales, (largest / 127).reshape(-1, 1).half())


def test_the_weights_of_bitsandbytes_are_nearly_those_of_rounding_to_nearest(
    family: str, bitsandbytes: Any
) -> None:
    rounded = pairs(family, "rtn-int8", torch.float32)
    for (_, theirs), (_, ours) in zip(
        pairs(family, "bitsandbytes-int8", torch.float32), rounded, strict=True
    ):
        gap = (signed_codes(theirs).int() - signed_codes(ours).int()).abs()
        assert gap.max() <= 1
        assert (gap == 0).float().mean() > 0.95


def test_a_mixed_product_is_that_of_bitsandbytes_token_by_token(bitsandbytes: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(64, 32, bias=False)
    ours = OutlierInt8Linear.holding(linear, threshold=6.0)
    codes, scales = signed_codes(ours), ours.scales.float().squeeze(-1) * 127
    x = torch.randn(5, 64, generator=generator)
    x[0, 3], x[2, 60], x[2, 9] = 9.0, -30.0, 6.5
    expected = []
    for token in x.half().split(1):
        theirs, largest, columns = bitsandbytes.int8_vectorwise_quant(token.clone(), threshold=6.0)
        theirs[:, columns] = 0
        exact = bitsandbytes.int8_linear_matmul(theirs, codes)
        product = bitsandbytes.int8_mm_dequant(exact, largest, scales).float()
        weight = codes[:, columns].float() * scales.unsqueeze(-1) / 127
        expected.append(product + token[:, columns].float() @ weight.t())
    torch.testing.assert_close(ours(x.half().float()), torch.cat(expected), rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("name", ["torchao", "bitsandbytes"])
def test_without_the_library_planning_names_the_extra(name: str, without: Callable[[str], None]) -> None:
    without(name)
    recipe = Recipe.parse(f"{name}-int8")
    with pytest.raises(MissingExtra, match=rf"{name}-int8 needs.*weighin\[{name}\]"):
        recipe.plan(tiny.anatomy("llama"), Budget(metric="none"))


def test_embedding_and_head_are_rounded_by_the_suite(torchao: Any) -> None:
    theirs, ours = tiny.build("llama-untied"), tiny.build("llama-untied")
    tiny.compress(theirs, "torchao-int8(embedding=8)")
    tiny.compress(ours, "rtn-int8(embedding=8)")
    layout = layout_of(ours.config)
    for path in (layout.embedding, layout.head):
        one, other = theirs.get_submodule(path), ours.get_submodule(path)
        assert all(torch.equal(t, other.state_dict()[name]) for name, t in one.state_dict().items())


def test_weights_are_rounded_by_the_library_alone(torchao: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(self: PackedLinear, weight: Tensor) -> None:
        raise AssertionError("rounded by the suite")

    monkeypatch.setattr(PackedLinear, "quantize_", never)
    assert pairs("llama", "torchao-int8", torch.bfloat16)


def codes_of(*values: int) -> Tensor:
    return torch.tensor([values], dtype=torch.int8)


def test_stored_codes_and_scales_come_back() -> None:
    packed = PackedLinear(4, 1, 8, 4)
    store(packed, codes_of(-128, -1, 0, 127), torch.tensor([0.5]))
    assert packed.dequantize(torch.float32).tolist() == [[-64.0, -0.5, 0.0, 63.5]]


def test_a_scale_that_float16_cannot_hold_is_refused() -> None:
    with pytest.raises(InputError, match="65504"):
        store(PackedLinear(2, 1, 8, 2), codes_of(1, 2), torch.tensor([1e6]))
