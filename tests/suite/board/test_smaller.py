"""A smaller dense model of the same family stands on the board of the larger one."""

from __future__ import annotations

import pytest

from suite.board import tables
from suite.records import Record, Sizes
from tests.suite import examples

SMALL = Sizes(params=600, decoder_params=400, bytes_disk=1200, bytes_resident=1200, bytes_nominal=1200)


def small(**fields: str) -> Record:
    record = examples.finished("dense", "none", params=600, accuracy=0.6, model=fields.pop("model", "small"))
    return record.model_copy(update={"dense": SMALL, "family": "llama of 256 tokens"} | fields)


@pytest.fixture
def large() -> list[Record]:
    records = [
        examples.finished("dense", "none", params=1000, accuracy=0.7),
        examples.finished("svd", "params=0.8", params=796, accuracy=0.5),
        examples.finished("svd", "bytes=0.5", params=500, accuracy=0.4),
    ]
    return [record.model_copy(update={"family": "llama of 256 tokens"}) for record in records]


def test_it_stands_under_dense_with_its_sizes_and_speeds_against_the_larger_one(large: list[Record]) -> None:
    found = {t.title: t for t in tables.tables([*large, small()])}
    table = found["tiny · example · params=0.8"]
    assert [row["recipe"] for row in table.rows] == ["dense", "dense small", "svd"]
    control = table.rows[1]
    assert control["budget_achieved"] == control["params_ratio"] == pytest.approx(0.6)
    assert control["prefill_ratio"] == pytest.approx(1000 / 600)
    assert control["rank"] is None
    assert any(note.startswith("dense NAME: a smaller dense model") for note in table.notes)
    in_bytes = found["tiny · example · bytes=0.5"].rows[1]
    assert in_bytes["budget_achieved"] == pytest.approx(0.6)
    # The smaller model keeps a table of its own, on which the larger one is no control.
    assert [row["recipe"] for row in found["small · example"].rows] == ["dense"]
    assert "dense small" in tables.markdown([*large, small()])


@pytest.mark.parametrize("other", ["opt of 256 tokens", "llama of 512 tokens", None])
def test_a_model_of_another_family_is_no_control(large: list[Record], other: str | None) -> None:
    stranger = small().model_copy(update={"family": other})
    assert all(
        not row["recipe"].startswith("dense ")
        for table in tables.tables([*large, stranger])
        for row in table.rows
    )


def test_a_smaller_dense_model_that_failed_is_no_control(large: list[Record]) -> None:
    failed = large[0].model_copy(update={"status": "failed", "measurements": None}, deep=True)
    failed.spec = failed.spec.model_copy(update={"model": "other"})
    assert "dense other" not in tables.markdown([*large, failed])


def test_speeds_of_another_kind_of_machine_are_not_compared(large: list[Record]) -> None:
    elsewhere = small(conditions={"device": "another processor"})  # type: ignore[arg-type]
    table = next(t for t in tables.tables([*large, elsewhere]) if t.title.endswith("params=0.8"))
    assert table.rows[1]["prefill_ratio"] is None
