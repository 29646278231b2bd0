from __future__ import annotations

import pytest

from suite.board.rows import rows
from tests.suite import examples


def test_achieved_unused_and_ratios_are_computed_from_the_record() -> None:
    dense = examples.finished("dense", "none", params=1000)
    row = rows([dense, examples.finished("svd", "params=0.8", params=796)])[1]
    assert row["budget_achieved"] == pytest.approx(0.796)
    assert row["unused"] == pytest.approx(0.005)
    assert row["prefill_ratio"] == pytest.approx(1000 / 796)
    assert row["decoder_ratio"] == pytest.approx(596 / 800)


def test_the_interval_covers_the_mean_and_narrows_with_more_tasks() -> None:
    row = rows([examples.finished()])[0]
    low, high = row["accuracy_ci"]
    assert low < row["accuracy"] < high
    assert high - low == pytest.approx(2 * 1.96 * 0.05, rel=1e-3)
