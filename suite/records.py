"""Records: everything needed to trust or redo a row, written crash-safe, one file per cell."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from suite.errors import InputError
from suite.evaluate import items
from suite.specs import Frozen, RunSpec

if TYPE_CHECKING:  # it brings torch, and who only reads records shall not wait for that
    from suite.measure.ledger import Entry

SCHEMA_VERSION = 1
Status = Literal["ok", "failed", "not_applicable"]


class Part(BaseModel):
    """A part of a record. Unknown fields of newer versions are ignored when read."""

    model_config = ConfigDict(extra="ignore", ser_json_inf_nan="constants")


class Sizes(Part):
    """Sizes of one model: logical parameters, and bytes on disk, resident after load, and nominal."""

    params: int
    decoder_params: int
    bytes_disk: int
    bytes_resident: int | None = None
    bytes_nominal: float | None = None


class Memory(Part):
    """Peak memory in bytes. On CPU above what the process held before the model was loaded."""

    load: int
    inference: int
    how: str


class Compression(Part):
    """Cost of making the checkpoint: wall time and peak memory of the compressing process."""

    seconds: float
    peak_bytes: int
    peak_how: str


class Throughput(Frozen):
    """Median tokens per second over the repeats, the repeats themselves and their conditions."""

    tokens_per_s: float
    repeats: tuple[float, ...]
    batch: int
    length: int
    unit: str = "tokens/s"


class Perplexity(Frozen):
    """Perplexity per token and how it was computed."""

    perplexity: float
    nll_per_token: float
    tokens: int
    """Scored tokens: every window scores all its tokens but the first (all, with a BOS)."""
    window: int
    stride: int
    bos: bool
    source: str
    tokens_digest: str
    unit: str = "per token"
    window_nlls: tuple[float, ...] = ()
    """Summed negative log-likelihood of each window in nats, for paired comparisons."""


class TaskResult(Frozen):
    """Accuracy on one task: the mean of `metric` over `items` items, its standard error, and versions."""

    task: str
    metric: str
    value: float
    standard_error: float
    items: int
    version: str
    fewshot: int
    chance: float | None = None


class Measurements(Part):
    """What was measured on the reloaded checkpoint."""

    sizes: Sizes
    memory: Memory
    prefill: Throughput
    decode: Throughput
    training: Throughput
    trainable_params: int
    perplexity: Perplexity
    tasks: tuple[TaskResult, ...]
    simulated_share: float | None = None
    """Share of the parameters of linears and packed head that are rebuilt dense for each call; None in
    records from before this was measured. Older ones leave the head out."""
    simulated_decode_share: float | None = None
    """The same for the calls of decoding, for which packed linears may have a kernel."""


class Noise(Part):
    """How far two runs of the same checkpoint differ when only how it is computed changes."""

    changed: str
    """What was changed, for example "batch 8 instead of 32"."""
    items: int
    flips: int
    """Items whose outcome changed, either way."""
    accuracy_difference: float
    """Macro accuracy of the second run minus that of the first."""
    largest_log_likelihood_difference: float
    """Largest absolute change in nats of any scored continuation."""
    perplexity_ratio: float


class Failure(Part):
    """Where and why a cell failed."""

    stage: str
    reason: str


class Record(Part):
    """One cell of the grid, finished or failed."""

    schema_version: int = SCHEMA_VERSION
    status: Status
    spec: RunSpec
    model_note: str = ""
    family: str | None = None
    """Architecture and vocabulary; smaller dense models of the same are controls. None in older records."""
    dense: Sizes
    knobs: dict[str, dict[str, Any]] = Field(default_factory=dict)
    notes: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """What the stages of the recipe want kept beside their knobs, such as a loss curve."""
    planned: Sizes | None = None
    compression: Compression | None = None
    measurements: Measurements | None = None
    seconds: dict[str, float] = Field(default_factory=dict)
    calibration_digest: str | None = None
    healing_digest: str | None = None
    conditions: dict[str, Any] = Field(default_factory=dict)
    noise: list[Noise] | None = None
    """The noise floor, on the dense record; None where it was not measured."""
    failure: Failure | None = None
    checkpoint: str | None = None
    measured_at: str | None = None
    """The budget under which this checkpoint was measured, where that is not the cell's own."""
    searched: str | None = None
    """Digest of the search that found the recipe; None where a person named it."""

    @property
    def id(self) -> str:
        """The digest that names the record's files."""
        return self.spec.digest()


class RecordStore:
    """`FOLDER/records/MODEL/DIGEST.json`, with per-item outcomes and the ledger beside each."""

    def __init__(self, folder: Path):
        self.folder = folder

    def check_writable(self) -> None:
        """Refuse a results folder that cannot be written, before anything is computed.

        Raises:
            InputError: the folder cannot be created or written.
        """
        check_writable(self.folder / "records", "results folder", "--results", shown=self.folder)

    def path(self, spec: RunSpec) -> Path:
        """Where the record of a cell lives."""
        return self.folder / "records" / spec.model.replace("/", "--") / f"{spec.digest()}.json"

    def find(self, spec: RunSpec) -> Record | None:
        """The record of a cell, if there is one."""
        path = self.path(spec)
        return self.read(path) if path.exists() else None

    def read(self, path: Path) -> Record:
        """Read one record.

        Raises:
            InputError: half-written, foreign, or of a newer schema.
        """
        advice = "Move it out of the results folder, or delete it and run again."
        try:
            content = json.loads(path.read_text())
            version = content.get("schema_version") if isinstance(content, dict) else None
            if not isinstance(version, int):
                raise InputError(f"'{path}' is not a Weigh-in record. {advice}")
            if version > SCHEMA_VERSION:
                raise InputError(
                    f"'{path}' has schema {version}; this weighin reads up to {SCHEMA_VERSION}. Update."
                )
            return Record.model_validate(content)
        except OSError as error:
            raise InputError(f"'{path}' cannot be read: {error.strerror}. {advice}") from None
        except (json.JSONDecodeError, UnicodeDecodeError):
            raise InputError(f"'{path}' is not valid JSON (half-written?). {advice}") from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise InputError(
                f"'{path}' is not a Weigh-in record ('{where}': {first['msg']}). {advice}"
            ) from None

    def all(self) -> list[Record]:
        """Every record in the folder, oldest names first.

        Raises:
            InputError: the folder has no records, or one of them cannot be read.
        """
        root = self.folder / "records"
        paths = sorted(root.glob("*/*.json"))
        if not paths:
            raise InputError(
                f"no records in '{self.folder}'. Make some with: weighin run --results {self.folder}"
            )
        return [self.read(path) for path in paths]

    def items(self, record: Record) -> pd.DataFrame | None:
        """The outcomes of a record's items (see `read_items`), or None where it has none.

        Raises:
            InputError: the file cannot be read.
        """
        return read_items(self.path(record.spec))

    def save(
        self,
        record: Record,
        item_rows: Iterable[dict[str, Any]] = (),
        entries: Iterable[Entry] = (),
    ) -> Path:
        """Write a record; what was there before stays whole until the new one is complete.

        Raises:
            InputError: the folder cannot be written (a full disk, missing rights).
        """
        path = self.path(record.spec)
        table = items.frame(list(item_rows))
        ledger = pd.DataFrame([vars(entry) for entry in entries])
        text = record.model_dump_json(indent=1)
        with _writing(path):
            if len(table):
                atomically(path.with_suffix(".items.parquet"), lambda to: table.to_parquet(to, index=False))
            if len(ledger):
                atomically(path.with_suffix(".ledger.csv"), lambda to: ledger.to_csv(to, index=False))
            atomically(path, lambda to: to.write_text(text + "\n"))
        return path

    def save_as(self, spec: RunSpec, measured: Record, searched: str | None = None) -> Record:
        """Write what was measured in another cell as the record of `spec`, which has the same checkpoint.

        Raises:
            InputError: the folder cannot be written.
        """
        new = {"measured_at": measured.measured_at or str(measured.spec.budget), "checkpoint": None}
        record = measured.model_copy(update={"spec": spec, "searched": searched, **new})
        for suffix in (".items.parquet", ".ledger.csv"):
            beside, path = self.path(measured.spec).with_suffix(suffix), self.path(spec).with_suffix(suffix)
            if beside.is_file():
                with _writing(path):
                    atomically(path, partial(shutil.copyfile, beside))
        self.save(record)
        return record


def check_writable(folder: Path, what: str, option: str, shown: Path | None = None) -> None:
    """Refuse a folder that cannot be written, before anything is computed.

    Raises:
        InputError: the folder cannot be created or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"{what} '{shown or folder}' cannot be written: {error.strerror}. Choose another with"
            f" {option} DIR."
        ) from None


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise InputError(f"'{path}' cannot be written: {error}. Earlier records are untouched.") from None


def read_items(record_path: Path) -> pd.DataFrame | None:
    """The per-item outcomes beside a record's file, with all of `items.COLUMNS`; None where there are none.

    Columns that an older version did not write are there, with missing values.

    Raises:
        InputError: the file is damaged, or lacks what names an item or its outcome.
    """
    path = record_path.with_suffix(".items.parquet")
    if not path.is_file():
        return None
    try:
        table = pd.read_parquet(path)
    except (OSError, ValueError) as error:  # pyarrow's errors are among these
        reason = str(error).splitlines()[0]
        raise InputError(
            f"'{path}' cannot be read ({reason}). Delete it with its record and run the cell again."
        ) from None
    missing = {"task", "item", "correct"} - set(table.columns)
    if missing:
        raise InputError(f"'{path}' holds no item outcomes: it has no column '{min(missing)}'.")
    return table.reindex(columns=items.COLUMNS)


def atomically(path: Path, write: Any) -> None:
    """Write to a temporary file, flush it to disk, and rename it into place."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
