"""Where a method ranks: run on a real model against the baselines at the same budget, item by item."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from suite import stats
from suite.conformance.trial import Subject
from suite.method import methods
from suite.paired import pair_items
from suite.recipe import Recipe
from suite.run.runner import Cell, Grid, Options, reason_of
from suite.specs import Track

DEFAULT_BUDGETS = {"params": "params=0.8", "bytes": "bytes=0.45"}


@dataclass(frozen=True)
class Difference:
    """Macro accuracy of the subject minus that of another row, with the ends of its interval."""

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
    limit: int | None
    rank: tuple[int, int] | None
    """The ranks it can have; None when its own cell failed."""
    rows: int
    differences: tuple[Difference, ...]
    failed: dict[str, str]
    """Rows without a result, and why."""


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
        rankings.append(_ranking(grid, subject, budget))
    return rankings


def _ranking(grid: Grid, subject: Subject, budget: str) -> Ranking:
    cells = {cell.spec.recipe: cell for cell in grid.cells}
    frames = {name: grid.store.items(cell.record) for name, cell in cells.items() if _fine(cell)}
    scored = {name: frame for name, frame in frames.items() if frame is not None}
    first = grid.cells[0].spec
    empty = Ranking(
        budget=budget,
        model=first.model,
        protocol=first.protocol.name,
        items=0,
        limit=first.limit,
        rank=None,
        rows=len(scored),
        differences=(),
        failed={name: reason_of(cell.record) for name, cell in cells.items() if not _fine(cell)},
    )
    if subject.recipe not in scored or len(scored) < 2:
        return empty
    names = sorted(scored, key="dense".__eq__)  # dense last: it is compared, not ranked
    competitors = len(names) - ("dense" in scored)
    paired = pair_items({name: scored[name] for name in names})
    pairs = stats.all_pairs(len(names))
    intervals = stats.macro_differences(paired.correct, paired.tasks, pairs)
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
        items=len(paired.tasks),
        rank=ranks[own],
        rows=competitors,
        differences=tuple(sorted(differences, key=lambda difference: -difference.estimate)),
    )


def _fine(cell: Cell) -> bool:
    return cell.record.status == "ok"
