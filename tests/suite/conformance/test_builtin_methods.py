"""Every method that ships with the suite passes every check; a new one is picked up by itself."""

from __future__ import annotations

import re

import pytest

from suite.conformance import tiny
from suite.conformance.trial import Subject, examine
from suite.errors import MissingExtra
from suite.method import methods
from suite.recipe import Recipe
from suite.specs import Budget

pytestmark = pytest.mark.slow

# A search of two trials or a fit of two steps goes the same way as one of twenty, in a part of the minutes.
QUICK = {"bolaco": "bolaco(trials=2)", "tensor-network": "tensor-network(refine=2)"}
BUILTIN = [QUICK.get(name, name) for name in methods if methods.get(name).__module__.startswith("methods.")]


STACKS = ["svd+rtn-int8", "layerchop+heal(distill=0.5)", "svd+heal(mode=lora)"]


def _families(name: str) -> tuple[str, ...]:
    """Grouped queries, biases, and by turns one of the other families; biases alone for further widths."""
    if name in STACKS:
        return ("llama", "opt")
    stems = [re.sub(r"\d+$", "", other) for other in BUILTIN]
    if stems.index(re.sub(r"\d+$", "", name)) < BUILTIN.index(name):
        return ("opt",)
    others = [family for family in tiny.FAMILIES if family not in ("llama", "opt")]
    return ("llama", "opt", others[BUILTIN.index(name) % len(others)])


@pytest.mark.parametrize("name", [*BUILTIN, *STACKS])
def test_a_builtin_method_passes_every_check(name: str) -> None:
    _passes(name, _families(name))


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", [*BUILTIN, *STACKS])
def test_a_builtin_method_passes_every_check_on_every_family(name: str) -> None:
    _passes(name, tuple(tiny.FAMILIES))


def _passes(name: str, families: tuple[str, ...]) -> None:
    try:
        Recipe.parse(name).plan(tiny.anatomy("llama"), Budget(metric="none"))
    except MissingExtra as missing:
        pytest.skip(str(missing))
    examination = examine(Subject(name), families)
    offences = {f.check.name: f.details for f in examination.findings if f.status == "failed"}
    assert not offences
    assert sum(f.status == "passed" for f in examination.findings) >= len(examination.findings) - 4
