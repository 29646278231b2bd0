"""The contract between the suite and a compression method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidatorFunctionWrapHandler, field_validator
from pydantic_core import PydanticCustomError
from transformers import PreTrainedModel

from suite.calibration import Calibration
from suite.errors import ImpossibleBudget
from suite.layers import ModuleSpec
from suite.models.anatomy import Anatomy
from suite.registry import Registry
from suite.specs import Frozen

Metric = Literal["params", "bytes"]


class MethodConfig(BaseModel):
    """A method's own knobs. A knob left at None is solved for the budget.

    A knob of type `pydantic.FilePath` names a file whose content is part of what a run is.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    @field_validator("*", mode="wrap")
    @classmethod
    def _no_switch_for_a_number(cls, value: object, validate: ValidatorFunctionWrapHandler) -> Any:
        knob = validate(value)
        if isinstance(value, bool) and not isinstance(knob, bool):  # to pydantic, true is 1 as well
            raise PydanticCustomError("switch", "{given} is no number", {"given": str(value).lower()})
        return knob

    @property
    def files(self) -> dict[str, Path]:
        """The files named by knobs."""
        return {knob: value for knob, value in self if isinstance(value, Path)}


class Plan(Frozen):
    """What a method will do, decided on shapes alone.

    `knobs` are shown to the user; `notes` are kept in the record only (a loss curve, a search's
    trials); `drop` lists blocks to remove; `modules` says which module type with which arguments
    will stand at each path (numbered as after dropping).
    """

    knobs: dict[str, Any] = Field(default_factory=dict)
    notes: dict[str, Any] = Field(default_factory=dict)
    drop: tuple[int, ...] = ()
    modules: dict[str, ModuleSpec] = Field(default_factory=dict)

    def apply(self, anatomy: Anatomy) -> Anatomy:
        """The anatomy this plan leads to."""
        return anatomy.after(self.drop, self.modules)


@dataclass(frozen=True)
class Target:
    """The budget as a method sees it: an absolute size in `params` or `bytes`."""

    metric: Metric
    value: int

    def fits(self, anatomy: Anatomy) -> bool:
        """Whether a model of these shapes meets the budget."""
        return anatomy.size(self.metric) <= self.value


ConfigT = TypeVar("ConfigT", bound=MethodConfig)


class Method(ABC, Generic[ConfigT]):
    """A compression method: arithmetic on shapes (`plan`), then the mathematics (`compress`).

    It never counts, times, saves, loads, evaluates, prints or seeds; the suite does. `version` goes
    up when the numbers a method produces change, so that old records are not taken for new ones.
    """

    name: ClassVar[str]
    family: ClassVar[str]
    source: ClassVar[str]
    version: ClassVar[int] = 1
    acts_on: ClassVar[frozenset[Metric]] = frozenset({"params", "bytes"})
    needs: ClassVar[frozenset[str]] = frozenset()
    """Any of "calibration", "training" (tokens to train on, and the dense model), "cuda"."""
    adaptive: ClassVar[bool] = False
    """Whether `compress` lets the data decide how the planned size is spread over the modules."""
    library: ClassVar[str | None] = None
    """An optional package it imports; `plan` says so where it is missing (`suite.errors.require`)."""
    trains_packed: ClassVar[bool] = False
    """Whether a method that needs "training" can train a model whose linears are packed already."""
    acts_on_parts: ClassVar[Literal["linears", "blocks"] | None] = "linears"
    """How a profile compresses a part alone. "linears": `plan` touches no module but the anatomy's
    linears; "blocks": `compress` drops whichever blocks a plan names; None: the whole model or nothing."""
    Config: ClassVar[type[MethodConfig]] = MethodConfig

    def __init__(self, config: ConfigT):
        self.config = config

    @abstractmethod
    def plan(self, anatomy: Anatomy, target: Target | None, seed: int) -> Plan:
        """Solve the knobs for `target`, or use them exactly as configured when it is None.

        Raises:
            ImpossibleBudget: with the smallest size the method can reach on this model.
        """

    @abstractmethod
    def compress(self, model: PreTrainedModel, plan: Plan, calibration: Calibration | None) -> Plan | None:
        """Turn the dense `model` into what `plan` says, in place.

        Returns the plan as it was carried out when that says more than `plan`: notes for the record,
        which of equal blocks went, or, for an adaptive method, other modules of at most the planned size.
        None means `plan`.
        """


methods: Registry[type[Method[Any]]] = Registry("method")

MethodT = TypeVar("MethodT", bound=type[Method[Any]])


def register(cls: MethodT) -> MethodT:
    """Class decorator: add a method to the registry under its `name`."""
    methods.add(cls.name, cls)
    return cls


def largest_share(
    build: Callable[[float], Plan], anatomy: Anatomy, target: Target, steps: int = 22
) -> tuple[float, Plan]:
    """For a continuous knob: the largest share in [0, 1] whose plan meets the target, by bisection.

    Sizes must grow with the share; `build(0)` is the smallest plan there is, `build(1)` the identity.

    Raises:
        ImpossibleBudget: even share 0 is above the target.
    """
    if target.fits(build(1.0).apply(anatomy)):
        return 1.0, build(1.0)
    low, high, best = 0.0, 1.0, largest_fitting([build(0.0)], anatomy, target)
    for _ in range(steps):
        middle = (low + high) / 2
        plan = build(middle)
        if target.fits(plan.apply(anatomy)):
            low, best = middle, plan
        else:
            high = middle
    return low, best


def largest_fitting(plans: Iterable[Plan], anatomy: Anatomy, target: Target, why: str = "") -> Plan:
    """For discrete knobs: the first of `plans`, largest first, that meets the target.

    Raises:
        ImpossibleBudget: none does; `why` tells the user what stands in the way.
    """
    smallest = anatomy.size(target.metric)
    for plan in plans:
        size = plan.apply(anatomy).size(target.metric)
        if size <= target.value:
            return plan
        smallest = min(smallest, size)
    raise ImpossibleBudget(smallest, why)
