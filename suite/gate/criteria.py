"""The criteria beside accuracy: perplexity, size, memory and throughput of candidate over baseline."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Literal

import numpy as np
from scipy import stats

from suite.errors import InputError
from suite.gate.sequential import Verdict
from suite.records import Perplexity
from suite.specs import Frozen

Phase = Literal["prefill", "decode"]


class Criterion(Frozen):
    """One condition on the candidate and what was found; figures in the criterion's own unit."""

    name: str
    verdict: Verdict
    text: str
    limit: float
    estimate: float | None = None
    lower: float | None = None
    upper: float | None = None
    alpha: float | None = None
    """Chance of a wrong verdict that is allowed; None for a plain comparison of two figures."""
    reason: str = ""
    """Why a verdict is inconclusive although the figures alone would say more."""


def perplexity_ratio(base: Perplexity, candidate: Perplexity, limit: float, alpha: float) -> Criterion:
    """Perplexity of the candidate over the baseline's, by Student's t over the paired windows.

    Both bounds are one-sided at `alpha`. With every window equal, the interval is the estimate.

    Raises:
        InputError: the two were not computed over the same tokens, or windows are missing.
    """
    if (base.tokens_digest, base.window, base.bos) != (
        candidate.tokens_digest,
        candidate.window,
        candidate.bos,
    ):
        raise InputError(
            "--max-perplexity-ratio: baseline and candidate were scored on different tokens (another"
            " tokenizer, text or window), so that their perplexities cannot be compared."
        )
    windows = len(base.window_nlls)
    if windows != len(candidate.window_nlls) or windows < 2:
        raise InputError("--max-perplexity-ratio needs the same windows, at least 2, on both sides.")
    per_window = base.tokens / windows
    gaps = (np.array(candidate.window_nlls) - np.array(base.window_nlls)) / per_window
    if not np.isfinite(gaps).all():
        # Beside a broken baseline nothing can be said of the candidate, good or bad.
        sound = bool(np.isfinite(base.window_nlls).all())
        text = f"perplexity of the {'candidate' if sound else 'baseline'} is not finite (limit {limit:g} ×)"
        broken: Verdict = "fail" if sound else "inconclusive"
        return Criterion(name="max-perplexity-ratio", verdict=broken, text=text, limit=limit, alpha=alpha)
    mean, error = float(gaps.mean()), float(gaps.std(ddof=1)) / math.sqrt(windows)
    reach = float(stats.t.ppf(1 - alpha, windows - 1)) * error
    low, ratio, high = (_exp(mean + offset) for offset in (-reach, 0.0, reach))
    verdict: Verdict = "pass" if high <= limit else "fail" if low > limit else "inconclusive"
    text = (
        f"perplexity {ratio:.3f} × [{low:.3f}, {high:.3f}], limit {limit:g} × ({windows} paired windows,"
        f" α {alpha:.3g})"
    )
    return Criterion(
        name="max-perplexity-ratio",
        verdict=verdict,
        text=text,
        limit=limit,
        estimate=ratio,
        lower=low,
        upper=high,
        alpha=alpha,
    )


def plain_ratio(
    name: str, what: str, base: float, candidate: float, limit: float, how: str = ""
) -> Criterion:
    """Two figures that carry no sampling error, compared.

    The peak of a tiny model may be 0: then 0 is as much, and all else is beyond any limit.
    """
    ratio = candidate / base if base else (math.inf if candidate else 1.0)
    text = f"{what} {ratio:.3f} × ({candidate / 1e6:,.1f} of {base / 1e6:,.1f} MB), limit {limit:g} ×{how}"
    verdict: Verdict = "pass" if ratio <= limit else "fail"
    return Criterion(name=name, verdict=verdict, text=text, limit=limit, estimate=ratio)


def not_compared(name: str, what: str, limit: float, unlike: str) -> Criterion:
    """The verdict on two figures that machines of different kinds gave: neither good nor bad."""
    reason = (
        f"the two records were measured under other conditions ({unlike}); give the checkpoints or models"
        " themselves to have both measured here"
    )
    text = f"{what} is not compared, limit {limit:g} ×"
    return Criterion(name=name, verdict="inconclusive", text=text, limit=limit, reason=reason)


def judge_ratios(ratios: Sequence[float], phase: Phase, limit: float, alpha: float) -> Criterion:
    """The verdict on paired throughput ratios (one per round)."""
    ordered = sorted(ratios)
    middle = statistics.median(ordered)
    # The k-th smallest is a lower bound of the median with error P(Binomial(n, 1/2) < k).
    k = int(stats.binom.ppf(alpha, len(ordered), 0.5))
    low, high = (ordered[k - 1], ordered[-k]) if k else (0.0, math.inf)
    verdict: Verdict = "pass" if low >= limit else "fail" if high < limit else "inconclusive"
    text = (
        f"{phase} {middle:.3f} × [{low:.3f}, {high:.3f}], limit {limit:g} × ({len(ordered)} interleaved"
        f" rounds, α {alpha:.3g})"
    )
    return Criterion(
        name="min-throughput-ratio",
        verdict=verdict,
        text=text,
        limit=limit,
        estimate=middle,
        lower=low,
        upper=high if math.isfinite(high) else None,
        alpha=alpha,
    )


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))
