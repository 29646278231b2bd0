"""Items or windows that several rows share, brought into one order, and the noise floor of two runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from suite import stats
from suite.errors import InputError
from suite.evaluate import items
from suite.records import Noise, Perplexity

_KEYS = ["task", "subtask", "item", "hash"]


@dataclass(frozen=True)
class Paired:
    """Outcomes of the same items for several rows."""

    tasks: np.ndarray[Any, Any]
    """(items,): the task of each item."""
    correct: stats.Floats
    """(rows, items)."""
    frames: Mapping[str, pd.DataFrame]
    """Each row's items in this order, by the row's name."""

    @property
    def sizes(self) -> list[int]:
        """Items of each task, in alphabetical order of the tasks."""
        return [int(n) for n in np.unique(self.tasks, return_counts=True)[1]]

    @cached_property
    def log_probabilities(self) -> stats.Floats:
        """(rows, items): log-probability of the right answer in nats, NaN where it is not known."""
        return np.array([_log_probabilities(frame) for frame in self.frames.values()])

    @cached_property
    def likely(self) -> np.ndarray[Any, Any]:
        """(items,): where the right answer's log-probability is known in every row."""
        return np.asarray(~np.isnan(self.log_probabilities).any(axis=0))


def item_keys(frame: pd.DataFrame) -> list[str]:
    """What names the items of a record, sorted: task, subtask, item and the hash of its content."""
    return sorted(map("\t".join, frame[_KEYS].fillna("").astype(str).itertuples(index=False)))


def pair_items(frames: Mapping[str, pd.DataFrame]) -> Paired:
    """Bring the items of several rows, by name, into one order.

    Raises:
        InputError: the rows do not have exactly the same items.
    """
    indexed = _indexed(frames)
    (first, reference), *others = indexed.items()
    for name, frame in indexed.items():
        if not frame.index.is_unique:
            raise InputError(f"the items of '{name}' are not unique; its file of items is damaged.")
    for name, frame in others:
        if not frame.index.equals(reference.index):
            here = len(reference.index.difference(frame.index))
            there = len(frame.index.difference(reference.index))
            raise InputError(
                f"'{first}' and '{name}' were not scored on the same items: {here:,} are in '{first}' alone,"
                f" {there:,} in '{name}' alone. Run both under one protocol and one --limit."
            )
    return Paired(
        tasks=reference.index.get_level_values("task").to_numpy(),
        correct=np.array([frame["correct"].to_numpy(float) for frame in indexed.values()]),
        frames=indexed,
    )


def _indexed(frames: Mapping[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    # An older file may lack a column; then no row is held to it.
    columns = [key for key in _KEYS if all(frame[key].notna().all() for frame in frames.values())]
    return {name: frame.set_index(columns).sort_index() for name, frame in frames.items()}


def _log_probabilities(frame: pd.DataFrame) -> list[float]:
    columns = frame[["log_likelihoods", "prediction", "target", "correct"]]
    return [_log_probability(*row) for row in columns.itertuples(index=False)]


def _log_probability(log_likelihoods: Any, prediction: Any, target: Any, correct: float) -> float:
    choices = len(log_likelihoods) if isinstance(log_likelihoods, (list, np.ndarray)) else 0
    answer = 0 if choices == 1 else _answer(choices, str(prediction), str(target), correct)
    if not choices or answer is None or not np.isfinite(log_likelihoods).all():
        return math.nan
    return stats.log_probability(log_likelihoods, answer)


def _answer(choices: int, prediction: str, target: str, correct: float) -> int | None:
    """The right choice. Some tasks store its text; then prediction and outcome may still give it away."""
    if prediction.isdecimal() and int(prediction) < choices:
        if correct == 1:
            return int(prediction)
        if choices == 2:
            return 1 - int(prediction)
    return int(target) if target.isdecimal() and int(target) < choices else None


def pair_windows(texts: Mapping[str, Perplexity]) -> dict[str, stats.Floats]:
    """Log-likelihoods (windows,) per token of those `texts` that are finite and of the text most have."""
    digests = [(text.tokens_digest, len(text.window_nlls)) for text in texts.values()]
    common = max(digests, key=digests.count, default=None)
    return {
        name: -np.array(text.window_nlls) * len(text.window_nlls) / text.tokens
        for (name, text), digest in zip(texts.items(), digests, strict=True)
        if digest == common and np.isfinite(text.window_nlls).all()
    }


def noise(
    changed: str,
    first: Sequence[Mapping[str, Any]],
    second: Sequence[Mapping[str, Any]],
    first_perplexity: Perplexity,
    second_perplexity: Perplexity,
) -> Noise:
    """The noise floor between two runs of one checkpoint, from their item rows and perplexities.

    Without items, as under a protocol of perplexity alone, it is that of the perplexity.

    Raises:
        InputError: the runs do not have the same items.
    """
    ratio = float(np.exp(second_perplexity.nll_per_token - first_perplexity.nll_per_token))
    if not first and not second:
        return Noise(
            changed=changed,
            items=0,
            flips=0,
            accuracy_difference=0.0,
            largest_log_likelihood_difference=0.0,
            perplexity_ratio=ratio,
        )
    frames = {
        "first run": items.frame([dict(row) for row in first]),
        "second run": items.frame([dict(row) for row in second]),
    }
    paired = pair_items(frames)
    scores = [
        np.concatenate([np.asarray(row, float) for row in frame["log_likelihoods"]])
        for frame in paired.frames.values()
    ]
    means = [
        np.mean([row[paired.tasks == task].mean() for task in np.unique(paired.tasks)])
        for row in paired.correct
    ]
    return Noise(
        changed=changed,
        items=len(paired.tasks),
        flips=sum(stats.flips(*paired.correct)),
        accuracy_difference=float(means[1] - means[0]),
        largest_log_likelihood_difference=float(np.abs(scores[1] - scores[0]).max(initial=0.0)),
        perplexity_ratio=ratio,
    )
