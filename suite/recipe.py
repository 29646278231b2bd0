"""Recipes: one string such as `svd+rtn-int8` or `rtn-int4(group=32, embedding=8)`, parsed and solved."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from transformers import PreTrainedModel

from suite.calibration import Calibration
from suite.carrying_out import RecipePlan as RecipePlan
from suite.carrying_out import Work, may_leave_idle
from suite.errors import ImpossibleBudget, InputError, NotApplicable, WeighinError
from suite.method import Method, Plan, Target, methods
from suite.models.anatomy import Anatomy
from suite.specs import Budget, explain
from suite.stacking import Place, WrongOrder, check_place, check_plan

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
        if may_leave_idle(self.stages):
            named.append("sizes=2")
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
        planned for the final target, and those before it together keep the largest share for which
        the last one still has a configuration that fits. Each of them shrinks what it meets by the
        same factor, as far as it can; a stage with knobs of its own keeps to them, and the others
        make up for it.

        Raises:
            NotApplicable: no stage can act on the metric.
            ImpossibleBudget: with the smallest size this recipe can reach.
            InputError: a stage makes no sense after the ones before it; with an order that works.
        """
        try:
            return self._solve(anatomy, budget, seed)
        except WrongOrder as error:
            raise InputError(self._advice(error, anatomy, budget, seed)) from None

    def _solve(self, anatomy: Anatomy, budget: Budget, seed: int) -> RecipePlan:
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
                plan = self._search(anatomy, target, acting, seed)
        except ImpossibleBudget as error:
            refused = error
        else:
            size = plan.final.size(target.metric)
            if size <= target.value:
                return plan
            refused = ImpossibleBudget(size, "the knobs given decide the size")
        refused.args = (_refusal(str(self), budget, anatomy, refused),)
        raise refused

    def _advice(self, error: WrongOrder, anatomy: Anatomy, budget: Budget, seed: int) -> str:
        """The refusal of an order, and the nearest one that is not refused: tried, not looked up."""
        others = list(self.stages)
        stage = others.pop(error.index)
        moved = [
            Recipe((*others[:place], stage, *others[place:])) for place in range(error.index - 1, -1, -1)
        ]
        told = f"recipe '{self}': {error}" + ("" if str(error).endswith(".") else ".")
        for recipe in moved:
            if recipe._makes_sense(anatomy, budget, seed):
                return f"{told} This order works: {recipe}."
        rest = Recipe(tuple(others))
        return f"{told} Leave it out: {rest}." if rest._makes_sense(anatomy, budget, seed) else told

    def _makes_sense(self, anatomy: Anatomy, budget: Budget, seed: int) -> bool:
        try:
            self._solve(anatomy, budget, seed)
        except InputError:
            return False
        except WeighinError:
            return True
        return True

    def same_checkpoint(self, plan: RecipePlan, other: RecipePlan) -> bool:
        """Whether two plans of this recipe for one model are carried out alike, whatever the budgets.

        What a stage after an adaptive one does depends on its target too: such plans never are.
        """
        return plan.stages == other.stages and not any(stage.adaptive for stage in self.stages[:-1])

    def compress(
        self,
        model: PreTrainedModel,
        plan: RecipePlan,
        calibration: Calibration | None,
        before_stage: Callable[[Method[Any]], None] = lambda stage: None,
        dense: Callable[[], PreTrainedModel] | None = None,
    ) -> RecipePlan:
        """Carry out `plan` on `model`, in place; returns it as it was carried out.

        A stage after an adaptive one is planned anew for the shapes it really meets. Where that
        leaves bytes idle, as when a quantizer packs matrices that were not planned to stay dense, the
        adaptive stage is carried out once more on a model from `dense`, for as much more; without
        `dense` the bytes stay idle.

        Raises:
            CellFailed: an adaptive stage made more of the model than was planned.
            ImpossibleBudget: what an adaptive stage made leaves a later stage no way to meet the budget.
        """
        return Work(self.stages, model, calibration, before_stage, dense).carry_out(plan)

    def _chain(
        self, anatomy: Anatomy, targets: dict[int, Target], seed: int, yielding: Container[int] = ()
    ) -> RecipePlan:
        """Plan stage after stage; those that are `yielding` may miss their target as narrowly as they can."""
        plans, start, given = [], anatomy, dict(targets)
        for index in range(len(self.stages)):
            place = Place(self.stages, index, start, anatomy, seed)
            check_place(place)
            try:
                plan, anatomy = _planned(place, given.get(index))
            except ImpossibleBudget as error:
                if index not in yielding:
                    raise
                given[index] = Target(given[index].metric, error.smallest)
                plan, anatomy = _planned(place, given[index])
            plans.append(plan)
        used = tuple(given.get(index) for index in range(len(plans)))
        return RecipePlan(tuple(plans), anatomy, start, used, seed)

    def _search(self, anatomy: Anatomy, target: Target, acting: Sequence[int], seed: int) -> RecipePlan:
        dense = anatomy.size(target.metric)
        *shaping, last = acting
        # The sizes an adaptive stage settles for are not known yet: leave the last stage room.
        room = _ROOM if any(self.stages[index].adaptive for index in shaping) else 1.0
        aim = Target(target.metric, int(room * target.value))

        def attempt(size: int) -> RecipePlan:
            sizes = [int(dense * (size / dense) ** (n / len(shaping))) for n in range(1, len(shaping))]
            asked = [Target(target.metric, value) for value in (*sizes, size)]
            yielding = shaping if len(shaping) > 1 else ()
            wanted = {**dict(zip(shaping, asked, strict=True)), last: aim}
            plan = self._chain(anatomy, wanted, seed, yielding)
            if not target.fits(plan.final):  # a last stage with knobs of its own plans no smaller
                raise ImpossibleBudget(plan.final.size(target.metric), "the knobs given decide the size")
            targets = tuple(target if given is aim else given for given in plan.targets)
            return replace(plan, targets=targets)

        try:
            return attempt(dense)
        except ImpossibleBudget:
            low = 1 if len(shaping) > 1 else self._smallest_of(anatomy, target, shaping[0], seed)
            high = dense
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


def _planned(place: Place, target: Target | None) -> tuple[Plan, Anatomy]:
    """The plan of a stage at its place, and the shapes it leads to.

    Raises:
        WrongOrder: the stage refuses what the stages before it leave, but not the dense model.
    """
    stage = place.stage
    try:
        plan = stage.plan(place.before, target, place.seed)
        after = plan.apply(place.before)
    except InputError as error:
        if not place.index:
            raise
        try:
            stage.plan(place.dense, target, place.seed).apply(place.dense)
        except InputError:
            raise error from None
        except WeighinError:
            pass
        raise WrongOrder(str(error), place.index) from None
    check_plan(place, plan)
    return plan, after


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
        except (yaml.YAMLError, ValueError):  # a date may be none
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
