from __future__ import annotations

import json
import math
from pathlib import Path

import pandas as pd
import pytest

from suite.errors import InputError
from suite.measure.ledger import Entry
from suite.records import SCHEMA_VERSION, Record, RecordStore
from tests.suite import examples

ITEM = {
    "task": "physical",
    "subtask": "physical",
    "item": "physical-001",
    "hash": "ab",
    "family": "physical",
    "log_likelihoods": [-1.0, -2.5],
    "prediction": "0",
    "target": "0",
    "correct": 1.0,
}


def test_a_record_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    store, record = RecordStore(tmp_path), examples.finished()
    store.save(record)
    assert store.find(record.spec) == record
    assert store.all() == [record]


@pytest.mark.parametrize("perplexity", [math.inf, 1e300])
def test_a_perplexity_beyond_all_bounds_survives_the_file(perplexity: float, tmp_path: Path) -> None:
    store, record = RecordStore(tmp_path), examples.finished(perplexity=perplexity)
    store.save(record)
    assert store.find(record.spec) == record


def test_items_and_ledger_lie_beside_the_record(tmp_path: Path) -> None:
    store, record = RecordStore(tmp_path), examples.finished()
    path = store.save(record, [ITEM], [Entry("lm_head", "Linear", 4, 8, 8, 8.0)])
    items = pd.read_parquet(path.with_suffix(".items.parquet"))
    assert list(items.loc[0, "log_likelihoods"]) == [-1.0, -2.5]
    assert pd.read_csv(path.with_suffix(".ledger.csv")).loc[0, "disk"] == 8


def test_items_come_back_and_a_record_without_any_gives_none(tmp_path: Path) -> None:
    store, record = RecordStore(tmp_path), examples.finished()
    store.save(record)
    assert store.items(record) is None
    store.save(record, [ITEM])
    found = store.items(record)
    assert found is not None
    assert found.loc[0, "target"] == "0"


def test_items_of_an_older_version_lack_columns_but_can_be_read(tmp_path: Path) -> None:
    store, record = RecordStore(tmp_path), examples.finished()
    path = store.save(record, [ITEM]).with_suffix(".items.parquet")
    pd.read_parquet(path).drop(columns=["hash", "family"]).to_parquet(path)
    found = store.items(record)
    assert found is not None
    assert found["hash"].isna().all()
    pd.read_parquet(path).drop(columns=["correct"]).to_parquet(path)
    with pytest.raises(InputError, match="no column 'correct'"):
        store.items(record)


def test_damaged_items_are_named(tmp_path: Path) -> None:
    store, record = RecordStore(tmp_path), examples.finished()
    path = store.save(record, [ITEM]).with_suffix(".items.parquet")
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(InputError, match="cannot be read") as error:
        store.items(record)
    assert str(path) in str(error.value)


def test_a_record_from_before_the_noise_floor_is_still_read(tmp_path: Path) -> None:
    store, record = RecordStore(tmp_path), examples.finished()
    path = store.save(record)
    content = json.loads(path.read_text())
    del content["noise"]
    path.write_text(json.dumps(content))
    assert store.read(path).noise is None


def test_a_cell_that_was_never_run_has_no_record(tmp_path: Path) -> None:
    assert RecordStore(tmp_path).find(examples.spec()) is None


def test_a_failed_write_leaves_the_old_record_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, record = RecordStore(tmp_path), examples.finished()
    path = store.save(record)
    before = path.read_text()

    def full_disk(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("suite.records.os.fsync", full_disk)
    with pytest.raises(InputError, match="No space"):
        store.save(examples.finished(accuracy=0.1))
    assert path.read_text() == before
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"schema_version": 1, "status": "o', "half-written"),
        ('{"name": "something else"}', "not a Weigh-in record"),
        ("[1, 2]", "not a Weigh-in record"),
        ('{"schema_version": 1, "status": "ok"}', "not a Weigh-in record"),
        ('{"schema_version": 99}', "Update"),
    ],
)
def test_a_file_that_is_no_record_is_named_and_left_alone(tmp_path: Path, content: str, message: str) -> None:
    store = RecordStore(tmp_path)
    path = tmp_path / "records" / "tiny" / "0123.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(InputError, match=message) as error:
        store.all()
    assert str(path) in str(error.value)
    assert path.read_text() == content


def test_a_folder_where_a_record_should_be_is_named(tmp_path: Path) -> None:
    path = tmp_path / "records" / "tiny" / "0123.json"
    path.mkdir(parents=True)
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        RecordStore(tmp_path).all()


def test_unknown_fields_of_a_record_are_ignored(tmp_path: Path) -> None:
    store, record = RecordStore(tmp_path), examples.finished()
    path = store.save(record)
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"a_later_field": 1}))
    assert store.read(path) == record


def test_an_empty_folder_says_how_to_fill_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="weighin run --results"):
        RecordStore(tmp_path).all()


def test_an_unwritable_folder_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        RecordStore(tmp_path / "file").check_writable()


def test_the_schema_version_is_written() -> None:
    assert json.loads(examples.finished().model_dump_json())["schema_version"] == SCHEMA_VERSION
    assert Record.model_validate(json.loads(examples.failed().model_dump_json())) == examples.failed()


def test_a_record_from_before_searches_and_simulated_layers_is_still_read(tmp_path: Path) -> None:
    store, record = RecordStore(tmp_path), examples.finished()
    path = store.save(record)
    content = json.loads(path.read_text())
    del content["searched"], content["measurements"]["simulated_share"]
    path.write_text(json.dumps(content))
    old = store.read(path)
    assert old.searched is None
    assert old.measurements is not None
    assert old.measurements.simulated_share is None
    assert old.id == record.id
