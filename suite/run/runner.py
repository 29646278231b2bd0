"""The grid: which cells there are, which are missing, and running those, each in its own processes."""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from suite import data
from suite.errors import ImpossibleBudget, InputError, NotApplicable, WeighinError
from suite.evaluate.harness import check_task_files, check_tasks
from suite.models import load
from suite.models.anatomy import Anatomy
from suite.recipe import Recipe
from suite.records import Compression, Failure, Measurements, Record, RecordStore, Sizes, check_writable
from suite.registry import load_plugin, origin
from suite.run.processes import WorkerFailed, supervised
from suite.run.worker import Job, make_checkpoint, measure_checkpoint, work
from suite.specs import Budget, CalibrationSpec, HealingSpec, Protocol, RunSpec, Track

STAGES = (
    *("plan", "load", "compress", "save"),
    *("reload", "audit", "speed", "perplexity", "tasks", "noise", "training"),
)


@dataclass(frozen=True)
class Options:
    """How to run a grid; none of these changes what a record says, except the device."""

    results: Path
    device: str = "cpu"
    jobs: int = 1
    timeout: float | None = None
    data_folder: Path | None = None
    plugins: tuple[str, ...] = ()
    keep_checkpoints: Path | None = None


@dataclass
class Cell:
    """One cell of the grid and how far it is."""

    spec: RunSpec
    source: load.Source
    record: Record
    state: str = "waiting"
    """waiting, running, cached, ok, failed or not_applicable."""
    stage: str = ""
    detail: str = ""
    share_done: float = 0.0
    pid: int | None = None
    started: float = field(default=0.0)

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return self.state not in ("waiting", "running")


Listener = Callable[[Cell], None]


class Grid:
    """All cells of a track, planned; `run` computes the missing ones."""

    def __init__(self, track: Track, options: Options, searched: Mapping[tuple[str, str], str] | None = None):
        """Resolve everything a user may have got wrong, before any model is compressed.

        `searched` maps (recipe, budget) to the digest of the search that found the recipe.

        Raises:
            InputError: the first thing that is wrong.
        """
        self.options, self.searched = options, searched or {}
        self.store = RecordStore(options.results)
        self.plugins = {str(Path(p).expanduser().resolve()): load_plugin(p) for p in options.plugins}
        check_device(options.device)
        protocol = Protocol.load(track.protocol)
        check_tasks(protocol)
        spec = CalibrationSpec.parse(track.calibration) if track.calibration else protocol.calibration
        data.check_learnt(spec.source, protocol.perplexity.source)
        pairs = [(Recipe.parse(recipe), Budget.parse(budget)) for recipe, budget in track.pairs()]
        needs = set[str]().union(*(recipe.needs for recipe, _ in pairs))
        healing = training_text(track.healing, protocol) if "training" in needs else None
        self.store.check_writable()
        if options.keep_checkpoints is not None:
            check_writable(options.keep_checkpoints, "checkpoint folder", "--keep-checkpoints")
        self.cells: list[Cell] = []
        known = set[str]()
        for model in track.models:
            source = load.resolve(model)
            anatomy = load.load_anatomy(source)
            for seed in track.seeds:
                for recipe, budget in pairs:
                    run = RunSpec(
                        model=source.name,
                        model_digest=source.digest,
                        recipe=str(recipe),
                        method_versions=(*recipe.versions, *self._plugins_of(recipe)),
                        budget=budget,
                        protocol=protocol,
                        protocol_digest=protocol.digest(),
                        calibration=spec,
                        healing=healing if "training" in recipe.needs else None,
                        seed=seed,
                        device=options.device,
                        limit=track.limit,
                    )
                    if run.digest() not in known:  # the same cell may be written in several ways
                        known.add(run.digest())
                        self.cells.append(self._cell(run, source, recipe, anatomy))
        self._refuse_hopeless()
        if not all(cell.finished for cell in self.cells):
            check_task_files(protocol, options.data_folder)
            texts = {protocol.perplexity.source}
            if needs & {"calibration", "training"}:
                texts.add(spec.source)
            if healing is not None:
                texts.add(healing.source)
            names = [*(task.name for task in protocol.tasks), *sorted(texts)]
            data.check_whole(names, track.limit, options.data_folder)
            for text in sorted(texts):
                data.text(text, options.data_folder)  # from the hub it is fetched now, for all cells

    def run(self, listener: Listener = lambda cell: None) -> None:
        """Compute the missing cells. A cell that crashes is recorded as failed; the others go on."""
        alike: dict[tuple[str, str], list[Cell]] = {}
        for cell in self.cells:
            if not cell.finished:
                key = (cell.spec.model_dump_json(exclude={"budget"}), repr(cell.record.planned))
                alike.setdefault(key, []).append(cell)
        stop = threading.Event()

        def run_in_turn(cells: Sequence[Cell]) -> None:
            for cell in cells:
                self._run_cell(cell, listener, stop)

        with ThreadPoolExecutor(self.options.jobs) as pool:
            # Cells that may share a checkpoint never run side by side: the later ones are copied.
            futures = [pool.submit(run_in_turn, cells) for cells in alike.values()]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _plugins_of(self, recipe: Recipe) -> tuple[str, ...]:
        """Digests of the plug-ins, for a recipe that uses any: built-in rows do not depend on them."""
        foreign = any(origin(type(stage)) in self.plugins for stage in recipe.stages)
        return tuple(self.plugins.values()) if foreign else ()

    def _cell(self, spec: RunSpec, source: load.Source, recipe: Recipe, anatomy: Anatomy) -> Cell:
        existing = self.store.find(spec)
        searched = self.searched.get((spec.recipe, str(spec.budget)))
        if existing is not None and searched and not existing.searched:
            existing.searched = searched  # the same numbers, but now it is known how the recipe came about
            self.store.save(existing)
        if existing is not None and existing.status == "ok" and self._has_wanted_checkpoint(existing):
            return Cell(spec, source, existing, state="cached")
        record = Record(
            status="failed",
            spec=spec,
            model_note=source.note,
            family=f"{anatomy.model_type} of {anatomy.vocab_size} tokens",
            dense=_sizes(anatomy),
            searched=searched or (existing.searched if existing else None),
        )
        cell = Cell(spec, source, record)
        try:
            plan = recipe.plan(anatomy, spec.budget, spec.seed)
            record.knobs = plan.knobs(recipe)
            record.planned = _sizes(plan.final)
        except NotApplicable as error:
            self._finish(cell, "not_applicable", Failure(stage="plan", reason=str(error)))
        except ImpossibleBudget as error:
            self._finish(cell, "failed", Failure(stage="plan", reason=f"{spec.model}: {error}"))
        except Exception as error:  # whatever a method's plan raises: the other cells go on
            reason = str(error) if isinstance(error, WeighinError) else f"{type(error).__name__}: {error}"
            self._finish(cell, "failed", Failure(stage="plan", reason=reason))
        return cell

    def _refuse_hopeless(self) -> None:
        """When every cell asked for is impossible there is nothing to run: say so as an input error."""
        asked = [cell for cell in self.cells if cell.spec.recipe != "dense"]
        refused = [cell for cell in asked if cell.state == "failed"]
        if asked and len(refused) == len(asked):
            raise InputError("\n       ".join(reason_of(cell.record) for cell in refused))

    def _run_cell(self, cell: Cell, listener: Listener, stop: threading.Event) -> None:
        if stop.is_set():
            return
        if (measured := self._measured_under_another_budget(cell)) is not None:
            cell.record = self.store.save_as(cell.spec, measured, cell.record.searched)
            cell.state = "ok"
            listener(cell)
            return
        cell.state, cell.started = "running", time.monotonic()
        listener(cell)
        scratch = Path(tempfile.mkdtemp(prefix="weighin-"))
        folder = self._checkpoint_folder(cell.spec) or scratch / "checkpoint"
        job = Job(
            spec=cell.spec,
            source=cell.source,
            folder=folder,
            probe=scratch / "probe.safetensors",
            log=scratch / "log.txt",
            threads=max(1, torch.get_num_threads() // self.options.jobs),
            jobs=self.options.jobs,
            plugins=self.options.plugins,
            data_folder=self.options.data_folder,
        )
        results: dict[str, Any] = {}
        try:
            for step in (make_checkpoint, measure_checkpoint):
                part = self._supervise(step, job, cell, listener, stop)
                if part is None:
                    return
                job = replace(job, plan=part.get("plan"))
                seconds = results.get("seconds", {}) | part["seconds"]
                results |= part | {"seconds": seconds}
            self._record(cell, results)
        except WorkerFailed as broke:
            self._finish(cell, "failed", Failure(stage=cell.stage, reason=str(broke)))
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
            listener(cell)

    def _measured_under_another_budget(self, cell: Cell) -> Record | None:
        """The record of a finished cell that differs in its budget alone and has the same checkpoint."""
        if self.options.keep_checkpoints is not None:
            return None  # the checkpoint itself is wanted
        spec, recipe = cell.spec, Recipe.parse(cell.spec.recipe)
        for other in self.cells:
            same = other.spec.model_copy(update={"budget": spec.budget}) == spec
            if same and other.state in ("ok", "cached") and other.record.planned == cell.record.planned:
                anatomy = load.load_anatomy(cell.source)
                budgets = (spec.budget, other.spec.budget)
                if recipe.same_checkpoint(*(recipe.plan(anatomy, budget, spec.seed) for budget in budgets)):
                    return other.record
        return None

    def _supervise(
        self,
        step: Callable[..., dict[str, Any]],
        job: Job,
        cell: Cell,
        listener: Listener,
        stop: threading.Event,
    ) -> dict[str, Any] | None:
        """Run one half of a cell in a process; None when the whole run is being stopped."""

        def is_over() -> bool:
            if stop.is_set():
                return True
            limit = self.options.timeout
            if limit is not None and time.monotonic() - cell.started > limit:
                raise WorkerFailed(f"timed out after {limit:g} s")
            return False

        def hear(kind: str, content: Any) -> None:
            _update(cell, kind, content)
            listener(cell)

        def started(pid: int | None) -> None:
            cell.pid = pid

        return supervised(work, (step, job), job.log, is_over, hear, started)

    def _record(self, cell: Cell, results: dict[str, Any]) -> None:
        record = cell.record
        record.compression = Compression.model_validate(results["compression"])
        record.measurements = Measurements.model_validate(results["measurements"])
        recipe = Recipe.parse(cell.spec.recipe)
        record.knobs = results["plan"].knobs(recipe)
        record.notes = results["plan"].notes(recipe)
        record.calibration_digest = results["calibration_digest"]
        record.healing_digest = results["healing_digest"]
        record.conditions = results["conditions"]
        record.noise = results["noise"]
        record.seconds = results["seconds"]
        folder = self._checkpoint_folder(cell.spec)
        record.checkpoint = str(folder) if folder else None
        record.status, record.failure = "ok", None
        self.store.save(record, results["items"], results["entries"])
        cell.state = "ok"

    def _finish(self, cell: Cell, state: Any, failure: Failure) -> None:
        record = cell.record
        cell.state = record.status = state
        record.failure = failure
        kept = self.store.find(cell.spec)
        if kept is None or kept.status != "ok":  # what was measured outlives a later failure
            self.store.save(record)

    def _has_wanted_checkpoint(self, record: Record) -> bool:
        """Whether a finished cell still has the checkpoint that this run was asked to keep."""
        folder = self._checkpoint_folder(record.spec)
        return folder is None or (str(folder) == record.checkpoint and folder.is_dir())

    def _checkpoint_folder(self, spec: RunSpec) -> Path | None:
        if self.options.keep_checkpoints is None:
            return None
        recipe = "".join(c if c.isalnum() or c in "-+." else "_" for c in spec.recipe)
        name = f"{Path(spec.model).name}-{recipe}-{spec.budget}-{spec.digest()[:8]}"
        return self.options.keep_checkpoints / name


def training_text(given: str | None, protocol: Protocol) -> HealingSpec:
    """The text that healed and distilled cells are trained on: the protocol's unless another is given.

    Raises:
        InputError: there is none, it does not exist, or models are scored on it.
    """
    spec = protocol.healing
    if given is not None:
        spec = HealingSpec.parse(given, spec.batch) if spec else HealingSpec.parse(given)
    if spec is None:
        raise InputError(
            f"protocol '{protocol.name}' names no text to train on."
            " Give one with --healing NAME:COUNTxLENGTH."
        )
    data.check_learnt(spec.source, protocol.perplexity.source)
    return spec


def check_device(device: str) -> None:
    """Refuse a device torch does not know or does not have.

    Raises:
        InputError: with what is available.
    """
    available = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if device not in available and not (device == "cuda" and len(available) > 1):
        raise InputError(f"there is no device '{device}' here.  (Available: {', '.join(available)}.)")


def reason_of(record: Record) -> str:
    """Why a cell failed or does not apply; empty for one that is fine."""
    return record.failure.reason if record.failure else ""


def _sizes(anatomy: Anatomy) -> Sizes:
    return Sizes(params=anatomy.params, decoder_params=anatomy.decoder_params, bytes_disk=anatomy.bytes)


def _update(cell: Cell, kind: str, content: Any) -> None:
    if kind == "stage":
        cell.stage, cell.detail = content, ""
        cell.share_done = STAGES.index(content) / len(STAGES)
    else:
        cell.detail, done, total = content
        cell.share_done = (STAGES.index(cell.stage) + done / max(total, 1)) / len(STAGES)
