"""The suite's evaluator beside lm-eval's `hf` model on a real one, both in one run.

    python -m tests.benchmarks.evaluator --data-dir DIR --rows 200 --dtype bfloat16 --batch 8

Prints wall seconds per task, the largest log-likelihood difference, and rows predicted differently.
A row counts as a tie when its best two log-likelihoods lie closer than twice that difference.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from lm_eval.models.huggingface import HFLM
from tabulate import tabulate

from suite.evaluate.harness import Scorer
from suite.evaluate.model import WeighinLM
from suite.models import load
from suite.specs import Protocol

TASKS = ("arc_easy", "arc_challenge", "piqa", "hellaswag", "winogrande", "openbookqa", "boolq")


def requests_of(scorer: Scorer, name: str, rows: int) -> list[Any]:
    """The log-likelihood requests of the first `rows` items."""
    (task,) = scorer._load(name).values()
    task.build_all_requests(limit=rows)
    return [request for request in task.instances if request.request_type == "loglikelihood"]


def by_item(requests: list[Any], answers: list[tuple[float, bool]]) -> dict[int, list[float]]:
    """Log-likelihoods of all choices, by item."""
    items: dict[int, list[float]] = {}
    for request, (score, _) in zip(requests, answers, strict=True):
        items.setdefault(request.doc_id, []).append(score)
    return items


def main(
    data_dir: Path,
    rows: int = 200,
    dtype: str = "bfloat16",
    batch: Annotated[list[int] | None, typer.Option(help="Batch sizes of hf.")] = None,
    model: str = "smollm2-135m",
) -> None:
    """Time both on the same requests and compare what they answer."""
    logging.disable(logging.WARNING)
    source = load.resolve(model)
    loaded = load.load_model(source, dtype=getattr(torch, dtype))
    tokenizer = load.load_tokenizer(source.location)
    scorer = Scorer(loaded, tokenizer, Protocol.load("standard"), data_dir)
    sides: dict[str, Any] = {
        f"hf {size}": HFLM(pretrained=loaded, tokenizer=tokenizer, batch_size=size) for size in batch or [8]
    }
    sides["weighin"] = WeighinLM(loaded, tokenizer=tokenizer)
    lines = []
    for name in TASKS:
        requests = requests_of(scorer, name, rows)
        seconds, answers = {}, {}
        for side, lm in sides.items():
            lm.loglikelihood(requests[:8], disable_tqdm=True)
            start = time.perf_counter()
            answers[side] = lm.loglikelihood(requests, disable_tqdm=True)
            seconds[side] = time.perf_counter() - start
        theirs, ours = (by_item(requests, answers[side]) for side in (next(iter(sides)), "weighin"))
        gaps = [
            abs(a - b) for item, scores in theirs.items() for a, b in zip(scores, ours[item], strict=True)
        ]
        largest, different, ties = max(gaps), 0, 0
        for item, scores in theirs.items():
            if scores.index(max(scores)) != ours[item].index(max(ours[item])):
                first, second = sorted(scores)[-1:-3:-1]
                ties += first - second <= 2 * largest
                different += first - second > 2 * largest
        lines.append([name, *seconds.values(), largest, different, ties])
    total = [sum(line[1 + index] for line in lines) for index in range(len(sides))]
    lines.append(
        ["all", *total, max(line[-3] for line in lines), *(sum(line[i] for line in lines) for i in (-2, -1))]
    )
    rows_out = [[*line, min(line[1 : len(sides)]) / line[len(sides)]] for line in lines]
    columns = [
        *(f"{side} s" for side in sides),
        "largest difference",
        "other answers",
        "other at ties",
        "speed-up",
    ]
    typer.echo(tabulate(rows_out, ["task", *columns], tablefmt="github", floatfmt=".3g"))


if __name__ == "__main__":
    typer.run(main)
