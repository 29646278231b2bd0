"""Recovery training: the same tokens in the same order, and the same optimizer steps, for every method."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from operator import itemgetter
from statistics import fmean
from typing import Any

import psutil
import torch
from pydantic import Field
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from suite.calibration import Training
from suite.errors import CellFailed
from suite.losses import Objective, mean_loss
from suite.models.load import cache_directory
from suite.specs import Frozen, digest_of

SECONDS_BETWEEN_STATES = 120.0
SAVING_SHARE = 0.05
EVALUATIONS = 8
REHEARSAL_SHARE = 1 / 8
REHEARSAL_STEPS = 256
"""A rehearsal takes this share of all steps, but no more than so many."""
CURVE_POINTS = 512
_MOMENTS = ("exp_avg", "exp_avg_sq")
_CROSS_ENTROPY = Objective()


class Schedule(Frozen):
    """AdamW with linear warm-up (a share of all steps) and a cosine down to zero.

    `weight_decay` acts on matrices alone, `clip` bounds the norm of all gradients together.
    """

    learning_rate: float = Field(default=3e-4, gt=0)
    warmup: float = Field(default=0.05, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    clip: float = Field(default=1.0, gt=0)

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of step 0 … `steps` − 1."""
        warm = max(1, round(self.warmup * steps))
        if step < warm:
            return self.learning_rate * (step + 1) / warm
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def train(
    model: PreTrainedModel,
    training: Training,
    objective: Objective,
    schedules: Sequence[Schedule],
    parameters: Sequence[nn.Parameter] | None = None,
) -> dict[str, Any]:
    """Train `parameters` (by default all floating-point ones) of `model` in place; returns the loss curve.

    Forward and backward run in the model's own dtype, steps are taken on float32 master weights. The
    model stays in evaluation mode: without dropout a run is repeatable. A run that was cut off goes on
    from its last saved state, rehearsing again first, and ends in the same weights, bit for bit.

    Of several `schedules`, each is rehearsed from the same start on the first tokens, and the one with
    the least held-out cross-entropy is used: a learning rate that mends one model ruins another.

    Raises:
        CellFailed: the loss is no longer finite, with each of the schedules.
    """
    chosen = [p for p in (model.parameters() if parameters is None else parameters) if p.is_floating_point()]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in chosen:
        parameter.requires_grad_(True)
    teacher = training.teacher() if objective.needs_teacher else None

    def start(text: Training, schedule: Schedule) -> _Run:
        return _Run(model, teacher, chosen, text, objective, schedule)

    schedule, rehearsed = schedules[0], {}
    if len(schedules) > 1:
        short = _beginning(training)
        found = [(_rehearsed(start, chosen, short, each), each) for each in schedules]
        told = {f"{each.learning_rate:g}": loss for loss, each in found}
        finite = [(loss, each) for loss, each in found if loss is not None]
        if not finite:
            raise CellFailed(
                f"training diverged at every learning rate: {', '.join(told)}. Give a lower one."
            )
        schedule = min(finite, key=itemgetter(0))[1]
        rehearsed = {"rehearsal": {"tokens": short.tokens.numel(), "held_out_cross_entropy": told}}
    run = start(training, schedule)
    run.finish(EVALUATIONS, "training")
    taught = {}
    if teacher is not None:
        divergence = _held_out_loss(model, training, teacher, Objective(distill=1.0))
        taught["held_out_divergence"] = round(divergence, 4)
    run.forget()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
        parameter.grad = None
    resumed = {"seconds_before_resuming": round(run.seconds_before, 1)} if run.seconds_before else {}
    return {
        "tokens": training.tokens.numel(),
        "steps": run.step,
        "tokens_per_step": training.batch * training.tokens.shape[1],
        "objective": objective.model_dump(),
        "schedule": schedule.model_dump(),
        **rehearsed,
        "trained_parameters": sum(p.numel() for p in chosen),
        "loss": curve(run.losses),
        "held_out_cross_entropy": [[step, round(value, 4)] for step, value in run.held_out],
        **taught,
        **resumed,
    }


def _beginning(training: Training) -> Training:
    """The sequences of a rehearsal."""
    steps = math.ceil(len(training.tokens) / training.batch)
    few = min(math.ceil(REHEARSAL_SHARE * steps), REHEARSAL_STEPS)
    return replace(training, tokens=training.tokens[: few * training.batch])


def _rehearsed(
    start: Callable[[Training, Schedule], _Run],
    parameters: Sequence[nn.Parameter],
    short: Training,
    schedule: Schedule,
) -> float | None:
    """Held-out cross-entropy after a short run, None if it diverged; the parameters are put back."""
    # On the CPU, as an accelerator may have no room for the parameters twice.
    before = [parameter.detach().to("cpu", copy=True) for parameter in parameters]
    run = start(short, schedule)
    try:
        run.finish(0, f"rehearsing learning rate {schedule.learning_rate:g}")
        loss = run.held_out[-1][1]
    except CellFailed:
        loss = math.nan
    run.forget()
    with torch.no_grad():
        for parameter, value in zip(parameters, before, strict=True):
            parameter.copy_(value)
            parameter.grad = None
    return round(loss, 4) if math.isfinite(loss) else None


def curve(losses: Sequence[float], points: int = CURVE_POINTS) -> list[float]:
    """A loss per step, or means over runs of equally many steps where there are more than `points`."""
    run = math.ceil(len(losses) / points)
    return [round(fmean(losses[start : start + run]), 4) for start in range(0, len(losses), run or 1)]


def batch_loss(
    model: PreTrainedModel, teacher: PreTrainedModel | None, ids: Tensor, objective: Objective
) -> Tensor:
    """Mean loss of predicting tokens 1… of each row of `ids` (sequences × length)."""
    ids = ids.to(model.device)
    taught = None
    if teacher is not None:
        with torch.no_grad():
            taught = (_hidden(teacher, ids), teacher.get_output_embeddings())
    student, targets = (_hidden(model, ids), model.get_output_embeddings()), ids[:, 1:]
    return mean_loss(objective, student, targets.flatten(), taught, length=targets.shape[1])


def _hidden(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Final hidden states of all positions but the last, which predicts nothing (positions × width)."""
    states: Tensor = model.base_model(ids, use_cache=False).last_hidden_state
    return states[:, :-1].flatten(0, 1)


@torch.no_grad()
def _held_out_loss(
    model: PreTrainedModel,
    training: Training,
    teacher: PreTrainedModel | None = None,
    objective: Objective = _CROSS_ENTROPY,
) -> float:
    batches = training.held_out.split(training.batch)
    losses = [batch_loss(model, teacher, ids, objective) for ids in batches]
    return float(torch.stack(losses).mean())


class _Run:
    """The steps of one schedule: master weights, optimizer, loss curve, and their state on disk."""

    def __init__(
        self,
        model: PreTrainedModel,
        teacher: PreTrainedModel | None,
        parameters: Sequence[nn.Parameter],
        training: Training,
        objective: Objective,
        schedule: Schedule,
    ):
        self.model, self.teacher, self.parameters = model, teacher, parameters
        self.training, self.objective, self.schedule = training, objective, schedule
        self.masters = [_wide(p.detach()).clone().requires_grad_(True) for p in parameters]
        matrices = [master for master in self.masters if master.ndim > 1]
        vectors = [master for master in self.masters if master.ndim <= 1]
        groups = [
            {"params": matrices, "weight_decay": schedule.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), foreach=False)
        self.step = 0
        self.begun, self.seconds_before = time.monotonic(), 0.0
        self.losses: list[float] = []
        self.held_out: list[list[float]] = []
        start = [_digest(model.state_dict().values()), [p.shape for p in parameters], torch.__version__]
        text = [training.digest, len(training.tokens), training.batch]
        knobs = [text, objective.model_dump(), schedule.model_dump()]
        digest = digest_of([start, knobs])
        self.file = cache_directory() / "healing" / f"{digest[:16]}.safetensors"
        self.pause, self.saved = SECONDS_BETWEEN_STATES, time.monotonic()
        if self.file.is_file():
            self._load()

    def finish(self, evaluations: int, what: str) -> None:
        """Take the steps that are left, with the held-out loss at the end and so often before.

        Raises:
            CellFailed: the loss is no longer finite.
        """
        batches = self.training.tokens.split(self.training.batch)
        every = math.ceil(len(batches) / evaluations) if evaluations else None
        for step in range(self.step, len(batches)):
            if every and step % every == 0:
                self.held_out.append([step, _held_out_loss(self.model, self.training)])
            for group in self.optimizer.param_groups:
                group["lr"] = self.schedule.rate(step, len(batches))
            loss = batch_loss(self.model, self.teacher, batches[step], self.objective)
            value = float(loss.detach())
            if not math.isfinite(value):
                raise CellFailed(
                    f"training diverged in step {step + 1} of {len(batches)}: lower learning_rate"
                )
            loss.backward()
            self.update(value)
            self.training.progress(what, step + 1, len(batches))
        self.held_out.append([len(batches), _held_out_loss(self.model, self.training)])

    def update(self, loss: float) -> None:
        """One optimizer step from the gradients of the model's parameters."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            master.grad = None if parameter.grad is None else _wide(parameter.grad)
            parameter.grad = None
        nn.utils.clip_grad_norm_(self.masters, self.schedule.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._copy_back()
        self.losses.append(loss)
        self.step += 1
        if time.monotonic() - self.saved >= self.pause:
            self.save()

    def save(self) -> None:
        """Write the state; a reader sees the old one or the new one, never half of it."""
        tensors = {f"master.{i}": master.detach() for i, master in enumerate(self.masters)}
        for i, master in enumerate(self.masters):
            for name, value in self.optimizer.state[master].items():
                tensors[f"{name}.{i}"] = value
        start = time.monotonic()
        metadata = {"step": self.step, "losses": self.losses, "held_out": self.held_out}
        metadata["seconds"] = self.seconds_before + start - self.begun
        self.file.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.file.with_suffix(f".{os.getpid()}.tmp")
        save_file(tensors, temporary, {"state": json.dumps(metadata)})
        temporary.replace(self.file)
        self.saved = time.monotonic()
        # A large model's state takes long to write: it may cost a small share of the time only.
        self.pause = max(SECONDS_BETWEEN_STATES, (self.saved - start) / SAVING_SHARE)

    def forget(self) -> None:
        """Remove the state of a run that is complete, and what processes that are gone left half written."""
        self.file.unlink(missing_ok=True)
        for partial in self.file.parent.glob("*.tmp"):
            if not psutil.pid_exists(int(partial.suffixes[-2].removeprefix("."))):
                partial.unlink(missing_ok=True)

    def _load(self) -> None:
        with safe_open(self.file, framework="pt") as file:
            state = json.loads(file.metadata()["state"])
            keys = set(file.keys())
            for i, master in enumerate(self.masters):
                with torch.no_grad():
                    master.copy_(file.get_tensor(f"master.{i}"))
                if f"step.{i}" in keys:
                    moments = {n: file.get_tensor(f"{n}.{i}").to(master.device) for n in _MOMENTS}
                    self.optimizer.state[master] = {"step": file.get_tensor(f"step.{i}"), **moments}
        self.step, self.losses, self.held_out = state["step"], state["losses"], state["held_out"]
        self.seconds_before = state.get("seconds", 0.0)
        self._copy_back()

    @torch.no_grad()
    def _copy_back(self) -> None:
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            parameter.copy_(master)


def _wide(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in float64 where it is already."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _digest(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of tensors' bytes."""
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
