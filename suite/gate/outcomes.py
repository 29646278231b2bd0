"""Per-item outcomes of one side of the gate: read from a record, or measured and, for the base, cached."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import tempfile
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import filelock
import pandas as pd
import torch
from pydantic import ValidationError
from transformers import PreTrainedModel

from suite import checkpoint
from suite.errors import InputError
from suite.evaluate import perplexity
from suite.evaluate.harness import Item, Scorer, load_tasks
from suite.evaluate.items import COLUMNS
from suite.models import load
from suite.records import Perplexity, Record
from suite.run.environment import PACKAGES, device_name
from suite.specs import Protocol, TaskSpec, digest_of

Row = dict[str, Any]
Key = tuple[str, str, str, str]
Notice = Callable[[str], None]


def key_of(row: Row) -> Key:
    """What makes two rows outcomes of the same item: task, subtask, item and hash of its text."""
    return row["task"], row["subtask"], row["item"], row["hash"]


class Recorded:
    """Outcomes that a record holds."""

    def __init__(self, record: Record, file: Path):
        """`file` holds the outcomes.

        Raises:
            InputError: it is missing or not of this shape.
        """
        self.record = record
        try:
            table = pd.read_parquet(file)[COLUMNS]
        except (OSError, ValueError, KeyError) as error:
            raise InputError(
                f"the item outcomes of record {record.id} cannot be read from '{file}'"
                f" ({type(error).__name__}). Run the cell again with: weighin run"
            ) from None
        self.by_task: dict[str, list[Row]] = {}
        for row in table.to_dict("records"):
            self.by_task.setdefault(row["task"], []).append({str(name): row[name] for name in row})
        self._by_key = {key_of(row): row for rows in self.by_task.values() for row in rows}

    def matching(self, rows: Sequence[Row]) -> list[Row]:
        """This record's row for each of the other side's rows.

        Raises:
            InputError: with the number of items it lacks.
        """
        missing = [row for row in rows if key_of(row) not in self._by_key]
        if missing:
            example = missing[0]
            raise InputError(
                f"{len(missing)} of {len(rows)} items have no match in record {self.record.id} (equal task,"
                f" item and text), for example {example['subtask']} {example['item']}. The two sides were"
                " scored on different items; use records of the same protocol, limit and data."
            )
        return [self._by_key[key_of(row)] for row in rows]

    def perplexity(self) -> Perplexity:
        """The record's perplexity, with its windows."""
        if self.record.measurements is None:
            raise InputError(f"record {self.record.id} holds no measurements.")
        return self.record.measurements.perplexity


class Measured:
    """Outcomes of a model, scored when asked for; loaded only when something must be scored."""

    def __init__(
        self,
        source: load.Source,
        protocol: Protocol,
        device: str = "cpu",
        limit: int | None = None,
        data_folder: Path | None = None,
        cache: Path | None = None,
        notice: Notice = lambda message: None,
    ):
        """`cache` is the folder of this very side under these very conditions (see `cache_folder`)."""
        self.source, self.protocol, self.device, self.limit = source, protocol, device, limit
        self.data_folder, self.cache, self.notice = data_folder, cache, notice
        self.scored = 0

    @functools.cached_property
    def model(self) -> PreTrainedModel:
        """The model as a cell's worker would load it."""
        return load_side(self.source, self.device, self.protocol)

    @functools.cached_property
    def scorer(self) -> Scorer:
        """Scores items on the model."""
        tokenizer = load.load_tokenizer(self.source.location)
        return Scorer(self.model, tokenizer, self.protocol, self.data_folder)

    def items(self, task: TaskSpec) -> list[Item]:
        """All items of a task."""
        return self.scorer.items(task, self.limit)

    def rows(self, task: TaskSpec, chosen: Sequence[Item]) -> list[Row]:
        """One row for each chosen item, in that order."""
        file = self.cache and self.cache / f"{digest_of([task.name, list(chosen)])[:16]}.json"
        known = self._read(file, list) if file else None
        if known is not None and len(known) == len(chosen) and all(set(COLUMNS) <= set(r) for r in known):
            return list(known)
        # The scorer answers by subtask and in the order of the data.
        at = sorted(range(len(chosen)), key=lambda i: chosen[i])
        rows = sorted(self.scorer.score(task, [chosen[i] for i in at]), key=lambda row: row["subtask"])
        if [row["subtask"] for row in rows] != [chosen[i][0] for i in at]:
            raise InputError(f"task '{task.name}' returned other items than it was asked for.")
        placed = dict(zip(at, rows, strict=True))
        ordered = [placed[i] for i in range(len(chosen))]
        self.scored += len(ordered)
        if file:
            self._write(file, ordered)
        return ordered

    def perplexity(self) -> Perplexity:
        """Perplexity on the protocol's text."""
        file = self.cache and self.cache / "perplexity.json"
        known = self._read(file, dict) if file else None
        if known is not None:
            try:
                return Perplexity.model_validate(known)
            except ValidationError:
                self.notice(f"cached perplexity in {file} does not fit this version; measured again.")
        tokenizer = load.load_tokenizer(self.source.location)
        found = perplexity.measure(self.model, tokenizer, self.protocol.perplexity, self.data_folder)
        if file:
            self._write(file, found.model_dump(mode="json"))
        return found

    def _read(self, file: Path, shape: type) -> Any:
        if not file.is_file():
            return None
        try:
            stored = json.loads(file.read_text())
            content = stored["content"]
            if stored["digest"] != digest_of(content) or not isinstance(content, shape):
                raise ValueError("digest")
        except (OSError, ValueError, KeyError, TypeError):
            self.notice(f"cache entry {file} is damaged; the base is measured again for it.")
            return None
        return content

    def _write(self, file: Path, content: Any) -> None:
        text = json.dumps({"digest": digest_of(content), "content": content})
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with (
                filelock.FileLock(file.with_suffix(".lock")),
                tempfile.TemporaryDirectory(dir=file.parent, prefix=".partial-") as partial,
            ):
                written = Path(partial) / file.name
                written.write_text(text)
                written.replace(file)
        except OSError as error:
            self.notice(f"the base is not cached: '{file.parent}' cannot be written ({error.strerror}).")


def load_side(source: load.Source, device: str, protocol: Protocol) -> PreTrainedModel:
    """A dense or compressed model, in the protocol's dtype.

    Raises:
        InputError: its family is not supported, or its weights cannot be read.
    """
    load.load_config(source)
    try:
        if Path(source.location).is_dir():
            model = checkpoint.reload(Path(source.location), device)
        else:
            model = load.load_model(source, device)
    except (OSError, ValueError, RuntimeError) as error:
        lines = str(error).strip().splitlines() or [""]
        raise InputError(f"the weights of '{source.name}' cannot be read: {lines[0]}") from None
    return model if protocol.dtype == "native" else model.to(getattr(torch, protocol.dtype))


def dtype_of(source: load.Source, protocol: Protocol) -> str:
    """The name of the dtype a side is scored in, from its config alone."""
    if protocol.dtype != "native":
        return protocol.dtype
    return str(load.native_dtype(load.load_config(source))).removeprefix("torch.")


def cache_folder(
    source: load.Source, protocol: Protocol, device: str, limit: int | None, data_folder: Path | None
) -> Path:
    """The cache of a base, named by everything that could change an outcome.

    That is weights, tokenizer, protocol (with its batch size), limit, every document of the tasks, dtype,
    device, threads, library versions, and the suite's own sources.
    """
    facts = {
        "weights": source.digest,
        "tokenizer": tokenizer_digest(source.location),
        "protocol": protocol.model_dump(mode="json"),
        "limit": limit,
        "documents": {task.name: documents_digest(task.name, data_folder) for task in protocol.tasks},
        "dtype": dtype_of(source, protocol),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "suite": source_digest(),
    }
    return load.cache_directory() / "gate" / digest_of(facts)[:32]


def tokenizer_digest(location: str) -> str:
    """SHA-256 of everything that the tokenizer beside a model would save."""
    with tempfile.TemporaryDirectory() as folder:
        load.load_tokenizer(location).save_pretrained(folder)
        return _files_digest(Path(folder), "*")


def documents_digest(task: str, data_folder: Path | None) -> str:
    """SHA-256 of a task's documents, those shown as examples included."""
    found = hashlib.sha256()
    for name, part in load_tasks(task, data_folder).items():
        shown = part.fewshot_docs() if part.config.num_fewshot else []
        for document in (*part.eval_docs, *(shown or [])):
            found.update(json.dumps([name, document], sort_keys=True, default=str).encode())
    return found.hexdigest()


@functools.cache
def source_digest() -> str:
    """SHA-256 of the suite's own sources and task files, committed or not."""
    folders = [Path(__file__).parents[1]]
    for package in ("methods", "tasks"):
        spec = importlib.util.find_spec(package)
        folders += [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    return digest_of([_files_digest(folder, "**/*.py", "**/*.yaml", "**/*.jsonl") for folder in folders])


def _files_digest(folder: Path, *patterns: str) -> str:
    files = sorted(file for pattern in patterns for file in folder.glob(pattern) if file.is_file())
    parts = [(str(f.relative_to(folder)), hashlib.sha256(f.read_bytes()).hexdigest()) for f in files]
    return digest_of(parts)
