"""Carrying out the plan of a recipe, stage by stage, on the shapes that the data leave."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from transformers import PreTrainedModel

from suite import kernels
from suite.calibration import Calibration
from suite.errors import CellFailed, ImpossibleBudget
from suite.method import Method, Plan, Target
from suite.models.anatomy import Anatomy

WORTH = 0.01
"""Share of a budget that must lie idle before an adaptive stage is carried out once more."""


@dataclass(frozen=True)
class RecipePlan:
    """The plans of all stages, the shapes they start from and end in, and what each was solved for."""

    stages: tuple[Plan, ...]
    final: Anatomy
    start: Anatomy
    targets: tuple[Target | None, ...]
    seed: int

    def knobs(self, recipe: Staged) -> dict[str, dict[str, Any]]:
        """Solved knobs by stage name; a second stage of the same name is `name #2`."""
        return self._by_stage(recipe, [plan.knobs for plan in self.stages])

    def notes(self, recipe: Staged) -> dict[str, dict[str, Any]]:
        """What the stages want kept in the record, by stage name; stages without notes are left out."""
        notes = self._by_stage(recipe, [plan.notes for plan in self.stages])
        return {name: note for name, note in notes.items() if note}

    @staticmethod
    def _by_stage(recipe: Staged, values: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        try:
            json.dumps(values)
        except (TypeError, ValueError) as error:
            raise CellFailed(
                f"knobs or notes of {recipe} cannot be kept in a record: {error}; give Python's own numbers,"
                " texts, lists and dictionaries"
            ) from None
        named: dict[str, dict[str, Any]] = {}
        for number, (stage, value) in enumerate(zip(recipe.stages, values, strict=True), start=1):
            named[stage.name if stage.name not in named else f"{stage.name} #{number}"] = value
        return named


class Staged(Protocol):
    """Whatever has stages, such as a recipe."""

    @property
    def stages(self) -> tuple[Method[Any], ...]: ...


def may_leave_idle(stages: Sequence[Method[Any]]) -> bool:
    """Whether a stage packs what an adaptive one before it leaves, which planning cannot foresee.

    Where the data leave more matrices dense than was planned, these are packed smaller than planned.
    """
    adaptive = [index for index, stage in enumerate(stages) if stage.adaptive]
    return bool(adaptive) and any(stage.acts_on == {"bytes"} for stage in stages[adaptive[0] :])


@dataclass
class Work:
    """A model on its way through the stages of a recipe."""

    stages: tuple[Method[Any], ...]
    model: PreTrainedModel
    calibration: Calibration | None
    before_stage: Callable[[Method[Any]], None]
    dense: Callable[[], PreTrainedModel] | None

    def carry_out(self, plan: RecipePlan) -> RecipePlan:
        """See `Recipe.compress`."""
        settled = max((i + 1 for i, stage in enumerate(self.stages) if stage.adaptive), default=0)
        done = self._run(plan, range(settled), ())
        larger = self._larger(plan, done)
        if larger is not None and self.dense is not None:
            self._restore(self.dense)
            try:
                done = self._run(larger, range(settled), ())
                self._rest(plan, done)
            except (ImpossibleBudget, CellFailed):
                self._restore(self.dense)
                done = self._run(plan, range(settled), ())
        done = self._run(plan, range(settled, len(self.stages)), done)
        return replace(plan, stages=done, final=_after(plan.start, done))

    def _run(self, plan: RecipePlan, stages: range, done: tuple[Plan, ...]) -> tuple[Plan, ...]:
        anatomy = _after(plan.start, done)
        for index in stages:
            stage, step = self.stages[index], plan.stages[index]
            self.before_stage(stage)
            if anatomy != plan.start and any(earlier.adaptive for earlier in self.stages[:index]):
                step = stage.plan(anatomy, plan.targets[index], plan.seed)
            needed = self.calibration if stage.needs & {"calibration", "training"} else None
            with kernels.reference():  # what is written must not depend on which kernel was the faster
                carried_out = stage.compress(self.model, step, needed) or step
            _no_larger(stage.name, step.apply(anatomy), after := carried_out.apply(anatomy))
            anatomy, done = after, (*done, carried_out)
        return done

    def _rest(self, plan: RecipePlan, done: tuple[Plan, ...]) -> Anatomy:
        """What the stages that are left would make of the model."""
        anatomy, first = _after(plan.start, done), len(done)
        for stage, target in zip(self.stages[first:], plan.targets[first:], strict=True):
            anatomy = stage.plan(anatomy, target, plan.seed).apply(anatomy)
        return anatomy

    def _larger(self, plan: RecipePlan, done: tuple[Plan, ...]) -> RecipePlan | None:
        """The plan with what the data left idle added to the last adaptive stage's size, if that is much.

        A byte more for that stage is at most a byte more in the end, as packing never adds any.
        """
        last, given = len(done) - 1, [target for target in plan.targets if target is not None]
        if self.dense is None or not done or not may_leave_idle(self.stages) or len(given) < 2:
            return None
        asked, final = plan.targets[last], given[-1]
        if asked is None or final is asked:
            return None
        idle = plan.final.size(final.metric) - self._rest(plan, done).size(final.metric)
        if idle <= WORTH * final.value:
            return None
        larger = self._asking(plan, done, Target(asked.metric, asked.value + idle))
        return larger if larger.stages[last].modules != plan.stages[last].modules else None

    def _asking(self, plan: RecipePlan, done: tuple[Plan, ...], target: Target) -> RecipePlan:
        """The plan with another target for the last of the stages that are done."""
        last = len(done) - 1
        step = self.stages[last].plan(_after(plan.start, done[:last]), target, plan.seed)
        return replace(
            plan,
            stages=(*plan.stages[:last], step, *plan.stages[last + 1 :]),
            targets=(*plan.targets[:last], target, *plan.targets[last + 1 :]),
        )

    def _restore(self, dense: Callable[[], PreTrainedModel]) -> None:
        """Make the model the dense one again, in place."""
        names = [name for name, _ in self.model.named_children()]
        for name in names:  # freed first, so that two models are never in memory at once
            setattr(self.model, name, None)
        fresh = dense()
        for name in names:
            setattr(self.model, name, getattr(fresh, name))
        self.model.config = fresh.config


def _after(anatomy: Anatomy, done: Sequence[Plan]) -> Anatomy:
    for step in done:
        anatomy = step.apply(anatomy)
    return anatomy


def _no_larger(stage: str, planned: Anatomy, carried_out: Anatomy) -> None:
    for metric in ("params", "bytes"):
        if carried_out.size(metric) > planned.size(metric):
            raise CellFailed(
                f"{stage} made {carried_out.size(metric):,} {metric} of a plan for {planned.size(metric):,}"
            )
