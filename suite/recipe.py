"""Recipes: one string such as `svd+rtn-int8` or `rtn-int4(group=32, embedding=8)`, parsed and solved."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import yaml
from pydantic import ValidationError

from suite.errors import ImpossibleBudget, InputError, NotApplicable
from suite.method import Method, Plan, Target, methods
from suite.models.anatomy import Anatomy
from suite.specs import Budget, explain

_STAGE = re.compile(r"\s*([A-Za-z][\w.-]*)\s*(?:\(([^()]*)\))?\s*")
_SEARCH_STEPS = 12


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
        """`name@version` of every stage."""
        return tuple(f"{stage.name}@{stage.version}" for stage in self.stages)

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

    def _chain(self, anatomy: Anatomy, targets: dict[int, Target], seed: int) -> RecipePlan:
        plans = []
        for index, stage in enumerate(self.stages):
            plan = stage.plan(anatomy, targets.get(index), seed)
            anatomy = plan.apply(anatomy)
            plans.append(plan)
        return RecipePlan(tuple(plans), anatomy)

    def _search(self, anatomy: Anatomy, target: Target, first: int, last: int, seed: int) -> RecipePlan:
        dense = anatomy.size(target.metric)

        def attempt(size: int) -> RecipePlan:
            return self._chain(anatomy, {first: Target(target.metric, size), last: target}, seed)

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
    """The plans of all stages and the shapes they end in."""

    stages: tuple[Plan, ...]
    final: Anatomy

    def knobs(self, recipe: Recipe) -> dict[str, dict[str, Any]]:
        """Solved knobs by stage name; a second stage of the same name is `name #2`."""
        solved: dict[str, dict[str, Any]] = {}
        for number, (stage, plan) in enumerate(zip(recipe.stages, self.stages, strict=True), start=1):
            solved[stage.name if stage.name not in solved else f"{stage.name} #{number}"] = plan.knobs
        return solved


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
            knobs[key.strip()] = yaml.safe_load(value)
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
