"""Students that are rounded in every step of their training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from methods import quantization_aware
from methods.quantization_aware import DynamicScaling
from suite import kernels
from suite.conformance import tiny
from suite.measure.ledger import ledger, total_disk
from suite.models.anatomy import anatomy_of
from suite.packed_layers import PackedLinear
from suite.recipe import Recipe
from suite.specs import Budget

SCALINGS = ["module", "row"]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHIN_CACHE_DIR", str(tmp_path))


def weights(rows: int = 6, columns: int = 40) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_weight_lands_on_the_nearest_point_of_a_grid_clipped_at_its_mean_size(
    bits: int, scaling: Any
) -> None:
    weight, top = weights(), 2 ** (bits - 1) - 1
    module = DynamicScaling(weight, bits, scaling)
    size = weight.abs().mean(1, keepdim=True) if scaling == "row" else weight.abs().mean()
    step = (module.ratio.detach()[:, None] * size / top).half().float()  # as it is stored
    expected = step * (weight / step).round().clamp(-top, top)
    torch.testing.assert_close(module(weight), expected)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_the_clipping_point_hears_of_clipped_and_of_rounded_weights(scaling: Any) -> None:
    """dQ/dα is the sign of a clipped weight, and the rounding error of u = w/α for another one."""
    weight, upstream = weights().requires_grad_(True), weights().roll(1, 0)
    module = DynamicScaling(weight, 3, scaling)
    with torch.no_grad():
        module.ratio *= 0.6  # so that a good many are clipped
    (module(weight) * upstream).sum().backward()
    detached = weight.detach()
    size = detached.abs().mean(1, keepdim=True) if scaling == "row" else detached.abs().mean().reshape(1, 1)
    clip = module.ratio.detach()[:, None] * size
    ratio = detached / clip
    inside = ratio.abs() <= 1
    slope = torch.where(inside, (3 * ratio).round() / 3 - ratio, ratio.sign())
    expected = (upstream * slope * size).sum(1) if scaling == "row" else (upstream * slope * size).sum()
    assert not inside.all()
    assert module.ratio.grad is not None
    torch.testing.assert_close(module.ratio.grad, expected.reshape(-1), rtol=0.02, atol=0.02)
    torch.testing.assert_close(weight.grad, upstream * inside)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_the_start_is_no_worse_than_clipping_nothing(scaling: Any) -> None:
    weight = weights(columns=400)
    module = DynamicScaling(weight, 3, scaling)
    found = (module(weight) - weight).square().sum()
    with torch.no_grad():
        size = weight.abs()
        at_most = size.amax(1) / size.mean(1) if scaling == "row" else (size.max() / size.mean()).reshape(1)
        module.ratio.copy_(at_most)
    assert found < (module(weight) - weight).square().sum()


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_trained_is_what_is_packed_bit_for_bit(
    family: str, scaling: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    before: list[Tensor] = []

    def trained(model: Any, *_: Any) -> dict[str, Any]:
        linears = [m for m in model.modules() if isinstance(m, nn.Linear) and parametrize.is_parametrized(m)]
        assert len(linears) == len(anatomy_of(tiny.build(family)).linears)
        with torch.no_grad():
            for linear in linears:  # as if it had been trained: other weights, other ratios
                linear.parametrizations.weight.original.mul_(1.1)
                linear.parametrizations.weight[0].ratio.mul_(0.93)
        before.append(tiny.logits_of(model))
        return {}

    monkeypatch.setattr(quantization_aware, "train", trained)
    model = tiny.build(family, dtype)
    tiny.compress(model, f"quantgpt(bits=3,scaling={scaling})")
    with kernels.reference():
        assert torch.equal(tiny.logits_of(model), before[0])


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_every_linear_is_packed_at_the_bits_asked_for(family: str, bits: int) -> None:
    model = tiny.build(family)
    plan = tiny.compress(model, f"quantgpt(bits={bits},learning_rate=1e-4)")
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    assert {module.bits for module in packed} == {bits}
    assert len(packed) == len(anatomy_of(tiny.build(family)).linears)
    assert total_disk(ledger(model)) == plan.final.bytes
    assert not any(parametrize.is_parametrized(module) for module in model.modules())


def test_the_embedding_is_rounded_when_the_bytes_ask_for_it(family: str) -> None:
    dense = tiny.anatomy(family)
    least = Recipe.parse("quantgpt(embedding=4)").plan(dense, Budget.parse("none")).final.bytes
    recipe = Recipe.parse("quantgpt")
    roomy, tight = Budget.parse("bytes=0.8"), Budget(metric="bytes", value=least)
    assert recipe.plan(dense, roomy).stages[0].knobs["embedding"] == 16
    assert recipe.plan(dense, tight).stages[0].knobs["embedding"] == 4
    model = tiny.build(family)
    plan = tiny.compress(model, "quantgpt(learning_rate=1e-4)", str(tight))
    assert total_disk(ledger(model)) == plan.final.bytes <= least


def test_training_brings_the_rounded_student_closer_to_its_teacher() -> None:
    teacher, tokens, gaps = tiny.build("llama"), tiny.token_ids(8, 16, seed=1), []
    dense = tiny.logits_of(teacher, tokens)
    for rate in ("1e-9", "1e-3"):
        student = tiny.build("llama")
        notes = tiny.compress(student, f"quantgpt(bits=2,contrast=0,learning_rate={rate})").stages[0].notes
        gaps.append(float((tiny.logits_of(student, tokens) - dense).norm() / dense.norm()))
        assert notes["objective"]["distill"] == 1
    assert gaps[1] < 0.97 * gaps[0]
