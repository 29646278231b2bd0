"""Uniform grids, searched ones, and the quantiles of NF4."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from suite import grids

BITS = st.sampled_from([2, 3, 4, 8])
ROWS, COLUMNS, GROUPS, SEEDS = st.integers(1, 5), st.integers(1, 40), st.integers(1, 48), st.integers(0, 999)


def weights(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def squares(error: Tensor) -> Tensor:
    return error.square().sum(-1)


@given(ROWS, COLUMNS, GROUPS, SEEDS)
def test_grouping_comes_undone(rows: int, columns: int, group: int, seed: int) -> None:
    weight = weights(rows, columns, seed)
    assert torch.equal(grids.ungrouped(grids.grouped(weight, group), columns), weight)


@given(BITS, st.booleans(), st.booleans(), COLUMNS, GROUPS, SEEDS)
def test_a_searched_grid_is_never_worse_than_the_whole_range(
    bits: int, symmetric: bool, signed: bool, columns: int, group: int, seed: int
) -> None:
    blocks = grids.grouped(weights(3, columns, seed), group)

    def loss(scales: Tensor, zeros: Tensor) -> Tensor:
        codes = grids.codes_on(blocks, scales, zeros, bits)
        return squares(blocks - grids.values_of(codes, scales, zeros))

    plain = loss(*grids.range_grid(blocks, bits, symmetric))
    searched = loss(*grids.searched_grid(blocks, bits, symmetric, squares, signed=signed))
    assert (searched <= plain).all()


def test_the_searched_clip_lets_an_outlier_go_where_many_weights_gain() -> None:
    block = torch.cat([weights(1, 63, 0) * 0.1, torch.tensor([[1.0]])], 1).unsqueeze(1)
    scales, _ = grids.searched_grid(block, 3, True, lambda e: e.abs().pow(0.5).sum(-1), signed=False)
    assert float(scales) < float(grids.range_grid(block, 3, True)[0])


def test_the_longer_side_of_a_signed_grid_is_that_of_the_largest_weight() -> None:
    block = torch.tensor([[[0.0, 8.0, 1.0, -7.0]]])
    scales, zeros = grids.searched_grid(block, 4, True, squares)
    assert float(scales) == -1
    codes = grids.codes_on(block, scales, zeros, 4)
    assert torch.equal(grids.values_of(codes, scales, zeros), block)


def test_normal_float_has_sixteen_rising_values_with_both_ends_and_zero() -> None:
    levels = grids.NORMAL_FLOAT
    assert len(levels) == 16
    assert list(levels) == sorted(set(levels))
    assert (levels[0], levels[7], levels[15]) == (-1, 0, 1)


@given(ROWS, COLUMNS, GROUPS, SEEDS)
def test_normal_float_codes_are_those_of_the_nearest_values(
    rows: int, columns: int, group: int, seed: int
) -> None:
    weight = weights(rows, columns, seed)
    codes, scales = grids.to_normal_float(weight, group)
    step = scales.float().repeat_interleave(group, 1)[:, :columns]
    levels = torch.tensor(grids.NORMAL_FLOAT)
    errors = (weight.unsqueeze(-1) - step.unsqueeze(-1) * levels).abs()
    chosen = errors.gather(-1, codes.long().unsqueeze(-1)).squeeze(-1)
    assert (chosen <= errors.amin(-1) + 1e-6 * step).all()


@pytest.mark.parametrize("columns", [64, 192])
def test_normal_float_codes_are_those_of_bitsandbytes(columns: int) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    # Halves of a short mantissa: largest sizes of them are stored exactly in float16 as in float32.
    weight = weights(48, columns, 3).bfloat16().float()
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    theirs = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).reshape(48, columns)
    codes, scales = grids.to_normal_float(weight, 64)
    assert torch.equal(codes, theirs)
    assert torch.equal(scales.float().flatten(), state.absmax)
    assert torch.allclose(torch.tensor(grids.NORMAL_FLOAT), state.code, atol=3e-7)
