"""Where a method ranks when cells fail, and under a protocol of perplexity alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from suite.conformance.ranking import Ranking, rank
from suite.conformance.trial import Subject
from suite.records import Failure, Measurements
from suite.run.runner import Cell, Grid, Options
from suite.specs import Track
from tests.suite import examples

PERPLEXITY_ALONE = """
name: text
description: a protocol for tests
calibration: {source: pydoc, count: 2, length: 16}
healing: {source: pydoc, count: 2, length: 16}
perplexity: {source: pydoc-held-out, window: 32, windows: 4}
tasks: []
"""
STEP = (0.0, 0.5, -0.5, 0.25)
"""What differs from window to window, small beside what the rows differ by."""

Ranked = Callable[..., Ranking]


@pytest.fixture
def ranked(folder_of: Callable[[str], Path], tmp_path: Path) -> Ranked:
    """Ranks `svd` with made-up nats per window, or a failure, for each recipe of a real grid."""
    protocol = tmp_path / "text.yaml"
    protocol.write_text(PERPLEXITY_ALONE)

    def rank_svd(nats: Mapping[str, float | Failure], against: list[str] | None = None) -> Ranking:
        def run(grid: Grid) -> None:
            for cell in grid.cells:
                end(cell, nats.get(cell.spec.recipe, 90.0))

        track = Track(models=(str(folder_of("llama")),), budgets=("params=0.8",), protocol=str(protocol))
        [ranking] = rank(Subject("svd"), track, Options(tmp_path / "rows"), against, run)
        return ranking

    return rank_svd


def end(cell: Cell, how: float | Failure) -> None:
    if isinstance(how, Failure):
        cell.record.status, cell.record.failure = "failed", how
    elif not cell.finished:
        text = examples.measurements(800).perplexity.model_copy(
            update={"tokens": 124, "window_nlls": tuple(how + step for step in STEP)}
        )
        made: Measurements = examples.measurements(800)
        made.perplexity = text
        cell.record.status, cell.record.measurements = "ok", made


def test_a_protocol_of_perplexity_alone_ranks_by_its_windows(ranked: Ranked) -> None:
    nats = {"dense": 60.0, "layerchop": 70.0, "svd": 80.0, "random-layers": 110.0}
    ranking = ranked(nats, ["layerchop", "random-layers"])
    assert (ranking.rank, ranking.rows, ranking.items, ranking.unit) == ((2, 2), 3, 4, "nats")
    found = {difference.other: difference.estimate for difference in ranking.differences}
    expected = {name: (value - 80.0) / 31 for name, value in nats.items() if name != "svd"}
    assert found == pytest.approx(expected)
    for difference in ranking.differences:
        assert difference.low <= difference.estimate <= difference.high


def test_a_row_without_a_finite_perplexity_is_named_and_the_others_are_ranked(ranked: Ranked) -> None:
    ranking = ranked({"svd": 80.0, "random-layers": float("inf")}, ["layerchop", "random-layers"])
    assert (ranking.rank, ranking.rows) == ((1, 1), 2)
    assert "no finite perplexity" in ranking.failed["random-layers"]
    assert ranking.broken == ()


@pytest.mark.parametrize("broken", ["svd", "layerchop", "dense"])
def test_a_cell_that_breaks_is_one_that_should_have_had_a_result(ranked: Ranked, broken: str) -> None:
    ranking = ranked({broken: Failure(stage="compress", reason="out of memory")}, ["layerchop"])
    assert ranking.broken == (broken,)
    assert ranking.failed[broken] == "out of memory"
    assert (ranking.rank is None) == (broken == "svd")


def test_only_a_baseline_that_nobody_named_may_be_without_a_plan(ranked: Ranked) -> None:
    unplanned = {"layerchop": Failure(stage="plan", reason="out of reach")}
    assert ranked(unplanned, ["layerchop"]).broken == ("layerchop",)
    assert "layerchop" not in ranked(unplanned).broken
