"""Searching stacks for a budget, on a tiny model and in processes of their own."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from suite import calibration, data
from suite.errors import InputError
from suite.models import load
from suite.recipe import Recipe
from suite.search import Found, Search, SearchSpec, Tried, choices, load_found, seconds_of
from suite.specs import Budget, CalibrationSpec, HealingSpec
from tests.suite import examples

BUDGET = "bytes=0.5"


@pytest.fixture
def make(folder_of: Callable[[str], Path], tmp_path: Path) -> Callable[..., Search]:
    def search(*candidates: str, plugins: tuple[str, ...] = (), **fields: Any) -> Search:
        source = load.resolve(str(folder_of("llama")))
        spec = SearchSpec(
            model=str(folder_of("llama")),
            model_digest=source.digest,
            budget=Budget.parse(fields.pop("budget", BUDGET)),
            protocol=examples.PROTOCOL,
            protocol_given="example",
            calibration=CalibrationSpec(source="pydoc", count=2, length=16),
            healing=HealingSpec(source="pydoc", count=2, length=16, batch=1),
            held_back=3,
            seed=0,
            device="cpu",
            candidates=candidates,
            choices={} if candidates else fields.pop("kinds"),
            versions=(),
        )
        return Search(spec, source, load.load_anatomy(source), tmp_path, plugins=plugins)

    return search


def measured(search: Search, monkeypatch: pytest.MonkeyPatch, **figures: float) -> list[str]:
    """Let every trial give a made-up loss, 2.0 unless its recipe is named; returns what was measured."""
    asked: list[str] = []

    def figure(self: Search, recipe: Recipe, deadline: float) -> dict[str, Any]:
        asked.append(str(recipe))
        return {"nll_per_token": figures.get(str(recipe), 2.0), "params": 1, "bytes": 2}

    monkeypatch.setattr(Search, "_in_process", figure)
    return asked


@pytest.mark.slow
def test_the_best_candidate_is_found_and_a_failing_one_is_recorded(
    make: Callable[..., Search], tmp_path: Path
) -> None:
    plugin = examples.write_plugin(tmp_path, "breaks", "raise RuntimeError('on purpose')")
    from suite.registry import load_plugin

    lazy = examples.write_plugin(tmp_path, "lazy", "pass")  # promises to drop a block, and does not
    for path in (plugin, lazy):
        load_plugin(path)
    candidates = ("rtn-int8", "breaks+rtn-int8", "lazy+rtn-int8", "rtn-int4", "svd+dense")
    search = make(*candidates, plugins=(plugin, lazy))
    found = search.run(1200)
    tried = {trial.recipe: trial for trial in found.trials}
    assert {trial.status for trial in found.ranked} == {"ok"}
    assert set(tried) == set(candidates)
    assert tried["lazy+rtn-int8"].status == "failed"
    assert "over budget" in tried["lazy+rtn-int8"].reason
    # Which of the two is better is chance in a random model; the order must be that of what was measured.
    assert {trial.recipe for trial in found.ranked} == {"rtn-int8", "rtn-int4"}
    perplexities = [trial.perplexity for trial in found.ranked]
    assert perplexities == sorted(perplexities)
    assert perplexities[0] != perplexities[1]
    assert tried["rtn-int8"].perplexity == pytest.approx(expected_perplexity(search), rel=1e-4)
    assert tried["breaks+rtn-int8"].status == "failed"
    assert "on purpose" in tried["breaks+rtn-int8"].reason
    assert tried["svd+dense"].status == "impossible"
    assert "changes nothing" in tried["svd+dense"].reason
    assert load_found(search.spec.path(tmp_path)) == found
    assert all(trial.seconds > 0 for trial in found.trials if trial.status != "impossible")


def expected_perplexity(search: Search) -> float:
    """Of the int8 model on the sequences that the search says it holds back."""
    import math

    from suite.checkpoint import surgery_of
    from suite.evaluate import perplexity

    model = load.load_model(search.source, "cpu")
    recipe = Recipe.parse("rtn-int8")
    recipe.compress(model, recipe.plan(search.anatomy, search.spec.budget), None)
    assert surgery_of(model)
    spec, tokenizer = search.spec, load.load_tokenizer(search.source.location)
    text = calibration.draw_held_back(spec.calibration, spec.healing, spec.held_back, tokenizer, spec.seed)
    nlls = perplexity.window_nlls(model, text)
    return math.exp(float(nlls.sum()) / (text.shape[0] * (text.shape[1] - 1)))


@pytest.mark.slow
def test_a_trial_that_outlasts_the_search_is_given_up(make: Callable[..., Search], tmp_path: Path) -> None:
    plugin = examples.write_plugin(tmp_path, "sleeps", "time.sleep(600)")
    from suite.registry import load_plugin

    load_plugin(plugin)
    start = time.monotonic()
    found = make("sleeps+rtn-int8", plugins=(plugin,)).run(8)
    assert time.monotonic() - start < 300
    assert found.trials == ()


def test_a_search_goes_on_where_it_was_stopped(
    make: Callable[..., Search], monkeypatch: pytest.MonkeyPatch
) -> None:
    search = make("rtn-int8", "rtn-int4", "svd+rtn-int8")
    asked = measured(search, monkeypatch)
    whole = Search._in_process

    def stopped(self: Search, recipe: Recipe, deadline: float) -> Any:
        if asked:
            raise KeyboardInterrupt
        return whole(self, recipe, deadline)

    monkeypatch.setattr(Search, "_in_process", stopped)
    with pytest.raises(KeyboardInterrupt):
        search.run(60)
    assert [t.recipe for t in load_found(search.spec.path(search.results)).trials] == ["rtn-int8"]
    monkeypatch.setattr(Search, "_in_process", whole)
    found = search.run(60)
    assert sorted(asked) == ["rtn-int4", "rtn-int8", "svd+rtn-int8"]
    assert {t.recipe for t in found.ranked} == {"rtn-int8", "rtn-int4", "svd+rtn-int8"}
    search.run(60)
    assert len(asked) == 3


def test_cheap_untrained_stacks_come_first_and_each_stack_once(
    make: Callable[..., Search], monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = {"structure": ("none", "svd"), "heal": ("none", "heal"), "quantizer": ("none", "rtn-int8")}
    search = make(kinds=kinds)
    asked = measured(search, monkeypatch)
    monkeypatch.setattr("suite.search._TIRED", 60)
    found = search.run(60)
    assert search.spec.budget.metric == "bytes"
    assert asked[:3] == ["rtn-int8", "svd+rtn-int8", "svd"]
    assert "svd+heal+rtn-int8" in asked
    assert not any(recipe.startswith("heal") for recipe in asked)
    assert len(asked) == len(set(asked))
    assert all(str(Recipe.parse(trial.recipe)) == trial.recipe for trial in found.trials)
    assert {t.recipe for t in found.trials if t.status == "impossible"} >= {"dense"}


def test_a_trial_takes_no_more_than_its_share_of_the_time_and_may_have_a_longer_one(
    make: Callable[..., Search], monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = {"structure": ("none", "svd", "rom"), "heal": ("none",), "quantizer": ("none",)}
    search = make(kinds=kinds)
    asked = measured(search, monkeypatch)
    quick = Search._in_process

    def dawdling(self: Search, recipe: Recipe, deadline: float) -> Any:
        found = quick(self, recipe, deadline)
        return None if str(recipe) == "svd" and deadline - time.monotonic() < 100 else found

    monkeypatch.setattr(Search, "_in_process", dawdling)
    monkeypatch.setattr("suite.search._TIRED", 20)
    found = search.run(60)
    status = {trial.recipe: trial.status for trial in found.trials}
    assert status == {"svd": "slow", "rom": "ok", "dense": "impossible"}
    (slow,) = [trial for trial in found.trials if trial.status == "slow"]
    assert (slow.seconds, slow.reason) == (15, "not done in 15 s; give the search more time")
    found = search.run(600)
    assert {trial.recipe for trial in found.ranked} == {"svd", "rom"}
    assert sorted(asked) == ["rom", "svd", "svd"]


@pytest.mark.parametrize(("budget", "first"), [("params=0.8", "structure"), ("bytes=0.3", "quantizer")])
def test_every_method_is_met_before_chance_decides(
    make: Callable[..., Search], budget: str, first: str
) -> None:
    kinds = choices(trained=True, device="cpu")
    search = make(kinds=kinds)
    search = replace(search, spec=search.spec.model_copy(update={"budget": Budget.parse(budget)}))
    tried = list(search._first())
    assert tried[0][first] != "none"
    for kind, other in (("structure", "quantizer"), ("quantizer", "structure")):
        assert {trial[kind] for trial in tried if trial[other] == "none"} >= {*kinds[kind]} - {"none"}
    stacked = [
        trial["structure"] for trial in tried if "none" not in (trial["structure"], trial["quantizer"])
    ]
    assert sorted(stacked) == sorted({*kinds["structure"]} - {"none"})


def test_the_choices_are_all_that_is_registered_without_controls() -> None:
    kinds = choices(trained=True, device="cpu")
    assert {"svd", "slicegpt", "tensor-network"} <= set(kinds["structure"])
    assert not {"dense", "random-layers", "distill"} & set(kinds["structure"])
    assert set(kinds["heal"]) >= {"none", "heal"}
    assert {"none", "rtn-int4", "rtn-int8"} <= set(kinds["quantizer"])
    assert choices(trained=False, device="cpu")["heal"] == ("none",)


def test_what_is_held_back_overlaps_neither_calibration_nor_training(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "".join(chr(33 + i % 90) + chr(33 + i // 90) for i in range(2000))
    monkeypatch.setitem(data.TEXTS, "pydoc", lambda folder: text)
    sample = CalibrationSpec(source="pydoc", count=40, length=32)
    healing = HealingSpec(source="pydoc", count=10, length=48, batch=1)
    seen = calibration.draw(sample, tokenizer, 3).tokens
    training = calibration.draw_training(healing, tokenizer, lambda: None, 3)  # type: ignore[arg-type, return-value]
    kept = calibration.draw_held_back(sample, healing, 8, tokenizer, 3)
    assert kept.shape == (8, 32)

    def places(tokens: torch.Tensor) -> set[int]:
        whole = calibration.token_ids(tokenizer, text).tolist()
        at = {tuple(whole[i : i + 6]): i for i in range(len(whole) - 5)}
        rows = tokens.tolist()
        return {at[tuple(row[:6])] + j for row in rows for j in range(len(row))}

    learnt = places(seen) | places(training.tokens) | places(training.held_out)
    assert not places(kept) & learnt
    with pytest.raises(InputError, match="Hold fewer back"):
        calibration.draw_held_back(sample, healing, 80, tokenizer, 3)


@pytest.mark.parametrize(("text", "seconds"), [("30m", 1800), ("2h", 7200), ("90s", 90), ("1h30m", 5400)])
def test_a_time_is_read(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "30", "0m", "m30", "1.5h", "-3m"])
def test_a_time_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="Use 30m, 2h, 90s or 1h30m"):
        seconds_of(text)


def test_a_summary_that_cannot_be_used_is_refused(make: Callable[..., Search], tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    with pytest.raises(InputError, match="cannot be read"):
        load_found(path)
    path.write_text("{}")
    with pytest.raises(InputError, match="not the summary of a search"):
        load_found(path)
    failed = Tried(recipe="svd", status="failed", reason="x")
    path.write_text(Found(spec=make("svd").spec, digest="0", trials=(failed,)).model_dump_json())
    with pytest.raises(InputError, match="no recipe yet"):
        load_found(path)
