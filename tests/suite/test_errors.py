"""Messages for the person at the keyboard."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from suite.errors import EXTRAS, MissingExtra, require
from suite.method import methods


def test_every_extra_that_is_named_exists() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert set(EXTRAS.values()) <= set(project["optional-dependencies"])


def test_what_a_builtin_method_imports_has_an_extra() -> None:
    builtin = [cls for cls in map(methods.get, methods) if cls.__module__.startswith("methods.")]
    assert {cls.library for cls in builtin if cls.library} <= set(EXTRAS)


def test_a_package_that_is_there_is_no_error() -> None:
    require("torch", "this test")


@pytest.mark.parametrize(
    ("package", "command"),
    [("optuna", "pip install 'weighin[search]'"), ("of_a_plugin", "pip install of_a_plugin")],
)
def test_a_missing_package_names_the_install_command(
    package: str, command: str, without: Callable[[str], None]
) -> None:
    without(package)
    with pytest.raises(MissingExtra) as refusal:
        require(package, "this test")
    assert str(refusal.value) == f"this test needs an optional package: {command}"
