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
    """All; for stacks, and for further widths of a quantizer, whose code has met all already, these two.

    One has grouped queries, the other biases.
    """
    stems = [re.sub(r"\d+$", "", other) for other in BUILTIN]
    again = name in STACKS or stems.index(re.sub(r"\d+$", "", name)) < BUILTIN.index(name)
    return ("llama", "opt") if again else tuple(tiny.FAMILIES)


@pytest.mark.parametrize("name", [*BUILTIN, *STACKS])
def test_a_builtin_method_passes_every_check(name: str) -> None:
    try:
        Recipe.parse(name).plan(tiny.anatomy("llama"), Budget(metric="none"))
    except MissingExtra as missing:
        pytest.skip(str(missing))
    examination = examine(Subject(name), _families(name))
    offences = {f.check.name: f.details for f in examination.findings if f.status == "failed"}
    assert not offences
    assert sum(f.status == "passed" for f in examination.findings) >= len(examination.findings) - 4
