"""Distillation: a smaller student that starts from the teacher's own layers and channels."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from functools import partial
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from methods.healing import TrainingConfig
from methods.layer_pruning import Pattern, chop
from suite.calibration import Calibration
from suite.errors import InputError
from suite.healing import train
from suite.layers import ModuleSpec, ResizedLinear, replace
from suite.losses import Objective
from suite.method import Method, Plan, Target, largest_fitting, register
from suite.models.anatomy import Anatomy, LinearShape, drop_blocks
from suite.models.layouts import layout_of
from suite.streaming import stream

WIDENING = ("gate", "up")


class DistillConfig(TrainingConfig):
    """`remove` blocks in `pattern`, then `width` MLP channels a block; both solved when not given.

    `weight`: share of the KL term against cross-entropy; `direction`: forward KL(teacher‖student) or
    reverse; `hidden`: weight of one minus the cosine of the last hidden states.
    `learning_rate`, `warmup`, `weight_decay`: see `TrainingConfig`.
    """

    pattern: Pattern = "max-gap"
    remove: int | None = Field(default=None, ge=0)
    width: int | None = Field(default=None, gt=0)
    weight: float = Field(default=0.5, ge=0, le=1)
    direction: Literal["forward", "reverse"] = "forward"
    temperature: float = Field(default=1.0, gt=0)
    hidden: float = Field(default=0.0, ge=0)


@register
class Distill(Method[DistillConfig]):
    """A student of fewer blocks and narrower MLPs, copied from the teacher, trained on its logits.

    Depth first: one block fewer goes than depth alone would need, and the MLPs are narrowed until the
    budget is met. The channels that stay carry the most output, E[a²]·‖w‖². Trained on the same tokens
    and steps as `heal`.
    """

    name = "distill"
    version = 2
    family = "distillation"
    source = "Sanh et al., DistilBERT (arXiv 1910.01108); reverse KL: Gu et al., MiniLLM (arXiv 2306.08543)"
    needs = frozenset({"calibration", "training"})
    acts_on_parts = None
    Config = DistillConfig

    def plan(self, anatomy: Anatomy, target: Target | None, seed: int) -> Plan:
        if len(anatomy.dense_linears(self.name)) != len(anatomy.layout.roles) * anatomy.n_blocks:
            raise InputError(
                f"'{self.name}' copies whole linears, but an earlier stage factorised them."
                f" Put {self.name} first: {self.name}+..."
            )
        most = max(anatomy.n_blocks - 2, 0)
        if self.config.remove is not None and self.config.remove > most:
            raise InputError(
                f"distill(remove={self.config.remove}): at most {most} of {anatomy.n_blocks} blocks can go."
            )
        full = _width(anatomy.linears)
        if self.config.width is not None and self.config.width > full:
            raise InputError(f"distill(width={self.config.width}): the MLPs are {full} wide.")
        if target is None:
            return self._plan(anatomy, self.config.remove or 0, self.config.width or full)
        students = self._students(anatomy, target, most, full)
        return largest_fitting(students, anatomy, target, "two blocks must stay")

    def _students(self, anatomy: Anatomy, target: Target, most: int, full: int) -> Iterator[Plan]:
        """The widest student that fits for each depth, from one block fewer than depth alone would cost."""
        given = self.config.remove
        if given is None:
            enough = (k for k in range(most + 1) if target.fits(anatomy.after(self._drop(anatomy, k))))
            first = max(next(enough, most) - 1, 0)
        for remove in range(first, most + 1) if given is None else [given]:

            def too_wide(width: int, remove: int = remove) -> bool:
                return not target.fits(self._plan(anatomy, remove, width).apply(anatomy))

            width = self.config.width or max(1, bisect_left(range(1, full + 1), True, key=too_wide))
            yield self._plan(anatomy, remove, width)

    def _drop(self, anatomy: Anatomy, remove: int) -> tuple[int, ...]:
        return chop(self.config.pattern, anatomy.n_blocks, remove)

    def _plan(self, anatomy: Anatomy, remove: int, width: int) -> Plan:
        drop = self._drop(anatomy, remove)
        after = anatomy.after(drop)
        # An earlier stage may have left MLPs of several widths: the narrower ones stay as they are.
        own = {line.block: line.in_features for line in after.linears if line.role == "down"}
        modules = {}
        for line in after.linears:
            if width >= own[line.block]:
                continue
            shape = {"in_features": line.in_features, "out_features": line.out_features, "bias": line.bias}
            if line.role in WIDENING:
                modules[line.path] = ModuleSpec(type="linear", arguments=shape | {"out_features": width})
            elif line.role == "down":
                modules[line.path] = ModuleSpec(type="linear", arguments=shape | {"in_features": width})
        knobs = {"remove": remove, "blocks": list(drop), "width": width}
        return Plan(knobs=knobs, drop=drop, modules=modules)

    def compress(self, model: PreTrainedModel, plan: Plan, calibration: Calibration | None) -> Plan:
        assert calibration is not None
        assert calibration.training is not None
        kept = important_channels(model, calibration.tokens, plan) if plan.modules else {}
        drop_blocks(model, plan.drop)
        for path in plan.modules:
            linear = model.get_submodule(path)
            assert isinstance(linear, nn.Linear)
            replace(model, path, narrowed(linear, kept[path]))
        config = self.config
        objective = Objective(
            distill=config.weight,
            direction=config.direction,
            temperature=config.temperature,
            hidden=config.hidden,
        )
        notes = train(model, calibration.training, objective, config.schedules())
        return plan.model_copy(update={"notes": notes})


def important_channels(model: PreTrainedModel, tokens: Tensor, plan: Plan) -> dict[str, tuple[str, Tensor]]:
    """For each linear of the plan which side is cut ("out" or "in") and the sorted channels that stay.

    A channel's importance is E[a²]·‖w‖², the energy it adds through its column w of the down projection.
    """
    layout = layout_of(model.config)
    roles = {role: path for path, role in layout.roles.items()}
    kept: dict[str, tuple[str, Tensor]] = {}
    position = 0
    for block in stream(model, tokens):
        if block.index in plan.drop:
            continue
        prefix = f"{layout.blocks}.{position}."
        position += 1
        if prefix + roles["down"] not in plan.modules:
            continue
        down = block.module.get_submodule(roles["down"])
        assert isinstance(down, nn.Linear)
        energy = torch.zeros(down.in_features, dtype=torch.float64, device=down.weight.device)
        block.observe({roles["down"]: partial(_add_energy, energy)})
        score = energy * down.weight.double().square().sum(0)
        width = plan.modules[prefix + roles["down"]].arguments["in_features"]
        channels = score.topk(width).indices.sort().values
        kept[prefix + roles["down"]] = ("in", channels)
        kept |= {prefix + roles[role]: ("out", channels) for role in WIDENING if role in roles}
    return kept


def _add_energy(total: Tensor, activations: Tensor) -> None:
    total += activations.double().square().sum(0)


def narrowed(linear: nn.Linear, cut: tuple[str, Tensor]) -> ResizedLinear:
    """`linear` with the chosen output rows, or the chosen input columns."""
    side, channels = cut
    weight = linear.weight.detach()
    if side == "in":
        return ResizedLinear.from_weight(weight[:, channels], linear.bias, weight.dtype)
    bias = None if linear.bias is None else linear.bias.detach()[channels]
    return ResizedLinear.from_weight(weight[channels], bias, weight.dtype)


def _width(linears: tuple[LinearShape, ...]) -> int:
    """Channels of the widest MLP."""
    return max(line.in_features for line in linears if line.role == "down")
