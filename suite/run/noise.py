"""How far the numbers move when nothing but the way of computing them changes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from suite.evaluate import harness, perplexity
from suite.paired import noise
from suite.records import Noise, Perplexity
from suite.specs import Protocol

ITEMS_PER_TASK = 200
_BATCH_FACTOR = 4


def noise_floor(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    protocol: Protocol,
    first: tuple[list[dict[str, Any]], Perplexity],
    folder: Path | None = None,
    limit: int | None = None,
) -> list[Noise]:
    """Score a model again with another batch size, and with another thread count on a CPU.

    `first` is what the first run gave: its item rows and perplexity. Multiple-choice tasks only, at
    most 200 items each: generation takes minutes, and these say how large the rounding is. Where a task
    has more items than that, those 200 are scored once more as in the first run, so that the items they
    share their batches with stay the same.
    """
    from suite.evaluate.model import usual_tokens_per_batch  # lm-eval takes seconds to import

    rows, ppl = first
    scored = {row["task"] for row in rows if row["log_likelihoods"]}
    protocol = protocol.model_copy(
        update={"tasks": tuple(task for task in protocol.tasks if task.name in scored)}
    )
    limit = min(limit or ITEMS_PER_TASK, ITEMS_PER_TASK)
    usual = protocol.tokens_per_batch or usual_tokens_per_batch(model.device)

    def scored_as(other: Protocol) -> list[dict[str, Any]]:
        return harness.evaluate(model, tokenizer, other, folder=folder, limit=limit)[1]

    counts = Counter(row["task"] for row in rows if row["task"] in scored)
    if counts and max(counts.values()) > limit:
        rows = scored_as(protocol)

    def again(changed: str, **update: Any) -> Noise:
        other = protocol.model_copy(update=update)
        again_rows = scored_as(other)
        keys = {(row["subtask"], row["item"]) for row in again_rows}
        same = [row for row in rows if (row["subtask"], row["item"]) in keys]
        batch = perplexity.BATCH_SIZE // 2 if update else perplexity.BATCH_SIZE
        measured = perplexity.measure(model, tokenizer, protocol.perplexity, folder, batch)
        return noise(changed, same, again_rows, ppl, measured)

    larger = usual * _BATCH_FACTOR
    floor = [again(f"batches of {larger:,} tokens instead of {usual:,}", tokens_per_batch=larger)]
    threads = torch.get_num_threads()
    if model.device.type == "cpu":
        other_threads = threads - 1 or 2
        torch.set_num_threads(other_threads)
        try:
            plural = "s" if other_threads > 1 else ""
            floor.append(again(f"{other_threads} thread{plural} instead of {threads}"))
        finally:
            torch.set_num_threads(threads)
    return floor
