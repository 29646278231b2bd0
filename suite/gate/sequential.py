"""Testing by betting: has the accuracy dropped by more than a margin, decided as early as the items allow.

Source: Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting", arXiv
2010.09686 (capital processes, §4; predictable bets, App. B). A capital starts at 1 and is staked, item by
item, against a hypothesis. If that is true, the capital reaches 1/α at any time with probability at most α
(Ville's inequality), however often one looks: no normal approximation and no fixed number of items.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

from suite.specs import digest_of

Verdict = Literal["pass", "fail", "inconclusive"]
Floats = NDArray[np.float64]

STAKES = {1.0: 0.9, 4.0: 0.1}
"""Multiple of the bet that suits a drop of 0 or 2·margin -> share of the capital that follows it."""
GROWTH = 3
"""How late the larger tasks give more than one item to a round (the power of the share of rounds)."""
PRIOR_VARIANCE, PRIOR_COUNT = 0.1, 20
"""What is believed of the differences' spread before the first item, worth this many items."""
LARGEST_BET = {"pass": 0.9, "fail": 0.5}
"""Keeps every factor positive, and the bounds defined from -11 points up, and up to 100 points."""


@dataclass(frozen=True)
class Decision:
    """What the rounds say. Drops are shares in [-1, 1]; each bound is one-sided and holds at any time."""

    verdict: Verdict
    rounds: int
    """Rounds up to the decision, or all there are."""
    drop: float
    """Mean over rounds and tasks of base minus candidate."""
    upper: float
    lower: float


def order(protocol_digest: str, task: str, items: int) -> NDArray[np.int64]:
    """The items of a task in uniformly random order, the same in every run of a protocol."""
    seed = int(digest_of(["gate", protocol_digest, task, items])[:16], 16)
    return np.random.default_rng(seed).permutation(items)


def round_ends(sizes: dict[str, int]) -> dict[str, NDArray[np.int64]]:
    """How many items of each task are used after each round (rounds + 1 entries, from 0 to all).

    The smallest task gives one item to each round. A larger one starts like that, where equal shares
    tell most per item, and then gives more and more, so that at the end all items are used.
    """
    rounds = min(sizes.values())
    t = np.arange(rounds + 1)
    return {
        task: np.rint(t + (size - rounds) * (t / rounds) ** GROWTH).astype(np.int64)
        for task, size in sizes.items()
    }


def round_means(differences: dict[str, Floats], ends: dict[str, NDArray[np.int64]], rounds: int) -> Floats:
    """Mean difference of each task in each of the first `rounds` rounds (rounds × tasks).

    `differences` holds base minus candidate per task in `order`, at least as many as the rounds use.
    """
    columns = []
    for task, values in differences.items():
        edges = ends[task][: rounds + 1]
        sums = np.concatenate([[0.0], np.cumsum(values[: edges[-1]])])[edges]
        columns.append(np.diff(sums) / np.diff(edges))
    return np.stack(columns, axis=-1)


def bets(means: Floats, margin: float, against: Verdict) -> Floats:
    """Stakes (bets × ... × rounds), each from earlier rounds alone.

    λ = m / E[(d - m)²] maximises the growth to second order when the drop is 0 ("pass") or 2·m ("fail").
    """
    squares = ((means - margin) ** 2).sum(axis=-1)
    before = np.cumsum(squares, axis=-1) - squares
    count = np.arange(means.shape[-2]) * means.shape[-1]
    spread = (PRIOR_VARIANCE * PRIOR_COUNT + before) / (PRIOR_COUNT + count)
    scaled = np.multiply.outer(np.array(list(STAKES)), margin / spread)
    stakes: Floats = np.minimum(scaled, LARGEST_BET[against])
    return stakes


def log_capital(means: Floats, margin: float, stakes: Floats, against: Verdict) -> Floats:
    """Logarithm of the capital after each round (... × rounds).

    "pass" bets against a drop of at least the margin, "fail" against one of at most the margin. Within a
    round all tasks carry the same stake, so by independence and the inequality of arithmetic and geometric
    means E Π(1 + λ(m - d)) ≤ (1 + λ(m - mean drop))^T ≤ 1 under the hypothesis, although a single task may
    well be on the other side of it. The accuracy is the mean over tasks, as on the board.
    """
    gain = (margin - means) if against == "pass" else (means - margin)
    growth = np.log1p(stakes[..., None] * gain).sum(axis=-1)
    shares = np.log(list(STAKES.values())).reshape(-1, *[1] * (growth.ndim - 1))
    logs: Floats = np.logaddexp.reduce(shares + np.cumsum(growth, axis=-1), axis=0)
    return logs


def decide(means: Floats, margin: float, alpha: float = 0.05) -> Decision:
    """Pass or fail at the first round where one of the two capitals reaches 1/α, else inconclusive.

    `means` (rounds × tasks) as from `round_means`; later rounds than the deciding one change nothing.
    """
    level = math.log(1 / alpha)
    crossed: dict[Verdict, int] = {}
    stakes: dict[Verdict, Floats] = {}
    sides: tuple[Verdict, Verdict] = ("fail", "pass")
    for side in sides:
        stakes[side] = bets(means, margin, side)
        hits = np.flatnonzero(log_capital(means, margin, stakes[side], side) >= level)
        if len(hits):
            crossed[side] = int(hits[0]) + 1
    verdict = min(crossed, key=lambda side: crossed[side]) if crossed else "inconclusive"
    rounds = crossed.get(verdict, len(means))
    used = means[:rounds]
    return Decision(
        verdict=verdict,
        rounds=rounds,
        drop=float(used.mean()) if rounds else 0.0,
        upper=_bound(used, stakes["pass"][:, :rounds], "pass", level),
        lower=_bound(used, stakes["fail"][:, :rounds], "fail", level),
    )


def _bound(means: Floats, stakes: Floats, side: Verdict, level: float) -> float:
    """The drop at which the capital, with the same stakes, would just have reached 1/α at some round.

    With the stakes given, capital is monotone in the margin, so that one inversion is a confidence bound.
    """

    def excess(margin: float) -> float:
        return float(log_capital(means, margin, stakes, side).max()) - level

    # Outside this range a factor might be negative and the capital no longer be one.
    low, high = (1.001 - 1 / LARGEST_BET["pass"], 1.0) if side == "pass" else (-1.0, 0.999)
    if not len(means):
        return high if side == "pass" else low
    at_low, at_high = excess(low), excess(high)
    if (at_low >= 0) == (at_high >= 0):
        decided = at_low >= 0
        return low if decided == (side == "pass") else high
    return float(brentq(excess, low, high, xtol=1e-5))


def looks(ends: dict[str, NDArray[np.int64]], first: int = 128) -> list[int]:
    """Rounds after which to look: at least `first` items, then half as many again as used so far.

    The looks decide how items are batched, never the verdict.
    """
    total = np.sum(list(ends.values()), axis=0)
    stops = [0]
    while stops[-1] < len(total) - 1:
        used = total[stops[-1]]
        wanted = int(np.searchsorted(total, used + max(first, used // 2)))
        stops.append(min(wanted, len(total) - 1))
    return stops
