"""Grids that weights are stored on: uniform steps, and the quantiles of the normal distribution.

A group is `group` consecutive columns of one row; the last group of a row may be shorter. Blocks are
weights seen by group (rows × groups × group), the shorter last one filled with zeros.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from statistics import NormalDist
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Grid = Literal["uniform", "float-zero", "normal-float"]
"""Uniform steps from an integer zero or from a float16 one, or the 16 values of NF4."""

SHRINKS = tuple(1 - 0.05 * step for step in range(11))
"""Shares of the full range that a search tries."""
SMALLEST_SCALE = torch.finfo(torch.float16).smallest_normal
"""Scales are stored as float16; smaller ones would become zero."""


def grouped(weight: Tensor, group: int) -> Tensor:
    """Blocks (rows × groups × group, float32) of `weight` (rows × columns)."""
    rows, columns = weight.shape
    groups = math.ceil(columns / group)
    return functional.pad(weight.float(), (0, groups * group - columns)).reshape(rows, groups, group)


def ungrouped(blocks: Tensor, columns: int) -> Tensor:
    """Inverse of `grouped`: rows × columns, filling left out."""
    return blocks.reshape(len(blocks), -1)[:, :columns].contiguous()


def range_grid(blocks: Tensor, bits: int, symmetric: bool, share: float = 1.0) -> tuple[Tensor, Tensor]:
    """Scales (float16) and zeros (whole numbers, float32) that span `share` of each block's range.

    Symmetric: scale = max|w| / (2^(b−1) − 1), zero = 2^(b−1). Asymmetric:
    scale = (max(w,0) − min(w,0)) / (2^b − 1), zero = round(−min/scale).
    """
    top, half = (1 << bits) - 1, 1 << (bits - 1)
    if symmetric:
        scales = (share * blocks.abs().amax(-1) / (half - 1)).clamp(min=SMALLEST_SCALE).half()
        return scales, torch.full_like(scales, half, dtype=torch.float32)
    low, high = share * blocks.amin(-1).clamp(max=0), share * blocks.amax(-1).clamp(min=0)
    scales = ((high - low) / top).clamp(min=SMALLEST_SCALE).half()
    return scales, (-low / scales.float()).round().clamp(0, top)


def codes_on(blocks: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """The nearest code of each weight, as float32: round(w / scale) + zero within 0 … 2^b − 1.

    Codes are rounded against the scale that is stored, so float16 costs no further error.
    """
    codes = (blocks / scales.float().unsqueeze(-1)).round() + zeros.unsqueeze(-1)
    return codes.clamp(0, (1 << bits) - 1)


def values_of(codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """The weights (float32) that codes stand for: scale · (code − zero)."""
    return scales.float().unsqueeze(-1) * (codes - zeros.unsqueeze(-1))


def searched_grid(
    blocks: Tensor,
    bits: int,
    symmetric: bool,
    loss: Callable[[Tensor], Tensor],
    shares: Sequence[float] = SHRINKS,
    signed: bool = True,
) -> tuple[Tensor, Tensor]:
    """Scales and zeros as `range_grid` gives them, for the share of the range with the least loss.

    `loss` takes errors (rows × groups × group) and gives the loss of each group (rows × groups). A
    symmetric grid has one step more on one side; `signed` also tries to lay it on the side of the
    largest weight, by a negative scale where that weight is positive.
    """
    least = torch.full(blocks.shape[:-1], math.inf, device=blocks.device)
    scales, zeros = range_grid(blocks, bits, symmetric)
    for scale, zero in _candidates(blocks, bits, symmetric, shares, signed):
        found = loss(blocks - values_of(codes_on(blocks, scale, zero, bits), scale, zero))
        better = found < least
        least = torch.where(better, found, least)
        scales, zeros = torch.where(better, scale, scales), torch.where(better, zero, zeros)
    return scales, zeros


def _candidates(
    blocks: Tensor, bits: int, symmetric: bool, shares: Sequence[float], signed: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    for share in shares:
        yield range_grid(blocks, bits, symmetric, share)
    if not (symmetric and signed):
        return
    half = 1 << (bits - 1)
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True)).squeeze(-1)
    sign = torch.where(largest > 0, -1.0, 1.0)
    for share in shares:
        scales = (sign * (share * largest.abs() / half).clamp(min=SMALLEST_SCALE)).half()
        yield scales, torch.full_like(scales, half, dtype=torch.float32)


def round_to_nearest(weight: Tensor, bits: int, group: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (uint8, rows × columns), float16 scales and uint8 zeros (rows × groups) by rounding."""
    blocks = grouped(weight, group)
    scales, zeros = range_grid(blocks, bits, symmetric)
    codes = codes_on(blocks, scales, zeros, bits).to(torch.uint8)
    return ungrouped(codes, weight.shape[1]), scales, zeros.to(torch.uint8)


def _normal_float() -> tuple[float, ...]:
    # The outermost quantile is the mean of the last half-steps of 15 and of 16 equal ones.
    outermost = 1 - (1 / 30 + 1 / 32) / 2
    quantile = NormalDist().inv_cdf

    def side(count: int) -> list[float]:
        step = (outermost - 0.5) / count
        return [quantile(0.5 + step * number) / quantile(outermost) for number in range(1, count + 1)]

    return (*sorted(-value for value in side(7)), 0.0, *side(8))


NORMAL_FLOAT = _normal_float()
"""The 16 values of NF4 in rising order: quantiles of the normal distribution, with −1, 0 and 1.

Seven below zero and eight above, equal steps of probability on each side (Dettmers et al., arXiv
2305.14314, section 3).
"""


def to_normal_float(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Codes (uint8, rows × columns) of the nearest NF4 values and float16 scales max|w| (rows × groups)."""
    blocks = grouped(weight, group)
    scales = blocks.abs().amax(-1).clamp(min=SMALLEST_SCALE).half()
    levels = torch.tensor(NORMAL_FLOAT, device=weight.device)
    middles = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(blocks / scales.float().unsqueeze(-1), middles)
    return ungrouped(codes.to(torch.uint8), weight.shape[1]), scales
