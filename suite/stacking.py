"""Orders of stages that make no sense, refused while planning with the reason.

A rule looks at the shapes that the stages before have left, not at names, so that it holds for
methods from outside too. What a method's own `plan` refuses on those shapes and accepts on the dense
model is an order of the same kind (see `suite.recipe`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from suite.errors import InputError, WeighinError
from suite.method import Method, Plan
from suite.models.anatomy import Anatomy


class WrongOrder(InputError):
    """Stage number `index` of a recipe makes no sense after the stages before it."""

    def __init__(self, reason: str, index: int):
        super().__init__(reason)
        self.index = index


@dataclass(frozen=True)
class Place:
    """A stage within a recipe, the dense model, and what the stages before it leave."""

    stages: Sequence[Method[Any]]
    index: int
    dense: Anatomy
    before: Anatomy
    seed: int

    @property
    def stage(self) -> Method[Any]:
        """The stage itself."""
        return self.stages[self.index]

    @property
    def earlier(self) -> Sequence[Method[Any]]:
        """The stages before it."""
        return self.stages[: self.index]


def pointless(stage: Method[Any]) -> bool:
    """Whether a method is a control that leaves every model as it is."""
    return stage.family == "control" and not stage.acts_on


def _control(place: Place) -> str | None:
    if len(place.stages) == 1 or not pointless(place.stage):
        return None
    return f"'{place.stage.name}' changes nothing, so it has no place in a stack"


def _quantized_twice(place: Place) -> str | None:
    if not place.before.packed or not _packs(place):
        return None
    return (
        f"'{place.stage.name}' needs dense weights, but an earlier stage quantized them, and once is enough"
    )


def _packs(place: Place) -> bool:
    """Whether the stage, on the dense model, packs weights."""
    try:
        return place.stage.plan(place.dense, None, place.seed).apply(place.dense).packed
    except WeighinError:
        return False


def _trains_packed(place: Place) -> str | None:
    stage = place.stage
    if "training" not in stage.needs or stage.trains_packed or not place.before.packed:
        return None
    return (
        f"'{stage.name}' needs dense weights to train, but an earlier stage quantized them: nothing but norms"
        f" would be left. Put the quantizer last: {stage.name}+..."
    )


def _trains_twice(place: Place) -> str | None:
    first = next((stage for stage in place.earlier if "training" in stage.needs), None)
    if first is None or "training" not in place.stage.needs:
        return None
    return (
        f"'{first.name}' trains already, and every model is trained once on the same tokens: a second time"
        f" ('{place.stage.name}') would double them"
    )


def _nothing_left(place: Place) -> str | None:
    stage = place.stage
    if place.before.linears or stage.acts_on_parts != "linears" or "params" not in stage.acts_on:
        return None
    return f"'{stage.name}' acts on linears, but an earlier stage has replaced them all"


BEFORE: tuple[Callable[[Place], str | None], ...] = (
    _control,
    _quantized_twice,
    _trains_packed,
    _trains_twice,
    _nothing_left,
)
"""Each gives the reason why a stage makes no sense at its place, or None."""


def check_place(place: Place) -> None:
    """Refuse a stage at its place, before it is planned.

    Raises:
        WrongOrder: with the reason.
    """
    for rule in BEFORE:
        reason = rule(place)
        if reason is not None:
            raise WrongOrder(reason, place.index)


def check_plan(place: Place, plan: Plan) -> None:
    """Refuse a plan that factorises what is a factor already: a smaller rank of the whole does the same.

    Raises:
        WrongOrder: with the reason.
    """
    before, roles = place.before.after(plan.drop), place.before.layout.roles
    whole = {f"{before.layout.blocks}.{block}.{inner}" for block in range(before.n_blocks) for inner in roles}
    factors = ({line.path for line in before.linears} - whole) & plan.modules.keys()
    after = [line.path for line in before.after((), plan.modules).linears] if factors else []
    for path in factors:
        if sum(line.startswith(f"{path}.") for line in after) > 1:
            raise WrongOrder(
                f"'{place.stage.name}' would factorise factors: an earlier stage has made two of a linear",
                place.index,
            )
