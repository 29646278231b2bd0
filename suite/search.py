"""Searching the best stack for a budget: a structural method, recovery training, and a quantizer.

Every trial is a recipe string that is planned for the budget first, which costs nothing; what cannot
be planned is pruned. The others are compressed in a process of their own and judged by perplexity on
text that no method learns from and no board is scored on. Optuna's journal keeps the trials, so that
a search that was cut off goes on; a summary for people and for `weighin run` lies beside it.
"""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, ValidationError

from suite.calibration import draw_held_back
from suite.errors import ImpossibleBudget, InputError, NotApplicable, WeighinError, require
from suite.method import Method, methods
from suite.models import load
from suite.models.anatomy import Anatomy
from suite.recipe import Recipe
from suite.records import atomically
from suite.run.processes import supervised
from suite.run.worker import Job, score_held_back, work
from suite.specs import Budget, CalibrationSpec, Frozen, HealingSpec, Protocol, RunSpec, digest_of, explain

GROUPS = ("channel", 128, 64, 32)
EMBEDDINGS = (16, 8, 4)
NOTHING = "none"
TRIAL_SHARE = 0.25
"""Of a search's time, what one trial may take; where the user named the candidates, all of it."""
_TIRED = 200
"""Proposals in a row that say nothing new, after which a space counts as exhausted."""


class SearchSpec(Frozen):
    """What is searched; how long is left out, so that a longer search goes on where a shorter one ended."""

    schema_version: ClassVar[int] = 1

    model: str
    """As the user named it."""
    model_digest: str
    budget: Budget
    protocol: Protocol
    protocol_given: str
    """Its name or file, as the user named it."""
    calibration: CalibrationSpec
    healing: HealingSpec | None
    held_back: int
    """Sequences of the calibration's text that no method sees, for perplexity."""
    seed: int
    device: str
    candidates: tuple[str, ...]
    """The recipes to choose from; empty for every stack of `choices`."""
    choices: dict[str, tuple[str, ...]]
    versions: tuple[str, ...]

    def digest(self) -> str:
        """Sixteen hexadecimal digits naming the search."""
        return digest_of([self.schema_version, self.model_dump(mode="json")])[:16]

    def path(self, results: Path) -> Path:
        """Where the summary is kept; optuna's journal lies beside it."""
        name = re.sub(r"[^A-Za-z0-9.=-]+", "_", f"{Path(self.model).name}-{self.budget}")
        return results / "searches" / f"{name}-{self.digest()[:8]}.json"


class Tried(Frozen):
    """One trial."""

    recipe: str
    status: Literal["ok", "failed", "impossible", "slow"]
    """Slow ones had their share of the search's time; a longer search may try them again."""
    perplexity: float | None = None
    params: int | None = None
    bytes: int | None = None
    seconds: float = 0.0
    reason: str = ""


class Found(Frozen):
    """A search and what it has tried so far."""

    spec: SearchSpec
    digest: str
    trials: tuple[Tried, ...] = Field(default=())

    @property
    def ranked(self) -> list[Tried]:
        """The trials that were measured, best first."""
        return sorted(
            (t for t in self.trials if t.perplexity is not None), key=lambda t: (t.perplexity, t.recipe)
        )


def load_found(path: Path) -> Found:
    """Read the summary of a search.

    Raises:
        InputError: it cannot be read, is none, or holds no recipe that was measured.
    """
    try:
        found = Found.model_validate_json(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"search '{path}' cannot be read: {error}.") from None
    except ValidationError as error:
        raise InputError(f"'{path}' is not the summary of a search: {explain(error, Found)}") from None
    if not found.ranked:
        raise InputError(f"search '{path}' has measured no recipe yet. Give it more --time.")
    return found


def choices(trained: bool, device: str) -> dict[str, tuple[str, ...]]:
    """The stacks to choose from, by kind of stage, from all registered methods that the device can run.

    One whose extra is missing is among them: trying it costs no time and notes how to install it.
    `trained`: whether there is a text for recovery training.
    """
    known = [(name, methods.get(name)) for name in methods]
    fitting = [(n, m) for n, m in known if "cuda" not in m.needs or device.startswith("cuda")]
    plain = [(n, m) for n, m in fitting if m.family != "control" and "training" not in m.needs]
    structures = [n for n, m in plain if "params" in m.acts_on]
    quantizers = [n for n, m in plain if m.acts_on == {"bytes"}]
    heals = [n for n, m in fitting if "training" in m.needs and not m.acts_on] if trained else []
    return {
        "structure": (NOTHING, *structures),
        "heal": (NOTHING, *heals),
        "quantizer": (NOTHING, *quantizers),
    }


def seconds_of(text: str) -> float:
    """Read a time such as `30m`, `2h`, `90s` or `1h30m`.

    Raises:
        InputError: it is none.
    """
    match = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text.strip())
    total = (
        sum(int(n or 0) * unit for n, unit in zip(match.groups(), (3600, 60, 1), strict=True)) if match else 0
    )
    if not total:
        raise InputError(f"'{text}' is no time. Use 30m, 2h, 90s or 1h30m.")
    return float(total)


Listener = Callable[[str, Found], None]
"""Called with what is being done and what was found so far."""


@dataclass
class Search:
    """The trials of one search, in one process each."""

    spec: SearchSpec
    source: load.Source
    anatomy: Anatomy
    results: Path
    data_folder: Path | None = None
    plugins: tuple[str, ...] = ()

    def run(self, seconds: float, listener: Listener = lambda what, found: None) -> Found:
        """Try stacks for `seconds`; a trial that is not done by then is given up and may come again.

        One that takes more than its share of the time is given up, too, and noted as slow.

        Raises:
            InputError: the results folder cannot be written.
            MissingExtra: optuna is not installed.
        """
        self._check_text()
        deadline = time.monotonic() + seconds
        study = self._study()
        share = seconds if self.spec.candidates else TRIAL_SHARE * seconds
        tries = self._found(study).trials
        known = {tried.recipe: tried for tried in tries if tried.status != "slow" or tried.seconds >= share}
        idle = 0
        while time.monotonic() < deadline and idle < _TIRED:
            trial = study.ask()
            recipe = self._proposed(trial)
            if recipe in known:
                idle += 1
                self._tell(study, trial, known[recipe], again=True)
                continue
            idle = 0
            listener(recipe, self._found(study))
            tried = self._try(recipe, min(deadline, time.monotonic() + share))
            if tried is None and time.monotonic() < deadline:
                reason = f"not done in {share:.0f} s; give the search more time"
                tried = Tried(recipe=recipe, status="slow", seconds=share, reason=reason)
            if tried is None:
                self._tell(study, trial, Tried(recipe=recipe, status="failed"), again=True)
                study.enqueue_trial(trial.params)  # the same command goes on with it
                break
            known[recipe] = tried
            self._tell(study, trial, tried)
            self._save(study)
        return self._save(study)

    def _check_text(self) -> None:
        """Draw once what is held back: a text too short for it is said before the first trial."""
        spec = self.spec
        tokenizer = load.load_tokenizer(self.source.location)
        draw_held_back(spec.calibration, spec.healing, spec.held_back, tokenizer, spec.seed, self.data_folder)

    def _study(self) -> Any:
        require("optuna", "weighin search")
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        path = self.spec.path(self.results)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            backend = optuna.storages.journal.JournalFileBackend(str(path.with_suffix(".journal")))
            storage = optuna.storages.JournalStorage(backend)
        except OSError as error:
            raise InputError(f"'{path.parent}' cannot be written: {error.strerror}.") from None
        study = optuna.create_study(storage=storage, study_name=self.spec.digest(), load_if_exists=True)
        for trial in study.trials:  # what a killed search was at
            if trial.state == optuna.trial.TrialState.RUNNING:
                study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
                study.enqueue_trial(trial.params)
        # Each beginning draws anew; all of them together are decided by the seed.
        seed = self.spec.seed + len(study.trials)
        startup = len(list(self._first()))
        study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup)
        if not study.trials:
            for parameters in self._first():
                study.enqueue_trial(parameters)
        return study

    def _first(self) -> Iterator[dict[str, Any]]:
        """Tried first: the candidates, or every method alone and every structure under one quantizer.

        What can reach a byte budget well comes first: quantizers, then stacks, then structures alone; other
        budgets need structures. All are untrained and have default knobs; the seed says who meets whom.
        """
        if self.spec.candidates:
            yield from ({"recipe": recipe} for recipe in self.spec.candidates)
            return
        structures, quantizers = (
            [name for name in self.spec.choices[kind] if name != NOTHING]
            for kind in ("structure", "quantizer")
        )
        shuffled = random.Random(self.spec.seed).sample(quantizers, len(quantizers))
        pairs = [(NOTHING, quantizer) for quantizer in quantizers]
        pairs += zip(structures, cycle(shuffled), strict=False)
        alone = [(structure, NOTHING) for structure in structures]
        for structure, quantizer in pairs + alone if self.spec.budget.metric == "bytes" else alone + pairs:
            knobs = self._knobs(quantizer) if quantizer != NOTHING else {}
            defaults = {f"{quantizer} {knob}": values[0] for knob, values in knobs.items()}
            yield {"structure": structure, "heal": NOTHING, "quantizer": quantizer, **defaults}

    def _proposed(self, trial: Any) -> str:
        """The recipe that a trial stands for."""
        if self.spec.candidates:
            return str(trial.suggest_categorical("recipe", self.spec.candidates))
        kinds = self.spec.choices
        stages = [trial.suggest_categorical(kind, kinds[kind]) for kind in ("structure", "heal", "quantizer")]
        if stages[0] == NOTHING:
            stages[1] = NOTHING  # recovery of what nothing was taken from
        if stages[2] != NOTHING:
            given = [
                f"{knob}={value}"
                for knob, values in self._knobs(stages[2]).items()
                if (value := trial.suggest_categorical(f"{stages[2]} {knob}", values)) != values[0]
            ]
            stages[2] += f"({','.join(sorted(given))})" if given else ""
        return "+".join(stage for stage in stages if stage != NOTHING) or "dense"

    @staticmethod
    def _knobs(quantizer: str) -> dict[str, tuple[Any, ...]]:
        """The knobs of a quantizer that are searched, its own default first."""
        fields = methods.get(quantizer).Config.model_fields
        searched: dict[str, tuple[Any, ...]] = {}
        if "group" in fields:
            searched["group"] = tuple(dict.fromkeys((fields["group"].default, *GROUPS)))
        if "embedding" in fields:
            searched["embedding"] = ("solved", *EMBEDDINGS)
        return searched

    def _try(self, recipe: str, deadline: float) -> Tried | None:
        """Plan and, if that works, measure; None when the time is up."""
        try:
            parsed = Recipe.parse(recipe)
            parsed.plan(self.anatomy, self.spec.budget, self.spec.seed)
        except (ImpossibleBudget, NotApplicable, InputError) as error:
            return Tried(recipe=recipe, status="impossible", reason=str(error))
        except Exception as error:  # whatever a method's plan raises
            return Tried(recipe=recipe, status="failed", reason=f"{type(error).__name__}: {error}")
        start = time.monotonic()
        try:
            found = self._in_process(parsed, deadline)
        except WeighinError as error:
            return Tried(recipe=recipe, status="failed", reason=str(error), seconds=time.monotonic() - start)
        if found is None:
            return None
        mean, seconds = found["nll_per_token"], time.monotonic() - start
        if not math.isfinite(mean):
            return Tried(recipe=recipe, status="failed", reason="perplexity is not finite", seconds=seconds)
        return Tried(
            recipe=recipe,
            status="ok",
            perplexity=math.exp(min(mean, 700)),
            params=found["params"],
            bytes=found["bytes"],
            seconds=seconds,
        )

    def _in_process(self, recipe: Recipe, deadline: float) -> dict[str, Any] | None:
        scratch = Path(tempfile.mkdtemp(prefix="weighin-"))
        job = Job(
            spec=self._run_spec(recipe),
            source=self.source,
            folder=scratch / "checkpoint",
            probe=scratch / "probe.safetensors",
            log=scratch / "log.txt",
            threads=torch.get_num_threads(),
            jobs=1,
            plugins=self.plugins,
            data_folder=self.data_folder,
        )
        step = partial(score_held_back, self.spec.held_back)
        try:
            return supervised(work, (step, job), job.log, lambda: time.monotonic() >= deadline)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _run_spec(self, recipe: Recipe) -> RunSpec:
        spec = self.spec
        return RunSpec(
            model=self.source.name,
            model_digest=spec.model_digest,
            recipe=str(recipe),
            method_versions=recipe.versions,
            budget=spec.budget,
            protocol=spec.protocol,
            protocol_digest=spec.protocol.digest(),
            calibration=spec.calibration,
            # Always the same text held back, whether or not the recipe trains.
            healing=spec.healing,
            seed=spec.seed,
            device=spec.device,
        )

    def _tell(self, study: Any, trial: Any, tried: Tried, again: bool = False) -> None:
        from optuna.trial import TrialState

        if not again:
            trial.set_user_attr("tried", tried.model_dump_json())
        if tried.perplexity is not None:
            study.tell(trial, math.log(tried.perplexity))
        else:
            study.tell(trial, state=TrialState.PRUNED if tried.status == "impossible" else TrialState.FAIL)

    def _found(self, study: Any) -> Found:
        told = [trial.user_attrs["tried"] for trial in study.trials if "tried" in trial.user_attrs]
        trials = [Tried.model_validate(json.loads(text)) for text in told]
        last = {tried.recipe: tried for tried in trials}
        return Found(spec=self.spec, digest=self.spec.digest(), trials=tuple(last.values()))

    def _save(self, study: Any) -> Found:
        found, path = self._found(study), self.spec.path(self.results)
        try:
            atomically(path, lambda to: to.write_text(found.model_dump_json(indent=1) + "\n"))
        except OSError as error:
            raise InputError(f"'{path}' cannot be written: {error}. What it held is untouched.") from None
        return found


def versions_of(names: Sequence[str]) -> tuple[str, ...]:
    """`name@version` of methods."""
    known: list[type[Method[Any]]] = [methods.get(name) for name in names if name != NOTHING]
    return tuple(sorted({f"{cls.name}@{cls.version}" for cls in known}))
