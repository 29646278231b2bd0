"""One side of the gate as its model is now: its conditions and, for the base cached, what it scores."""

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
import torch
from pydantic import ValidationError
from transformers import PreTrainedModel

from suite import checkpoint
from suite.errors import InputError, WeighinError
from suite.evaluate import perplexity
from suite.evaluate.harness import Scorer, load_tasks
from suite.evaluate.items import COLUMNS, Item
from suite.gate.outcomes import Row
from suite.gate.sides import VERSIONS, Side
from suite.models import load
from suite.records import Perplexity, Record
from suite.run.environment import PACKAGES, device_name, git_state
from suite.specs import Protocol, TaskSpec, digest_of

Notice = Callable[[str], None]


def model_of(side: Side) -> tuple[load.Source | None, str]:
    """The model behind a side, or None and why there is none to measure."""
    if side.record is None:
        return side.source, ""
    record = side.record
    if record.checkpoint is not None:
        if (Path(record.checkpoint) / "config.json").is_file():
            return load.resolve(record.checkpoint), ""
        return None, f"its checkpoint '{record.checkpoint}' is gone"
    spec = record.spec
    if spec.recipe != "dense":
        return None, (
            "its checkpoint was not kept (make it again with: weighin run"
            f" --model {spec.model} --recipe '{spec.recipe}' --budget {spec.budget}"
            f" --protocol {spec.protocol.name} --keep-checkpoints DIR)"
        )
    try:
        source = load.resolve(spec.model)
    except WeighinError:
        return None, f"its model '{spec.model}' cannot be found here"
    if source.digest != spec.model_digest:
        return None, f"the model now called '{spec.model}' has other weights than the recorded one"
    return source, ""


def current_conditions(device: str) -> dict[str, Any]:
    """The conditions under which outcomes would be measured now."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "versions": {name: metadata.version(name) for name in VERSIONS},
        "git": git_state(),
    }


def dtype_now(source: load.Source | None, protocol: Protocol, record: Record) -> dict[str, Any]:
    """The dtype a record's model would be scored in now; what the record says when there is no model."""
    known = record.conditions.get("dtype")
    return {"dtype": dtype_of(source, protocol) if source is not None else known}


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
    folder = Path(source.location)
    model = checkpoint.reload(folder, device) if folder.is_dir() else load.load_model(source, device)
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
