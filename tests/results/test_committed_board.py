"""The committed results tell the truth about themselves."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest

from suite.board.standings import standings
from suite.board.tables import FORMATS
from suite.recipe import Recipe
from suite.records import Record, RecordStore

RESULTS = Path(__file__).resolve().parents[2] / "results"
STORE = RecordStore(RESULTS)
RECORDS = STORE.all()
FINISHED = [record for record in RECORDS if record.status == "ok"]
DENSE = [record for record in FINISHED if record.spec.recipe == "dense"]


def label(record: Record) -> str:
    return f"{record.spec.protocol.name}-{record.spec.recipe}-{record.spec.budget}"


@pytest.mark.parametrize("record", FINISHED, ids=label)
def test_every_cell_makes_its_weight_and_matches_its_plan(record: Record) -> None:
    measured, planned, budget = record.measurements, record.planned, record.spec.budget
    assert measured is not None
    assert planned is not None
    stages = Recipe.parse(record.spec.recipe).stages
    if any(stage.adaptive for stage in stages):
        packed = any(stage.acts_on == {"bytes"} for stage in stages)
        if packed and budget.metric == "bytes":
            # A quantizer packs other shapes than were planned: half a percent of the budget is left for
            # those that take more bytes, and what others leave idle is given back as parameters.
            assert 0.997 * planned.params <= measured.sizes.params <= 1.1 * planned.params
            assert 0.9 * planned.bytes_disk <= measured.sizes.bytes_disk <= planned.bytes_disk / 0.995
        elif packed:
            # What was planned to be factored and stays dense after all is packed, too.
            assert 0.997 * planned.params <= measured.sizes.params <= planned.params
            assert measured.sizes.bytes_disk <= planned.bytes_disk / 0.995
        else:
            assert 0.997 * planned.params <= measured.sizes.params <= planned.params
            assert 0.997 * planned.bytes_disk <= measured.sizes.bytes_disk <= planned.bytes_disk
    else:
        assert (measured.sizes.params, measured.sizes.bytes_disk) == (planned.params, planned.bytes_disk)
    if budget.metric == "params":
        assert measured.sizes.params <= budget.target(record.dense.params)
    if budget.metric == "bytes":
        assert measured.sizes.bytes_disk <= budget.target(record.dense.bytes_disk)


@pytest.mark.parametrize("record", FINISHED, ids=label)
def test_sizes_are_the_sums_of_the_stored_ledger(record: Record) -> None:
    assert record.measurements is not None
    ledger = pd.read_csv(STORE.path(record.spec).with_suffix(".ledger.csv"))
    sizes = record.measurements.sizes
    assert (sizes.params, sizes.bytes_disk) == (ledger["params"].sum(), ledger["disk"].sum())


@pytest.mark.parametrize("record", FINISHED, ids=label)
def test_task_values_are_the_means_of_the_stored_items(record: Record) -> None:
    assert record.measurements is not None
    items = STORE.items(record)
    means = {} if items is None else items.groupby("task")["correct"].mean().to_dict()
    assert {task.task: task.value for task in record.measurements.tasks} == pytest.approx(means)


@pytest.mark.parametrize(
    "record",
    [r for r in DENSE if r.spec.protocol.name == "embedded" and r.spec.limit is None],
    ids=label,
)
def test_the_dense_model_is_above_chance_and_below_the_ceiling_on_every_embedded_family(
    record: Record,
) -> None:
    items = pd.read_parquet(STORE.path(record.spec).with_suffix(".items.parquet"))
    for family, group in items.groupby("family"):
        accuracy = group["correct"].mean()
        chance = (1 / group["log_likelihoods"].map(len)).mean()
        error = math.sqrt(chance * (1 - chance) / len(group))
        assert chance + 2 * error < accuracy < 0.95, family


def test_there_is_a_dense_row_for_every_protocol_on_the_board() -> None:
    assert {r.spec.protocol.name for r in DENSE} == {r.spec.protocol.name for r in RECORDS}


def test_the_committed_board_is_the_one_its_records_give() -> None:
    found = standings(RECORDS, STORE)  # seconds, so all formats are made of one
    for suffix in ("md", "csv", "json", "tex"):
        assert (RESULTS / f"board.{suffix}").read_text() == FORMATS[suffix](RECORDS, found), suffix
