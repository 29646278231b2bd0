"""One registry for everything with a name: methods and module types."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Generic, TypeVar

from suite.errors import InputError, nearest

ENTRY_POINT_GROUP = "weighin.methods"

ItemT = TypeVar("ItemT")


class Registry(Generic[ItemT]):
    """Names to things, filled by decorators when packages named as entry points are imported."""

    def __init__(self, kind: str):
        self.kind = kind
        self._items: dict[str, ItemT] = {}

    def add(self, name: str, item: ItemT) -> ItemT:
        """Register `item`; a module executed twice replaces its own entries, nobody else's.

        Raises:
            InputError: another file already registered this name.
        """
        known = self._items.get(name)
        if known is not None and origin(known) != origin(item):
            raise InputError(
                f"two {self.kind}s are called '{name}': {origin(known)} and {origin(item)}. Rename one."
            )
        self._items[name] = item
        return item

    def get(self, name: str) -> ItemT:
        """Look a name up.

        Raises:
            InputError: unknown name; the nearest known one is offered.
        """
        if name not in self._items:
            load_entry_points()
        if name in self._items:
            return self._items[name]
        broken = "".join(f"\nNot importable: {entry} ({why})" for entry, why in broken_entry_points.items())
        listing = (
            f"(weighin methods lists all {len(self._items)}.)"
            if self.kind == "method"
            else f"(Known: {', '.join(self._items)}; import the plug-in that defines it.)"
        )
        raise InputError(f"no {self.kind} is called '{name}'.{nearest(name, self._items)}  {listing}{broken}")

    def __iter__(self) -> Iterator[str]:
        load_entry_points()
        return iter(sorted(self._items))

    def __len__(self) -> int:
        return len(self._items)


broken_entry_points: dict[str, str] = {}
_loaded_entry_points: set[str] = set()


def load_entry_points() -> None:
    """Import every package that announces methods; one that fails is remembered, not hidden."""
    for entry in metadata.entry_points(group=ENTRY_POINT_GROUP):
        if entry.value in _loaded_entry_points:
            continue
        _loaded_entry_points.add(entry.value)
        try:
            entry.load()
        except Exception as error:  # a third-party package may fail in any way
            broken_entry_points[entry.value] = f"{type(error).__name__}: {error}"


def load_plugin(path: str | Path) -> str:
    """Import a plug-in file, so that its decorators register what it holds. Returns its SHA-256.

    Raises:
        InputError: the file does not exist or does not import.
    """
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise InputError(f"plug-in '{path}' is not a file.")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    name = f"weighin_plugin_{file.stem}_{digest[:8]}"
    if name in sys.modules:
        return digest
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise InputError(f"plug-in '{path}' is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except InputError:
        del sys.modules[name]
        raise
    except Exception as error:  # whatever the plug-in's own code raises
        del sys.modules[name]
        frames = traceback.extract_tb(error.__traceback__)
        line = next((f" (line {f.lineno})" for f in reversed(frames) if f.filename == str(file)), "")
        raise InputError(f"plug-in '{path}' does not import: {type(error).__name__}: {error}{line}") from None
    return digest


def origin(item: object) -> str:
    """The file that defines a registered thing."""
    try:
        return str(Path(inspect.getfile(item)).resolve())  # type: ignore[arg-type]
    except (TypeError, OSError):
        return type(item).__name__
