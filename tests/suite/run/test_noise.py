"""The noise floor compares runs that differ in nothing but what its line names."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from suite.records import Measurements
from suite.run import noise
from suite.specs import Protocol
from tests.suite import examples


def in_parts(right: list[int]) -> list[dict[str, Any]]:
    """Item rows of one task in two parts: it is the task that is cut, not its parts."""
    rows = examples.item_rows(right, "physical")
    return [row | {"subtask": f"part {place % 2}"} for place, row in enumerate(rows)]


PERPLEXITY = cast(Measurements, examples.finished().measurements).perplexity


@pytest.mark.parametrize(("limit", "flips"), [(3, 0), (5, 1)])
def test_where_tasks_are_cut_the_usual_way_is_scored_on_the_cut_as_well(
    monkeypatch: pytest.MonkeyPatch, limit: int, flips: int
) -> None:
    """One item comes out otherwise when fewer are scored together: that is no noise of a setting."""
    calls: list[Any] = []

    def evaluate(model: Any, tokenizer: Any, protocol: Protocol, folder: Any, limit: int) -> Any:
        calls.append(protocol.tokens_per_batch)
        right = [1, 1, 0, 1, 1][:limit]
        return None, in_parts(right)

    monkeypatch.setattr(noise, "ITEMS_PER_TASK", limit)
    monkeypatch.setattr(noise.harness, "evaluate", evaluate)
    monkeypatch.setattr(noise.perplexity, "measure", lambda *_: PERPLEXITY)
    protocol = Protocol.load("embedded").model_copy(update={"tokens_per_batch": 512})
    protocol = protocol.model_copy(update={"tasks": tuple(t for t in protocol.tasks if t.name == "physical")})
    model: Any = SimpleNamespace(device=torch.device("meta"))
    first = in_parts([1, 1, 1, 1, 1])
    (floor,) = noise.noise_floor(model, model, protocol, (first, PERPLEXITY))
    assert (floor.items, floor.flips) == (limit, flips)
    assert calls == ([512, 2048] if limit < 5 else [2048])
