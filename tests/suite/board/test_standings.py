from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from suite.board import page, tables
from suite.board.standings import current, standings
from suite.errors import InputError
from suite.records import Noise, Record, RecordStore
from suite.specs import HealingSpec
from tests.suite import examples

NOISE = Noise(
    changed="1 thread instead of 2",
    items=200,
    flips=3,
    accuracy_difference=-0.005,
    largest_log_likelihood_difference=0.25,
    perplexity_ratio=1.0001,
)


@pytest.fixture
def store(tmp_path: Path) -> RecordStore:
    """Dense, two good rows that are much alike, and a bad one."""
    store = RecordStore(tmp_path)
    generator = np.random.default_rng(0)
    right = generator.random(200) < 0.8
    dense = examples.finished("dense", "none")
    save(store, dense.model_copy(update={"noise": [NOISE]}), right)
    save(store, examples.finished("svd"), right ^ (generator.random(200) < 0.02))
    save(store, examples.finished("layerchop"), right ^ (generator.random(200) < 0.03))
    save(store, examples.finished("random-layers"), generator.random(200) < 0.3)
    return store


def save(store: RecordStore, record: Record, right: Any, **fields: str) -> None:
    store.save(record, examples.item_rows(right, **fields))


def row(store: RecordStore, recipe: str) -> tables.Row:
    records = store.all()
    return next(r for r in tables.rows(records, standings(records, store)) if r["recipe"] == recipe)


def test_rows_that_are_not_told_apart_share_their_ranks(store: RecordStore) -> None:
    assert row(store, "svd")["rank"] == row(store, "layerchop")["rank"] == (1, 2)
    assert row(store, "random-layers")["rank"] == (3, 3)


def test_a_row_of_an_older_version_of_its_method_makes_way_for_the_newer() -> None:
    old = examples.finished("svd+heal")
    new = old.model_copy(deep=True)
    new.spec = old.spec.model_copy(update={"method_versions": ("svd@1", "heal@10")})
    newest = old.spec.model_copy(update={"method_versions": ("svd@2", "heal@1")})
    alone = examples.finished("svd", budget="params=0.7")
    assert current([new, old, alone]) == [new, alone]
    assert current([old, alone]) == [old, alone]
    trained = old.spec.protocol.model_copy(update={"healing": HealingSpec(source="c4", count=2, length=16)})
    new.spec = new.spec.model_copy(update={"protocol": trained})  # which a cell's digest leaves out, too
    assert current([new, old]) == [new]
    edited = [examples.finished("outside") for _ in range(2)]  # digests of plug-ins have no order
    for record, digest in zip(edited, ("ab", "cd"), strict=True):
        record.spec = record.spec.model_copy(update={"method_versions": ("outside@1", digest)})
    assert current(edited) == edited
    newer = old.model_copy(update={"spec": newest})
    assert current([newer, new, old]) == [newer]


def test_dense_has_no_rank_and_the_others_their_difference_to_it(store: RecordStore) -> None:
    assert row(store, "dense")["rank"] is None
    worst = row(store, "random-layers")
    low, high = worst["accuracy_difference_ci"]
    assert low < worst["accuracy_difference"] < high < 0


def test_unbudgeted_rows_are_compared_but_not_ranked(store: RecordStore) -> None:
    save(store, examples.finished("svd(share=0.3)", "none"), np.arange(200) % 2)
    found = row(store, "svd(share=0.3)")
    assert found["rank"] is None
    assert found["accuracy_difference"] is not None


def test_partial_rows_are_ranked_among_themselves(store: RecordStore) -> None:
    save(store, examples.finished("svd", limit=50), np.ones(50))
    records = store.all()
    partial = next(r for r in records if r.spec.limit)
    assert standings(records, store)[partial.id].rank == (1, 1)
    assert standings(records, store)[partial.id].difference is None
    assert row(store, "layerchop")["rank"] == (1, 2)


def test_a_row_without_items_has_no_rank(store: RecordStore) -> None:
    store.save(examples.finished("rtn-int8"))
    assert row(store, "rtn-int8")["rank"] is None
    assert row(store, "svd")["rank"] == (1, 2)


def test_a_row_scored_on_other_items_is_left_out_and_says_so(store: RecordStore) -> None:
    save(store, examples.finished("rtn-int8"), np.ones(200), hash="another")
    records = store.all()
    assert row(store, "rtn-int8")["rank"] is None
    assert row(store, "svd")["rank"] == (1, 2)
    assert "rtn-int8: not compared: scored on other items" in tables.markdown(
        records, standings(records, store)
    )


def test_a_damaged_file_of_items_is_named(store: RecordStore) -> None:
    path = store.path(examples.finished("svd").spec).with_suffix(".items.parquet")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match=r"items\.parquet' cannot be read"):
        standings(store.all(), store)


def test_every_format_shows_ranks_and_the_page_too(store: RecordStore) -> None:
    records = store.all()
    found = standings(records, store)
    assert "| 1–2" in tables.markdown(records, found)
    assert " 1--2 " in tables.latex(records, found)
    assert '"rank": [' in tables.as_json(records, found)
    assert "rank_low" in tables.comma_separated(records, found)
    assert "<td>1–2</td>" in page.page(records, found)
    assert not {"Δ", "−", "–"} & set(tables.latex(records, found))


def test_the_noise_floor_is_under_the_table_or_said_to_be_missing(store: RecordStore) -> None:
    text = tables.markdown(store.all())
    assert "noise floor, dense with 1 thread instead of 2: 3 of 200 items flip, accuracy −0.5 points" in text
    assert "noise floor: not measured in these records" in tables.markdown([examples.finished()])


def test_the_same_records_give_the_same_board_byte_for_byte(store: RecordStore) -> None:
    records = store.all()
    texts = {tables.as_json(records, standings(records, store)) for _ in range(3)}
    assert len(texts) == 1


def test_trained_rows_are_ranked_apart_and_have_a_table_of_their_own(store: RecordStore) -> None:
    healing = HealingSpec(source="pydoc", count=128, length=512)
    save(store, examples.finished("svd+heal", healing=healing), np.ones(200))
    save(store, examples.finished("layerchop+heal", healing=healing), np.zeros(200))
    found = {table.title.rpartition("params=0.8")[2]: table for table in tables.tables(store.all())}
    trained = found[" · trained on 65,536 tokens (pydoc:128x512/2)"]
    assert {r["recipe"] for r in trained.rows} == {"dense", "svd+heal", "layerchop+heal"}
    assert not any("heal" in r["recipe"] for r in found[""].rows)
    assert row(store, "svd+heal")["rank"] == (1, 1)
    assert row(store, "svd")["rank"] == (1, 2)


def read(recipe: str, losses: Any, text: str = "0123") -> Record:
    """A record of a protocol without tasks: nats a token in each of many windows."""
    record = examples.finished(recipe, "none" if recipe == "dense" else "params=0.8")
    assert record.measurements is not None
    nlls = tuple(16.0 * float(loss) for loss in losses)
    mean = float(np.mean(losses))
    perplexity = record.measurements.perplexity.model_copy(
        update={
            "window_nlls": nlls,
            "nll_per_token": mean,
            "perplexity": math.exp(mean),
            "tokens_digest": text,
        }
    )
    measured = record.measurements.model_copy(update={"perplexity": perplexity, "tasks": ()})
    return record.model_copy(update={"measurements": measured})


def test_rows_without_tasks_are_ranked_by_perplexity_window_by_window(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    text = 3 + generator.normal(size=16)  # windows differ far more than rows do
    losses = {
        "dense": text,
        "svd": text + 0.50 + 0.01 * generator.normal(size=16),
        "layerchop": text + 0.30 + 0.01 * generator.normal(size=16),
        "slicegpt": text + 0.30 + 0.01 * generator.normal(size=16),
        "random-layers": text + 8 + generator.normal(size=16),
    }
    records = [read(recipe, values) for recipe, values in losses.items()]
    records.append(read("rom", [*text[:-1], math.inf]))
    store = RecordStore(tmp_path)
    for record in records:
        store.save(record)
    found = {row["recipe"]: row for row in tables.rows(records, standings(records, store))}
    assert found["layerchop"]["rank"] == found["slicegpt"]["rank"] == (1, 2)
    assert found["svd"]["rank"] == (3, 3)
    assert found["random-layers"]["rank"] == (4, 4)
    assert found["dense"]["rank"] is found["rom"]["rank"] is None
    assert "no finite perplexity" in found["rom"]["standing_note"]
    text_ = tables.markdown(records, standings(records, store))
    header = next(line for line in text_.splitlines() if line.startswith("| recipe"))
    assert "perplexity" in header
    assert "accuracy" not in header
    assert "from paired windows" in text_
    order = [line.split("|")[1].strip() for line in text_.splitlines() if line.startswith("| ")][1:]
    assert order[0] == "dense"
    assert order[3:5] == ["svd", "random-layers"]


def test_one_row_without_tasks_is_first_and_texts_are_not_mixed(tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    one = [read("dense", [1, 2]), read("svd", [2, 3])]
    for record in one:
        store.save(record)
    assert [s.rank for s in standings(one, store).values()] == [(1, 1)]
    more = [*one, read("layerchop", [3, 3.5]), read("slicegpt", [1, 1], text="other")]
    store.save(more[2])
    store.save(more[3])
    found = {row["recipe"]: row for row in tables.rows(more, standings(more, store))}
    assert found["slicegpt"]["rank"] is None
    assert found["svd"]["rank"] is not None
