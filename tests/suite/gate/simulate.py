"""How often the gate errs and how many items it needs, simulated over real per-item outcomes.

`python -m tests.suite.gate.simulate 2000` prints the table with 2,000 replications per line.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats
from tabulate import tabulate

from suite.gate.sequential import bets, log_capital, round_ends
from suite.records import RecordStore

RESULTS = Path(__file__).parents[3] / "results"
PAIRS = {
    "rtn-int8": ("rtn-int8", "bytes=0.55"),
    "rtn-int4": ("rtn-int4", "bytes=0.55"),
    "svd": ("svd", "params=0.9"),
}


@dataclass(frozen=True)
class Pair:
    """Outcomes of dense and a compressed model on the same items, one row of the frame per item."""

    name: str
    items: pd.DataFrame

    @property
    def sizes(self) -> dict[str, int]:
        return self.items.groupby("task", sort=False).size().to_dict()

    @property
    def discordance(self) -> float:
        """Share of items on which the two differ, the mean over tasks as for the accuracy."""
        return float((self.items.difference != 0).groupby(self.items.task).mean().mean())

    @property
    def accuracy(self) -> float:
        return float(self.items.correct_base.groupby(self.items.task).mean().mean())


def real_pair(name: str) -> Pair:
    """One pair from the committed records of the embedded protocol."""
    records = {
        (record.spec.recipe, str(record.spec.budget)): record
        for record in RecordStore(RESULTS).all()
        if record.spec.protocol.name == "embedded" and record.status == "ok"
    }
    store = RecordStore(RESULTS)
    base, other = (
        pd.read_parquet(store.path(records[key].spec).with_suffix(".items.parquet"))
        for key in (("dense", "none"), PAIRS[name])
    )
    items = base.merge(other, on=["task", "subtask", "item", "hash"], suffixes=("_base", "_other"))
    items["difference"] = items.correct_base - items.correct_other
    return Pair(name, items)


def draw(
    pair: Pair, drop: float, sizes: dict[str, int], replications: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Round means (replications × rounds × tasks) of resampled items, and items used after each round.

    Which items the models disagree on is resampled from the real pair; who is right on such an item is
    drawn anew, so that the expected drop is exactly `drop`: at 0, which one is the base is a coin toss.
    """
    generator = np.random.default_rng(seed)
    if abs(drop) > pair.discordance:
        raise ValueError(f"{pair.name}: no drop of {drop} with a discordance of {pair.discordance}")
    in_favour = (1 + drop / pair.discordance) / 2
    ends = round_ends(sizes)
    columns = []
    for task, size in sizes.items():
        discordant = (pair.items.difference[pair.items.task == task] != 0).to_numpy()
        chosen = generator.choice(discordant, (replications, size))
        signs = np.where(generator.random((replications, size)) < in_favour, 1, -1)
        sums = np.cumsum(np.pad(chosen * signs, ((0, 0), (1, 0))), axis=1, dtype=float)[:, ends[task]]
        columns.append(np.diff(sums, axis=1) / np.diff(ends[task]))
    return np.stack(columns, axis=-1), np.sum(list(ends.values()), axis=0)


@dataclass(frozen=True)
class Outcome:
    """Shares of the three verdicts and the mean number of items up to the verdict."""

    passed: float
    failed: float
    items: float

    @property
    def inconclusive(self) -> float:
        return 1 - self.passed - self.failed


def simulate(
    pair: Pair,
    margin: float,
    drop: float,
    enlarged: float = 1.0,
    replications: int = 400,
    alpha: float = 0.05,
    seed: int = 0,
) -> Outcome:
    """Run the gate on many resampled item sets of a true drop; `enlarged` multiplies every task's items."""
    sizes = {task: round(size * enlarged) for task, size in pair.sizes.items()}
    first = {"pass": [], "fail": []}
    for start in range(0, replications, 100):
        means, used = draw(pair, drop, sizes, min(100, replications - start), seed + start)
        for side, found in first.items():
            capital = log_capital(means, margin, bets(means, margin, side), side)
            hit = capital >= math.log(1 / alpha)
            found.append(np.where(hit.any(axis=1), hit.argmax(axis=1), means.shape[1]))
    passing, failing = (np.concatenate(first[side]) for side in ("pass", "fail"))
    stop = np.minimum(np.minimum(passing, failing), len(used) - 2)
    return Outcome(
        passed=float((passing < failing).mean()),
        failed=float((failing < passing).mean()),
        items=float(used[stop + 1].mean()),
    )


def unpaired_items(accuracy: float, margin: float, alpha: float = 0.05, power: float = 0.9) -> float:
    """Items per model of the fixed-size two-proportion z-test that tells drops one margin apart."""
    z = stats.norm.ppf(1 - alpha) + stats.norm.ppf(power)
    return float(z**2 * 2 * accuracy * (1 - accuracy) / margin**2)


def table(replications: int) -> list[dict[str, object]]:
    """One line per pair, margin, number of items and true drop."""
    lines = []
    for name in PAIRS:
        pair = real_pair(name)
        available = sum(pair.sizes.values())
        for enlarged in (1.0, 10_000 / available, 100_000 / available):
            for margin in (0.01, 0.02, 0.03):
                for multiple in (0, 1, 2):
                    if multiple * margin > pair.discordance:
                        continue
                    found = simulate(pair, margin, multiple * margin, enlarged, replications)
                    fixed = unpaired_items(pair.accuracy, margin)
                    lines.append(
                        {
                            "pair": name,
                            "discordance %": 100 * pair.discordance,
                            "items": round(available * enlarged),
                            "margin": 100 * margin,
                            "true drop": 100 * multiple * margin,
                            "pass %": 100 * found.passed,
                            "fail %": 100 * found.failed,
                            "inconclusive %": 100 * found.inconclusive,
                            "mean items": round(found.items),
                            "unpaired": round(fixed),
                            "fewer": fixed / found.items,
                        }
                    )
    return lines


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 400
    print(tabulate(table(count), headers="keys", tablefmt="github", floatfmt=".1f", intfmt=","))  # noqa: T201
