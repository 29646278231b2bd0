"""GPTQ: weights rounded column by column, each rounding error made up for by the columns still to come."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from methods.quantization import Group, Quantizer, UniformConfig, linear_at, packed_like, steps
from suite.calibration import Calibration
from suite.grids import codes_on, grouped, range_grid, round_to_nearest, searched_grid, values_of
from suite.layers import ModuleSpec, replace
from suite.linalg import inverse_factor
from suite.method import register
from suite.models.layouts import layout_of
from suite.streaming import stream

COLUMNS = 128
"""Columns whose errors reach the later ones together."""

Order = Literal["activation", "original"]
Scale = Literal["searched", "largest"]


class GptqConfig(UniformConfig):
    """As for every quantizer, and three knobs of GPTQ's own.

    `order`: columns by falling second moment of their input, on grids fixed beforehand
    ("activation"), or as they stand, each grid chosen when its first column is reached ("original").
    `scale`: of the share of a group's range with the least error, every column weighted by what an
    error in it costs ("searched"), or of the whole range ("largest"). `damping`: share of the mean
    second moment added to all of them.
    """

    order: Order = "activation"
    scale: Scale = "searched"
    damping: float = Field(default=0.01, gt=0)


@dataclass(frozen=True)
class Rounded:
    """Codes (uint8, m × n), scales (float16) and zeros (m × groups) of a matrix, and what it took."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    raised: int = 0
    """How often the damping had to be raised."""
    fallback: bool = False
    """Whether no damping sufficed, so that the weights were rounded to nearest."""


class Gptq(Quantizer[GptqConfig]):
    """Rounds W column by column; what a column loses is made up for by those not yet rounded.

    Minimises tr((W−W') C (W−W')ᵀ) greedily, with C = Σ x xᵀ of the inputs that the blocks and linears
    already quantized give. Linears that read the same input are quantized together. A column whose
    input was always zero has no say in C and is rounded to nearest (the paper's code sets it to zero).
    """

    source = "Frantar et al., GPTQ (arXiv 2210.17323, algorithm 1)"
    needs = frozenset({"calibration"})
    Config = GptqConfig

    def pack_linears(
        self, model: PreTrainedModel, specs: dict[str, ModuleSpec], calibration: Calibration | None
    ) -> dict[str, Any]:
        assert calibration is not None
        layout = layout_of(model.config)
        raised = fallbacks = dead = 0
        for block in stream(model, calibration.tokens):
            prefix = f"{block.path}."
            inside = [path.removeprefix(prefix) for path in specs if path.startswith(prefix)]
            for step in steps(layout, block.module, inside):
                moment = block.second_moment(step[0])
                linears = [linear_at(block.module, path) for path in step]
                weight = torch.cat([linear.weight.detach().float() for linear in linears])
                first = specs[prefix + step[0]].arguments
                rounded = self._round(weight, moment, first["group"])
                raised, fallbacks = raised + rounded.raised, fallbacks + len(step) * rounded.fallback
                dead += int((moment.diagonal() == 0).sum())
                heights = [linear.out_features for linear in linears]
                parts = [t.split(heights) for t in (rounded.codes, rounded.scales, rounded.zeros)]
                for path, linear, *part in zip(step, linears, *parts, strict=True):
                    module = packed_like(linear, specs[prefix + path])
                    module.store_(*part)
                    replace(model, prefix + path, module)
                block.settle(step)
        found = {"damping_raised": raised, "rounded_to_nearest": fallbacks, "dead_columns": dead}
        return {note: count for note, count in found.items() if count}

    def _round(self, weight: Tensor, moment: Tensor, group: int) -> Rounded:
        config = self.config
        return gptq(
            weight, moment, self.bits, group, config.symmetric, config.order, config.scale, config.damping
        )


@torch.no_grad()
def gptq(
    weight: Tensor,
    moment: Tensor,
    bits: int,
    group: int,
    symmetric: bool,
    order: Order = "activation",
    scale: Scale = "searched",
    damping: float = 0.01,
) -> Rounded:
    """Round `weight` (m × n) for inputs with Σ x xᵀ = `moment` (n × n), in float32.

    The factor of the inverse moment is taken in float64.
    """
    n = weight.shape[1]
    importance = moment.diagonal()
    ranked = importance.argsort(descending=True, stable=True)
    columns = ranked if order == "activation" else torch.arange(n, device=weight.device)
    factor, raised = inverse_factor(moment[columns][:, columns], damping)
    if factor is None:
        return Rounded(*round_to_nearest(weight, bits, group, symmetric), raised, fallback=True)
    factor = factor.float()
    costs = torch.empty(n, device=weight.device)
    costs[columns] = factor.diagonal().square().reciprocal()

    def grid(part: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Scales and zeros (m × groups) of the columns of `part` (m × columns from `start` on)."""
        blocks = grouped(part, group)
        if scale == "largest":
            return range_grid(blocks, bits, symmetric)
        own = grouped(costs[None, start : start + part.shape[1]], group)
        return searched_grid(blocks, bits, symmetric, lambda error: (error.square() * own).sum(-1))

    # Transposed: what one step reads and writes lies side by side.
    work = weight.float().T[columns].contiguous()
    codes = torch.empty_like(work)
    fixed = order == "activation"
    groups = -(-n // group)
    if fixed:
        scales, zeros = grid(weight.float(), 0)
    else:
        scales = torch.empty(len(weight), groups, dtype=torch.float16, device=weight.device)
        zeros = torch.empty(len(weight), groups, device=weight.device)
    of_column = (columns // group).tolist()
    # No group may straddle two lazy blocks: its grid is chosen with all earlier errors made up for.
    width = COLUMNS if groups == 1 else max(1, COLUMNS // group) * group
    for start in range(0, n, width):
        stop = min(start + width, n)
        part, errors = work[start:stop], torch.empty(stop - start, len(weight), device=weight.device)
        inner = factor[start:stop, start:stop]
        for row in range(stop - start):
            own = of_column[start + row]
            if not fixed and (start + row) % group == 0:
                ahead = work[start + row : start + row + group].T
                scale_, zero_ = grid(ahead, start + row)
                scales[:, own], zeros[:, own] = scale_[:, 0], zero_[:, 0]
            column, at = part[row, :, None], (scales[:, own], zeros[:, own])
            code = codes_on(column, *at, bits)
            codes[start + row] = code[:, 0]
            errors[row] = (column - values_of(code, *at))[:, 0] / inner[row, row]
            part[row + 1 :] -= inner[row, row + 1 :, None] * errors[row]
        work[stop:] -= factor[start:stop, stop:].T @ errors
    unsorted = torch.empty_like(codes)
    unsorted[columns] = codes
    return Rounded(unsorted.T.to(torch.uint8).contiguous(), scales, zeros, raised)


class GptqChannelConfig(GptqConfig):
    """As for GPTQ; one scale per output channel by default."""

    group: Group = Field(default="channel")


@register
class GptqInt8(Gptq):
    """GPTQ, 8 bits, one scale per output channel unless `group` is given."""

    name = "gptq-int8"
    Config = GptqChannelConfig
    bits = 8
    embedding_choices = (16, 8)


@register
class GptqInt4(Gptq):
    """GPTQ, 4 bits, groups of 64 columns unless `group` is given."""

    name = "gptq-int4"
    bits = 4


@register
class GptqInt3(Gptq):
    """GPTQ, 3 bits, groups of 64 columns unless `group` is given."""

    name = "gptq-int3"
    bits = 3
