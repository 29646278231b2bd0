"""Puts a method through the checks: compressed in two processes, reloaded in a third, fresh one."""

from __future__ import annotations

import copy
import functools
import gc
import json
import os
import random
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from suite import checkpoint, data
from suite.calibration import Calibration, tokens_digest
from suite.conformance import tiny
from suite.conformance.cases import SEED, Attempt, Case, Exempt, Planning, Reloaded, Scope, Situation, Twins
from suite.conformance.checks import CHECKS
from suite.conformance.findings import Finding, Outcome, Status, summed
from suite.errors import ImpossibleBudget, InputError, WeighinError
from suite.measure.ledger import ledger
from suite.method import Metric, Plan, methods
from suite.models import load
from suite.models.anatomy import Anatomy
from suite.recipe import Recipe, RecipePlan
from suite.registry import load_plugin, origin
from suite.run import audit
from suite.run.processes import running
from suite.run.worker import seed_everything
from suite.seal import sealed
from suite.specs import Budget
from suite.stacking import pointless

TARGETS: dict[Metric, tuple[float, ...]] = {
    "params": (0.8, 0.9, 0.7, 0.5),
    "bytes": (0.6, 0.8, 0.45, 0.3),
}
"""Shares asked for, the one of the thorough look first; what a method cannot reach is left out."""

STACKED = "rtn-int4"
TIMEOUT = 300.0


@dataclass(frozen=True)
class Subject:
    """What is examined: a recipe, and the plug-in files that its methods come from."""

    recipe: str
    plugins: tuple[str, ...] = ()


@dataclass(frozen=True)
class Examination:
    """All findings on one subject."""

    subject: Subject
    findings: tuple[Finding, ...]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(finding.status != "failed" for finding in self.findings)

    def finding(self, check: str) -> Finding:
        """What one check found."""
        return next(finding for finding in self.findings if finding.check.name == check)


@dataclass(frozen=True)
class Desk:
    """Where an examination works and on what; handed to its processes."""

    subject: Subject
    folder: Path
    families: tuple[str, ...]

    def source(self, family: str) -> load.Source:
        """The saved dense tiny model."""
        return load.resolve(str(self.folder / "dense" / family))


def subjects_of(what: str) -> list[Subject]:
    """The subjects a user means: all methods of a plug-in file, or a method or recipe by name.

    Raises:
        InputError: the file registers no method, or the name is unknown.
    """
    path = Path(what).expanduser()
    if path.suffix == ".py" or path.is_file():
        load_plugin(path)
        here = str(path.resolve())
        names = [name for name in methods if origin(methods.get(name)) == here]
        if not names:
            raise InputError(f"plug-in '{what}' registers no method: decorate its class with @register.")
        return [Subject(name, (here,)) for name in names]
    return [Subject(str(Recipe.parse(what)))]


def examine(subject: Subject, families: Sequence[str] = tuple(tiny.FAMILIES)) -> Examination:
    """Run every check on tiny models of all families.

    Raises:
        InputError: the recipe or a plug-in is wrong, or it needs a device that is not here.
    """
    for plugin in subject.plugins:
        load_plugin(plugin)
    recipe = Recipe.parse(subject.recipe)
    if "cuda" in recipe.needs and not torch.cuda.is_available():
        raise InputError(f"{subject.recipe} needs CUDA, and there is none here.")
    start = time.perf_counter()
    folder = Path(tempfile.mkdtemp(prefix="weighin-conformance-"))
    desk = Desk(subject, folder, tuple(families))
    try:
        tokenizer = tiny.byte_tokenizer()
        for family in families:
            tiny.build(family).save_pretrained(folder / "dense" / family)
            tokenizer.save_pretrained(folder / "dense" / family)
        cases, outcomes = _in_process(_compress_all, desk)
        with ThreadPoolExecutor(2) as pool:
            rest = [pool.submit(_in_process, step, desk, cases) for step in (_compress_again, _reload_all)]
            outcomes += [outcome for part in rest for outcome in part.result()]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    findings = tuple(summed(check, outcomes) for check in CHECKS.values())
    return Examination(subject, findings, time.perf_counter() - start)


def _compress_all(desk: Desk) -> tuple[list[tuple[Case, Path]], list[Outcome]]:
    """Plan and compress every case; returns those that were saved, and what the checks say so far."""
    outcomes: list[Outcome] = []
    saved: list[tuple[Case, Path]] = []
    for family in desk.families:
        for case, plan in _cases(desk, family, outcomes):
            folder = desk.folder / "made" / str(len(saved))
            error = _attempt(desk, case, folder, plan)
            outcomes += _checked("compress", case.scope, family, Attempt(case, error))
            if error is None:
                saved.append((case, folder))
            elif case.scope == "stack":
                outcomes.append(Outcome("stacks under int4", family, "failed", _told(error)))
    return saved, outcomes


def _cases(desk: Desk, family: str, outcomes: list[Outcome]) -> list[tuple[Case, RecipePlan | None]]:
    """The cases of one family, each plan once; checks of the plan are run on the way."""
    recipe = Recipe.parse(desk.subject.recipe)
    dense = _anatomy(desk.source(family))
    acts_on = frozenset().union(*(stage.acts_on for stage in recipe.stages))
    metrics: tuple[Metric, ...] = tuple(metric for metric in TARGETS if metric in acts_on)
    outcomes += _checked("plan", "main", family, Planning(recipe, dense, metrics))
    budgets = [Budget(metric=metric, value=share) for metric in metrics for share in TARGETS[metric]]
    cases: list[Case] = []
    seen: list[RecipePlan] = []
    for budget in budgets or [Budget(metric="none")]:
        scope: Scope = "every" if cases else "main"
        case = Case(family, desk.subject.recipe, budget, scope)
        try:
            with _no_peeking():
                plan = recipe.plan(dense, budget, SEED)
        except ImpossibleBudget:
            continue
        except Exception as error:  # whatever a method's plan raises
            outcomes += _checked("compress", scope, family, Attempt(case, error))
            continue
        if plan in seen:
            known = seen.index(plan)
            cases[known] = replace(cases[known], alike=(*cases[known].alike, budget))
        else:
            seen.append(plan)
            cases.append(case)
    if not cases:
        asked = ", ".join(str(budget) for budget in budgets)
        detail = f"none of the targets can be planned for: {asked}"
        outcomes.append(Outcome("runs on every family", family, "failed", detail))
        return []
    planned: list[tuple[Case, RecipePlan | None]] = list(zip(cases, seen, strict=True))
    if metrics:
        whole = Budget(metric=metrics[0], value=1.0)
        planned.append((Case(family, desk.subject.recipe, whole, "full"), None))
    stack = f"{desk.subject.recipe}+{STACKED}"
    if any(map(pointless, recipe.stages)):
        outcomes.append(Outcome("stacks under int4", family, "exempt", "it changes nothing"))
    elif any(line.sparse for line in seen[0].final.linears):
        outcomes.append(Outcome("stacks under int4", family, *_refused(stack, dense, cases[0].budget)))
    elif any(not line.packed for line in seen[0].final.linears) and desk.subject.recipe != STACKED:
        planned.append((Case(family, stack, cases[0].budget, "stack"), None))
    else:
        outcomes.append(Outcome("stacks under int4", family, "exempt", "it leaves no dense linears"))
    return planned


def _refused(stack: str, dense: Anatomy, budget: Budget) -> tuple[Status, str]:
    """Sparse linears cannot be quantized: whether the stack is refused before any work, as it must be."""
    try:
        Recipe.parse(stack).plan(dense, budget, SEED)
    except InputError:
        return "exempt", "sparse linears are not quantized, and the stack is refused"
    except Exception as error:  # any other exception is an offence, told in one line
        return "failed", _told(error)
    return "failed", "it leaves sparse linears, yet a quantizer after it is not refused"


def _attempt(desk: Desk, case: Case, folder: Path, plan: RecipePlan | None = None) -> Exception | None:
    """Compress and save as the runner does, planning first without `plan`; what it raises is returned."""
    source = desk.source(case.family)
    try:
        recipe = Recipe.parse(case.recipe)
        device = "cuda" if "cuda" in recipe.needs else "cpu"
        model, tokenizer = copy.deepcopy(_dense(source, device)), load.load_tokenizer(source.location)
        with _no_peeking():
            plan = plan or recipe.plan(_anatomy(source), case.budget, SEED)
            plan = recipe.compress(
                model, plan, _calibration(source, device), lambda stage: seed_everything(SEED)
            )
        checkpoint.save(model, tokenizer, folder)
        stages = [step.model_dump(mode="json") for step in plan.stages]
        _carried_out(folder).write_text(json.dumps(stages))
        ids = tiny.token_ids(2, 32)
        checkpoint.save_probe(_probe(folder), ids, audit.logits_of(model, ids))
    except Exception as error:  # whatever a method raises is what we want to know
        shutil.rmtree(folder, ignore_errors=True)
        return error
    return None


def _compress_again(desk: Desk, cases: Sequence[tuple[Case, Path]]) -> list[Outcome]:
    """Compress the main cases once more, in another order and from other random states."""
    outcomes = []
    for case, folder in reversed(cases):
        if case.scope == "main":
            _disturb()
            second = desk.folder / "again" / folder.name
            error = _attempt(desk, case, second)
            if error is None:
                outcomes += _checked("again", "main", case.family, Twins(folder, second))
            else:
                detail = f"a second compression fails: {_told(error)}"
                outcomes.append(Outcome("deterministic", case.family, "failed", detail))
    return outcomes


def _reload_all(desk: Desk, cases: Sequence[tuple[Case, Path]]) -> list[Outcome]:
    """Reload every checkpoint and run the checks that look at it."""
    outcomes = []
    for case, folder in cases:
        source = desk.source(case.family)
        dense = _anatomy(source)
        try:
            recipe = Recipe.parse(case.recipe)
            model = checkpoint.reload(folder, "cuda" if "cuda" in recipe.needs else "cpu")
            planned = dense
            for step in json.loads(_carried_out(folder).read_text()):
                planned = Plan.model_validate(step).apply(planned)
        except Exception as error:  # a checkpoint that does not load is a finding
            detail = f"it does not load: {_told(error)}"
            outcomes.append(Outcome("reloads in a fresh process", case.family, "failed", detail))
            continue
        situation = Reloaded(
            case, source, folder, _probe(folder), dense, planned, model, tuple(ledger(model))
        )
        outcomes += _checked("reload", case.scope, case.family, situation)
        del situation, model
    return outcomes


def _checked(situation: Situation, scope: Scope, family: str, of: Any) -> list[Outcome]:
    """The outcomes of all checks for this situation."""
    outcomes = []
    for check in CHECKS.values():
        if check.situation == situation and scope in check.scopes:
            try:
                with _no_peeking() if situation == "plan" else _nothing():
                    outcomes.append(Outcome(check.name, family, "passed", check.run(of)))
            except Exempt as why:
                outcomes.append(Outcome(check.name, family, "exempt", str(why)))
            except Exception as error:  # any other exception is an offence, told in one line
                outcomes.append(Outcome(check.name, family, "failed", _told(error)))
    return outcomes


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def _no_peeking() -> Iterator[None]:
    with sealed(audit.evaluation_paths(data.data_directory()), data.HELD_OUT):
        yield


@functools.cache
def _anatomy(source: load.Source) -> Anatomy:
    return load.load_anatomy(source)


@functools.cache
def _dense(source: load.Source, device: str) -> PreTrainedModel:
    """The dense tiny model, read from its files once; only copies of it are handed out."""
    return load.load_model(source, device)


def _calibration(source: load.Source, device: str) -> Calibration:
    tokens = tiny.token_ids(4, 128)
    training = tiny.training_sample(lambda: copy.deepcopy(_dense(source, device)).requires_grad_(False))
    return Calibration(tokens, tokens_digest(tokens), training)


def _probe(folder: Path) -> Path:
    return folder.with_suffix(".probe.safetensors")


def _carried_out(folder: Path) -> Path:
    return folder.with_suffix(".plan.json")


def _disturb() -> None:
    """Random states that no honest method depends on."""
    state = int.from_bytes(os.urandom(4), "little")
    random.seed(state)
    np.random.seed(state)
    torch.manual_seed(state)


def _told(error: Exception) -> str:
    """An exception in one line, with the place for those that were not written for a user."""
    if isinstance(error, WeighinError):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}".split("\n")[0] + where


def _in_process(step: Callable[..., Any], desk: Desk, *arguments: Any) -> Any:
    """What `step` returns in a process of its own.

    Raises:
        WeighinError: the process died or took too long.
    """
    with running(_child, step, desk, arguments) as (process, receiver):
        if not receiver.poll(TIMEOUT):
            raise WeighinError(f"{desk.subject.recipe}: the checks took longer than {TIMEOUT:g} s")
        try:
            kind, content = receiver.recv()
        except EOFError:
            process.join()
            raise WeighinError(
                f"{desk.subject.recipe}: the process of the checks ended with exit code {process.exitcode}"
            ) from None
    if kind == "error":
        raise WeighinError(content)
    return content


def _child(step: Callable[..., Any], desk: Desk, arguments: tuple[Any, ...], pipe: Connection) -> None:
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    gc.freeze()  # what the libraries hold is no business of the memory census
    try:
        for plugin in desk.subject.plugins:
            load_plugin(plugin)
        pipe.send(("result", step(desk, *arguments)))
    except Exception as error:  # the parent tells it
        pipe.send(("error", _told(error)))
    finally:
        pipe.close()
