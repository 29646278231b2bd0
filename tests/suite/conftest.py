"""Plug-ins that a module of tests loads are forgotten after it: other tests list all methods."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from suite.layers import module_types
from suite.method import methods
from suite.registry import load_entry_points


@pytest.fixture(autouse=True, scope="module")
def _registries_left_as_they_were() -> Iterator[None]:
    load_entry_points()
    before = [(registry, dict(registry._items)) for registry in (methods, module_types)]
    yield
    for registry, items in before:
        registry._items.clear()  # type: ignore[attr-defined]
        registry._items.update(items)  # type: ignore[attr-defined]
    for name in [name for name in sys.modules if name.startswith("weighin_plugin_")]:
        del sys.modules[name]
