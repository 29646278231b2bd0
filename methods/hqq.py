"""HQQ: zero points that leave few large errors rather than a small squared one, without data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from methods.quantization import Quantizer, QuantizerConfig
from suite.grids import grouped, range_grid, ungrouped, values_of
from suite.method import register
from suite.packed_layers import PackedMatrix

POWER = 0.7
"""p of the norm that errors are measured in."""
STRENGTH, GROWTH = 10.0, 1.01
ITERATIONS = 20
WEIGHTS_AT_ONCE = 1 << 18
"""Groups are solved one by one; so many weights stay in the caches, which whole matrices do not."""


class HalfQuadratic(Quantizer[QuantizerConfig]):
    """Rounding to nearest on an asymmetric grid whose zeros are float16 and solved for, group by group.

    Minimises ‖W − scale·(code − zero)‖ₚ with p = 0.7 by turns: errors are shrunk towards zero, then
    the zero moves to the mean of what is left. Of all zeros met, the first (that of rounding to
    nearest) included, each group keeps the one with the least mean error. Scales stay.
    """

    source = "Badri & Shaji, Half-Quadratic Quantization (mobiusml.github.io/hqq_blog, 2023)"
    Config = QuantizerConfig

    def format(self, bits: int, columns: int) -> dict[str, Any]:
        return super().format(bits, columns) | {"symmetric": False, "grid": "float-zero"}

    def pack(self, matrix: PackedMatrix, weight: Tensor) -> None:
        filled = grouped(torch.ones(1, matrix.columns, device=weight.device), matrix.group)
        parts = []
        for rows in weight.detach().split(max(1, WEIGHTS_AT_ONCE // matrix.columns)):
            blocks = grouped(rows, matrix.group)
            scales, zeros = half_quadratic(blocks, filled, matrix.bits)
            codes = codes_by(blocks, scales, zeros, matrix.bits)
            parts.append((ungrouped(codes, matrix.columns), scales, zeros))
        matrix.store_(*(torch.cat(part) for part in zip(*parts, strict=True)))


@torch.no_grad()
def half_quadratic(blocks: Tensor, filled: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scales (float16) and zeros (of float16, as float32; rows × groups) for blocks of weights.

    `filled` (1 × groups × group) is 1 where a block holds a weight, and 0 where a shorter last group
    is filled up.
    """
    scales, zeros = range_grid(blocks, bits, symmetric=False)
    step, counts = scales.float().unsqueeze(-1), filled.sum(-1)
    kept, least, strength = zeros, torch.full_like(zeros, torch.inf), STRENGTH
    for _ in range(ITERATIONS + 1):
        codes = codes_by(blocks, scales, zeros, bits)
        error = (blocks - values_of(codes, scales, zeros)) * filled
        found = error.abs().sum(-1)
        better = found < least
        kept, least = torch.where(better, zeros, kept), torch.where(better, found, least)
        size = error.abs()
        # Errors of exactly zero have an infinite threshold, and stay zero.
        shrunk = error.sign() * (size - size.pow(POWER - 1) / strength).clamp(min=0)
        zeros = ((codes - (blocks - shrunk) / step) * filled).sum(-1) / counts
        zeros = zeros.half().float()
        strength *= GROWTH
    return scales, kept


def codes_by(blocks: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """Codes (float32) of blocks on a grid with float zeros: round(w / scale + zero) within 0 … 2^b − 1."""
    codes = (blocks / scales.float().unsqueeze(-1) + zeros.unsqueeze(-1)).round()
    return codes.clamp(0, (1 << bits) - 1)


@register
class HqqInt4(HalfQuadratic):
    """HQQ, 4 bits, groups of 64 columns unless `group` is given."""

    name = "hqq-int4"
    bits = 4


@register
class HqqInt3(HalfQuadratic):
    """HQQ, 3 bits, groups of 64 columns unless `group` is given."""

    name = "hqq-int3"
    bits = 3
