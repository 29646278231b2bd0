"""Rounding errors made up for by the columns still to come."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from methods import gptq as module
from methods.gptq import Order, Rounded, gptq
from suite.conformance import tiny
from suite.grids import grouped, round_to_nearest, ungrouped, values_of
from suite.layers import replace
from suite.models.anatomy import anatomy_of
from suite.packed_layers import PackedLinear
from suite.streaming import stream

SEEDS = st.integers(0, 9999)
ORDERS: list[Order] = ["activation", "original"]
BLOCK = "model.layers.0"


def layer(rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    """A random weight and the second moment of correlated inputs of uneven size."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    mixing += torch.eye(columns)
    inputs = torch.randn(4 * columns, columns, generator=generator) @ mixing
    inputs *= torch.randn(columns, generator=generator).exp()
    return torch.randn(rows, columns, generator=generator), (inputs.T @ inputs).double()


def loss(weight: Tensor, moment: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, group: int) -> float:
    """tr((W−W') C (W−W')ᵀ)."""
    values = values_of(grouped(codes.float(), group), scales, zeros.float())
    error = (weight - ungrouped(values, weight.shape[1])).double()
    return float((error @ moment * error).sum())


def losses(rounded: Rounded, weight: Tensor, moment: Tensor, group: int) -> float:
    return loss(weight, moment, rounded.codes, rounded.scales, rounded.zeros, group)


@pytest.mark.parametrize("order", ORDERS)
@given(seed=SEEDS, bits=st.sampled_from([2, 3, 4, 8]), symmetric=st.booleans(), group=st.integers(1, 40))
def test_with_unrelated_inputs_it_is_rounding_to_nearest(
    order: Order, seed: int, bits: int, symmetric: bool, group: int
) -> None:
    weight, _ = layer(5, 30, seed)
    moment = torch.rand(30, generator=torch.Generator().manual_seed(seed)).double().diag()
    rounded = gptq(weight, moment, bits, min(group, 30), symmetric, order, "largest")
    codes, scales, zeros = round_to_nearest(weight, bits, min(group, 30), symmetric)
    assert torch.equal(rounded.codes, codes)
    assert torch.equal(rounded.scales, scales)
    assert torch.equal(rounded.zeros, zeros.float())


@pytest.mark.parametrize("order", ORDERS)
def test_one_column_is_rounded_to_nearest(order: Order) -> None:
    weight, moment = layer(9, 1, 0)
    rounded = gptq(weight, moment, 3, 1, False, order, "largest")
    assert torch.equal(rounded.codes, round_to_nearest(weight, 3, 1, False)[0])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("bits", "group", "symmetric"), [(4, 16, True), (3, 20, False), (3, 48, True)])
def test_the_loss_is_below_that_of_rounding_to_nearest(
    order: Order, bits: int, group: int, symmetric: bool
) -> None:
    ours, theirs, searched = [], [], []
    for seed in range(8):
        weight, moment = layer(12, 48, seed)
        ours.append(
            losses(gptq(weight, moment, bits, group, symmetric, order, "largest"), weight, moment, group)
        )
        searched.append(losses(gptq(weight, moment, bits, group, symmetric, order), weight, moment, group))
        theirs.append(loss(weight, moment, *round_to_nearest(weight, bits, group, symmetric), group))
    assert all(a <= 1.01 * b for a, b in zip(ours, theirs, strict=True))
    assert sum(ours) < 0.8 * sum(theirs)
    assert sum(searched) < sum(ours)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("group", [7, 16, 24, 40])
def test_the_lazy_blocks_change_nothing(order: Order, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, moment = layer(6, 40, 1)
    at_once = gptq(weight, moment, 4, group, True, order)
    monkeypatch.setattr(module, "COLUMNS", 8)
    lazy = gptq(weight, moment, 4, group, True, order)
    assert torch.equal(at_once.codes, lazy.codes)
    assert torch.equal(at_once.scales, lazy.scales)


def test_without_a_usable_moment_it_falls_back_and_says_so() -> None:
    weight, moment = layer(4, 12, 4)
    moment[3, 3] = torch.nan
    rounded = gptq(weight, moment, 4, 12, True)
    assert rounded.fallback
    assert torch.equal(rounded.codes, round_to_nearest(weight, 4, 12, True)[0])


def test_the_notes_count_fallbacks_and_dead_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build("llama")
    with torch.no_grad():
        norm: nn.Module = model.get_submodule(f"{BLOCK}.input_layernorm")
        norm.weight[:5] = 0
    assert tiny.compress(model, "gptq-int4").stages[0].notes["dead_columns"] == 5
    monkeypatch.setattr(module, "inverse_factor", lambda *_: (None, 2))
    notes = tiny.compress(tiny.build("llama"), "gptq-int4").stages[0].notes
    assert notes["rounded_to_nearest"] == 7 * tiny.BLOCKS
    assert notes["damping_raised"] == 2 * 4 * tiny.BLOCKS


def test_a_dead_column_keeps_its_rounded_weight() -> None:
    weight, moment = layer(4, 16, 5)
    moment[6], moment[:, 6] = 0, 0
    rounded = gptq(weight, moment, 4, 1, True, scale="largest")
    assert torch.equal(rounded.codes[:, 6], round_to_nearest(weight, 4, 1, True)[0][:, 6])


def test_every_linear_sees_what_those_before_it_became() -> None:
    dense, model = tiny.build("llama"), tiny.build("llama")
    weight = dense.get_submodule(f"{BLOCK}.mlp.down_proj").weight.detach().clone()
    tiny.compress(model, "gptq-int4(group=16)")
    for line in anatomy_of(dense).linears:
        if line.block == 0 and line.role != "down":
            replace(dense, line.path, model.get_submodule(line.path))
    block = next(stream(dense, tiny.calibration_sample().tokens))
    rounded = gptq(weight, block.second_moment("mlp.down_proj"), 4, 16, True)
    down = model.get_submodule(f"{BLOCK}.mlp.down_proj")
    assert isinstance(down, PackedLinear)
    expected = PackedLinear(112, 48, 4, 16)
    expected.store_(rounded.codes, rounded.scales, rounded.zeros)
    assert torch.equal(down.packed, expected.packed)
    assert torch.equal(down.scales, expected.scales)


def distance(family: str, recipe: str, dtype: torch.dtype = torch.float32) -> float:
    """Relative distance of the logits on the calibration tokens from the dense model's."""
    ids, model = tiny.calibration_sample().tokens, tiny.build(family, dtype)
    dense = tiny.logits_of(model, ids).float()
    tiny.compress(model, recipe)
    return float((tiny.logits_of(model, ids).float() - dense).norm() / dense.norm())


def test_the_model_comes_closer_to_the_dense_one_than_by_rounding(family: str) -> None:
    assert distance(family, "gptq-int4(group=16)") < 0.6 * distance(family, "rtn-int4(group=16)")


def test_half_precision_models_can_be_quantized(family: str) -> None:
    assert distance(family, "gptq-int4(group=16,embedding=8)", torch.bfloat16) < 0.2


@pytest.mark.parametrize(
    "first", ["svd(share=0.8)", "layerchop(remove=1)", "slicegpt(width=40)", "tensor-network(share=0.8)"]
)
def test_it_stacks_on_changes_of_structure(first: str) -> None:
    model = tiny.build("llama")
    tiny.compress(model, first)
    paths = [line.path for line in anatomy_of(model).linears]
    tiny.compress(model, "gptq-int4(group=20)")
    assert all(isinstance(model.get_submodule(path), PackedLinear) for path in paths)
    assert tiny.logits_of(model).isfinite().all()
