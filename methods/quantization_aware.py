"""Quantization-aware distillation: a student whose weights are rounded in every step of its training."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from methods.healing import TrainingConfig
from methods.quantization import Bits, RtnInt4, UniformConfig
from suite.calibration import Calibration
from suite.healing import train
from suite.layers import ModuleSpec, replace
from suite.losses import Objective
from suite.method import Method, Plan, Target, largest_fitting, register
from suite.models.anatomy import Anatomy
from suite.models.layouts import layout_of
from suite.packed_layers import PackedLinear

_STARTS = 40
"""Clipping points, as even shares of the largest weight, that the start is chosen from."""


class QuantGptConfig(TrainingConfig):
    """`bits` of the decoder linears; `embedding`: those of embedding and head, rounded after training.

    16 leaves embedding and head as they are; solved for the budget when not given.
    `scaling`: one learned clipping ratio for a whole linear, as in the paper, or for each of its rows.
    `weight`: share of the KL term against cross-entropy (the paper trains on KL alone); `contrast`: weight
    of the contrastive term. `learning_rate`, `warmup`, `weight_decay`: see `TrainingConfig`.
    """

    bits: Literal[8, 4, 3, 2] = 4
    embedding: Bits | None = None
    scaling: Literal["module", "row"] = "module"
    weight: float = Field(default=1.0, ge=0, le=1)
    contrast: float = Field(default=0.1, ge=0)


@register
class QuantGpt(Method[QuantGptConfig]):
    """The teacher's own weights, trained while rounded: dynamic scaling, KL, and a contrast of tokens.

    Every decoder linear is clipped at γ·mean|w| with a learned γ and rounded in the forward pass; the
    gradient passes the rounding straight. Trained on the same tokens and steps as `heal`. Not taken over:
    8-bit activations, embeddings rounded in training, and the memory bank of earlier epochs' states,
    which has nothing to remember where every sequence is seen once. A module's scale is stored per row.
    """

    name = "quantgpt"
    family = "quantization"
    source = "Tao et al., Compression of Generative Pre-trained Language Models (arXiv 2203.10705, section 3)"
    acts_on = frozenset({"bytes"})
    needs = frozenset({"training"})
    acts_on_parts = None
    Config = QuantGptConfig

    def plan(self, anatomy: Anatomy, target: Target | None, seed: int) -> Plan:
        anatomy.dense_linears(self.name)
        if self.config.embedding is not None or target is None:
            return self._plan(anatomy, self.config.embedding or 16)
        choices: tuple[Bits, ...] = (16, 8, 4)
        return largest_fitting((self._plan(anatomy, bits) for bits in choices), anatomy, target)

    def _plan(self, anatomy: Anatomy, embedding: Bits) -> Plan:
        bits = {"bits": self.config.bits}
        modules = dict(_rounding(embedding).plan(anatomy, None, 0).modules)
        for line in anatomy.linears:
            arguments = {**modules[line.path].arguments, **bits}
            modules[line.path] = ModuleSpec(type="packed_linear", arguments=arguments)
        knobs = {**bits, "scaling": self.config.scaling, "embedding": embedding}
        return Plan(knobs=knobs, modules=modules)

    def compress(self, model: PreTrainedModel, plan: Plan, calibration: Calibration | None) -> Plan:
        assert calibration is not None
        assert calibration.training is not None
        config = self.config
        layout = layout_of(model.config)
        packed = {p: spec for p, spec in plan.modules.items() if p not in (layout.embedding, layout.head)}
        for path in packed:
            linear = model.get_submodule(path)
            scaling = DynamicScaling(linear.get_parameter("weight"), config.bits, config.scaling)
            parametrize.register_parametrization(linear, "weight", scaling)
        objective = Objective(distill=config.weight, contrast=config.contrast)
        notes = train(model, calibration.training, objective, config.schedules())
        for path, spec in packed.items():
            replace(model, path, pack_linear(model.get_submodule(path), spec))
        ends = {path: spec for path, spec in plan.modules.items() if path not in packed}
        _rounding(plan.knobs["embedding"]).compress(model, Plan(modules=ends), None)
        return plan.model_copy(update={"notes": notes})


def _rounding(embedding: Bits) -> RtnInt4:
    """Rounding to nearest with a scale a row, for embedding and head."""
    return RtnInt4(UniformConfig(group="channel", embedding=embedding))


class DynamicScaling(nn.Module):
    """A weight (m × n) clipped at α = γ·mean|w| and rounded to 2^(b−1) − 1 steps on each side of zero.

    γ is one number, or one a row. It starts where the squared error is least and is learned: its gradient
    hears of clipped weights (±1 each) and of the rounding of the others; mean|w| follows the weights but
    hands them no gradient. The rounded weight is, bit for bit, what the packed linear will give.
    """

    def __init__(self, weight: Tensor, bits: int, scaling: Literal["module", "row"]):
        super().__init__()
        self.top, self.zero = (1 << bits - 1) - 1, 1 << bits - 1
        self.by_row = scaling == "row"
        self.ratio = nn.Parameter(torch.ones(len(weight) if self.by_row else 1, device=weight.device))
        self._start(weight.detach())

    @torch.no_grad()
    def _start(self, weight: Tensor) -> None:
        size = weight.float().abs()
        largest = size.amax(1) if self.by_row else size.max().reshape(1)
        widest = largest / self._mean(weight).flatten().clamp(min=torch.finfo(torch.float32).tiny)
        best = torch.full_like(self.ratio, math.inf)
        chosen = torch.ones_like(self.ratio)
        for share in range(1, _STARTS + 1):
            self.ratio.copy_(widest * share / _STARTS)
            error = (self(weight).float() - weight.float()).square()
            error = error.sum(1) if self.by_row else error.sum().reshape(1)
            chosen = torch.where(error < best, self.ratio, chosen)
            best = torch.minimum(best, error)
        self.ratio.copy_(chosen)

    def _mean(self, weight: Tensor) -> Tensor:
        size = weight.detach().float().abs()
        return size.mean(1, keepdim=True) if self.by_row else size.mean().reshape(1, 1)

    def step(self, weight: Tensor) -> Tensor:
        """The distance of two grid points (m × 1 or 1 × 1), rounded as it will be stored and read."""
        exact = (self.ratio[:, None] * self._mean(weight) / self.top).clamp(
            min=torch.finfo(torch.float16).smallest_normal
        )
        return exact + (exact.half().to(weight.dtype).float() - exact).detach()

    def codes(self, weight: Tensor) -> Tensor:
        """Signed integers (m × n, float32), with the gradient of the clipped weights."""
        clipped = (weight.float() / self.step(weight)).clamp(-self.top, self.top)
        return clipped + (clipped.round() - clipped).detach()

    def forward(self, weight: Tensor) -> Tensor:
        return (self.step(weight) * self.codes(weight)).to(weight.dtype)


@torch.no_grad()
def pack_linear(linear: nn.Module, spec: ModuleSpec) -> PackedLinear:
    """The linear as it stands in training, with its codes and scales stored."""
    weights: Any = linear.parametrizations
    weight, scaling = weights.weight.original, weights.weight[0]
    module = spec.build(weight.dtype, str(weight.device))
    assert isinstance(module, PackedLinear)
    codes = scaling.codes(weight).round() + scaling.zero
    module.store_(codes, scaling.step(weight).expand(len(weight), 1))
    module.bias = linear.bias if isinstance(linear.bias, nn.Parameter) else None
    return module
