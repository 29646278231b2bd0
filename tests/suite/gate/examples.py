"""Records with chosen outcomes, and tiny checkpoints, for the tests of the gate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from suite import checkpoint
from suite.conformance import tiny
from suite.records import Record, RecordStore
from suite.specs import Budget, RunSpec, TaskSpec, digest_of
from tests.suite import examples

PROTOCOL = examples.PROTOCOL.model_copy(
    update={"tasks": (TaskSpec(name="one", metric="acc"), TaskSpec(name="two", metric="acc"))}
)
CONDITIONS = {
    "device": "a processor",
    "dtype": "float32",
    "threads": 1,
    "versions": dict.fromkeys(("weighin", "torch", "transformers", "tokenizers", "lm_eval", "datasets"), "1"),
    "git": "0123456789ab",
}
PROTOCOL_FILE = """
name: tiny
description: a protocol for tests
calibration: {source: pydoc, count: 2, length: 16}
perplexity: {source: pydoc-held-out, window: 32, windows: 4}
tasks:
  - {name: physical, metric: acc_norm, limit: 20}
  - {name: passage, metric: acc, limit: 10}
speed: {prefill_batch: 1, prefill_length: 8, decode_prompt: 4, decode_tokens: 2, train_length: 8, repeats: 2}
"""


def row(task: str, index: int, correct: float) -> dict[str, Any]:
    return {
        "task": task,
        "subtask": task,
        "item": f"{task}-{index:03}",
        "hash": digest_of([task, index]),
        "family": task,
        "log_likelihoods": [-1.0, -2.0],
        "prediction": "1" if correct else "0",
        "target": "1",
        "correct": correct,
    }


def save_record(
    folder: Path, correct: dict[str, Sequence[float]], recipe: str = "dense", **fields: Any
) -> Path:
    """A record of the two tasks with these outcomes; `fields` replace those of the record."""
    spec = RunSpec(
        model=fields.pop("model", "nowhere/to-be-found"),
        model_digest=fields.pop("model_digest", "0"),
        recipe=recipe,
        method_versions=(),
        budget=Budget.parse("none"),
        protocol=fields.pop("protocol", PROTOCOL),
        protocol_digest="1",
        calibration=PROTOCOL.calibration,
    )
    record = Record(
        status="ok",
        spec=spec,
        dense=examples.DENSE,
        measurements=fields.pop("measurements", examples.measurements(1000)),
        conditions=fields.pop("conditions", CONDITIONS),
        **fields,
    )
    rows = [row(task, index, value) for task, values in correct.items() for index, value in enumerate(values)]
    return RecordStore(folder).save(record, rows)


def flipped(values: Sequence[float], count: int) -> list[float]:
    """The outcomes with `count` right answers, spread evenly, turned wrong."""
    right = [index for index, value in enumerate(values) if value]
    lost = {right[i * len(right) // count] for i in range(count)} if count else set()
    return [0.0 if index in lost else value for index, value in enumerate(values)]


def save_checkpoint(folder: Path, recipe: str | None = None, noise: float = 0.0, seed: int = 0) -> Path:
    """A tiny model, compressed by a recipe or disturbed, beside its tokenizer."""
    model = tiny.build("llama", seed=seed)
    if recipe:
        tiny.compress(model, recipe)
    if noise:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(1)
            for parameter in model.parameters():
                parameter.add_(noise * torch.randn_like(parameter))
    checkpoint.save(model, tiny.byte_tokenizer(), folder)
    return folder
