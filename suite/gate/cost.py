"""What two models cost now: throughput in turns, stored bytes, and memory in fresh processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from suite import bfloat16, checkpoint
from suite.errors import InputError
from suite.gate.criteria import Criterion, Phase, judge_ratios
from suite.measure import speed
from suite.measure.ledger import ledger, total_disk
from suite.measure.memory import peak_memory, resident_memory
from suite.models import load
from suite.records import Memory, Throughput
from suite.registry import load_plugin
from suite.run.processes import running
from suite.specs import SpeedSpec

SPEED_ROUNDS = 15


def throughput_ratio(
    base: PreTrainedModel,
    candidate: PreTrainedModel,
    spec: SpeedSpec,
    phase: Phase,
    limit: float,
    alpha: float,
    rounds: int = SPEED_ROUNDS,
) -> Criterion:
    """Tokens per second of the candidate over the baseline's, from interleaved rounds.

    Who goes first alternates, so that a drift of the machine hits both alike. The interval is that of
    the median ratio by the sign test (order statistics), which asks nothing of the distribution.
    """
    measure: Callable[[PreTrainedModel, SpeedSpec], Throughput] = getattr(speed, phase)
    once = spec.model_copy(update={"repeats": 1})
    ratios = []
    for index in range(rounds):
        rates = {}
        for which in ("base", "candidate") if index % 2 == 0 else ("candidate", "base"):
            rates[which] = measure(base if which == "base" else candidate, once).tokens_per_s
        ratios.append(rates["candidate"] / rates["base"])
    return judge_ratios(ratios, phase, limit, alpha)


def stored_bytes(source: load.Source) -> int:
    """Bytes of a model's weights as stored; counted on the model where no folder holds them."""
    if Path(source.location).is_dir():
        return checkpoint.weight_bytes(Path(source.location))
    return total_disk(ledger(load.load_model(source)))


def measure_memory(source: load.Source, device: str, spec: SpeedSpec, plugins: Sequence[str] = ()) -> Memory:
    """Peak memory of loading and of inference, in a fresh process, as a cell's worker measures it.

    Raises:
        InputError: the process failed.
    """
    arguments = (source.location, device, spec, torch.get_num_threads(), tuple(plugins))
    with running(_memory_worker, *arguments) as (_, receiver):
        try:
            found: Any = receiver.recv()
        except EOFError:
            found = "the process was killed (out of memory?)"
    if not isinstance(found, Memory):
        raise InputError(f"the memory of '{source.name}' cannot be measured: {found}.")
    return found


def _memory_worker(
    location: str, device: str, spec: SpeedSpec, threads: int, plugins: tuple[str, ...], pipe: Connection
) -> None:
    torch.set_num_threads(threads)
    try:
        for plugin in plugins:
            load_plugin(plugin)
        before = 0 if device.startswith("cuda") else resident_memory()
        with peak_memory(device) as loading:
            model = checkpoint.reload(Path(location), device)
        with bfloat16.widened(device), peak_memory(device) as running:
            speed.prefill(model, spec)
            speed.decode(model, spec)
        peaks = (max(peak.bytes - before, 0) for peak in (loading, running))
        pipe.send(Memory(load=next(peaks), inference=next(peaks), how=running.how))
    except Exception as error:  # whatever it was, the parent says it in one line
        pipe.send(f"{type(error).__name__}: {error}")
    finally:
        pipe.close()
