"""Accuracy: pair the outcomes of both sides look by look until the sequential test decides."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from suite.errors import InputError
from suite.gate import sequential
from suite.gate.criteria import Criterion
from suite.gate.outcomes import Recorded, Row, key_of
from suite.gate.sequential import Decision
from suite.specs import Frozen, Protocol

if TYPE_CHECKING:
    from suite.gate.measured import Measured

Pairs = dict[str, list[tuple[Row, Row]]]
"""Task -> (base, candidate) rows in the order of the test."""
Progress = Callable[[int, int, Decision], None]


class TaskMove(Frozen):
    """A task on the items used: accuracies in percent, and on how many items the verdicts differ."""

    task: str
    items: int
    base: float
    candidate: float
    lost: int
    gained: int


class Flip(Frozen):
    """An item that one side gets right and the other does not."""

    task: str
    subtask: str
    item: str
    base: str
    candidate: str
    target: str
    lost: bool


class Accuracy:
    """The sequential test on two sides, and what moved between them on the items it used."""

    def __init__(self, outcomes: dict[str, Recorded | Measured], protocol: Protocol, limit: int | None):
        """`outcomes` of "baseline" and "candidate". A side that is measured says which items there are.

        Raises:
            InputError: a protocol without tasks, or a task without items.
        """
        if not protocol.tasks:
            raise InputError(
                f"protocol '{protocol.name}' has no tasks, so there is no accuracy to judge by --max-drop;"
                " give --max-perplexity-ratio, for example 1.05, in its place."
            )
        self.outcomes = outcomes
        self.leading = "baseline" if isinstance(outcomes["candidate"], Recorded) else "candidate"
        self._specs = {task.name: task for task in protocol.tasks}
        self._all: dict[str, list[Any]] = {}
        side = outcomes[self.leading]
        for name, task in self._specs.items():
            found = side.first(name, limit) if isinstance(side, Recorded) else side.items(task)
            if not found:
                raise InputError(f"there are no items of task '{name}'.")
            self._all[name] = list(found)
        self.sizes = {name: len(found) for name, found in self._all.items()}
        digest = protocol.digest()
        self._order = {name: sequential.order(digest, name, size) for name, size in self.sizes.items()}
        self.pairs: Pairs = {}

    @property
    def available(self) -> int:
        """Items there are."""
        return sum(self.sizes.values())

    @property
    def used(self) -> int:
        """Items up to the decision."""
        return sum(map(len, self.pairs.values()))

    def judge(
        self, max_drop: float, alpha: float, notice: Callable[[str], None], progress: Progress
    ) -> Criterion:
        """Add items until the test decides or there are no more; `max_drop` in points."""
        margin, ends = max_drop / 100, sequential.round_ends(self.sizes)
        rounds = min(self.sizes.values())
        if sequential.decide(np.zeros((rounds, len(ends))), margin, alpha).verdict == "inconclusive":
            notice(
                f"{self.available:,} items cannot show a drop below {max_drop:g} points, even if not a single"
                " one flips: give a larger --max-drop or more items of the smallest task."
            )
        pairs: Pairs = {task: [] for task in ends}
        decision = Decision("inconclusive", 0, 0.0, 1.0, -1.0)
        stops = sequential.looks(ends)
        for before, after in itertools.pairwise(stops):
            for task in ends:
                pairs[task] += self._pair(task, int(ends[task][before]), int(ends[task][after]))
            gaps = {task: np.array([_gap(*pair) for pair in rows]) for task, rows in pairs.items()}
            decision = sequential.decide(sequential.round_means(gaps, ends, after), margin, alpha)
            self.pairs = {task: rows[: ends[task][decision.rounds]] for task, rows in pairs.items()}
            progress(self.used, self.available, decision)
            if decision.verdict != "inconclusive":
                break
        return self._criterion(decision, max_drop, alpha)

    def moves(self) -> tuple[TaskMove, ...]:
        """What each task did."""
        return tuple(_task_move(task, rows) for task, rows in self.pairs.items())

    def flips(self) -> tuple[Flip, ...]:
        """The items that changed sides, those that were lost first."""
        flips = [
            Flip(
                task=base["task"],
                subtask=base["subtask"],
                item=base["item"],
                base=base["prediction"],
                candidate=candidate["prediction"],
                target=base["target"],
                lost=base["correct"] > candidate["correct"],
            )
            for rows in self.pairs.values()
            for base, candidate in rows
            if base["correct"] != candidate["correct"]
        ]
        return tuple(sorted(flips, key=lambda flip: not flip.lost))

    def _pair(self, task: str, start: int, end: int) -> list[tuple[Row, Row]]:
        """(base, candidate) rows of some places in the order of the test."""
        chosen = [self._all[task][i] for i in self._order[task][start:end]]
        leader = self.outcomes[self.leading]
        lead = chosen if isinstance(leader, Recorded) else leader.rows(self._specs[task], chosen)
        other = self.outcomes["candidate" if self.leading == "baseline" else "baseline"]
        if isinstance(other, Recorded):
            follow = other.matching(lead)
        else:
            follow = other.rows(self._specs[task], chosen)
            if list(map(key_of, follow)) != list(map(key_of, lead)):
                raise InputError(f"the two sides were given different items of task '{task}'.")
        both = (lead, follow) if self.leading == "baseline" else (follow, lead)
        return list(zip(*both, strict=True))

    def _criterion(self, decision: Decision, max_drop: float, alpha: float) -> Criterion:
        drop = float(np.mean([move.base - move.candidate for move in self.moves()]))
        upper, lower, level = 100 * decision.upper, 100 * decision.lower, f"{100 * (1 - alpha):.4g} %"
        bound = {
            "pass": f"{level} upper bound of the drop {upper:.2f} < {max_drop:g}",
            "fail": f"{level} lower bound of the drop {lower:.2f} > {max_drop:g}",
            "inconclusive": f"drop between {lower:.2f} and {upper:.2f} ({level} each), limit {max_drop:g}",
        }[decision.verdict]
        text = (
            f"accuracy {'−' if drop > 0 else '+'}{abs(drop):.2f} points, {bound} after {self.used:,} of"
            f" {self.available:,} items (sequential, α {alpha:.3g})"
        )
        return Criterion(
            name="max-drop",
            verdict=decision.verdict,
            text=text,
            limit=max_drop,
            estimate=drop,
            lower=lower,
            upper=upper,
            alpha=alpha,
        )


def _gap(base: Row, candidate: Row) -> float:
    return float(base["correct"]) - float(candidate["correct"])


def _task_move(task: str, rows: list[tuple[Row, Row]]) -> TaskMove:
    gaps = [_gap(*pair) for pair in rows]
    return TaskMove(
        task=task,
        items=len(rows),
        base=100 * float(np.mean([float(b["correct"]) for b, _ in rows])),
        candidate=100 * float(np.mean([float(c["correct"]) for _, c in rows])),
        lost=sum(gap > 0 for gap in gaps),
        gained=sum(gap < 0 for gap in gaps),
    )
