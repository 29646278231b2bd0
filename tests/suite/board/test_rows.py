from __future__ import annotations

import math

import pytest

from suite.board import tables
from suite.board.rows import rows
from suite.records import Record
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
    (task,) = row["tasks"].values()
    share = (task["value"] * task["items"] + 2) / (task["items"] + 4)
    error = math.sqrt(share * (1 - share) / (task["items"] + 4))
    assert high - low == pytest.approx(2 * 1.96 * error, rel=1e-3)


def test_a_few_items_that_are_all_right_leave_an_interval() -> None:
    record = examples.finished(accuracy=1.0)
    assert record.measurements is not None
    one = record.measurements.tasks[0].model_copy(update={"items": 1, "standard_error": 0.0})
    record.measurements.tasks = (one,)
    low, high = rows([record])[0]["accuracy_ci"]
    assert high - low > 0.5


def test_speeds_under_other_thread_counts_are_not_compared() -> None:
    def record(recipe: str, budget: str, threads: int) -> Record:
        conditions = {"device": "a processor", "threads": threads}
        return examples.finished(recipe, budget).model_copy(update={"conditions": conditions})

    dense = record("dense", "none", 2)
    alike, other = (rows([dense, record("svd", "params=0.8", count)])[1] for count in (2, 1))
    assert (alike["device"], alike["prefill_ratio"]) == ("a processor, 2 threads", 1.0)
    assert (other["device"], other["prefill_ratio"]) == ("a processor, 1 thread", None)


def test_older_packed_rows_that_do_not_say_whether_they_imitate_have_no_ratio() -> None:
    packed = examples.finished("rtn-int8", "bytes=0.5", params=900)
    assert packed.measurements is not None
    assert packed.measurements.simulated_share is None
    packed.measurements.trainable_params = 30
    records = [examples.finished("dense", "none", params=1000), packed]
    row = rows(records)[1]
    assert row["prefill_ratio"] is row["decode_ratio"] is row["train_ratio"] is None
    assert "rebuilt for each call have no ratio: rtn-int8" in tables.markdown(records)


def test_a_row_without_perplexity_comes_after_those_with_one() -> None:
    found = [
        examples.finished(recipe, perplexity=value)
        for recipe, value in (("a", math.nan), ("b", 9.0), ("c", 3.0))
    ]
    for record in found:
        assert record.measurements is not None
        record.measurements.tasks = ()
    assert [row["recipe"] for row in rows(found)] == ["c", "b", "a"]
