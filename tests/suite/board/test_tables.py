from __future__ import annotations

import io
import json
import math

import pandas as pd
import pytest

from suite.board import page, tables
from suite.board.rows import rows
from suite.records import Record
from tests.suite import examples

REQUIRED = {
    *("model", "method", "recipe", "budget_metric", "budget_target", "budget_achieved"),
    *("params", "params_ratio", "decoder_ratio", "bytes_disk", "bytes_resident", "bytes_nominal"),
    *("peak_memory_bytes", "prefill_tokens_per_s", "decode_tokens_per_s", "train_tokens_per_s"),
    *("perplexity", "accuracy", "accuracy_ci", "tasks", "compress_seconds"),
    *("status", "reason", "record", "checkpoint"),
}


@pytest.fixture
def records() -> list[Record]:
    return [
        examples.finished("dense", "none", params=1000, accuracy=0.7),
        examples.finished("svd", "params=0.8", params=796, accuracy=0.5),
        examples.finished("layerchop", "params=0.8", params=750, accuracy=0.55),
        examples.failed("random-layers", "params=0.8"),
        examples.finished("svd", "bytes=0.5", params=500, perplexity=math.inf),
        examples.finished("svd(share=0.3)", "none", params=400),
    ]


def test_json_rows_carry_every_required_key(records: list[Record]) -> None:
    found = json.loads(tables.as_json(records))
    assert len(found) == len(records)
    assert all(set(row) >= REQUIRED for row in found)
    assert {row["status"] for row in found} == {"ok", "failed"}


def test_rows_are_ordered_by_accuracy_with_failures_last(records: list[Record]) -> None:
    table = next(t for t in tables.tables(records) if t.title.endswith("params=0.8"))
    assert [row["recipe"] for row in table.rows] == ["dense", "layerchop", "svd", "random-layers"]


def test_the_reason_of_a_failed_cell_is_under_its_table(records: list[Record]) -> None:
    text = tables.markdown(records)
    assert "random-layers: compress: the worker was killed by SIGKILL" in text


def test_unbudgeted_rows_have_a_table_of_their_own(records: list[Record]) -> None:
    assert any(t.title.endswith("unbudgeted") for t in tables.tables(records))


def test_infinite_perplexity_is_null_in_json(records: list[Record]) -> None:
    rows = json.loads(tables.as_json(records))
    assert next(r for r in rows if r["budget_metric"] == "bytes")["perplexity"] is None


def test_csv_is_readable_and_complete(records: list[Record]) -> None:
    frame = pd.read_csv(io.StringIO(tables.comma_separated(records)))
    assert len(frame) == len(records)
    assert frame["accuracy_physical"].notna().sum() == 5


def test_latex_has_no_bare_unicode_signs(records: list[Record]) -> None:
    text = tables.latex(records)
    assert "toprule" in text
    assert not {"±", "×", "κ"} & set(text)


def test_the_model_with_most_rows_comes_first(records: list[Record]) -> None:
    other = examples.finished("svd", "params=0.8", model="another", params=796)
    assert [table.rows[0]["model"] for table in tables.tables([other, *records])][-1] == "another"


def test_tables_of_a_gpu_are_apart_and_say_so(records: list[Record]) -> None:
    there = [examples.finished("dense", "none", device="cuda"), examples.finished("svd", device="cuda")]
    titles = [table.title for table in tables.tables([*records, *there])]
    assert "tiny · example · cuda · params=0.8" in titles
    assert len(set(titles)) == len(titles)


def test_another_version_of_the_text_is_told(records: list[Record]) -> None:
    assert "another version" not in tables.markdown(records)
    dense = examples.finished("dense", "none", device="cuda")
    assert dense.measurements is not None
    text = dense.measurements.perplexity.model_copy(update={"tokens_digest": "0123456789"})
    dense.measurements = dense.measurements.model_copy(update={"perplexity": text})
    found = tables.tables([*records, dense])
    assert all("another version of it" in table.notes[-1] for table in found)
    assert any("of text 01234567;" in table.notes[-1] for table in found)


def test_rows_of_another_version_of_the_text_than_their_table_are_told(records: list[Record]) -> None:
    assert "2 versions of its text" not in tables.markdown(records)
    measured = records[1].measurements
    assert measured is not None
    text = measured.perplexity.model_copy(update={"tokens_digest": "9876543210"})
    records[1].measurements = measured.model_copy(update={"perplexity": text})
    table = next(t for t in tables.tables(records) if t.title.endswith("params=0.8"))
    (said,) = [note for note in table.notes if "2 versions of its text" in note]
    assert "98765432: svd" in said


def test_partial_rows_never_share_a_table_with_full_ones() -> None:
    full = examples.finished("svd", "params=0.8", params=796)
    partial = examples.finished("layerchop", "params=0.8", params=750, limit=10)
    titles = [table.title for table in tables.tables([full, partial])]
    assert len(titles) == 2
    assert any("partial: first 10 items" in title for title in titles)


def test_the_page_stands_alone_and_escapes_what_it_shows(records: list[Record]) -> None:
    records[3].failure.reason = "<script>alert(1)</script>"  # type: ignore[union-attr]
    html = page.page(records)
    assert "<script>" not in html
    assert "http" not in html
    assert "layerchop" in html


def simulated(record: Record, share: float) -> Record:
    assert record.measurements is not None
    record.measurements.simulated_share = share
    return record


def test_simulated_rows_show_speeds_with_a_mark_and_without_a_ratio() -> None:
    dense = simulated(examples.finished("dense", "none", params=1000), 0.0)
    packed = simulated(examples.finished("rtn-int8", "bytes=0.5", params=900), 0.95)
    honest = simulated(examples.finished("svd", "bytes=0.5", params=500), 0.0)
    text = tables.markdown([dense, packed, honest])
    line = next(line for line in text.splitlines() if line.startswith("| rtn-int8"))
    assert line.count("‡") == 3
    assert "×)" not in line
    assert "(2.00×)" in next(line for line in text.splitlines() if line.startswith("| svd"))
    assert "that of the imitation and has no ratio: rtn-int8 (95 %)" in text
    row = next(row for row in rows([dense, packed, honest]) if row["recipe"] == "rtn-int8")
    assert row["prefill_ratio"] is row["decode_ratio"] is row["train_ratio"] is None


def test_a_kernel_for_decoding_is_compared_though_prefill_is_simulated() -> None:
    dense = simulated(examples.finished("dense", "none", params=1000), 0.0)
    packed = simulated(examples.finished("rtn-int4", "bytes=0.5", params=900), 1.0)
    assert packed.measurements is not None
    packed.measurements.simulated_decode_share = 0.0
    row = next(row for row in rows([dense, packed]) if row["recipe"] == "rtn-int4")
    assert row["prefill_ratio"] is row["train_ratio"] is None
    assert row["decode_ratio"] is not None
    text = tables.markdown([dense, packed])
    assert next(line for line in text.splitlines() if line.startswith("| rtn-int4")).count("‡") == 2
    assert "rtn-int4 (prefill 100 %)" in text


def test_a_mark_on_decoding_alone_is_explained() -> None:
    packed = simulated(examples.finished("rtn-int4", "bytes=0.5", params=900), 0.0)
    assert packed.measurements is not None
    packed.measurements.simulated_decode_share = 0.25
    assert "has no ratio: rtn-int4 (decode 25 %)" in tables.markdown([packed])


def test_training_that_leaves_packed_weights_alone_is_not_compared() -> None:
    dense = simulated(examples.finished("dense", "none", params=1000), 0.0)
    packed = simulated(examples.finished("rtn-int8", "bytes=0.5", params=900), 0.0)
    assert packed.measurements is not None
    packed.measurements.trainable_params = 30
    row = next(row for row in rows([dense, packed]) if row["recipe"] == "rtn-int8")
    assert row["prefill_ratio"] is not None
    assert row["train_ratio"] is None


def test_a_stack_whose_structure_had_nothing_to_give_is_named() -> None:
    dense = examples.finished("dense", "none", params=1000)
    whole = examples.finished("svd+rtn-int8", "bytes=0.55", params=1000)
    text = tables.markdown([dense, whole, examples.finished("rom+rtn-int8", "bytes=0.55", params=900)])
    note = next(line for line in text.splitlines() if "stays whole" in line)
    assert "svd+rtn-int8" in note
    assert "rom" not in note


def test_rows_slower_than_dense_on_the_same_device_are_named() -> None:
    dense = simulated(examples.finished("dense", "none", params=1000), 0.0)
    slow = simulated(examples.finished("svd", "params=0.8", params=1100), 0.0)
    fast = simulated(examples.finished("layerchop", "params=0.8", params=800), 0.0)
    packed = simulated(examples.finished("rtn-int8", "params=0.8", params=1100), 0.9)
    text = tables.markdown([dense, slow, fast, packed])
    note = next(line for line in text.splitlines() if "slower than dense" in line)
    assert "svd (prefill and decode)" in note
    assert "rtn-int8 (prefill and decode)" in note
    assert "layerchop" not in note
    slow.conditions["device"] = packed.conditions["device"] = "another"
    assert "slower than dense" not in tables.markdown([dense, slow, fast, packed])


def test_rows_are_named_with_their_device_where_there_are_several() -> None:
    dense, other = examples.finished("dense", "none"), examples.finished("svd", "params=0.8")
    dense.conditions["device"] = other.conditions["device"] = "a processor"
    assert "- measured on a processor\n" in tables.markdown([dense, other])
    other.conditions["device"] = "another"
    text = tables.markdown([dense, other])
    assert "- measured on a processor: dense\n" in text
    assert "- measured on another: svd\n" in text


def test_searched_rows_are_marked_and_explained(records: list[Record]) -> None:
    records[1].searched = "0123456789abcdef"
    text = tables.markdown(records)
    assert "| svd †" in text
    assert "weighin search, 0123456789abcdef" in text
    assert "$\\dagger$" in tables.latex(records)
    found = json.loads(tables.as_json(records))
    assert [row.get("searched") for row in found if row["recipe"] == "svd"] == ["0123456789abcdef", None]


def test_boards_of_older_records_stay_as_they_were(records: list[Record]) -> None:
    assert not {"searched", "simulated_share", "slower_than_dense"} & set(rows(records)[0])
    assert not {"†", "‡"} & set(tables.markdown(records))
    columns = pd.read_csv(io.StringIO(tables.comma_separated(records))).columns
    assert not {"searched", "simulated_share", "slower_than_dense"} & set(columns)


def test_speeds_of_cells_that_ran_at_the_same_time_are_not_set_against_a_quiet_dense_row() -> None:
    def record(recipe: str, budget: str, together: int) -> Record:
        conditions = {"device": "a processor", "concurrent_cells": together}
        return examples.finished(recipe, budget).model_copy(update={"conditions": conditions})

    dense = record("dense", "none", 1)
    alone, disturbed = (rows([dense, record("svd", "params=0.8", count)])[1] for count in (1, 2))
    assert alone["prefill_ratio"] == 1.0
    assert disturbed["prefill_ratio"] is None
    assert disturbed["device"] == "a processor, 2 cells at the same time"
    text = tables.markdown([dense, record("svd", "params=0.8", 2)])
    assert "a processor, 2 cells at the same time: svd" in text
    assert "took from each other and are not compared" in text
    assert "not compared" not in tables.markdown([dense, record("svd", "params=0.8", 1)])
    both = [record("dense", "none", 2), record("svd", "params=0.8", 2)]
    assert rows(both)[1]["prefill_ratio"] is None  # nor against a dense row that was disturbed as well
    assert "×" not in tables.markdown(both).split("params=0.8")[1].split("\n\n-")[0]
