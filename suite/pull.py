"""Filling a data directory from the hub (`weighin data pull`)."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from suite.data import FIRST_ROWS, STREAMED_ROWS, hub_rows
from suite.errors import InputError, nearest
from suite.evaluate.harness import DATA_FILES, load_tasks
from suite.records import atomically

# Name -> file -> (dataset, config, split) on the hub.
_TEXTS: dict[str, dict[str, tuple[str, str | None, str]]] = {
    "wikitext2": {
        "wikitext2/train.txt.gz": ("Salesforce/wikitext", "wikitext-2-raw-v1", "train"),
        "wikitext2/test.txt.gz": ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
    },
    "c4": {"c4/train.jsonl.gz": ("allenai/c4", "en", "train")},
    "alpaca": {"alpaca/train.jsonl.gz": ("tatsu-lab/alpaca", None, "train")},
}


def pull(folder: Path, names: Sequence[str] | None, rows: int | None) -> Iterator[tuple[str, list[str]]]:
    """Fetch tasks and texts into `folder`; yields each name with the files written for it.

    Raises:
        InputError: an unknown name, a folder that cannot be written, or a hub that cannot be reached.
    """
    known = [*DATA_FILES, *_TEXTS]
    for name in names or ():
        if name not in known:
            raise InputError(
                f"nothing to pull is called '{name}'.{nearest(name, known)}  ({', '.join(known)})"
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"'{folder}' cannot be written: {error.strerror}.") from None
    for name in names or known:
        contents = _text(name, rows) if name in _TEXTS else _task(name, rows)
        for file, content in contents.items():
            _write(folder / file, content.encode())
        _remember(folder / FIRST_ROWS, name, rows)
        yield name, list(contents)


def _remember(path: Path, name: str, rows: int | None) -> None:
    """Note how many rows were asked for, so that no result of a part passes for one of the whole."""
    noted = json.loads(path.read_text()) if path.is_file() else {}
    if rows is None:
        noted.pop(name, None)
    else:
        noted[name] = rows
    if noted or path.is_file():
        _write(path, json.dumps(noted).encode())


def _write(path: Path, content: bytes) -> None:
    data = gzip.compress(content) if path.suffix == ".gz" else content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomically(path, lambda to: to.write_bytes(data))
    except OSError as error:
        raise InputError(f"'{path}' cannot be written: {error.strerror}.") from None


def _task(name: str, rows: int | None) -> dict[str, str]:
    """Files of a task, taken from the very splits that lm-eval's own task reads."""
    tasks = load_tasks(name, None)
    collected: dict[str, list[dict[str, Any]]] = {file: [] for file in DATA_FILES[name].values()}
    for task in tasks.values():
        for split, file in DATA_FILES[name].items():
            subject = {"subject": task.config.dataset_name} if name == "mmlu" else {}
            collected[file] += [dict(row) | subject for row in task.dataset[split]]
    return {file: _lines(found[:rows]) for file, found in collected.items()}


def _text(name: str, rows: int | None) -> dict[str, str]:
    files = {}
    for file, (dataset, config, split) in _TEXTS[name].items():
        limit = rows or STREAMED_ROWS.get(name)
        found = hub_rows(dataset, config, split, limit)
        # WikiText's rows keep their newline; its blank rows are empty and become " \n" lines.
        files[file] = (
            "".join(row["text"] or " \n" for row in found) if file.endswith(".txt.gz") else _lines(found)
        )
    return files


def _lines(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, default=str) + "\n" for row in rows)
