"""Records and files that several tests need."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from suite.records import (
    Compression,
    Failure,
    Measurements,
    Memory,
    Perplexity,
    Record,
    Sizes,
    TaskResult,
    Throughput,
)
from suite.specs import Budget, CalibrationSpec, PerplexitySpec, Protocol, RunSpec, TaskSpec

PROTOCOL = Protocol(
    name="example",
    description="for tests",
    calibration=CalibrationSpec(source="pydoc", count=2, length=16),
    perplexity=PerplexitySpec(source="pydoc-held-out", window=16, windows=2),
    tasks=(TaskSpec(name="physical", metric="acc_norm"),),
)
DENSE = Sizes(params=1000, decoder_params=800, bytes_disk=2000, bytes_resident=2000, bytes_nominal=2000)

TINY_PROTOCOL = """
name: tiny
description: a protocol for tests
calibration: {source: pydoc, count: 2, length: 16}
perplexity: {source: pydoc-held-out, window: 32, windows: 2}
tasks:
  - {name: physical, metric: acc_norm, limit: 3}
  - {name: passage, metric: acc, limit: 2}
speed: {prefill_batch: 1, prefill_length: 8, decode_prompt: 4, decode_tokens: 2, train_length: 8, repeats: 2}
"""

PLUGIN = '''
"""A method from outside the repository."""
import os
import time
from suite.method import Method, MethodConfig, Plan, register
from suite.models.anatomy import drop_blocks

@register
class Outside(Method[MethodConfig]):
    """Drops one block."""
    name = "{name}"
    family = "example"
    source = "a test"

    def plan(self, anatomy, target, seed):
        return Plan(knobs={{"remove": 1}}, drop=(1,))

    def compress(self, model, plan, calibration):
        {body}
'''


def write_plugin(folder: Path, name: str, body: str = "drop_blocks(model, plan.drop)") -> str:
    """A plug-in file with one method whose `compress` is `body`; returns its path."""
    path = folder / f"{name.replace('-', '_')}.py"
    path.write_text(PLUGIN.format(name=name, body=body))
    return str(path)


def spec(recipe: str = "svd", budget: str = "params=0.8", **fields: Any) -> RunSpec:
    """A cell of the example protocol."""
    return RunSpec(
        model=fields.pop("model", "tiny"),
        model_digest="0",
        recipe=recipe,
        method_versions=tuple(f"{stage}@1" for stage in recipe.split("+")),
        budget=Budget.parse(budget),
        protocol=PROTOCOL,
        protocol_digest="1",
        calibration=PROTOCOL.calibration,
        **fields,
    )


def measurements(params: int, accuracy: float = 0.6, perplexity: float = 20.0) -> Measurements:
    """Made-up measurements of a model with `params` parameters of two bytes."""
    rate = Throughput(tokens_per_s=1e5 / params, repeats=(1.0,), batch=1, length=1)
    return Measurements(
        sizes=Sizes(
            params=params,
            decoder_params=params - 200,
            bytes_disk=2 * params,
            bytes_resident=2 * params,
            bytes_nominal=2 * params,
        ),
        memory=Memory(load=10, inference=20, how="test"),
        prefill=rate,
        decode=rate,
        training=rate,
        trainable_params=params,
        perplexity=Perplexity(
            perplexity=perplexity,
            nll_per_token=3.0,
            tokens=30,
            window=16,
            stride=16,
            bos=False,
            source="x",
            tokens_digest="y",
        ),
        tasks=(
            TaskResult(
                task="physical",
                metric="acc_norm",
                value=accuracy,
                standard_error=0.05,
                items=110,
                version="1.0",
                fewshot=0,
                chance=0.33,
            ),
        ),
    )


def finished(recipe: str = "svd", budget: str = "params=0.8", params: int = 800, **fields: Any) -> Record:
    """A record of a cell that went well."""
    chosen = {key: fields.pop(key) for key in ("accuracy", "perplexity") if key in fields}
    return Record(
        status="ok",
        spec=spec(recipe, budget, **fields),
        dense=DENSE,
        measurements=measurements(params, **chosen),
        compression=Compression(seconds=1.5, peak_bytes=100, peak_how="test"),
    )


def failed(recipe: str = "layerchop", budget: str = "params=0.8") -> Record:
    """A record of a cell that broke."""
    failure = Failure(stage="compress", reason="the worker was killed by SIGKILL")
    return Record(status="failed", spec=spec(recipe, budget), dense=DENSE, failure=failure)


def item_rows(right: Iterable[Any], task: str = "physical", **fields: Any) -> list[dict[str, Any]]:
    """One row per outcome: two choices, of which the first is right, two nats apart."""
    return [
        {
            "task": task,
            "subtask": task,
            "item": f"{task}-{index:03}",
            "hash": f"{index:x}",
            "family": task,
            "log_likelihoods": [-1.0, -3.0] if correct else [-3.0, -1.0],
            "prediction": "0" if correct else "1",
            "target": "0",
            "correct": float(correct),
            **fields,
        }
        for index, correct in enumerate(right)
    ]
