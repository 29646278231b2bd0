"""Perplexity, ratios and throughput: what passes, what fails, and what cannot be told."""

from __future__ import annotations

import math

import numpy as np
import pytest

from suite.errors import InputError
from suite.gate import criteria
from suite.records import Perplexity
from tests.suite import examples

WINDOW = 64


def perplexity(nlls: np.ndarray, digest: str = "y") -> Perplexity:
    return examples.measurements(1000).perplexity.model_copy(
        update={
            "window_nlls": tuple(nlls.tolist()),
            "tokens": WINDOW * len(nlls),
            "tokens_digest": digest,
        }
    )


def windows(count: int, ratio: float, noise: float, seed: int = 0) -> tuple[Perplexity, Perplexity]:
    generator = np.random.default_rng(seed)
    base = generator.normal(3.0, 0.5, count)
    other = base + math.log(ratio) + generator.normal(0, noise, count)
    return perplexity(WINDOW * base), perplexity(WINDOW * other)


@pytest.mark.parametrize(
    ("ratio", "noise", "verdict"),
    [(1.0, 0.01, "pass"), (1.2, 0.01, "fail"), (1.05, 0.05, "inconclusive"), (1.0, 0.5, "inconclusive")],
)
def test_perplexity_is_compared_window_by_window(ratio: float, noise: float, verdict: str) -> None:
    # Between windows the spread is 0.5 nats: an unpaired comparison of 24 would see nothing.
    found = criteria.perplexity_ratio(*windows(24, ratio, noise), limit=1.05, alpha=0.05)
    assert found.verdict == verdict
    assert found.lower < found.estimate < found.upper  # type: ignore[operator]


def test_perplexity_errs_as_rarely_as_it_says() -> None:
    runs = [
        criteria.perplexity_ratio(*windows(24, 1.05, 0.05, seed), limit=1.05, alpha=0.05).verdict
        for seed in range(1000)
    ]
    for wrong in ("pass", "fail"):
        assert 0.02 < runs.count(wrong) / len(runs) < 0.08


def test_equal_perplexities_pass_and_broken_ones_fail() -> None:
    base, _ = windows(4, 1.0, 0.0)
    same = criteria.perplexity_ratio(base, base, limit=1.0, alpha=0.05)
    assert (same.verdict, same.estimate) == ("pass", 1.0)
    broken = perplexity(np.full(4, math.nan))
    assert criteria.perplexity_ratio(base, broken, limit=1.05, alpha=0.05).verdict == "fail"
    hopeless = perplexity(np.array(base.window_nlls) + 1e6 * np.arange(1, 5))
    assert math.isfinite(criteria.perplexity_ratio(base, hopeless, limit=1.05, alpha=0.05).estimate or 0)


@pytest.mark.parametrize("other", [3.0, math.nan])
def test_a_broken_baseline_is_not_blamed_on_the_candidate(other: float) -> None:
    broken, candidate = perplexity(np.full(4, math.inf)), perplexity(np.full(4, other))
    found = criteria.perplexity_ratio(broken, candidate, limit=1.05, alpha=0.05)
    assert found.verdict == "inconclusive"
    assert "of the baseline is not finite" in found.text


def test_perplexities_of_other_tokens_are_not_compared() -> None:
    base, _ = windows(4, 1.0, 0.0)
    with pytest.raises(InputError, match="different tokens"):
        criteria.perplexity_ratio(base, base.model_copy(update={"tokens_digest": "z"}), 1.05, 0.05)
    with pytest.raises(InputError, match="same windows"):
        criteria.perplexity_ratio(base, base.model_copy(update={"window_nlls": ()}), 1.05, 0.05)


@pytest.mark.parametrize(("candidate", "verdict"), [(105.0, "pass"), (106.0, "fail")])
def test_a_plain_ratio_is_held_against_its_limit(candidate: float, verdict: str) -> None:
    assert criteria.plain_ratio("max-size-ratio", "size", 100.0, candidate, 1.05).verdict == verdict


@pytest.mark.parametrize(("candidate", "verdict"), [(0.0, "pass"), (1.0, "fail")])
def test_a_peak_of_nothing_divides_nothing(candidate: float, verdict: str) -> None:
    assert criteria.plain_ratio("max-memory-ratio", "peak memory", 0.0, candidate, 1.05).verdict == verdict


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [
        ([1.0] * 15, "pass"),
        ([0.5] * 15, "fail"),
        ([1.0] * 8 + [0.5] * 7, "inconclusive"),
        ([1.0] * 13 + [0.01] * 2, "pass"),
        ([1.0] * 3, "inconclusive"),
    ],
)
def test_throughput_is_judged_by_ranks_so_that_a_hiccup_decides_nothing(
    ratios: list[float], verdict: str
) -> None:
    assert criteria.judge_ratios(ratios, "decode", limit=0.9, alpha=0.05).verdict == verdict


@pytest.mark.parametrize("alpha", [0.05, 0.0125])
def test_the_rank_interval_covers_the_median_as_often_as_it_says(alpha: float) -> None:
    drawn = np.random.default_rng(0).lognormal(0, 0.3, (4000, 15))
    found = [criteria.judge_ratios(list(row), "decode", limit=1.0, alpha=alpha).verdict for row in drawn]
    assert found.count("pass") / len(found) <= alpha
    assert found.count("fail") / len(found) <= alpha
    assert found.count("fail") > 0
