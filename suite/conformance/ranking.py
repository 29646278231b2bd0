"""Where a method ranks: run on a real model against the baselines at the same budget, item by item."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from suite import stats
from suite.conformance.trial import Subject
from suite.method import methods
from suite.paired import pair_items, pair_windows
from suite.recipe import Recipe
from suite.records import Measurements
from suite.run.runner import Cell, Grid, Options, reason_of
from suite.specs import Track

DEFAULT_BUDGETS = {"params": "params=0.8", "bytes": "bytes=0.45"}


@dataclass(frozen=True)
class Difference:
    """What the subject scores minus what another row does, with the ends of its interval."""

    other: str
    estimate: float
    low: float
    high: float


@dataclass(frozen=True)
class Ranking:
    """The subject among the baselines at one budget. All intervals hold together."""

    budget: str
    model: str
    protocol: str
    items: int
    """Items, or windows of text where the protocol has no tasks."""
    limit: int | None
    rank: tuple[int, int] | None
    """The ranks it can have; None when its own cell failed."""
    rows: int
    differences: tuple[Difference, ...]
    failed: dict[str, str]
    """Rows without a result, and why."""
    broken: tuple[str, ...] = ()
    """Those of `failed` that should have had one: not baselines that nobody named and no plan exists for."""
    unit: Literal["accuracy", "nats"] = "accuracy"
    """What is ranked by: macro accuracy, or the mean log-likelihood per token where there are no tasks."""


def default_budgets(subject: Subject) -> list[str]:
    """The budget that a subject is ranked at when none is given: of parameters if it acts on them."""
    acts_on = frozenset().union(*(stage.acts_on for stage in Recipe.parse(subject.recipe).stages))
    return [budget for metric, budget in DEFAULT_BUDGETS.items() if metric in acts_on][:1]


def baselines(subject: Subject, budget: str) -> list[str]:
    """All installed methods that act on the budget's metric, controls among them, without the subject."""
    metric = budget.partition("=")[0]
    names = [name for name in methods if metric in methods.get(name).acts_on]
    own = {stage.name for stage in Recipe.parse(subject.recipe).stages}
    installed = [n for n in names if not methods.get(n).__module__.startswith("weighin_plugin_")]
    return [name for name in installed if name not in own and "cuda" not in methods.get(name).needs]


def rank(
    subject: Subject,
    track: Track,
    options: Options,
    against: Sequence[str] | None,
    run: Callable[[Grid], None] = lambda grid: grid.run(),
) -> list[Ranking]:
    """One ranking for each budget of `track`, which gives model, protocol and limit.

    By accuracy on the same items, or by perplexity on the same windows where the protocol has no tasks.
    Cells that the results folder already has are not computed again. Dense is left out of the ranks, but
    the subject is compared with it.

    Raises:
        InputError: the model, a baseline or the data is missing, or no budget is within reach.
    """
    options = replace(options, plugins=subject.plugins)
    rankings = []
    for budget in track.budgets:
        others = list(against) if against else baselines(subject, budget)
        cells = track.model_copy(update={"recipes": (subject.recipe, *others), "budgets": (budget,)})
        grid = Grid(cells, options)
        run(grid)
        asked = {subject.recipe, *(str(Recipe.parse(text)) for text in against or ())}
        rankings.append(_ranking(grid, subject, budget, asked))
    return rankings


def _ranking(grid: Grid, subject: Subject, budget: str, asked: Set[str]) -> Ranking:
    cells = {cell.spec.recipe: cell for cell in grid.cells}
    first = grid.cells[0].spec
    failed = {name: reason_of(cell.record) for name, cell in cells.items() if cell.record.status != "ok"}
    by_items = bool(first.protocol.tasks)
    scores = _item_scores(grid) if by_items else _window_scores(grid, failed)
    empty = Ranking(
        budget=budget,
        model=first.model,
        protocol=first.protocol.name,
        items=0,
        limit=first.limit,
        rank=None,
        rows=len(scores.rows),
        differences=(),
        failed=failed,
        broken=tuple(name for name in failed if name in cells and _broken(cells[name], asked)),
        unit="accuracy" if by_items else "nats",
    )
    names, size = sorted(scores.rows, key="dense".__eq__), len(scores.tasks)  # dense is not ranked
    if subject.recipe not in names or len(names) < 2 or size < 2:
        return empty
    competitors = len(names) - ("dense" in names)
    pairs = stats.all_pairs(len(names))
    values = [scores.rows[name] for name in names]
    # Only outcomes, right or wrong, need pairs that are made up.
    made_up = stats.PSEUDO_PAIRS if by_items else 0.0
    intervals = stats.macro_differences(values, scores.tasks, pairs, pseudo_pairs=made_up)
    ranked = [index for index, pair in enumerate(pairs) if max(pair) < competitors]
    among = stats.Intervals(intervals.estimate[ranked], intervals.standard_error[ranked], intervals.critical)
    ranks = stats.rank_intervals(among, [pairs[index] for index in ranked], competitors)
    own = names.index(subject.recipe)
    differences = []
    for (i, j), estimate, half in zip(pairs, intervals.estimate, intervals.half_width, strict=True):
        if own in (i, j):
            middle = float(estimate if j == own else -estimate)
            other = names[i if j == own else j]
            differences.append(Difference(other, middle, middle - float(half), middle + float(half)))
    return replace(
        empty,
        items=size,
        rank=ranks[own],
        rows=competitors,
        differences=tuple(sorted(differences, key=lambda difference: -difference.estimate)),
    )


@dataclass(frozen=True)
class _Scores:
    """Values (items,) of each row, larger ones better, and the task of each item."""

    rows: dict[str, stats.Floats]
    tasks: np.ndarray[Any, Any]


def _item_scores(grid: Grid) -> _Scores:
    done = {cell.spec.recipe: grid.store.items(cell.record) for cell in grid.cells if _measured(cell)}
    frames = {name: frame for name, frame in done.items() if frame is not None}
    if not frames:
        return _Scores({}, np.zeros(0))
    paired = pair_items(frames)
    return _Scores(dict(zip(paired.frames, paired.correct, strict=True)), paired.tasks)


def _window_scores(grid: Grid, failed: dict[str, str]) -> _Scores:
    """Log-likelihood per token of each window; rows without one are put among the `failed`."""
    texts = {cell.spec.recipe: found.perplexity for cell in grid.cells if (found := _measured(cell))}
    rows = pair_windows(texts)
    failed |= dict.fromkeys(texts.keys() - rows.keys(), "no finite perplexity on the text of the other rows")
    return _Scores(rows, np.zeros(len(next(iter(rows.values()), ()))))


def _measured(cell: Cell) -> Measurements | None:
    return cell.record.measurements if cell.record.status == "ok" else None


def _broken(cell: Cell, asked: Set[str]) -> bool:
    """Whether a cell failed that could be planned for or was asked for by name."""
    failure = cell.record.failure if cell.record.status == "failed" else None
    return failure is not None and (failure.stage != "plan" or cell.spec.recipe in asked)
