"""Budgets, protocols, tracks and the digest that names a record."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from suite.errors import InputError
from suite.evaluate.harness import check_tasks
from suite.recipe import Recipe
from suite.run.runner import training_text
from suite.specs import (
    Budget,
    CalibrationSpec,
    HealingSpec,
    PerplexitySpec,
    Protocol,
    RunSpec,
    Track,
    digest_of,
    named_files,
)

METRICS = st.sampled_from(["params", "bytes"])
UNITS = {"k": 10**3, "M": 10**6, "G": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "MB": 10**6}


@given(METRICS, st.integers(1, 10**6))
def test_a_share_is_taken_of_the_dense_model(metric: str, millionths: int) -> None:
    share = millionths / 10**6
    budget = Budget.parse(f"{metric}={share:f}")
    assert budget == Budget(metric=metric, value=share)
    assert budget.target(10**6) <= millionths
    assert budget.target(10**6) >= millionths - 1
    assert Budget.parse(str(budget)) == budget


@given(METRICS, st.integers(1, 4000), st.sampled_from(sorted(UNITS)))
def test_a_unit_makes_a_budget_absolute(metric: str, number: int, unit: str) -> None:
    budget = Budget.parse(f"{metric}={number}{unit}")
    assert budget.target(1) == budget.target(10**9) == number * UNITS[unit]
    assert Budget.parse(str(budget)) == budget


@given(METRICS, st.integers(1000, 10**12))
def test_a_large_plain_number_is_absolute_too(metric: str, number: int) -> None:
    assert Budget.parse(f"{metric}={number}").target(5) == number


def test_none_is_a_budget_without_a_target() -> None:
    assert str(Budget.parse("none")) == "none"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is not a budget"),
        ("0.8", "is not a budget"),
        ("params=", "is not a budget"),
        ("params=lots", "is not a budget"),
        ("params=-0.5", "is not a budget"),
        ("params=0.8.1", "'0.8.1' is not a number"),
        ("bytes=64MiBs", "is not a budget"),
        ("params=1e999", "'1e999' is too large a number"),
        ("parms=0.8", "Did you mean 'params'?"),
        ("byte=0.8", "Did you mean 'bytes'?"),
        ("params=0", "a share must lie in (0, 1]"),
        ("params=1.2", "a share must lie in (0, 1]"),
        ("params=80", "a share must lie in (0, 1]"),
        ("bytes=0MiB", "too small to be an absolute size"),
        ("params=7b", "too small to be an absolute size"),
        ("params=1B", "too small to be an absolute size"),
        ("bytes=0.0005KiB", "too small to be an absolute size"),
    ],
)
def test_a_malformed_budget_is_refused_with_the_reason_and_the_form(text: str, says: str) -> None:
    with pytest.raises(InputError) as caught:
        Budget.parse(text)
    assert says in str(caught.value)


@given(st.text(max_size=20))
def test_any_text_is_a_budget_or_refused(text: str) -> None:
    try:
        budget = Budget.parse(text)
    except InputError:
        return
    assert budget.metric == "none" or budget.value > 0


@given(st.sampled_from(["pydoc", "wikitext2-test"]), st.integers(1, 999), st.integers(2, 9999))
def test_a_calibration_reads_back_what_it_prints(source: str, count: int, length: int) -> None:
    spec = CalibrationSpec(source=source, count=count, length=length)
    assert CalibrationSpec.parse(str(spec)) == spec


@pytest.mark.parametrize("text", ["pydoc", "pydoc:64", "pydoc:0x512", "pydoc:4x1", "pydoc:64x512x2", ":1x9"])
def test_a_malformed_calibration_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(InputError, match=r"Use NAME:COUNTxLENGTH, e\.g\. wikitext2:64x512"):
        CalibrationSpec.parse(text)


@given(st.sampled_from(["pydoc", "c4"]), st.integers(1, 999), st.integers(2, 9999), st.integers(1, 99))
def test_a_training_text_reads_back_what_it_prints(source: str, count: int, length: int, batch: int) -> None:
    spec = HealingSpec(source=source, count=count, length=length, batch=batch)
    assert HealingSpec.parse(str(spec)) == spec
    assert HealingSpec.parse(f"{source}:{count}x{length}", batch) == spec
    assert spec.tokens == count * length


@pytest.mark.parametrize(
    "text", ["c4:64x512/", "c4:64x512/0", "c4:64x512/two", "c4:64x512/2/2", "c4:64x512/-1"]
)
def test_a_malformed_training_text_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(InputError, match=r"Use NAME:COUNTxLENGTH/BATCH, e\.g\. wikitext2:128x512/4"):
        HealingSpec.parse(text)


PROTOCOL = Protocol(
    name="test",
    description="",
    calibration=CalibrationSpec(source="pydoc", count=2, length=8),
    perplexity=PerplexitySpec(source="pydoc-held-out", window=8),
    tasks=(),
)
SPEC = RunSpec(
    model="tiny",
    model_digest="abc",
    recipe="svd",
    method_versions=("svd@1",),
    budget=Budget.parse("params=0.8"),
    protocol=PROTOCOL,
    protocol_digest="def",
    calibration=PROTOCOL.calibration,
)
OTHER: dict[str, Any] = {
    "model": "other",
    "model_digest": "abd",
    "recipe": "layerchop",
    "method_versions": ("svd@2",),
    "budget": Budget.parse("params=0.7"),
    "protocol": PROTOCOL.model_copy(update={"tokens_per_batch": 7}),
    "protocol_digest": "deg",
    "calibration": CalibrationSpec(source="pydoc", count=3, length=8),
    "healing": HealingSpec(source="pydoc", count=3, length=8),
    "seed": 1,
    "device": "cuda",
    "limit": 5,
}


def test_the_digest_of_a_cell_survives_a_round_trip_through_json() -> None:
    again = RunSpec.model_validate_json(SPEC.model_dump_json())
    assert again == SPEC
    assert again.digest() == SPEC.digest()
    assert len(SPEC.digest()) == 16


def test_the_digest_of_a_cell_is_the_same_in_every_session() -> None:
    assert digest_of({"b": [1, "é"], "a": None}) == digest_of({"a": None, "b": [1, "é"]})
    text = '{"a": null, "b": [1, "é"]}'
    assert digest_of({"b": [1, "é"], "a": None}) == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize("field", list(RunSpec.model_fields))
def test_the_digest_of_a_cell_changes_with_each_field(field: str) -> None:
    assert SPEC.model_copy(update={field: OTHER[field]}).digest() != SPEC.digest()


def test_the_healing_text_of_a_protocol_is_no_part_of_cells_that_do_not_train() -> None:
    """What a protocol would train on leaves one-shot cells, and the tables they share, as they are."""
    text = HealingSpec(source="pydoc", count=4, length=8)
    other = PROTOCOL.model_copy(update={"healing": text})
    assert other.digest() == PROTOCOL.digest()
    assert SPEC.model_copy(update={"protocol": other}).digest() == SPEC.digest()
    healed = [SPEC.model_copy(update={"healing": t}) for t in (text, text.model_copy(update={"batch": 4}))]
    assert healed[0].digest() != healed[1].digest() != SPEC.digest()


@pytest.mark.parametrize("name", named_files("protocol"))
def test_every_protocol_trains_on_text_that_it_does_not_score(name: str) -> None:
    protocol = Protocol.load(name)
    assert protocol.healing is not None
    assert training_text(None, protocol) == protocol.healing
    inherited = training_text("c4:3x8", protocol)
    assert (str(inherited), inherited.batch) == (f"c4:3x8/{protocol.healing.batch}", protocol.healing.batch)


def test_a_specification_is_frozen_and_knows_no_other_fields() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        SPEC.seed = 3
    with pytest.raises(ValidationError, match="Extra inputs"):
        RunSpec(**SPEC.model_dump(), speed=1)


@pytest.mark.parametrize("name", named_files("protocol"))
def test_every_protocol_that_ships_loads_under_its_own_name(name: str) -> None:
    protocol = Protocol.load(name)
    assert protocol.name == name
    assert bool(protocol.tasks) != (name in ("quick", "wikitext2"))  # perplexity alone
    check_tasks(protocol)


@pytest.mark.parametrize("name", named_files("track"))
def test_every_track_that_ships_names_things_that_exist(name: str) -> None:
    track = Track.load(name)
    Protocol.load(track.protocol)
    for recipe, budget in track.pairs():
        Recipe.parse(recipe)
        Budget.parse(budget)


def test_a_track_starts_with_the_dense_model_and_lists_each_pair_once() -> None:
    track = Track(
        recipes=("svd", "dense"),
        budgets=("params=0.8", "none"),
        cells=(("svd", "none"), ("rtn-int8", "none")),
    )
    assert track.pairs() == [
        ("dense", "none"),
        ("svd", "params=0.8"),
        ("svd", "none"),
        ("rtn-int8", "none"),
    ]


def test_a_misspelt_protocol_is_offered_the_nearest() -> None:
    with pytest.raises(InputError, match=r"no protocol is called 'standart'\. Did you mean 'standard'\?"):
        Protocol.load("standart")


def test_a_protocol_is_read_from_any_yaml_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(named_files("protocol")["smoke"].read_text())
    assert Protocol.load(str(file)) == Protocol.load("smoke")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("calibratoin: 1", "unknown field 'calibratoin'. Did you mean 'calibration'?"),
        ("name: x", "Field required"),
        ("", "valid dictionary"),
        ("a: [", "cannot be read"),
        ("\x00", "cannot be read"),
        ("a: 2024-13-45", "cannot be read"),
        ("speed: {repeats: 0}", "greater than 0"),
    ],
)
def test_a_protocol_file_that_does_not_fit_is_refused(tmp_path: Path, content: str, says: str) -> None:
    file = tmp_path / "mine.yaml"
    full = named_files("protocol")["smoke"].read_text() if content.startswith(("calib", "speed")) else ""
    file.write_text(full + content)
    with pytest.raises(InputError) as caught:
        Protocol.load(str(file))
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("models: []", "at least 1 item"),
        ("seeds: []", "at least 1 item"),
        ("seeds: [-1]", "greater than or equal to 0"),
        ("seeds: [4294967296]", "less than 4294967296"),
    ],
)
def test_a_track_of_nothing_or_of_what_cannot_run_is_refused(tmp_path: Path, content: str, says: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(content)
    with pytest.raises(InputError) as caught:
        Track.load(str(file))
    assert says in str(caught.value)


def test_a_protocol_file_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        Protocol.load(str(tmp_path / "none.yaml"))
