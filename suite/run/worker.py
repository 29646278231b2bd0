"""The way of one cell: plan, compress, save | reload, measure, record.

The first half runs in one process, the second in a fresh one that never saw the dense model, so
everything on the board is true of the checkpoint alone.
"""

from __future__ import annotations

import gc
import os
import random
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from suite import bfloat16, calibration, checkpoint
from suite.calibration import Calibration
from suite.errors import WeighinError
from suite.evaluate import harness, perplexity
from suite.measure import speed
from suite.measure.ledger import Entry, ledger, total_disk, total_params
from suite.measure.memory import Peak, peak_memory, resident_memory
from suite.measure.simulated import simulated_share
from suite.method import Method
from suite.models import load
from suite.models.anatomy import decoder_params
from suite.models.layouts import layout_of
from suite.recipe import Recipe, RecipePlan
from suite.registry import load_plugin
from suite.run import audit
from suite.run.environment import conditions
from suite.run.noise import noise_floor
from suite.seal import lifted, sealed
from suite.specs import RunSpec

PROBE_SHAPE = (2, 32)


@dataclass(frozen=True)
class Job:
    """What a worker process is told."""

    spec: RunSpec
    source: load.Source
    folder: Path
    """Where the checkpoint goes."""
    probe: Path
    """Where the logits before saving wait for the reload."""
    log: Path
    threads: int
    jobs: int
    plan: RecipePlan | None = None
    """The plan as it was carried out, for the second half."""
    plugins: tuple[str, ...] = ()
    data_folder: Path | None = None


class Reporter:
    """Sends stages and results to the parent process, and keeps the seconds of each stage."""

    def __init__(self, pipe: Connection):
        self.pipe = pipe
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Announce a stage and time it."""
        self.pipe.send(("stage", name))
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start

    def progress(self, detail: str, done: int, total: int) -> None:
        """How far the current stage is."""
        self.pipe.send(("progress", (detail, done, total)))


Compressed = tuple[PreTrainedModel, PreTrainedTokenizerBase, RecipePlan, Calibration | None, Peak]
"""The model, its tokenizer, the plan as it was carried out, what it was calibrated on, and peak memory."""


def compressed(job: Job, report: Reporter) -> Compressed:
    """Plan, load and compress, with all that models are scored on out of reach."""
    spec = job.spec
    scored_on = (
        audit.evaluation_paths(job.data_folder),
        audit.evaluation_texts(spec.protocol),
    )
    with report.stage("plan"), sealed(*scored_on):
        recipe = Recipe.parse(spec.recipe)
        plan = recipe.plan(load.load_anatomy(job.source), spec.budget, spec.seed)
    with report.stage("load"):
        model = load.load_model(job.source, spec.device)
        tokenizer = load.load_tokenizer(job.source.location)
        sample = None
        if recipe.needs & {"calibration", "training"}:
            sample = calibration.draw(spec.calibration, tokenizer, spec.seed, job.data_folder)
        if spec.healing is not None and sample is not None and "training" in recipe.needs:
            training = calibration.draw_training(
                spec.healing, tokenizer, lambda: _teacher(job), spec.seed, job.data_folder
            )
            sample = replace(sample, training=replace(training, progress=report.progress))
    with report.stage("compress"), sealed(*scored_on), peak_memory(spec.device) as peak:

        def before(stage: Method[Any]) -> None:
            report.progress(stage.name, recipe.stages.index(stage), len(recipe.stages))
            seed_everything(spec.seed)

        plan = recipe.compress(model, plan, sample, before, lambda: _dense(job))
    plan.notes(recipe)  # refused here, before anything is measured, if a record cannot keep them
    return model, tokenizer, plan, sample, peak


def score_held_back(count: int, job: Job, report: Reporter) -> dict[str, Any]:
    """Compress, and measure perplexity on `count` sequences beside all that the method has learnt from."""
    spec = job.spec
    model, tokenizer, plan, _, _ = compressed(job, report)
    text = calibration.draw_held_back(
        spec.calibration, spec.healing, count, tokenizer, spec.seed, job.data_folder
    )
    entries = ledger(model)
    audit.within_budget(spec.budget, load.load_anatomy(job.source), entries)
    audit.as_planned(plan.final, entries)
    if spec.protocol.dtype != "native":
        model = model.to(getattr(torch, spec.protocol.dtype))
    with report.stage("perplexity"):
        nlls = torch.cat([perplexity.window_nlls(model, ids) for ids in text.split(perplexity.BATCH_SIZE)])
    mean = float(nlls.sum()) / (text.shape[0] * (text.shape[1] - 1))
    return {
        "nll_per_token": mean,
        "text_digest": calibration.tokens_digest(text),
        "params": plan.final.params,
        "bytes": plan.final.bytes,
    }


def make_checkpoint(job: Job, report: Reporter) -> dict[str, Any]:
    """Plan, compress, save. Returns the cost of compression."""
    model, tokenizer, plan, sample, peak = compressed(job, report)
    with report.stage("save"):
        ids = _probe_ids(model.config.vocab_size)
        checkpoint.save(model, tokenizer, job.folder)
        checkpoint.save_probe(job.probe, ids, audit.logits_of(model, ids))
    notes = plan.notes(Recipe.parse(job.spec.recipe)).values()
    earlier = sum(note.get("seconds_before_resuming", 0.0) for note in notes)
    return {
        "compression": {
            "seconds": report.seconds["compress"] + earlier,
            "peak_bytes": peak.bytes,
            "peak_how": peak.how,
        },
        "plan": plan,
        "calibration_digest": sample.digest if sample else None,
        "healing_digest": sample.training.digest if sample and sample.training else None,
        "seconds": report.seconds,
    }


def measure_checkpoint(job: Job, report: Reporter) -> dict[str, Any]:
    """Reload and measure. Returns the measurements, the items and the ledger."""
    spec, protocol = job.spec, job.spec.protocol
    before = 0 if spec.device.startswith("cuda") else resident_memory()
    with report.stage("reload"), peak_memory(spec.device) as load_peak:
        model = checkpoint.reload(job.folder, spec.device)
        tokenizer = load.load_tokenizer(job.source.location)  # never one that a method could change
    with report.stage("audit"):
        entries = ledger(model)
        _audit(job, model, entries, tokenizer)
    native = model.dtype
    with report.stage("speed"), peak_memory(spec.device) as peak:
        prefill = speed.prefill(model, protocol.speed)
        decode = speed.decode(model, protocol.speed)
        shapes, layout = protocol.speed, layout_of(model.config)
        together = shapes.prefill_batch * shapes.prefill_length
        simulated = simulated_share(model, entries, layout, together, shapes.prefill_batch)
        simulated_decode = simulated_share(model, entries, layout, 1, 1)
    if protocol.dtype != "native":
        model = model.to(getattr(torch, protocol.dtype))
    with report.stage("perplexity"):
        ppl = perplexity.measure(model, tokenizer, protocol.perplexity, job.data_folder)
    with report.stage("tasks"):
        tasks, items = harness.evaluate(
            model,
            tokenizer,
            protocol,
            folder=job.data_folder,
            limit=spec.limit,
            progress=report.progress,
        )
    noise = None
    if spec.recipe == "dense":
        with report.stage("noise"):
            noise = noise_floor(model, tokenizer, protocol, (items, ppl), job.data_folder, spec.limit)
    with report.stage("training"):  # last, as it moves the weights
        training = speed.training(model, protocol.speed)
    return {
        "measurements": {
            "sizes": {
                "params": total_params(entries),
                "decoder_params": decoder_params(entries, layout_of(model.config)),
                "bytes_disk": total_disk(entries),
                "bytes_resident": sum(entry.resident for entry in entries),
                "bytes_nominal": sum(entry.nominal for entry in entries),
            },
            "memory": {
                "load": max(load_peak.bytes - before, 0),
                "inference": max(peak.bytes - before, 0),
                "how": peak.how,
            },
            "prefill": prefill,
            "decode": decode,
            "training": training,
            "simulated_share": simulated,
            "simulated_decode_share": simulated_decode,
            "trainable_params": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "perplexity": ppl,
            "tasks": tasks,
        },
        # Scores and training have the protocol's dtype, prefill and decode the checkpoint's own.
        "conditions": conditions(spec.device, job.jobs, str(model.dtype).removeprefix("torch."))
        | {"speed_dtype": str(native).removeprefix("torch.")},
        "seconds": report.seconds,
        "noise": noise,
        "items": items,
        "entries": entries,
    }


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch; methods never do."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def work(step: Callable[[Job, Reporter], dict[str, Any]], job: Job, pipe: Connection) -> None:
    """Entry point of a worker process: run one half of a cell and send back what it returns."""
    log = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    torch.set_num_threads(job.threads)
    gc.freeze()  # what the libraries hold is no business of the memory census
    report = Reporter(pipe)
    try:
        for plugin in job.plugins:
            load_plugin(plugin)
        with bfloat16.widened(job.spec.device):
            result = step(job, report)
        pipe.send(("result", result))
    except WeighinError as error:
        pipe.send(("error", str(error)))
    except Exception as error:  # a method or a library may raise anything; the grid goes on
        traceback.print_exc()
        pipe.send(("error", f"{type(error).__name__}: {error}"))
    finally:
        pipe.close()


def _teacher(job: Job) -> PreTrainedModel:
    return _dense(job).requires_grad_(False)


def _dense(job: Job) -> PreTrainedModel:
    with lifted():  # a model from the hub asks whether its cached files are current
        return load.load_model(job.source, job.spec.device)


def _probe_ids(vocab_size: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, PROBE_SHAPE, generator=generator)


def _audit(
    job: Job, model: PreTrainedModel, entries: tuple[Entry, ...], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Refuse a checkpoint that breaks a rule of the suite, before anything is measured on it."""
    spec = job.spec
    config = load.load_config(job.source)
    dense = load.load_anatomy(job.source)
    audit.checkpoint_bytes(entries, job.folder)
    audit.within_budget(spec.budget, dense, entries)
    planned = job.plan or Recipe.parse(spec.recipe).plan(dense, spec.budget, spec.seed)
    audit.as_planned(planned.final, entries)
    audit.counted_honestly(model, dense.dtype)
    audit.finite_tensors(model)
    audit.same_logits(model, job.probe)
    audit.same_config(config, job.source.location, model)
    audit.same_tokenizer(tokenizer, load.load_tokenizer(str(job.folder)))
    audit.no_hidden_memory(
        model, entries, sum(e.resident - e.disk for e in dense.entries), audit.resident_tolerance(entries)
    )
