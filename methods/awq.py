"""AWQ: columns that strong inputs meet are scaled up before rounding, and ranges clipped where that helps."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from methods.quantization import Quantizer, UniformConfig, linear_at, packed_like, steps
from suite.calibration import Calibration
from suite.grids import codes_on, grouped, range_grid, searched_grid, ungrouped, values_of
from suite.layers import ModuleSpec, replace
from suite.method import register
from suite.models.anatomy import anatomy_of
from suite.models.scaling import divide_channels, obstacle, scaling_sites
from suite.streaming import InputStatistics, stream

RATIOS = tuple(step / 20 for step in range(20))
SHARES = tuple(1 - 0.05 * step for step in range(10))
"""Shares of a group's range that the search for a clip tries."""
SMALLEST_SCALE = 1e-4
UNCLIPPED = frozenset({"query", "key", "query_key_value"})
"""Roles whose ranges stay whole: products of two of them go through the softmax."""


class AwqConfig(UniformConfig):
    """As for every quantizer, with an asymmetric grid by default, and `clip`: search ranges too."""

    symmetric: bool = False
    clip: bool = Field(default=True)


class Awq(Quantizer[AwqConfig]):
    """Readers' columns times s, writer's channels by s, with s a power of mean |x|; then rounding to nearest.

    The power with the least tr((W−W') C (W−W')ᵀ) over all readers of a site is kept, C = Σ x xᵀ of the
    dense model's inputs. The paper takes the error behind the whole attention or MLP instead. Then
    each group's range is shrunk where that lowers its own error, queries and keys excepted. A site
    whose scale cannot be moved is left unscaled and counted in the notes.
    """

    source = "Lin et al., AWQ (arXiv 2306.00978, section 3.2 and the official code)"
    needs = frozenset({"calibration"})
    Config = AwqConfig

    def pack_linears(
        self, model: PreTrainedModel, specs: dict[str, ModuleSpec], calibration: Calibration | None
    ) -> dict[str, Any]:
        assert calibration is not None
        anatomy, unscaled = anatomy_of(model), Counter[str]()
        for block in stream(model, calibration.tokens):
            prefix = f"{block.path}."
            inside = [path.removeprefix(prefix) for path in specs if path.startswith(prefix)]
            together = list(steps(anatomy.layout, block.module, inside))
            sums = block.input_statistics((step[0] for step in together), advance=True)
            seen = {path: of_path.to(torch.float32) for path, of_path in sums.items()}
            inputs = {path: seen[step[0]] for step in together for path in step}
            scales: dict[str, Tensor] = {}
            for site in scaling_sites(anatomy, block.module):
                why = obstacle(site, block.module)
                if why is None and not all(reader in inside for reader in site.readers):
                    why = "not all readers are quantized"
                if why is not None:
                    unscaled[why] += any(path.startswith(site.readers) for path in inside)
                    continue
                weight = torch.cat([linear_at(block.module, r).weight.detach() for r in site.readers])
                group = specs[prefix + site.readers[0]].arguments["group"]
                scale = best_scale(weight, inputs[site.readers[0]], self.bits, group, self.config.symmetric)
                divide_channels(block.module.get_submodule(site.writer), scale)
                scales |= dict.fromkeys(site.readers, scale)
            for path in inside:
                role = next(r for whole, r in anatomy.layout.roles.items() if path.startswith(whole))
                self._pack_one(model, prefix + path, specs, inputs[path], scales.get(path), role)
        return {"sites_left_unscaled": dict(+unscaled)} if +unscaled else {}

    def _pack_one(
        self,
        model: PreTrainedModel,
        path: str,
        specs: dict[str, ModuleSpec],
        inputs: InputStatistics,
        scale: Tensor | None,
        role: str,
    ) -> None:
        linear, group = linear_at(model, path), specs[path].arguments["group"]
        weight = linear.weight.detach().float()
        if scale is not None:
            weight, inputs = weight * scale, inputs.divided_by(scale)
        blocks = grouped(weight, group)
        if self.config.clip and role not in UNCLIPPED:
            scales, zeros = clipped_grid(weight, inputs.moment, self.bits, group, self.config.symmetric)
        else:
            scales, zeros = range_grid(blocks, self.bits, self.config.symmetric)
        module = packed_like(linear, specs[path])
        codes = codes_on(blocks, scales, zeros, self.bits)
        module.store_(ungrouped(codes, weight.shape[1]), scales, zeros)
        replace(model, path, module)


@torch.no_grad()
def best_scale(weight: Tensor, inputs: InputStatistics, bits: int, group: int, symmetric: bool) -> Tensor:
    """S (n) for `weight` (m × n): mean |x| to the power that leaves the least error after rounding.

    Powers 0, 1/20, …, 19/20; power 0 is s = 1. Every s is normalised to √(max·min) = 1.
    """
    best = (float("inf"), torch.ones_like(inputs.size))
    for ratio in RATIOS:
        scale = inputs.size.pow(ratio).clamp(min=SMALLEST_SCALE)
        scale = scale / (scale.max() * scale.min()).sqrt()
        loss = float(rounding_loss(weight, scale, inputs.moment, bits, group, symmetric))
        if loss < best[0]:
            best = (loss, scale)
    return best[1]


def rounding_loss(
    weight: Tensor, scale: Tensor, moment: Tensor, bits: int, group: int, symmetric: bool
) -> Tensor:
    """tr((W−W') C (W−W')ᵀ) for W' = round(W·diag(s))·diag(1/s), with C = `moment` (n × n)."""
    blocks = grouped(weight.float() * scale, group)
    scales, zeros = range_grid(blocks, bits, symmetric)
    error = blocks - values_of(codes_on(blocks, scales, zeros, bits), scales, zeros)
    error = ungrouped(error, weight.shape[1]) / scale
    return (error @ moment * error).sum()


@torch.no_grad()
def clipped_grid(
    weight: Tensor, moment: Tensor, bits: int, group: int, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """Scales and zeros (m × groups): each group's range shrunk by what lowers its own output error most.

    The error of a group is e C_g eᵀ, with C_g the part of `moment` (n × n) between its own columns.
    """
    blocks = grouped(weight, group)
    own = torch.zeros(blocks.shape[1], group, group, device=weight.device)
    for index, start in enumerate(range(0, weight.shape[1], group)):
        part = moment[start : start + group, start : start + group]
        own[index, : len(part), : len(part)] = part

    def loss(error: Tensor) -> Tensor:
        by_group = error.transpose(0, 1)
        return (by_group @ own * by_group).sum(-1).T

    return searched_grid(blocks, bits, symmetric, loss, SHARES, signed=False)


@register
class AwqInt4(Awq):
    """AWQ, 4 bits, groups of 64 columns unless `group` is given."""

    name = "awq-int4"
    bits = 4


@register
class AwqInt3(Awq):
    """AWQ, 3 bits, groups of 64 columns unless `group` is given."""

    name = "awq-int3"
    bits = 3
