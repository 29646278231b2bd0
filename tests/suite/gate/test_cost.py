"""Neither side of a comparison of costs has the better conditions."""

from __future__ import annotations

import pytest

from suite.gate import cost
from suite.records import Throughput
from suite.specs import SpeedSpec


def test_base_and_candidate_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def rate(model: str, spec: SpeedSpec) -> Throughput:
        assert spec.repeats == 1
        order.append(model)
        value = 90.0 if model == "candidate" else 100.0
        return Throughput(tokens_per_s=value, repeats=(value,), batch=1, length=1)

    monkeypatch.setattr(cost.speed, "decode", rate)
    found = cost.throughput_ratio(
        "base",  # type: ignore[arg-type]
        "candidate",  # type: ignore[arg-type]
        SpeedSpec(),
        "decode",
        limit=0.8,
        alpha=0.05,
    )
    assert found.estimate == pytest.approx(0.9)
    assert order[:4] == ["base", "candidate", "candidate", "base"]
    assert order.count("base") == order.count("candidate") == cost.SPEED_ROUNDS
