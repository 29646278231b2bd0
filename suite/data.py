"""Texts and the data directory: offline copies of public data, laid out by task.

The directory is given by `--data-dir` or the environment variable WEIGHIN_DATA_DIR; `weighin data
pull` fills one from the hub. Without it, the same names load from the hub.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from suite import seal
from suite.errors import InputError, nearest

DATA_DIR_VARIABLE = "WEIGHIN_DATA_DIR"


def data_directory(given: str | Path | None = None) -> Path | None:
    """The data directory in force, or None for the hub.

    Raises:
        InputError: a directory is named that does not exist.
    """
    name = given or os.environ.get(DATA_DIR_VARIABLE)
    if not name:
        return None
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise InputError(f"data directory '{name}' does not exist (--data-dir or {DATA_DIR_VARIABLE}).")
    return folder.resolve()


def text(source: str, folder: Path | None = None) -> str:
    """One long text by name, for calibration or perplexity.

    Raises:
        InputError: unknown name, or neither the data directory nor the hub has it.
        seal.Trespass: a method asks for a text that it will be scored on.
    """
    check_text(source)
    seal.refuse_text(source)
    with seal.lifted():
        return TEXTS[source](folder)


def check_text(source: str) -> None:
    """Refuse a text that does not exist.

    Raises:
        InputError: with the names there are.
    """
    if source not in TEXTS:
        raise InputError(
            f"no text is called '{source}'.{nearest(source, TEXTS)}  (There are: {', '.join(TEXTS)}.)"
        )


STREAMED_ROWS = {"c4": 2000, "alpaca": 2000}
"""Rows that are taken of a text, pulled into a data directory or read from the hub, so both are the same."""


FIRST_ROWS = "first_rows.json"
"""Tells of a data directory what was pulled in part, and how many rows of it."""


def check_whole(names: Iterable[str], limit: int | None, folder: Path | None) -> None:
    """Refuse tasks and texts that were pulled in part, unless rows are marked as partial.

    Raises:
        InputError: with the rows there are.
    """
    if folder is None or not (folder / FIRST_ROWS).is_file():
        return
    there = json.loads(_content(folder / FIRST_ROWS))
    for name in names:
        first = there.get(name, there.get(name.partition("-")[0]))
        if first is not None and (limit is None or limit > first):
            raise InputError(
                f"'{folder}' holds only the first {first} rows of '{name}'. Run with --limit {first}, which"
                " marks the results as partial, or pull it whole."
            )


def check_learnt(source: str, perplexity_source: str) -> None:
    """Refuse to calibrate or train on a text that does not exist, or that models are scored on.

    Raises:
        InputError: with the texts there are.
    """
    check_text(source)
    scored = HELD_OUT | {perplexity_source}
    if source in scored:
        raise InputError(
            f"'{source}' is what models are scored on, so none learns from it."
            f"  (Others: {', '.join(sorted(TEXTS.keys() - scored))}.)"
        )


def _pydoc(part: str) -> str:
    """CPython's language reference as shipped with every interpreter, split once by topic.

    Every fifth topic in alphabetical order is held out for perplexity; topics of the same text
    (aliases) stay on one side.
    """
    from pydoc_data.topics import topics

    unique = sorted({hashlib.sha256(body.encode()).hexdigest(): body for body in topics.values()}.values())
    held_out = [body for index, body in enumerate(unique) if index % 5 == 0]
    rest = [body for index, body in enumerate(unique) if index % 5]
    return "\n\n".join(held_out if part == "held-out" else rest)


def _wikitext(split: str, raw: bool = False) -> Callable[[Path | None], str]:
    """The hub's rows joined by blank lines, as GPTQ and most after it do, or the `raw` file itself."""

    def rows(folder: Path | None) -> list[str]:
        # The hub's rows keep their newline; blank lines are empty rows.
        if folder is None:
            return [row["text"] for row in hub_rows("Salesforce/wikitext", "wikitext-2-raw-v1", split)]
        path = _existing(folder / "wikitext2" / f"{split}.txt.gz")
        # Lines end at "\n" alone: str.splitlines would also cut at U+2028 and its like.
        lines = io.StringIO(_content(path).decode(), newline="\n")
        return ["" if line.strip() == "" else line for line in lines]

    if raw:
        return lambda folder: "".join(row or " \n" for row in rows(folder))
    return lambda folder: "\n\n".join(rows(folder))


def _documents(name: str, hub: tuple[str, str | None], field: str = "text") -> Callable[[Path | None], str]:
    def load(folder: Path | None) -> str:
        if folder is None:
            rows = hub_rows(hub[0], hub[1], "train", limit=STREAMED_ROWS[name])
        else:
            rows = read_jsonl(_existing(folder / name / "train.jsonl.gz"))
        return "\n\n".join(row[field] for row in rows)

    return load


TEXTS: dict[str, Callable[[Path | None], str]] = {
    "pydoc": lambda folder: _pydoc("rest"),
    "pydoc-held-out": lambda folder: _pydoc("held-out"),
    "wikitext2": _wikitext("train"),
    "wikitext2-test": _wikitext("test"),
    "wikitext2-test-raw": _wikitext("test", raw=True),
    "c4": _documents("c4", ("allenai/c4", "en")),
    "alpaca": _documents("alpaca", ("tatsu-lab/alpaca", None)),
}

HELD_OUT = frozenset({"pydoc-held-out", "wikitext2-test", "wikitext2-test-raw"})
HELD_OUT_FILES = ("wikitext2/test.txt.gz",)


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise InputError(
            f"the data directory has no '{path.parent.name}/{path.name}' (expected {path})."
            "  (weighin data pull fetches it.)"
        )
    return path


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file, gzipped or not.

    Raises:
        InputError: it cannot be read, or is damaged.
    """
    lines = _content(path).decode().split("\n")
    try:
        return [json.loads(line) for line in lines if line.strip()]
    except json.JSONDecodeError as error:
        raise InputError(f"'{path}' is damaged: {error}.  (weighin data pull fetches it anew.)") from None


def _content(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"'{path}' cannot be read: {error}.  (weighin data pull fetches it anew.)") from None


def hub_rows(name: str, config: str | None, split: str, limit: int | None = None) -> list[dict[str, Any]]:
    """Rows of a dataset on the hub; at most `limit`, streamed, when given.

    Raises:
        InputError: the hub cannot be reached or has no such dataset.
    """
    import datasets

    try:
        if limit is None:
            return list(datasets.load_dataset(name, config, split=split))
        stream = datasets.load_dataset(name, config, split=split, streaming=True)
        return list(stream.take(limit))
    except (OSError, ValueError, datasets.exceptions.DatasetNotFoundError) as error:
        raise InputError(
            f"dataset '{name}' could not be loaded from the hub ({type(error).__name__})."
            f" Offline, name a data directory: --data-dir DIR or {DATA_DIR_VARIABLE}."
        ) from None
