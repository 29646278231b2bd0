"""Scales of columns, moved into what writes them, and clipped ranges."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from methods.awq import best_scale, clipped_grid, rounding_loss
from suite.conformance import tiny
from suite.grids import codes_on, grouped, range_grid, round_to_nearest, values_of
from suite.models.anatomy import anatomy_of
from suite.packed_layers import PackedLinear
from suite.streaming import InputStatistics


def layer(seed: int, rows: int = 24, columns: int = 40) -> tuple[Tensor, InputStatistics]:
    """A random weight, and inputs of which a few channels are far stronger than the others."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(200, columns, generator=generator)
    inputs[:, :3] *= 20
    weight = torch.randn(rows, columns, generator=generator)
    return weight, InputStatistics(inputs.T @ inputs, inputs.abs().mean(0))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(4, 40), (3, 16)])
def test_the_scale_found_is_no_worse_than_none_and_helps_strong_channels(
    bits: int, group: int, symmetric: bool
) -> None:
    for seed in range(5):
        weight, inputs = layer(seed)
        scale = best_scale(weight, inputs, bits, group, symmetric)
        found, plain = (
            float(rounding_loss(weight, s, inputs.moment, bits, group, symmetric))
            for s in (scale, torch.ones(40))
        )
        assert found < 0.7 * plain
        assert float(scale.max() * scale.min()) == pytest.approx(1, rel=1e-4)


def test_alike_channels_are_left_alone_or_lose_nothing() -> None:
    weight, inputs = layer(0)
    even = InputStatistics(torch.eye(40), torch.ones(40))
    assert torch.equal(best_scale(weight, even, 4, 20, True), torch.ones(40))
    assert inputs.divided_by(torch.full((40,), 2.0)).size.allclose(inputs.size / 2)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_clip_never_raises_the_error_of_a_group(symmetric: bool) -> None:
    weight, inputs = layer(1)
    blocks = grouped(weight, 16)

    def by_group(scales: Tensor, zeros: Tensor) -> Tensor:
        error = blocks - values_of(codes_on(blocks, scales, zeros, 3), scales, zeros)
        parts = []
        for index in range(blocks.shape[1]):
            start = 16 * index
            own = error[:, index, : min(16, 40 - start)]
            parts.append((own @ inputs.moment[start : start + 16, start : start + 16] * own).sum(-1))
        return torch.stack(parts, 1)

    plain = by_group(*range_grid(blocks, 3, symmetric))
    clipped = by_group(*clipped_grid(weight, inputs.moment, 3, 16, symmetric))
    assert (clipped <= plain * (1 + 1e-5)).all()
    assert clipped.sum() < plain.sum()


def distance(family: str, recipe: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> float:
    """Relative distance of the logits on the calibration tokens, of a model with strong channels."""
    ids, model = tiny.calibration_sample().tokens, tiny.build(family, dtype, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter[:3] *= 6
    dense = tiny.logits_of(model, ids).float()
    tiny.compress(model, recipe)
    return float((tiny.logits_of(model, ids).float() - dense).norm() / dense.norm())


def test_models_come_closer_to_the_dense_ones_than_by_rounding(family: str) -> None:
    # Only each matrix's own error is sure to fall, so models are taken together.
    rounded, scaled, clipped = (
        sum(distance(family, recipe, seed=seed) for seed in range(4))
        for recipe in (
            "rtn-int4(group=16,symmetric=false)",
            "awq-int4(group=16,clip=false)",
            "awq-int4(group=16)",
        )
    )
    assert scaled < rounded
    assert clipped < 0.9 * rounded


def test_queries_and_keys_keep_their_whole_range() -> None:
    dense, model = tiny.build("opt-350m-like"), tiny.build("opt-350m-like")
    tiny.compress(model, "awq-int3(group=16)")
    alike = {}
    for line in anatomy_of(dense).linears:
        packed, weight = model.get_submodule(line.path), dense.get_submodule(line.path).weight
        assert isinstance(packed, PackedLinear)
        same = torch.equal(packed.scales, round_to_nearest(weight, 3, 16, False)[1])
        alike.setdefault(line.role, []).append(same)
    # Norms stand after attention here, so nothing scales what queries and keys read.
    assert all(alike["query"] + alike["key"])
    assert not any(alike["down"] + alike["output"])


def test_half_precision_models_can_be_quantized(family: str) -> None:
    assert distance(family, "awq-int4(group=16,embedding=8)", torch.bfloat16) < 0.35


@pytest.mark.parametrize(
    ("first", "reason"),
    [
        ("svd(share=0.8)", "readers are factorised"),
        ("slicegpt(width=40)", "the writer has no scale of its own"),
        ("layerchop(remove=1)", "values are shared by several heads"),
        ("tensor-network(share=0.8)", "readers are factorised"),
    ],
)
def test_it_stacks_and_notes_the_sites_it_left_unscaled(
    llama: PreTrainedModel, first: str, reason: str
) -> None:
    tiny.compress(llama, first)
    paths = [line.path for line in anatomy_of(llama).linears]
    notes = tiny.compress(llama, "awq-int4(group=20)").stages[0].notes
    assert notes["sites_left_unscaled"][reason] >= 3
    assert all(isinstance(llama.get_submodule(path), PackedLinear) for path in paths)
    assert tiny.logits_of(llama).isfinite().all()
