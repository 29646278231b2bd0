"""Per-item outcomes: one row per scored item, kept beside the record as parquet."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from typing import Any

import pandas as pd

from suite.specs import digest_of

Item = tuple[str, int]
"""One item: the (sub)task that holds it and its place there."""

COLUMNS = ["task", "subtask", "item", "hash", "family", "log_likelihoods", "prediction", "target", "correct"]


def spread(sizes: Mapping[str, int], limit: int | None) -> list[Item]:
    """`limit` items (all, when None), spread evenly over the parts of a task, in the order of `sizes`.

    `sizes` is the number of items of each part. Parts take turns in an order that their names' digests
    give: fewer items than parts do not all come from the first in the alphabet, and the items of a small
    limit are among those of a larger one.
    """
    turns = sorted(sizes, key=digest_of)
    rounds = ((name, i) for i in range(max(sizes.values(), default=0)) for name in turns if i < sizes[name])
    chosen = set(itertools.islice(rounds, limit))
    return [(name, i) for name, size in sizes.items() for i in range(size) if (name, i) in chosen]


def rows_from_samples(
    task: str, subtask: str, metric: str, samples: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Turn lm-eval's logged samples of one task into item rows.

    `log_likelihoods` holds one summed log-likelihood per choice (one for a single continuation, none
    for generated text); `correct` is the task's metric on that item.
    """
    rows = []
    for sample in samples:
        doc, answers = sample["doc"], sample["filtered_resps"]
        scored = [answer for answer in answers if not isinstance(answer, str)]
        log_likelihoods = [float(answer[0]) for answer in scored]
        rows.append(
            {
                "task": task,
                "subtask": subtask,
                "item": str(doc.get("id", sample["doc_id"])),
                "hash": sample["doc_hash"],
                "family": str(doc.get("family", subtask)),
                "log_likelihoods": log_likelihoods,
                "prediction": _prediction(answers, log_likelihoods, metric, sample),
                "target": _text(sample["target"]),
                "correct": float(sample[metric]),
            }
        )
    return rows


def frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """The rows as a table with the columns every version of the store has."""
    return pd.DataFrame(rows, columns=COLUMNS)


def _prediction(answers: list[Any], log_likelihoods: list[float], metric: str, sample: dict[str, Any]) -> str:
    if not log_likelihoods:
        return _text(answers[0])
    if len(log_likelihoods) == 1:
        return "greedy" if answers[0][1] else "not greedy"
    scores = log_likelihoods
    if metric == "acc_norm":
        lengths = [len(argument[1].lstrip(" ")) for argument in _arguments(sample)]
        scores = [score / length for score, length in zip(scores, lengths, strict=True)]
    return str(scores.index(max(scores)))


def _arguments(sample: dict[str, Any]) -> list[tuple[str, str]]:
    arguments = sample["arguments"]
    return [(a[0], a[1]) for a in arguments]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
