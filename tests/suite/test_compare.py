from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from suite.compare import Chosen, choose, compare
from suite.errors import InputError
from suite.evaluate import items
from suite.paired import noise, pair_items
from suite.records import Record, RecordStore
from tests.suite import examples

GENERATOR = np.random.default_rng(0)
RIGHT = GENERATOR.random(300) < 0.8
BAD = GENERATOR.random(300) < 0.3
NLLS = (GENERATOR.random(12) + 40).tolist()


def with_windows(record: Record, nlls: list[float], **fields: Any) -> Record:
    assert record.measurements is not None
    tokens = 15 * len(nlls)
    measured = record.measurements.perplexity.model_copy(
        update={"window_nlls": tuple(nlls), "tokens": tokens, "nll_per_token": sum(nlls) / tokens, **fields}
    )
    changed = record.measurements.model_copy(update={"perplexity": measured})
    return record.model_copy(update={"measurements": changed})


@pytest.fixture
def store(tmp_path: Path) -> RecordStore:
    """Dense, a row almost like it, a bad one, and one whose cell failed."""
    store = RecordStore(tmp_path)
    store.save(with_windows(examples.finished("dense", "none"), NLLS), examples.item_rows(RIGHT))
    almost = examples.item_rows(np.where(np.arange(300) == 7, ~RIGHT, RIGHT))
    for row in almost:
        row["log_likelihoods"] = [value - 0.01 * i for i, value in enumerate(row["log_likelihoods"])]
    store.save(with_windows(examples.finished("rtn-int8", "bytes=0.55"), [n + 0.15 for n in NLLS]), almost)
    store.save(with_windows(examples.finished("svd", "params=0.8"), [2 * n for n in NLLS]), rows(BAD))
    store.save(examples.failed("layerchop"))
    return store


def rows(right: Any, **fields: Any) -> list[dict[str, Any]]:
    return examples.item_rows(right, **fields)


def compared(store: RecordStore, *names: str) -> dict[str, Any]:
    return compare([choose(store, name) for name in names])


def test_a_bad_row_is_worse_by_a_number_of_points_with_its_interval(store: RecordStore) -> None:
    line = compared(store, "dense", "svd")["comparisons"][0]
    difference = line["accuracy_difference"]
    assert difference["estimate"] == pytest.approx(BAD.mean() - RIGHT.mean())
    assert difference["low"] < difference["estimate"] < difference["high"] < 0
    assert line["verdict"].startswith("svd@params=0.8 is worse than dense by ")
    assert line["p"] < 1e-6


def test_the_verdict_turns_round_with_the_reference(store: RecordStore) -> None:
    line = compared(store, "svd", "dense")["comparisons"][0]
    assert line["verdict"].startswith("dense is better than svd@params=0.8 by ")


def test_damage_that_flips_next_to_nothing_is_still_seen(store: RecordStore) -> None:
    line = compared(store, "dense", "rtn-int8")["comparisons"][0]
    assert line["lost"] + line["won"] == 1
    assert line["accuracy_difference"]["low"] < 0 < line["accuracy_difference"]["high"]
    assert "not told apart from dense in accuracy" in line["verdict"]
    assert "perplexity is higher (1.01×)" in line["verdict"]
    assert line["log_probability_difference"]["estimate"] != 0


def test_the_perplexity_ratio_is_that_of_the_windows(store: RecordStore) -> None:
    ratio = compared(store, "dense", "rtn-int8")["comparisons"][0]["perplexity_ratio"]
    # Every window is worse by 0.15 nats over 15 tokens, so there is nothing uncertain about it.
    assert list(ratio.values()) == pytest.approx([math.exp(0.01)] * 3)


def test_intervals_of_several_comparisons_are_wider_than_that_of_one(store: RecordStore) -> None:
    alone = compared(store, "dense", "svd")["comparisons"][0]["accuracy_difference"]
    among = compared(store, "dense", "svd", "rtn-int8")["comparisons"][0]["accuracy_difference"]
    assert among["estimate"] == alone["estimate"]
    assert among["high"] - among["low"] > alone["high"] - alone["low"]


def test_per_task_p_values_are_adjusted_over_all_tasks_and_comparisons(tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    for recipe, right in (("dense", RIGHT), ("svd", BAD), ("layerchop", BAD[::-1])):
        scored = rows(right) + rows(right[:100], task="passage")
        record = examples.finished(recipe, "none" if recipe == "dense" else "params=0.8")
        store.save(record, scored)
    for line in compared(store, "dense", "svd", "layerchop")["comparisons"]:
        assert [task["task"] for task in line["tasks"]] == ["passage", "physical"]
        assert all(task["p"] <= task["p_adjusted"] <= 4 * task["p"] for task in line["tasks"])


def test_rows_on_different_items_are_refused_with_how_many(store: RecordStore) -> None:
    store.save(examples.finished("rom", "params=0.8"), rows(RIGHT[:250]))
    with pytest.raises(InputError, match=r"50 are in 'dense' alone, 0 in 'rom@params=0.8' alone"):
        compared(store, "dense", "rom")


def test_an_item_that_was_rewritten_is_not_the_same_item(store: RecordStore) -> None:
    changed = rows(RIGHT)
    changed[3]["hash"] = "rewritten"
    store.save(examples.finished("rom", "params=0.8"), changed)
    with pytest.raises(InputError, match=r"1 are in 'dense' alone, 1 in 'rom@params=0.8' alone"):
        compared(store, "dense", "rom")


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [("metric", "acc", "metric acc_norm in one and acc"), ("fewshot", 5, "few-shot examples 0 in one and 5")],
)
def test_rows_scored_in_different_ways_are_refused_with_the_reason(
    field: str, value: Any, words: str, store: RecordStore
) -> None:
    first, other = choose(store, "dense"), choose(store, "svd")
    task = other.measurements.tasks[0].model_copy(update={field: value})
    changed = other.measurements.model_copy(update={"tasks": (task,)})
    with pytest.raises(InputError, match=words):
        compare([first, Chosen(other.name, other.record, changed, other.items)])


def test_another_model_or_protocol_on_the_same_items_is_compared_and_noted(store: RecordStore) -> None:
    other = examples.finished("svd", "params=0.7")
    spec = other.spec.model_copy(update={"model": "other", "model_digest": "9", "protocol_digest": "8"})
    other = with_windows(other.model_copy(update={"spec": spec}), NLLS, tokens_digest="other tokens")
    store.save(other, rows(BAD))
    found = compared(store, "dense", "svd@params=0.7")
    assert found["comparisons"][0]["perplexity_ratio"] is None
    notes = " ".join(found["notes"])
    assert "another model (other, not tiny)" in notes
    assert "another protocol" in notes
    assert "perplexity is not compared: the records measured it on different tokens" in notes


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("svdd", "Did you mean 'svd'"),
        ("svd@params=0.3", "no record in"),
        ("layerchop", "has no measurements to compare: failed"),
        ("nowhere.json", "does not exist"),
    ],
)
def test_a_name_that_means_nothing_usable_is_refused(name: str, words: str, store: RecordStore) -> None:
    with pytest.raises(InputError, match=words):
        choose(store, name)


def test_a_row_of_perplexity_alone_has_nothing_to_pair(store: RecordStore) -> None:
    record = examples.finished("dense", "none", model="other")
    alone = examples.PROTOCOL.model_copy(update={"name": "alone", "tasks": ()})
    record.spec = record.spec.model_copy(update={"protocol": alone})
    store.save(record)
    with pytest.raises(InputError, match="no items to pair: protocol 'alone' is perplexity alone"):
        choose(store, record.id)


def test_an_ambiguous_name_lists_the_candidates(store: RecordStore) -> None:
    other = examples.finished("svd", "params=0.7")
    store.save(other, rows(BAD))
    with pytest.raises(InputError, match="means 2 records") as error:
        choose(store, "svd")
    assert other.id in str(error.value)
    assert "svd@params=0.7" in str(error.value)


def test_records_of_two_devices_are_told_apart(store: RecordStore) -> None:
    there = examples.finished("svd", "params=0.8", device="cuda")
    store.save(there, rows(BAD))
    with pytest.raises(InputError, match="--device") as error:
        choose(store, "svd")
    assert f"{there.id}  svd@params=0.8 · tiny · example · cuda" in str(error.value)
    assert choose(store, "svd", device="cuda").record == there
    assert choose(store, "svd", device="cpu").record != there
    with pytest.raises(InputError, match=r"no record has device 'cdua'.*Did you mean 'cuda'"):
        choose(store, "svd", device="cdua")


def test_a_record_is_found_by_file_id_and_recipe_alike(store: RecordStore) -> None:
    record = choose(store, "svd").record
    assert choose(store, record.id).record == record
    assert choose(store, record.id[:6]).record == record
    assert choose(store, str(store.path(record.spec))).record == record
    assert choose(store, "svd@params=0.8").record == record


def test_a_record_is_not_compared_with_itself(store: RecordStore) -> None:
    with pytest.raises(InputError, match="two different records"):
        compared(store, "dense", "dense")


def test_the_right_answer_is_found_where_a_task_stores_its_text() -> None:
    def frame(correct: list[float], **fields: Any) -> Any:
        return items.frame(rows(correct, target="the text of the answer", **fields))

    found = pair_items({"a": frame([1, 0]), "b": frame([0, 0])})
    assert found.log_probabilities[0, 0] > found.log_probabilities[1, 0]
    unknown = pair_items({"a": frame([1, 0], log_likelihoods=[-1.0, -2.0, -3.0])})
    assert np.isnan(unknown.log_probabilities[0]).tolist() == [False, True]


def test_generated_answers_have_no_log_probability() -> None:
    found = pair_items({"a": items.frame(rows([1, 0], log_likelihoods=[]))})
    assert not found.likely.any()


def test_the_noise_floor_counts_flips_and_the_largest_change() -> None:
    perplexity = examples.measurements(800).perplexity
    later = perplexity.model_copy(update={"nll_per_token": 3.001})
    first = rows([1, 1, 0, 1]) + rows([1, 1], task="passage")
    second = rows([1, 0, 1, 0]) + rows([1, 1], task="passage")
    second[0]["log_likelihoods"] = [-1.0, -7.5]
    # The second run may list its items in any order.
    found = noise("batch 8 instead of 32", first, second[::-1], perplexity, later)
    assert (found.items, found.flips) == (6, 3)
    assert found.accuracy_difference == pytest.approx(-0.25 / 2)
    assert found.largest_log_likelihood_difference == pytest.approx(4.5)
    assert found.perplexity_ratio == pytest.approx(math.exp(0.001))


def test_two_runs_that_agree_to_the_bit_have_no_noise() -> None:
    perplexity = examples.measurements(800).perplexity
    found = noise("nothing", rows(RIGHT), rows(RIGHT), perplexity, perplexity)
    assert (found.flips, found.accuracy_difference, found.largest_log_likelihood_difference) == (0, 0, 0)
    assert found.perplexity_ratio == 1
