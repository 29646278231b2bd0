"""Reproduction cards claim no run that is not on record, and name recipes that can be run."""

from __future__ import annotations

import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from suite.conformance import tiny
from suite.models.anatomy import anatomy_of
from suite.recipe import Recipe
from suite.specs import Budget, CalibrationSpec, Protocol
from tests.results.test_committed_board import RECORDS, RESULTS

CARDS = sorted(path for path in (RESULTS / "reproductions").glob("*.md") if path.stem != "README")
METHODS = {
    *("tensor-network", "rom", "slicegpt", "layerchop", "distillation"),
    *("quantization", "pruning"),
}


def sections(card: Path) -> dict[str, str]:
    parts = re.split(r"^## (.+)$", card.read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def commands(card: Path) -> list[list[str]]:
    return [shlex.split(line) for line in card.read_text().splitlines() if line.startswith("weighin ")]


def values(command: list[str], flag: str) -> list[str]:
    return [after for before, after in pairwise(command) if before == flag]


def test_every_published_method_that_was_compared_has_a_card() -> None:
    assert {card.stem for card in CARDS} == METHODS


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.stem)
def test_a_card_states_the_claim_before_the_setting(card: Path) -> None:
    assert list(sections(card))[:2] == ["Claim", "Nearest setting"]
    assert set(sections(card)) <= {"Claim", "Nearest setting", "Measured"}


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.stem)
def test_what_is_called_measured_is_on_record(card: Path) -> None:
    measured = sections(card).get("Measured")
    if measured is None:
        return
    named = set(re.findall(r"\b[0-9a-f]{16}\b", measured))
    assert named
    assert named <= {record.spec.digest() for record in RECORDS}


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.stem)
def test_the_commands_name_what_there_is(card: Path) -> None:
    assert any(command[1] == "run" for command in commands(card))
    anatomy = anatomy_of(tiny.build("llama"))
    for command in commands(card):
        for protocol in values(command, "--protocol"):
            Protocol.load(protocol)
        for calibration in values(command, "--calibration"):
            CalibrationSpec.parse(calibration)
        for budget in values(command, "--budget"):
            Budget.parse(budget)
        for recipe in values(command, "--recipe") + values(command, "--method"):
            parsed = Recipe.parse(recipe)
            if "width" not in recipe:  # a width of the real model, wider than a tiny one
                assert parsed.plan(anatomy, Budget.parse("none")).final.params > 0
