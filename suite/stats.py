"""Paired statistics on arrays: differences of macro means, simultaneous intervals, ranks, power.

The board's accuracy is a mean over tasks (macro), so every interval here is for a mean over strata, with
items drawn within their task. Rows that are compared share their items, and their covariance is kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import log_softmax
from scipy.stats import binomtest, norm, t

Floats = NDArray[np.float64]
Pairs = Sequence[tuple[int, int]]
"""Comparisons, each (first, second): the difference is second minus first."""

PSEUDO_PAIRS = 2.0
_DRAWS = 20_000


@dataclass(frozen=True)
class Intervals:
    """Estimated differences and intervals that all hold together; arrays have one entry per comparison.

    Each interval is the estimate ± `critical` standard errors.
    """

    estimate: Floats
    standard_error: Floats
    critical: float

    @property
    def half_width(self) -> Floats:
        """Half the length of each interval."""
        return self.critical * self.standard_error

    @property
    def low(self) -> Floats:
        """Lower ends."""
        return self.estimate - self.half_width

    @property
    def high(self) -> Floats:
        """Upper ends."""
        return self.estimate + self.half_width


def macro_differences(
    values: ArrayLike,
    tasks: ArrayLike,
    pairs: Pairs,
    *,
    confidence: float = 0.95,
    pseudo_pairs: float = PSEUDO_PAIRS,
    seed: int = 0,
) -> Intervals:
    """Differences of macro means between rows that share their items, with simultaneous intervals.

    Args:
        values: (rows, items): outcomes in [0, 1], or any other finite number per item.
        tasks: (items,): the task of each item. The macro mean gives every task the same weight.
        pairs: the comparisons.
        confidence: of all intervals together.
        pseudo_pairs: discordant pairs, half of them each way, added to the variance of each comparison and
            spread evenly over the tasks. Without them, rows that agree on every item would seem certain.
            For values other than outcomes pass 0.
        seed: of the joint normal draws that more than one comparison needs; equal seeds, equal intervals.

    The variance is that of a stratified mean of paired differences, with pseudo-observations in the manner
    of Agresti & Min (Statistics in Medicine 24, 2005). The critical value is the quantile of the largest
    |t| over all comparisons under their estimated joint distribution, a multivariate t with the fewest
    Satterthwaite degrees of freedom among them (Hothorn, Bretz & Westfall, Biometrical Journal 50, 2008,
    §3). It is never below that of one comparison alone.

    Raises:
        ValueError: no comparison, shapes that do not fit, or a task with fewer than two items.
    """
    rows, strata = np.asarray(values, float), np.asarray(tasks)
    if rows.ndim != 2 or strata.shape != rows.shape[1:] or not len(pairs):
        raise ValueError("values must be (rows, items), tasks (items,), and pairs must not be empty")
    names, sizes = np.unique(strata, return_counts=True)
    if sizes.min() < 2:
        raise ValueError(f"task '{names[sizes.argmin()]}' has fewer than two items")
    first, second = np.array(pairs).T
    # Only differences matter; taken from the first row they are small, and exact for equal rows.
    rows = rows - rows[0]
    added = pseudo_pairs / len(names)
    estimate, variance, satterthwaite = np.zeros((3, len(pairs)))
    covariance = np.zeros((len(rows), len(rows)))
    for name, n in zip(names, sizes, strict=True):
        block = rows[:, strata == name]
        totals, products = block.sum(axis=1), block @ block.T
        covariance += (products / n - np.outer(totals, totals) / n**2) / (n - 1)
        sums = totals[second] - totals[first]
        spread = (_quadratic(products, first, second) + added) / (n + added) - (sums / (n + added)) ** 2
        of_mean = np.maximum(spread, 0.0) / (n + added - 1)
        estimate += sums / n
        variance += of_mean
        satterthwaite += of_mean**2 / (n + added - 1)
    known = satterthwaite > 0
    freedom = float((variance[known] ** 2 / satterthwaite[known]).min()) if known.any() else math.inf
    critical = float(t.ppf((1 + confidence) / 2, freedom))
    if len(pairs) > 1:
        spreads = np.sqrt(np.maximum(_quadratic(covariance, first, second), 0.0))
        largest = _largest_t(covariance, spreads, first, second, freedom, np.random.default_rng(seed))
        critical = max(critical, float(np.quantile(largest, confidence)))
    return Intervals(estimate / len(names), np.sqrt(variance) / len(names), critical)


def _quadratic(matrix: Floats, first: NDArray[np.int_], second: NDArray[np.int_]) -> Floats:
    """(e_j - e_i)ᵀ M (e_j - e_i) for each comparison (i, j)."""
    diagonal = matrix.diagonal()
    return np.asarray(diagonal[first] + diagonal[second] - 2 * matrix[first, second])


def _largest_t(
    covariance: Floats,
    spreads: Floats,
    first: NDArray[np.int_],
    second: NDArray[np.int_],
    freedom: float,
    generator: np.random.Generator,
) -> Floats:
    """Draws (_DRAWS,) of max |t| over all comparisons, given the covariance (rows, rows) of the means."""
    eigenvalues, eigenvectors = np.linalg.eigh(covariance)
    root = eigenvectors * np.sqrt(np.maximum(eigenvalues, 0.0))
    means = generator.standard_normal((_DRAWS, len(covariance))) @ root.T
    if math.isfinite(freedom):
        means *= np.sqrt(freedom / generator.chisquare(freedom, (_DRAWS, 1)))
    largest = np.zeros(_DRAWS)
    for i, j, spread in zip(first, second, spreads, strict=True):
        if spread > 1e-12:
            np.maximum(largest, np.abs(means[:, j] - means[:, i]) / spread, out=largest)
    return largest


def all_pairs(rows: int) -> list[tuple[int, int]]:
    """Every comparison among `rows` rows once."""
    return [(i, j) for i in range(rows) for j in range(i + 1, rows)]


def rank_intervals(intervals: Intervals, pairs: Pairs, rows: int) -> list[tuple[int, int]]:
    """The ranks each of `rows` rows can have: 1 + the rows surely better, to all minus the surely worse.

    `intervals` must hold for all pairs together; then all rank intervals hold with that confidence (Mogstad,
    Romano, Shaikh & Wilhelm, Review of Economic Studies 91, 2024). Larger values are better.
    """
    better, worse = np.zeros(rows, int), np.zeros(rows, int)
    for (first, second), low, high in zip(pairs, intervals.low, intervals.high, strict=True):
        if low > 0:
            winner, loser = second, first
        elif high < 0:
            winner, loser = first, second
        else:
            continue
        better[loser] += 1
        worse[winner] += 1
    return [(int(1 + b), int(rows - w)) for b, w in zip(better, worse, strict=True)]


def flips(first: ArrayLike, second: ArrayLike) -> tuple[int, int]:
    """Items (lost, won) by the second row: outcomes (items,) that went down, and up."""
    change = np.asarray(second, float) - np.asarray(first, float)
    return int((change < 0).sum()), int((change > 0).sum())


def mcnemar(lost: int, won: int) -> float:
    """Exact two-sided p value of McNemar's test from the discordant counts; 1 without any."""
    return float(binomtest(lost, lost + won).pvalue) if lost + won else 1.0


def holm(p_values: ArrayLike) -> Floats:
    """Holm's step-down adjustment of p values (tests,) (Scandinavian Journal of Statistics 6, 1979)."""
    p = np.asarray(p_values, float)
    order = np.argsort(p)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1.0)
    return adjusted


def log_probability(log_likelihoods: ArrayLike, answer: int) -> float:
    """Log-probability in nats of the right answer: normalized over the choices.

    Normalizing takes out what the choices share, such as a model that finds all text less likely. With a
    single continuation there is nothing to normalize over, and its log-likelihood is returned.
    """
    values = np.asarray(log_likelihoods, float)
    return float(values[0]) if len(values) == 1 else float(log_softmax(values)[answer])


def smallest_difference(
    sizes: Sequence[int], discordant: float, *, alpha: float = 0.05, power: float = 0.8
) -> float | None:
    """Smallest true difference of macro accuracies that a two-sided paired test shows with this power.

    Args:
        sizes: items of each task.
        discordant: share ψ of items on which the two rows differ.
        alpha: level of the test.
        power: wanted probability of a significant difference.

    With s² = T² / Σ 1/nₜ in place of n it is Miettinen's formula for McNemar's test (Biometrics 24, 1968),
    δ s = z_α √ψ + z_β √(ψ − δ²), solved for δ. None where even δ = ψ, all of it one way, is not enough.
    """
    effective = len(sizes) ** 2 / sum(1 / n for n in sizes)
    z_alpha, z_beta = float(norm.ppf(1 - alpha / 2)), float(norm.ppf(power))
    under_root = effective + z_beta**2 - z_alpha**2
    if under_root < 0:
        return None
    root = math.sqrt(effective) * z_alpha + z_beta * math.sqrt(under_root)
    difference = math.sqrt(discordant) * root / (effective + z_beta**2)
    return difference if difference <= discordant else None
