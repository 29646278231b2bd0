"""The situations that a check may look at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers import PreTrainedModel

from suite.measure.ledger import Entry
from suite.method import Metric
from suite.models import load
from suite.models.anatomy import Anatomy
from suite.recipe import Recipe
from suite.specs import Budget

Situation = Literal["plan", "compress", "again", "reload"]
Scope = Literal["main", "every", "stack", "full"]
"""Which cases: one per family, every target, the method under int4, or the whole size as budget."""

SEED = 0


class Exempt(Exception):
    """A check has nothing to look at here; the message says why."""


@dataclass(frozen=True)
class Case:
    """One compression of one tiny model."""

    family: str
    recipe: str
    budget: Budget
    scope: Scope
    alike: tuple[Budget, ...] = ()
    """Other targets that lead to the same plan."""


@dataclass(frozen=True)
class Planning:
    """A recipe before a dense tiny model, of which only the shapes are known."""

    recipe: Recipe
    dense: Anatomy
    metrics: tuple[Metric, ...]
    """What the recipe acts on."""


@dataclass(frozen=True)
class Attempt:
    """A compression, and what it raised if it did."""

    case: Case
    error: Exception | None


@dataclass(frozen=True)
class Twins:
    """Checkpoints of the same case from two processes."""

    first: Path
    second: Path


@dataclass(frozen=True)
class Reloaded:
    """A checkpoint in a fresh process that never saw the dense model."""

    case: Case
    source: load.Source
    folder: Path
    probe: Path
    dense: Anatomy
    planned: Anatomy
    model: PreTrainedModel
    entries: tuple[Entry, ...]
