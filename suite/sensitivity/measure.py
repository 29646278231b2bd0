"""Measuring the points of a profile: compress a copy of the model in one part, and look."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from suite import bfloat16, calibration, seal
from suite.calibration import Calibration, tokens_digest
from suite.checkpoint import surgery_of
from suite.errors import CellFailed, ImpossibleBudget, InputError, WeighinError
from suite.evaluate import harness, perplexity
from suite.measure.ledger import ledger, total_disk, total_params
from suite.method import Method, Metric, Plan, Target, methods
from suite.models import load
from suite.models.anatomy import Anatomy
from suite.recipe import Recipe
from suite.run import audit
from suite.run.environment import conditions
from suite.run.worker import seed_everything
from suite.sensitivity.profile import (
    Baseline,
    Granularity,
    Part,
    Point,
    Profile,
    ProfileSpec,
    load_profile,
    save_profile,
)

REMOVED = 0.0
"""The one strength of methods that remove blocks whole."""
DEFAULT_STRENGTHS = (0.75, 0.5, 0.25)


def method_for(recipe: str, by: Granularity) -> Method[Any]:
    """The method of a one-stage recipe, if it can act on such parts alone.

    Raises:
        InputError: it cannot; the message names the methods that can.
    """
    stages = Recipe.parse(recipe).stages
    if len(stages) != 1:
        raise InputError(f"'{recipe}' has {len(stages)} stages; a profile is of one method.")
    method = stages[0]
    if method.acts_on_parts == "blocks" and by != "block":
        raise InputError(f"'{method.name}' removes whole blocks: profile it with --by block.")
    if method.acts_on_parts is None:
        raise InputError(_not_in_parts(method.name))
    return method


def metric_of(method: Method[Any]) -> Metric:
    """Strengths are shares of parameters, or of bytes for a method that leaves parameters alone."""
    return "params" if "params" in method.acts_on or not method.acts_on else "bytes"


def strengths_for(method: Method[Any], asked: Sequence[float] | None) -> tuple[float, ...]:
    """The strengths to measure, weakest compression first.

    Raises:
        InputError: one lies outside (0, 1), or the method knows no strengths.
    """
    if method.acts_on_parts == "blocks":
        if asked:
            raise InputError(f"'{method.name}' removes a block whole: leave --strength out.")
        return (REMOVED,)
    for strength in asked or ():
        if not 0 < strength < 1:
            raise InputError(f"--strength {strength:g}: the kept share of a part lies between 0 and 1.")
    return tuple(sorted(set(asked or DEFAULT_STRENGTHS), reverse=True))


def plan_part(method: Method[Any], anatomy: Anatomy, part: Part, strength: float, spec: ProfileSpec) -> Plan:
    """What the method would do to one part alone, on shapes.

    Raises:
        ImpossibleBudget: the part cannot be brought down to that share.
        InputError: the method changes more of the model than the part.
    """
    if method.acts_on_parts == "blocks":
        return Plan(drop=() if part.block is None else (part.block,))
    size = part.size(anatomy.entries, spec.metric)
    target = Target(spec.metric, anatomy.size(spec.metric) - math.ceil((1 - strength) * size))
    plan = method.plan(anatomy.restricted(part.paths), target, spec.seed)
    beside = {path for path in plan.modules if not _inside(path, part)}
    if plan.drop or (beside and not _embeddings_only(beside, anatomy)):
        raise InputError(_not_in_parts(method.name))
    after = plan.apply(anatomy)
    if beside or not target.fits(after):
        kept = 1 - (anatomy.size(spec.metric) - after.size(spec.metric)) / size
        why = "without touching embedding or head" if beside else f"the least is {kept:.3f}"
        raise ImpossibleBudget(after.size(spec.metric), why)
    return plan


@dataclass
class Skipped:
    """A point that could not be measured."""

    part: str
    strength: float
    reason: str
    failed: bool
    """Whether something broke; False when the part cannot be brought to that strength."""


@dataclass
class Profiler:
    """Measures the missing points of a profile; each is kept in its file before the next begins."""

    spec: ProfileSpec
    source: load.Source
    method: Method[Any]
    anatomy: Anatomy
    path: Path
    data_folder: Path | None = None
    skipped: list[Skipped] = field(default_factory=list)

    def run(
        self,
        parts: Sequence[Part],
        strengths: Sequence[float],
        listener: Callable[[str, int, int], None] = lambda what, done, total: None,
    ) -> Profile:
        """Measure each part at each strength; what the file already holds is not measured again.

        Raises:
            InputError: the method cannot act on parts, or a text or task cannot be loaded.
        """
        with bfloat16.widened(self.spec.device):
            return self._run(parts, strengths, listener)

    def _run(
        self, parts: Sequence[Part], strengths: Sequence[float], listener: Callable[[str, int, int], None]
    ) -> Profile:
        profile = load_profile(self.path)
        total, done = len(parts) * len(strengths), 0
        for part in parts:
            before: tuple[Plan, Point] | None = None
            for strength in strengths:
                listener(f"{part.name} at {strength:g}", done, total)
                done += 1
                if profile is not None and profile.find(part.name, strength) is not None:
                    continue
                plan = self._plan(part, strength)
                if plan is None:
                    continue
                if profile is None:
                    profile = Profile(spec=self.spec, dense=self._baseline())
                if before and (before[0].modules, before[0].drop) == (plan.modules, plan.drop):
                    point = before[1].model_copy(update={"strength": strength})
                else:
                    measured = self._point(part, strength, plan, profile.dense)
                    if measured is None:
                        continue
                    point = measured
                before = (plan, point)
                profile = save_profile(
                    profile.model_copy(update={"points": (*profile.points, point)}), self.path
                )
        if profile is None:
            raise InputError(f"nothing could be measured: {self.skipped[0].reason}")
        return profile

    def _plan(self, part: Part, strength: float) -> Plan | None:
        try:
            with self._sealed():
                return plan_part(self.method, self.anatomy, part, strength, self.spec)
        except ImpossibleBudget as error:
            what = f"{self.spec.method} cannot bring {part.name} to {strength:g} of its {self.spec.metric}"
            reason = f"{what}: {error.why}" if error.why else what
            self.skipped.append(Skipped(part.name, strength, reason, failed=False))
            return None

    def _point(self, part: Part, strength: float, plan: Plan, dense: Baseline) -> Point | None:
        try:
            model = self._compressed(part, plan)
            kept = self._kept(part, model)
            return self._measure(model, dense, part, strength, kept)
        except (InputError, KeyboardInterrupt):
            raise
        except Exception as error:  # a method may raise anything; the other points go on
            told = str(error) if isinstance(error, WeighinError) else f"{type(error).__name__}: {error}"
            self.skipped.append(
                Skipped(part.name, strength, f"{part.name} at {strength:g}: {told}", failed=True)
            )
            return None

    def _compressed(self, part: Part, plan: Plan) -> PreTrainedModel:
        model = copy.deepcopy(self._model)
        seed_everything(self.spec.seed)
        needed = self._texts[0] if "calibration" in self.method.needs else None
        with self._sealed():
            done = self.method.compress(model, plan, needed) or plan
        there = surgery_of(self._model)
        changed = {path for path, module in surgery_of(model).items() if there.get(path) != module}
        if done.drop != plan.drop or (not done.drop and not all(_inside(path, part) for path in changed)):
            raise CellFailed(f"{self.method.name} changed more of the model than {part.name}")
        return model

    def _kept(self, part: Part, model: PreTrainedModel) -> float:
        if self.method.acts_on_parts == "blocks":
            return REMOVED
        entries = ledger(model)
        after = total_params(entries) if self.spec.metric == "params" else total_disk(entries)
        removed = self.anatomy.size(self.spec.metric) - after
        return 1 - removed / part.size(self.anatomy.entries, self.spec.metric)

    def _measure(
        self, model: PreTrainedModel, dense: Baseline, part: Part, strength: float, kept: float
    ) -> Point:
        nlls, accuracy = self._figures(model)
        figures: dict[str, Any] = {}
        if nlls:
            scored = dense.tokens / len(nlls)
            rises = [(after - before) / scored for after, before in zip(nlls, dense.window_nlls, strict=True)]
            if not all(map(math.isfinite, rises)):
                raise CellFailed("the perplexity is not finite")
            figures["increase"] = mean(rises)
            figures["standard_error"] = stdev(rises) / math.sqrt(len(rises)) if len(rises) > 1 else None
        if accuracy:
            figures["accuracy"] = accuracy
            figures["accuracy_change"] = mean(accuracy.values()) - mean(dense.accuracy.values())
        return Point(part=part.name, strength=strength, kept=kept, **figures)

    def _figures(self, model: PreTrainedModel) -> tuple[list[float], dict[str, float]]:
        """Negative log-likelihood of every held-back sequence, and accuracy by task."""
        if self.spec.protocol.dtype != "native":
            model = model.to(getattr(torch, self.spec.protocol.dtype))
        nlls: list[float] = []
        accuracy: dict[str, float] = {}
        if self.spec.measures != "accuracy":
            for batch in self._texts[1].split(perplexity.BATCH_SIZE):
                nlls += perplexity.window_nlls(model, batch).tolist()
        if self.spec.measures != "perplexity":
            results, _ = harness.evaluate(
                model, self._tokenizer, self.spec.protocol, folder=self.data_folder, limit=self.spec.limit
            )
            accuracy = {result.task: result.value for result in results}
        return nlls, accuracy

    def _baseline(self) -> Baseline:
        sample, text = self._texts
        nlls, accuracy = self._figures(copy.deepcopy(self._model))
        return Baseline(
            window_nlls=tuple(nlls),
            tokens=len(nlls) * (text.shape[1] - 1),
            accuracy=accuracy,
            calibration_digest=sample.digest,
            text_digest=tokens_digest(text),
            conditions=conditions(self.spec.device, 1, str(self._model.dtype).removeprefix("torch.")),
        )

    def _sealed(self) -> Any:
        texts = audit.evaluation_texts(self.spec.protocol)
        return seal.sealed(audit.evaluation_paths(self.data_folder), texts)

    @cached_property
    def _model(self) -> PreTrainedModel:
        return load.load_model(self.source, self.spec.device)

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return load.load_tokenizer(self.source.location)

    @cached_property
    def _texts(self) -> tuple[Calibration, Tensor]:
        """The calibration that a run would draw, and sequences of the same text beside it."""
        spec = self.spec.calibration
        both = spec.model_copy(update={"count": spec.count + self.spec.held_back})
        drawn = calibration.draw(both, self._tokenizer, self.spec.seed, self.data_folder).tokens
        sample, held_back = drawn[: spec.count], drawn[spec.count :]
        return Calibration(sample, tokens_digest(sample)), held_back


def _inside(path: str, part: Part) -> bool:
    return any(path == own or path.startswith(own + ".") for own in part.paths)


def _embeddings_only(paths: set[str], anatomy: Anatomy) -> bool:
    return paths <= {anatomy.layout.embedding, anatomy.layout.head}


def _not_in_parts(name: str) -> str:
    able = [known for known in methods if methods.get(known).acts_on_parts is not None]
    return (
        f"'{name}' acts on a model as a whole and cannot compress one part alone."
        f"  (Methods that can: {', '.join(able)}.)"
    )
