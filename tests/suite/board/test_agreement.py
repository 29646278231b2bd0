"""The agreement of two protocols counts only cells that both have."""

from __future__ import annotations

from typing import Any

import pytest

from suite.board.agreement import agreements


def row(protocol: str, recipe: str, accuracy: float | None, **fields: Any) -> dict[str, Any]:
    plain = {"model": "m", "budget": "params=0.8", "seed": 0, "healing_tokens": 0}
    named = {"protocol": protocol, "protocol_name": protocol.split(" ")[0]}
    return plain | named | {"recipe": recipe, "accuracy": accuracy} | fields


def board(protocol: str, accuracies: dict[str, float]) -> list[dict[str, Any]]:
    return [row(protocol, recipe, accuracy) for recipe, accuracy in accuracies.items()]


EMBEDDED = {"a": 0.1, "b": 0.2, "c": 0.3, "d": 0.4, "only-here": 0.9}


def test_one_swapped_pair_of_four_costs_a_third() -> None:
    """Of the six pairs, five agree and one does not: τ = (5 − 1) / 6."""
    (found,) = agreements(board("embedded", EMBEDDED) + board("standard", {"a": 1, "b": 3, "c": 2, "d": 4}))
    assert (found.cells, found.protocols) == (4, ("embedded", "standard"))
    assert found.tau == pytest.approx(2 / 3)
    assert "4 common cells alike with Kendall's τ = 0.67" in str(found)


def test_dense_unfinished_and_unshared_cells_do_not_count() -> None:
    standard = [
        *board("standard", {"a": 1, "b": 2, "c": 3, "dense": 4}),
        row("standard", "d", None),
        row("standard", "only-here", 5, budget="params=0.7"),
    ]
    assert agreements(board("embedded", EMBEDDED | {"dense": 1.0}) + standard) == []


def test_one_protocol_on_two_devices_is_not_two_protocols() -> None:
    assert agreements(board("embedded", EMBEDDED) + board("embedded · cuda", EMBEDDED)) == []


def test_a_checkpoint_that_two_budgets_share_counts_once() -> None:
    three = {"a": 1, "b": 2, "c": 3}
    copies = [
        row(name, "c", 3, budget="params=0.7", measured_at="params=0.8") for name in ("embedded", "standard")
    ]
    assert agreements(board("embedded", three) + board("standard", three) + copies) == []


def test_equal_accuracies_everywhere_say_nothing() -> None:
    flat = dict.fromkeys("abcd", 0.5)
    assert agreements(board("embedded", flat) + board("standard", flat)) == []
