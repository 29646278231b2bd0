"""Removing whole decoder blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from pydantic import Field
from transformers import PreTrainedModel

from suite.calibration import Calibration
from suite.errors import InputError
from suite.method import Method, MethodConfig, Plan, Target, largest_fitting, register
from suite.models.anatomy import Anatomy, drop_blocks

Pattern = Literal["max-gap", "input", "output", "middle", "both"]


class LayerChopConfig(MethodConfig):
    """`pattern`: where blocks go; `remove`: how many, solved for the budget when not given."""

    pattern: Pattern = "max-gap"
    remove: int | None = Field(default=None, ge=0)


@register
class LayerChop(Method[LayerChopConfig]):
    """Remove k blocks at once in a fixed pattern; the first and the last block always stay.

    Patterns (0-based, over L blocks): `input` 1..k, `output` L−1−k..L−2, `middle` centred, `both`
    half at each end, `max-gap` evenly spread. The paper's continued pretraining is the stage `heal`.
    """

    name = "layerchop"
    family = "layer pruning"
    source = "Jha et al., Just CHOP: Embarrassingly Simple LLM Compression (arXiv 2305.14864, section 3)"
    acts_on_parts = "blocks"
    Config = LayerChopConfig

    def plan(self, anatomy: Anatomy, target: Target | None, seed: int) -> Plan:
        def remove(count: int) -> Plan:
            drop = chop(self.config.pattern, anatomy.n_blocks, count)
            knobs = {"pattern": self.config.pattern, "remove": count, "blocks": list(drop)}
            return Plan(knobs=knobs, drop=drop)

        return fewest_removed(remove, anatomy, target, self.config.remove, self.name)

    def compress(self, model: PreTrainedModel, plan: Plan, calibration: Calibration | None) -> None:
        drop_blocks(model, plan.drop)


def fewest_removed(
    remove: Callable[[int], Plan], anatomy: Anatomy, target: Target | None, given: int | None, name: str
) -> Plan:
    """The plan `remove(k)` with the fewest blocks gone that meets the target; two blocks must stay.

    Raises:
        ImpossibleBudget: not even two blocks fit.
        InputError: `given`, the number the user asks for, leaves fewer than two.
    """
    most = max(anatomy.n_blocks - 2, 0)
    if given is not None and given > most:
        raise InputError(f"{name}(remove={given}): at most {most} of {anatomy.n_blocks} blocks can go.")
    if given is not None or target is None:
        return remove(given or 0)
    return largest_fitting(map(remove, range(most + 1)), anatomy, target, "two blocks must stay")


def chop(pattern: Pattern, blocks: int, count: int) -> tuple[int, ...]:
    """Indices of the `count` blocks that `pattern` removes from `blocks`, ends excluded."""
    inner = list(range(1, blocks - 1))
    first = len(inner) - count
    match pattern:
        case "input":
            chosen = inner[:count]
        case "output":
            chosen = inner[first:]
        case "middle":
            chosen = inner[first // 2 : first // 2 + count]
        case "both":
            head = (count + 1) // 2
            chosen = inner[:head] + inner[len(inner) - (count - head) :]
        case "max-gap":
            chosen = [inner[int((j + 0.5) * len(inner) / count)] for j in range(count)]
    return tuple(chosen)
