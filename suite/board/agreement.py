"""Whether two protocols order the same methods alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from scipy.stats import kendalltau

FEWEST_CELLS = 4


@dataclass(frozen=True)
class Agreement:
    """Kendall's τ-b of mean accuracy under two protocols, over the cells that both have."""

    model: str
    protocols: tuple[str, str]
    cells: int
    tau: float
    p_value: float
    """Of the hypothesis that the two orders are unrelated."""

    def __str__(self) -> str:
        first, second = self.protocols
        return (
            f"{self.model}: {first} and {second} order {self.cells} common cells alike with Kendall's"
            f" τ = {self.tau:.2f} (p = {self.p_value:.2g})"
        )


def agreements(rows: Sequence[Mapping[str, Any]]) -> list[Agreement]:
    """Every pair of protocols with at least four finished compressed cells in common, by model.

    `rows` are those of `suite.board.tables.rows`. A cell is a recipe at a budget under a seed, once where
    two budgets lead to one checkpoint; each protocol brings its own calibration text. The same protocol on
    two devices is no two protocols.
    """
    scores: dict[str, dict[str, dict[tuple[Any, ...], float]]] = {}
    names: dict[str, str] = {}
    for row in rows:
        names[row["protocol"]] = row["protocol_name"]
        if row["accuracy"] is not None and row["recipe"] != "dense" and not row.get("measured_at"):
            cell = (row["recipe"], row["budget"], row["seed"], row["healing_tokens"])
            scores.setdefault(row["model"], {}).setdefault(row["protocol"], {})[cell] = row["accuracy"]
    found = []
    for model, by_protocol in scores.items():
        for one, other in combinations(sorted(by_protocol), 2):
            common = sorted(by_protocol[one].keys() & by_protocol[other].keys())
            if names[one] == names[other] or len(common) < FEWEST_CELLS:
                continue
            tau, p_value = kendalltau(
                [by_protocol[one][cell] for cell in common], [by_protocol[other][cell] for cell in common]
            )
            if not math.isnan(tau):
                found.append(Agreement(model, (one, other), len(common), float(tau), float(p_value)))
    return found
