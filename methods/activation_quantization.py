"""Quantizers that round activations as well as weights, both to 8 bits (W8A8)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from methods.quantization import RtnConfig, RtnInt8
from suite.calibration import Calibration
from suite.dynamic_layers import DynamicInt8Linear, OutlierInt8Linear
from suite.errors import InputError
from suite.layers import LowRankLinear, ModuleSpec, replace
from suite.method import Plan, Target, register
from suite.models.anatomy import Anatomy, LinearShape
from suite.models.layouts import Layout, layout_of
from suite.models.sliced import READS_ATTENTION, READS_MLP
from suite.streaming import stream

_SMALLEST_SCALE = 1e-5


class ChannelConfig(RtnConfig):
    """`embedding`: bits of embedding and head, 16 = untouched; solved for the budget when not given.

    Weights are symmetric with one scale per output channel: an integer product knows no other grid.
    """

    group: Literal["channel"] = "channel"
    symmetric: Literal[True] = True


class Int8Activations(RtnInt8):
    """Every decoder linear as 8-bit integers that multiply activations of 8 bits per token."""

    Config: ClassVar[type[RtnConfig]] = ChannelConfig
    layer: ClassVar[type[DynamicInt8Linear]] = DynamicInt8Linear

    def _plan(self, anatomy: Anatomy, embedding: Any) -> Plan:
        plan = super()._plan(anatomy, embedding)
        modules = dict(plan.modules)
        for line in anatomy.linears:
            shape = {"in_features": line.in_features, "out_features": line.out_features, "bias": line.bias}
            modules[line.path] = ModuleSpec(
                type=self.layer.type_name, arguments=shape | self._layer_arguments()
            )
        knobs = self._layer_arguments() | {"embedding": embedding}
        return plan.model_copy(update={"knobs": knobs, "modules": modules})

    def _layer_arguments(self) -> dict[str, Any]:
        return {}

    def compress(self, model: PreTrainedModel, plan: Plan, calibration: Calibration | None) -> None:
        chosen = {path: spec for path, spec in plan.modules.items() if spec.type == self.layer.type_name}
        for path in chosen:
            linear = model.get_submodule(path)
            assert isinstance(linear, nn.Linear)
            replace(model, path, self.layer.holding(linear, **self._layer_arguments()))
        rest = {path: spec for path, spec in plan.modules.items() if path not in chosen}
        super().compress(model, plan.model_copy(update={"modules": rest}), calibration)


@register
class Int8Dynamic(Int8Activations):
    """Weights to 8 bits per output channel by rounding, activations to 8 bits per token as they come.

    The scheme of torchao's `Int8DynamicActivationInt8WeightConfig`, on the suite's own grid: the largest
    magnitude becomes 127 where torchao takes 127.5. The baseline of every other W8A8 method.
    """

    name = "int8-dynamic"
    source = "torchao, int8 dynamic activation and int8 weight quantization (github.com/pytorch/ao)"


class LlmInt8Config(ChannelConfig):
    """As for every W8A8 method, and `threshold`: activations from here on stay in floating point."""

    threshold: float = Field(default=6.0, gt=0)


@register
class LlmInt8(Int8Activations):
    """Vector-wise 8 bits, but large activations are multiplied in floating point; no data.

    The paper takes the columns where any token of the batch has |x| ≥ threshold out of the integer
    product. Here every token decides for itself, as in the paper's scheme for one token at a time: else
    what a token gets would depend on the others in its batch, later ones among them. The weights of
    these columns are the dequantized integers, as in bitsandbytes.
    """

    name = "llm-int8"
    source = "Dettmers et al., LLM.int8() (arXiv 2208.07339, section 3)"
    Config = LlmInt8Config
    layer = OutlierInt8Linear

    def _layer_arguments(self) -> dict[str, Any]:
        assert isinstance(self.config, LlmInt8Config)
        return {"threshold": self.config.threshold}


class SmoothQuantConfig(ChannelConfig):
    """As for every W8A8 method, and `alpha`: how much of the difficulty moves into the weights.

    The authors take 0.5 for OPT, 0.6 to 0.7 for Falcon, 0.8 for Mistral and 0.85 for Llama 2 and 3.
    """

    alpha: float = Field(default=0.5, ge=0, le=1)


@register
class SmoothQuant(Int8Activations):
    """Outlying channels of activations are scaled down and the weights that read them up, then W8A8.

    s_j = max|x_j|^α / max|W_·j|^(1−α) over all linears that read the channel. It is folded into the
    norms before attention and MLP, so the output and down projections stay as they are. The maxima are
    those of the dense model.
    """

    name = "smoothquant"
    source = "Xiao et al., SmoothQuant (arXiv 2211.10438, section 4)"
    needs = frozenset({"calibration"})
    Config = SmoothQuantConfig

    def plan(self, anatomy: Anatomy, target: Target | None, seed: int) -> Plan:
        _refuse_where_nothing_folds(anatomy)
        return super().plan(anatomy, target, seed)

    def _plan(self, anatomy: Anatomy, embedding: Any) -> Plan:
        assert isinstance(self.config, SmoothQuantConfig)
        plan = super()._plan(anatomy, embedding)
        return plan.model_copy(update={"knobs": {"alpha": self.config.alpha} | plan.knobs})

    def compress(self, model: PreTrainedModel, plan: Plan, calibration: Calibration | None) -> None:
        assert isinstance(self.config, SmoothQuantConfig)
        assert calibration is not None
        smooth(model, calibration.tokens, self.config.alpha)
        super().compress(model, plan, calibration)


@torch.no_grad()
def smooth(model: PreTrainedModel, tokens: Tensor, alpha: float) -> None:
    """Move scales from the norms before attention and MLP into what reads them, in place.

    The model computes what it did. `tokens` (sequences × length) are streamed block by block.
    """
    layout = layout_of(model.config)
    for block in stream(model, tokens):
        for norm_path, readers in sites(layout):
            norm: Any = block.module.get_submodule(norm_path)
            largest = torch.zeros_like(norm.weight, dtype=torch.float32)

            def see(x: Tensor, largest: Tensor = largest) -> None:
                torch.maximum(largest, x.float().abs().amax(0), out=largest)

            block.observe({readers[0]: see})
            linears = [_reader(block.module.get_submodule(path)) for path in readers]
            scale = smoothing_scale(largest, [linear.weight for linear in linears], alpha)
            for tensor in (norm.weight, getattr(norm, "bias", None)):
                if tensor is not None:
                    tensor.copy_(tensor.float() / scale)
            for linear in linears:
                linear.weight.copy_(linear.weight.float() * scale)


def smoothing_scale(largest: Tensor, weights: Sequence[Tensor], alpha: float) -> Tensor:
    """Scales s (in) from the largest |x| of every channel (in) and the weights (out × in) that read it.

    Channels that are never used, by activations or by weights, keep the scale 1.
    """
    reading = torch.stack([weight.float().abs().amax(0) for weight in weights]).amax(0)
    scale = largest**alpha / reading.clamp(min=_SMALLEST_SCALE) ** (1 - alpha)
    return torch.where((largest > 0) & (reading > 0), scale.clamp(min=_SMALLEST_SCALE), 1.0)


def sites(layout: Layout) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Norm and the linears that read it, as paths inside a block."""
    for norm, roles in zip(layout.norms, (READS_ATTENTION, READS_MLP), strict=True):
        yield norm, tuple(path for path, role in layout.roles.items() if role in roles)


def _reader(module: nn.Module) -> nn.Linear:
    """The linear that reads the norm: the module itself, or the first factor of a low-rank one."""
    linear = module.first if isinstance(module, LowRankLinear) else module
    assert isinstance(linear, nn.Linear)
    return linear


def _refuse_where_nothing_folds(anatomy: Anatomy) -> None:
    """Scales can be folded where a norm with a scale feeds plain or low-rank linears.

    Raises:
        InputError: some norm or linear is of another kind.
    """
    if not anatomy.pre_norm:
        raise InputError(
            "smoothquant folds scales into the norms before attention and MLP; this model has its norms"
            " after them. Use int8-dynamic or llm-int8."
        )
    linears: dict[str, LinearShape] = {line.path: line for line in anatomy.linears}
    scaled = {entry.path for entry in anatomy.entries}
    for index in range(anatomy.n_blocks):
        for norm, readers in sites(anatomy.layout):
            block = f"{anatomy.layout.blocks}.{index}"
            foreign = [
                path
                for path in readers
                if f"{block}.{path}" not in linears
                and not {f"{block}.{path}.first", f"{block}.{path}.second"} <= linears.keys()
            ]
            if foreign or f"{block}.{norm}" not in scaled:
                what = foreign[0] if foreign else norm
                raise InputError(
                    f"smoothquant cannot fold scales around '{block}.{what}', which an earlier stage"
                    " replaced: it needs norms with a scale, read by plain or low-rank linears."
                    " Use int8-dynamic or llm-int8 there."
                )
