"""Recipes: one string such as `svd+rtn-int8` or `rtn-int4(group=32, embedding=8)`, parsed and solved."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from transformers import PreTrainedModel

from suite import kernels
from suite.calibration import Calibration
from suite.errors import CellFailed, ImpossibleBudget, InputError, NotApplicable
from suite.method import Method, Plan, Target, methods
from suite.models.anatomy import Anatomy
from suite.specs import Budget, explain

_STAGE = re.compile(r"\s*([A-Za-z][\w.-]*)\s*(?:\(([^()]*)\))?\s*")
# YAML reads 2:4 as a number of base sixty.
_RATIO = re.compile(r"\s*\d+:\d+\s*")
_SEARCH_STEPS = 12
_ROOM = 0.995


@dataclass(frozen=True)
class Recipe:
    """The stages of a recipe, in order."""

    stages: tuple[Method[Any], ...]

    @classmethod
    def parse(cls, text: str) -> Recipe:
        """Parse `stage+stage+...` where a stage is `method` or `method(knob=value, ...)`.

        Raises:
            InputError: bad grammar, unknown method or knob, or a value a knob does not take.
        """
        stages = []
        for part in _split(text):
            match = _STAGE.fullmatch(part)
            if not match:
                raise InputError(
                    f"recipe '{text}': '{part}' is not a stage."
                    " Write method or method(knob=value, ...), joined by '+'."
                )
            stages.append(_stage(match[1], match[2] or "", text))
        return cls(tuple(stages))

    @property
    def versions(self) -> tuple[str, ...]:
        """`name@version` of every stage, and the digest of every file a knob names."""
        named: list[str] = []
        for stage in self.stages:
            named.append(f"{stage.name}@{stage.version}")
            named += [f"{stage.name}.{knob}={_digest(file)}" for knob, file in stage.config.files.items()]
        return tuple(named)

    @property
    def needs(self) -> frozenset[str]:
        """What any stage needs."""
        return frozenset().union(*(stage.needs for stage in self.stages))

    def __str__(self) -> str:
        return "+".join(_stage_text(stage) for stage in self.stages)

    def plan(self, anatomy: Anatomy, budget: Budget, seed: int = 0) -> RecipePlan:
        """Solve all knobs for `budget`, on shapes alone.

        One stage that acts on the budget's metric gets the whole of it. With several, the last is
        planned for the final target, and the first keeps the largest share for which the last one
        still has a configuration that fits.

        Raises:
            NotApplicable: no stage can act on the metric.
            ImpossibleBudget: with the smallest size this recipe can reach.
        """
        if budget.metric == "none":
            return self._chain(anatomy, {}, seed)
        target = Target(budget.metric, budget.target(anatomy.size(budget.metric)))
        acting = [i for i, stage in enumerate(self.stages) if budget.metric in stage.acts_on]
        if not acting:
            names = " and ".join(stage.name for stage in self.stages)
            other = "bytes" if budget.metric == "params" else "params"
            leaves = "leave" if len(self.stages) > 1 else "leaves"
            hint = f" (try {other}=...)" if any(stage.acts_on for stage in self.stages) else ""
            raise NotApplicable(f"{names} {leaves} the model's {budget.metric} as they are{hint}")
        try:
            if len(acting) == 1:
                plan = self._chain(anatomy, {acting[0]: target}, seed)
            else:
                plan = self._search(anatomy, target, acting[0], acting[-1], seed)
        except ImpossibleBudget as error:
            refused = error
        else:
            size = plan.final.size(target.metric)
            if size <= target.value:
                return plan
            refused = ImpossibleBudget(size, "the knobs given decide the size")
        refused.args = (_refusal(str(self), budget, anatomy, refused),)
        raise refused

    def compress(
        self,
        model: PreTrainedModel,
        plan: RecipePlan,
        calibration: Calibration | None,
        before_stage: Callable[[Method[Any]], None] = lambda stage: None,
    ) -> RecipePlan:
        """Carry out `plan` on `model`, in place; returns it as it was carried out.

        A stage after an adaptive one is planned anew for the shapes it really meets.

        Raises:
            CellFailed: an adaptive stage made more of the model than was planned.
            ImpossibleBudget: what an adaptive stage made leaves a later stage no way to meet the budget.
        """
        anatomy = plan.start
        carried_out: list[Plan] = []
        for stage, step, target in zip(self.stages, plan.stages, plan.targets, strict=True):
            before_stage(stage)
            if anatomy != plan.start and any(earlier.adaptive for earlier in self.stages[: len(carried_out)]):
                step = stage.plan(anatomy, target, plan.seed)
            needed = calibration if stage.needs & {"calibration", "training"} else None
            with kernels.reference():  # what is written must not depend on which kernel was the faster
                done = stage.compress(model, step, needed) or step
            _no_larger(stage.name, step.apply(anatomy), after := done.apply(anatomy))
            anatomy = after
            carried_out.append(done)
        return replace(plan, stages=tuple(carried_out), final=anatomy)

    def _chain(self, anatomy: Anatomy, targets: dict[int, Target], seed: int) -> RecipePlan:
        plans, start = [], anatomy
        for index, stage in enumerate(self.stages):
            plan = stage.plan(anatomy, targets.get(index), seed)
            anatomy = plan.apply(anatomy)
            plans.append(plan)
        given = tuple(targets.get(index) for index in range(len(plans)))
        return RecipePlan(tuple(plans), anatomy, start, given, seed)

    def _search(self, anatomy: Anatomy, target: Target, first: int, last: int, seed: int) -> RecipePlan:
        dense = anatomy.size(target.metric)
        # The sizes an adaptive stage settles for are not known yet: leave the last stage room.
        room = _ROOM if self.stages[first].adaptive else 1.0
        aim = Target(target.metric, int(room * target.value))

        def attempt(size: int) -> RecipePlan:
            plan = self._chain(anatomy, {first: Target(target.metric, size), last: aim}, seed)
            targets = tuple(target if given is aim else given for given in plan.targets)
            return replace(plan, targets=targets)

        try:
            return attempt(dense)
        except ImpossibleBudget:
            low, high = self._smallest_of(anatomy, target, first, seed), dense
        best = attempt(low)  # raises ImpossibleBudget with the smallest size when even this is too big
        for _ in range(_SEARCH_STEPS):
            middle = (low + high) // 2
            try:
                best, low = attempt(middle), middle
            except ImpossibleBudget:
                high = middle
        return best

    def _smallest_of(self, anatomy: Anatomy, target: Target, stage: int, seed: int) -> int:
        """The least size stage number `stage` can be asked for."""
        for before in self.stages[:stage]:
            anatomy = before.plan(anatomy, None, seed).apply(anatomy)
        try:
            self.stages[stage].plan(anatomy, Target(target.metric, 1), seed)
        except ImpossibleBudget as error:
            return error.smallest
        return 1


@dataclass(frozen=True)
class RecipePlan:
    """The plans of all stages, the shapes they start from and end in, and what each was solved for."""

    stages: tuple[Plan, ...]
    final: Anatomy
    start: Anatomy
    targets: tuple[Target | None, ...]
    seed: int

    def knobs(self, recipe: Recipe) -> dict[str, dict[str, Any]]:
        """Solved knobs by stage name; a second stage of the same name is `name #2`."""
        return self._by_stage(recipe, [plan.knobs for plan in self.stages])

    def notes(self, recipe: Recipe) -> dict[str, dict[str, Any]]:
        """What the stages want kept in the record, by stage name; stages without notes are left out."""
        notes = self._by_stage(recipe, [plan.notes for plan in self.stages])
        return {name: note for name, note in notes.items() if note}

    @staticmethod
    def _by_stage(recipe: Recipe, values: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        named: dict[str, dict[str, Any]] = {}
        for number, (stage, value) in enumerate(zip(recipe.stages, values, strict=True), start=1):
            named[stage.name if stage.name not in named else f"{stage.name} #{number}"] = value
        return named


def _no_larger(stage: str, planned: Anatomy, carried_out: Anatomy) -> None:
    for metric in ("params", "bytes"):
        if carried_out.size(metric) > planned.size(metric):
            raise CellFailed(
                f"{stage} made {carried_out.size(metric):,} {metric} of a plan for {planned.size(metric):,}"
            )


def _refusal(recipe: str, budget: Budget, anatomy: Anatomy, error: ImpossibleBudget) -> str:
    smallest, why = error.smallest, f", {error.why}" if error.why else ""
    dense = anatomy.size(budget.metric)
    # Rounded up, so that the figure shown can be asked for.
    reachable = f"{math.ceil(smallest / dense * 1e4) / 1e4:g}" if budget.value <= 1 else f"{smallest}"
    return (
        f"{recipe} cannot reach {budget}: embedding and head alone are"
        f" {anatomy.embedding_params / anatomy.params:.1%} of the parameters{why};"
        f" the smallest it can reach is {budget.metric}={reachable}"
    )


def _digest(file: Path) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"'{file}' cannot be read: {error.strerror}.") from None


def _split(text: str) -> list[str]:
    """Split at '+' outside parentheses."""
    return re.split(r"\+(?![^(]*\))", text)


def _stage(name: str, arguments: str, text: str) -> Method[Any]:
    cls = methods.get(name)
    knobs: dict[str, Any] = {}
    for argument in filter(None, (a.strip() for a in arguments.split(","))):
        key, equals, value = argument.partition("=")
        if not equals:
            raise InputError(f"recipe '{text}': '{argument}' is not knob=value.")
        if key.strip() in knobs:
            raise InputError(f"recipe '{text}': '{key.strip()}' is given twice.")
        try:
            knobs[key.strip()] = value.strip() if _RATIO.fullmatch(value) else yaml.safe_load(value)
        except yaml.YAMLError:
            raise InputError(f"recipe '{text}': '{value.strip()}' is not a value.") from None
    try:
        return cls(cls.Config.model_validate(knobs))
    except ValidationError as error:
        raise InputError(f"recipe '{text}', method {name}: {explain(error, cls.Config)}") from None


def _stage_text(stage: Method[Any]) -> str:
    given = stage.config.model_dump(exclude_unset=True, exclude_none=True)
    knobs = ",".join(f"{key}={_value_text(value)}" for key, value in sorted(given.items()))
    return f"{stage.name}({knobs})" if knobs else stage.name


def _value_text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
