"""Weight quantization into the suite's packed linear."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import nn
from transformers import PreTrainedModel

from suite.calibration import Calibration
from suite.layers import ModuleSpec, PackedEmbedding, PackedLinear, TiedHead, replace
from suite.method import Method, MethodConfig, Plan, Target, largest_fitting, register
from suite.models.anatomy import Anatomy

Bits = Literal[16, 8, 4]
Group = Annotated[int, Field(gt=0)] | Literal["channel"]


class RtnConfig(MethodConfig):
    """Knobs of every quantizer.

    `group`: columns that share a scale, or "channel" for a whole row. `symmetric`: fixed zero point.
    `embedding`: bits of embedding and head, 16 = untouched; solved for the budget when not given.
    """

    group: Group = Field(default="channel")
    symmetric: bool = True
    embedding: Bits | None = None


class RoundToNearest(Method[RtnConfig]):
    """Every decoder linear on a uniform integer grid, each weight to its nearest point; no data."""

    family = "quantization"
    source = "round to nearest, the baseline of GPTQ (arXiv 2210.17323, section 5)"
    acts_on = frozenset({"bytes"})
    Config = RtnConfig
    bits: ClassVar[int]
    embedding_choices: ClassVar[tuple[Bits, ...]]

    def plan(self, anatomy: Anatomy, target: Target | None, seed: int) -> Plan:
        anatomy.dense_linears(self.name)
        if self.config.embedding is not None or target is None:
            return self._plan(anatomy, self.config.embedding or 16)
        return largest_fitting((self._plan(anatomy, b) for b in self.embedding_choices), anatomy, target)

    def _plan(self, anatomy: Anatomy, embedding: Bits) -> Plan:
        modules = {
            line.path: ModuleSpec(
                type="packed_linear",
                arguments={
                    "in_features": line.in_features,
                    "out_features": line.out_features,
                    "bits": self.bits,
                    "group": self._group(line.in_features),
                    "symmetric": self.config.symmetric,
                    "bias": line.bias,
                },
            )
            for line in anatomy.linears
        }
        if embedding < 16:
            modules |= self._embedding_modules(anatomy, embedding)
        knobs = {"group": self.config.group, "symmetric": self.config.symmetric, "embedding": embedding}
        return Plan(knobs=knobs, modules=modules)

    def _embedding_modules(self, anatomy: Anatomy, bits: int) -> dict[str, ModuleSpec]:
        def shared(width: int) -> dict[str, Any]:
            return {"bits": bits, "group": self._group(width), "symmetric": self.config.symmetric}

        vocab, width, read = anatomy.vocab_size, anatomy.embedding_size, anatomy.head_size
        table = ModuleSpec(
            type="packed_embedding",
            arguments={"num_embeddings": vocab, "embedding_dim": width, **shared(width)},
        )
        head = (
            ModuleSpec(type="tied_head", arguments={"source": anatomy.layout.embedding})
            if anatomy.tied
            else ModuleSpec(
                type="packed_linear",
                arguments={
                    "in_features": read,
                    "out_features": vocab,
                    **shared(read),
                    "bias": anatomy.head_bias,
                },
            )
        )
        return {anatomy.layout.embedding: table, anatomy.layout.head: head}

    def _group(self, columns: int) -> int:
        return columns if self.config.group == "channel" else min(self.config.group, columns)

    def compress(self, model: PreTrainedModel, plan: Plan, calibration: Calibration | None) -> None:
        symmetric = self.config.symmetric
        for path, spec in plan.modules.items():
            module, arguments = model.get_submodule(path), spec.arguments
            if spec.type == "tied_head":
                head = TiedHead(arguments["source"])
                head.bind(model)
                replace(model, path, head)
                model.config.tie_word_embeddings = False  # the head holds the tie from here on
            elif isinstance(module, nn.Embedding):
                table = PackedEmbedding.from_embedding(
                    module, arguments["bits"], arguments["group"], symmetric
                )
                replace(model, path, table)
            elif isinstance(module, nn.Linear):
                packed = PackedLinear.from_linear(module, arguments["bits"], arguments["group"], symmetric)
                replace(model, path, packed)


@register
class RtnInt8(RoundToNearest):
    """Round to nearest, 8 bits, one scale per output channel unless `group` is given."""

    name = "rtn-int8"
    bits = 8
    embedding_choices = (16, 8)


class RtnInt4Config(RtnConfig):
    """As for every quantizer; groups of 64 columns by default."""

    group: Group = Field(default=64)


@register
class RtnInt4(RoundToNearest):
    """Round to nearest, 4 bits, groups of 64 columns unless `group` is given."""

    name = "rtn-int4"
    Config = RtnInt4Config
    bits = 4
    embedding_choices = (16, 8, 4)
