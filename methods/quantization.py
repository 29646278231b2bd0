"""Weight quantization into the suite's packed linear: what all quantizers share, and rounding to nearest.

A quantizer says how a matrix is stored (`format`) and fills the planned modules (`pack_linears`, or
`pack` for one matrix at a time). The same rule of groups holds for all: a group size that does not
divide a row's width leaves the row's last group shorter, and one above the width is the whole row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeVar, cast

import torch
from pydantic import Field
from torch import nn
from transformers import PreTrainedModel

from suite.calibration import Calibration
from suite.grids import SMALLEST_SCALE, codes_on, grouped, searched_grid, ungrouped
from suite.layers import LowRankLinear, ModuleSpec, replace
from suite.method import Method, MethodConfig, Plan, Target, largest_fitting, register
from suite.models.anatomy import Anatomy
from suite.models.layouts import Layout, layout_of
from suite.packed_layers import PackedMatrix, TiedHead

Bits = Literal[16, 8, 4]
Group = Annotated[int, Field(gt=0)] | Literal["channel"]


class QuantizerConfig(MethodConfig):
    """Knobs of every quantizer.

    `group`: columns that share a scale, or "channel" for a whole row. `embedding`: bits of embedding
    and head, 16 = untouched; solved for the budget when not given.
    """

    group: Group = Field(default=64)
    embedding: Bits | None = None


class UniformConfig(QuantizerConfig):
    """As for every quantizer, and `symmetric`: fixed zero point."""

    symmetric: bool = True


ConfigT = TypeVar("ConfigT", bound=QuantizerConfig)


class Quantizer(Method[ConfigT]):
    """Every decoder linear (factors of earlier stages included) as packed integers of `bits` bits.

    Embedding and head are rounded to nearest where they are packed at all.
    """

    family = "quantization"
    acts_on = frozenset({"bytes"})
    bits: ClassVar[int]
    embedding_choices: ClassVar[tuple[Bits, ...]] = (16, 8, 4)

    def plan(self, anatomy: Anatomy, target: Target | None, seed: int) -> Plan:
        anatomy.dense_linears(self.name)
        if self.config.embedding is not None or target is None:
            return self._plan(anatomy, self.config.embedding or 16)
        return largest_fitting((self._plan(anatomy, b) for b in self.embedding_choices), anatomy, target)

    def format(self, bits: int, columns: int) -> dict[str, Any]:
        """How a matrix of `columns` columns is stored at `bits` bits: arguments of `PackedMatrix`."""
        group = columns if self.config.group == "channel" else min(self.config.group, columns)
        return {"bits": bits, "group": group, "symmetric": getattr(self.config, "symmetric", True)}

    def pack_linears(
        self, model: PreTrainedModel, specs: dict[str, ModuleSpec], calibration: Calibration | None
    ) -> dict[str, Any]:
        """Put packed linears at the paths of `specs`; returns notes for the record."""
        for path, spec in specs.items():
            linear = linear_at(model, path)
            module = packed_like(linear, spec)
            self.pack(module, linear.weight)
            replace(model, path, module)
        return {}

    def pack(self, matrix: PackedMatrix, weight: torch.Tensor) -> None:
        """Fill `matrix` with `weight` (rows × columns), without data."""
        matrix.quantize_(weight)

    def compress(self, model: PreTrainedModel, plan: Plan, calibration: Calibration | None) -> Plan | None:
        layout = layout_of(model.config)
        ends = {p: spec for p, spec in plan.modules.items() if p in (layout.embedding, layout.head)}
        for path, spec in ends.items():
            if spec.type == "tied_head":
                head = TiedHead(spec.arguments["source"])
                head.bind(model)
                replace(model, path, head)
                model.config.tie_word_embeddings = False  # the head holds the tie from here on
                continue
            old = cast(nn.Embedding | nn.Linear, model.get_submodule(path))
            module = packed_like(old, spec)
            self.pack(module, old.weight)
            replace(model, path, module)
        inner = {path: spec for path, spec in plan.modules.items() if path not in ends}
        notes = self.pack_linears(model, inner, calibration)
        return plan.model_copy(update={"notes": plan.notes | notes}) if notes else None

    def _plan(self, anatomy: Anatomy, embedding: Bits) -> Plan:
        modules = {
            line.path: self._linear(self.bits, line.out_features, line.in_features, line.bias)
            for line in anatomy.linears
        }
        shorter = sum(bool(s.arguments["in_features"] % s.arguments["group"]) for s in modules.values())
        if embedding < 16:
            modules |= self._ends(anatomy, embedding)
        shown = ("group", "symmetric") if hasattr(self.config, "symmetric") else ("group",)
        knobs = {knob: getattr(self.config, knob) for knob in shown} | {"embedding": embedding}
        # Kept for the reader of the record: rows of these linears end in a shorter group.
        notes = {"linears_with_a_shorter_last_group": shorter} if shorter else {}
        return Plan(knobs=knobs, notes=notes, modules=modules)

    def _linear(self, bits: int, out_features: int, in_features: int, bias: bool) -> ModuleSpec:
        shape = {"in_features": in_features, "out_features": out_features}
        arguments = {**shape, **self.format(bits, in_features), "bias": bias}
        return ModuleSpec(type="packed_linear", arguments=arguments)

    def _ends(self, anatomy: Anatomy, bits: int) -> dict[str, ModuleSpec]:
        vocab, width, layout = anatomy.vocab_size, anatomy.embedding_size, anatomy.layout
        table = ModuleSpec(
            type="packed_embedding",
            arguments={"num_embeddings": vocab, "embedding_dim": width, **self.format(bits, width)},
        )
        if anatomy.tied:
            head = ModuleSpec(type="tied_head", arguments={"source": layout.embedding})
        else:
            head = self._linear(bits, vocab, anatomy.head_size, anatomy.head_bias)
        return {layout.embedding: table, layout.head: head}


def packed_like(old: nn.Linear | nn.Embedding, spec: ModuleSpec) -> PackedMatrix:
    """An empty packed module of this spec, with the device, dtype and any bias of `old`."""
    module = cast(PackedMatrix, spec.build(old.weight.dtype, str(old.weight.device)))
    if isinstance(old, nn.Linear):
        module.bias = old.bias
    return module


def linear_at(model: nn.Module, path: str) -> nn.Linear:
    """The dense linear at `path`."""
    linear = model.get_submodule(path)
    assert isinstance(linear, nn.Linear)
    return linear


def steps(layout: Layout, block: nn.Module, paths: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Those of `paths` inside a block in the order they run, linears that read one input together.

    The factors of a linear follow each other; the first of a low-rank pair reads what the linear read.
    """
    for group in layout.groups:
        inner = [path for path in paths if path.startswith(tuple(f"{whole}." for whole in group))]
        pairs = {whole for whole in group if isinstance(block.get_submodule(whole), LowRankLinear)}
        shared = [p for p in paths if p in group or (p.endswith(".first") and p[: -len(".first")] in pairs)]
        if shared:
            yield tuple(shared)
        yield from ((path,) for path in inner if path not in shared)


class RtnConfig(UniformConfig):
    """As for every quantizer; one scale per output channel by default."""

    group: Group = Field(default="channel")


class NearestConfig(UniformConfig):
    """As for every quantizer, and `scale` of a symmetric grid, from the largest size in a group.

    "largest" puts it on the last positive point, max|w| / (2^(b−1) − 1), and leaves one point unused.
    "whole" uses all 2^b: max|w| / (2^(b−1) − ½), which clips it by half a step where it is positive, as
    torchao and compressed-tensors do. "searched" takes the share of the range with the least squared error.
    """

    scale: Literal["largest", "whole", "searched"] = "largest"


class WholeConfig(NearestConfig):
    """As for rounding to nearest; all points of the grid are used by default, as there are so few."""

    scale: Literal["largest", "whole", "searched"] = "whole"


class RoundToNearest(Quantizer[UniformConfig]):
    """Every decoder linear on a uniform integer grid, each weight to its nearest point; no data."""

    source = "round to nearest, the baseline of GPTQ (arXiv 2210.17323, section 5)"
    Config: ClassVar[type[UniformConfig]] = NearestConfig

    def pack(self, matrix: PackedMatrix, weight: torch.Tensor) -> None:
        scale = getattr(self.config, "scale", "largest")
        if scale == "largest" or not (matrix.symmetric or scale == "searched"):
            super().pack(matrix, weight)
            return
        blocks, bits = grouped(weight.detach(), matrix.group), matrix.bits
        if scale == "whole":
            half = 1 << (bits - 1)
            # The largest weight is half-way between two points: rounded against float32 scales, as in
            # compressed-tensors, its code is the same there and here.
            scales = (blocks.abs().amax(-1) / (half - 0.5)).clamp(min=SMALLEST_SCALE)
            zeros = torch.full_like(scales, half)
        else:
            scales, zeros = searched_grid(blocks, bits, matrix.symmetric, lambda e: e.square().sum(-1))
        codes = codes_on(blocks, scales, zeros, bits)
        matrix.store_(ungrouped(codes, matrix.columns), scales, zeros)


@register
class RtnInt8(RoundToNearest):
    """Round to nearest, 8 bits, one scale per output channel unless `group` is given."""

    name = "rtn-int8"
    Config = RtnConfig
    bits = 8
    embedding_choices = (16, 8)


@register
class RtnInt4(RoundToNearest):
    """Round to nearest, 4 bits, groups of 64 columns unless `group` is given."""

    name = "rtn-int4"
    bits = 4


@register
class RtnInt3(RoundToNearest):
    """Round to nearest, 3 bits, groups of 64 columns unless `group` is given."""

    name = "rtn-int3"
    version = 2
    Config = WholeConfig
    bits = 3
