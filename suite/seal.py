"""What a method is scored on stays out of its reach while it plans and compresses.

Opened files and network connections are watched through Python's audit events (PEP 578). This stops
mistakes and plain cheating; code that starts another program, or reads through a library that opens
files without Python, is not seen.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from suite.errors import CellFailed


class Trespass(CellFailed):
    """A method reached for what it is scored on."""


@dataclass
class _Seal:
    paths: tuple[str, ...]
    texts: frozenset[str]
    offences: list[str] = field(default_factory=list)
    lifted: bool = False


_current: _Seal | None = None
_watching = False


@contextmanager
def sealed(paths: Iterable[Path], texts: Iterable[str] = ()) -> Iterator[None]:
    """Refuse files at or below `paths`, the named texts, all task items and the network in this block.

    Raises:
        Trespass: at the end of the block, when something was tried, even if the refusal was caught.
    """
    global _current, _watching
    if not _watching:
        sys.addaudithook(_on_event)
        _watching = True
    seal = _Seal(tuple(os.path.realpath(path) for path in paths), frozenset(texts))
    before, _current = _current, seal
    try:
        yield
    except Exception as error:  # what was tried explains more than the error it led to
        if not seal.offences:
            raise
        raise Trespass(seal.offences[0]) from error
    finally:
        _current = before
    if seal.offences:
        raise Trespass(seal.offences[0])


@contextmanager
def lifted() -> Iterator[None]:
    """Let the suite itself read what a method may have, such as a text it can train on."""
    seal = _current
    if seal is None:
        yield
        return
    before, seal.lifted = seal.lifted, True
    try:
        yield
    finally:
        seal.lifted = before


def refuse_items(task: str) -> None:
    """Refuse the items of a task inside a sealed block.

    Raises:
        Trespass: inside a sealed block.
    """
    if _current is not None and not _current.lifted:
        _refuse(_current, f"read the evaluation items of task '{task}'")


def refuse_text(name: str) -> None:
    """Refuse a text that perplexity is measured on inside a sealed block.

    Raises:
        Trespass: inside a sealed block, for one of its texts.
    """
    if _current is not None and name in _current.texts:
        _refuse(_current, f"read the evaluation text '{name}'")


def _refuse(seal: _Seal, what: str) -> None:
    message = f"the method {what} while it planned or compressed: it must not see what it is scored on"
    seal.offences.append(message)
    raise Trespass(message)


def _on_event(event: str, arguments: tuple[Any, ...]) -> None:
    seal = _current
    if seal is None or seal.lifted:
        return
    if event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
        path = os.path.realpath(os.fsdecode(arguments[0]))
        if any(path == entry or path.startswith(entry + os.sep) for entry in seal.paths):
            _refuse(seal, f"opened the evaluation data '{path}'")
    elif event == "socket.connect" and isinstance(arguments[1], tuple):
        host = str(arguments[1][0])
        if not (host.startswith("127.") or host in ("::1", "localhost")):
            _refuse(seal, f"connected to '{host}'")
