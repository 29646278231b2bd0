"""Bolaco: centred output directions with a bias, ratios by role from a Bayesian search."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from methods import bolaco
from methods.bolaco import LEFT_DENSE, at_ratios, held_back_loss, outputs_of, put_in_place
from methods.reduced_order import Inputs
from suite.allocation import low_rank_settings
from suite.calibration import Calibration
from suite.conformance import tiny
from suite.errors import ImpossibleBudget, InputError, MissingExtra
from suite.layers import LowRankLinear
from suite.measure.ledger import ledger, total_params
from suite.models.anatomy import anatomy_of
from suite.recipe import Recipe
from suite.specs import Budget
from suite.streaming import stream

TOKENS = tiny.calibration_sample().tokens
EQUAL = "bolaco(trials=0,share=0.5)"


def has_optuna() -> bool:
    return importlib.util.find_spec("optuna") is not None


needs_optuna = pytest.mark.skipif(not has_optuna(), reason="needs the extra 'search'")


def test_the_mean_output_on_dense_inputs_is_kept_exactly(family: str) -> None:
    dense, model = tiny.build(family), tiny.build(family)
    plan = tiny.compress(model, EQUAL).stages[0]
    for block in stream(dense, TOKENS):
        prefix = f"{block.path}."
        for path in (path for path in plan.modules if path.startswith(prefix)):
            seen: list[Tensor] = []
            block.observe({path.removeprefix(prefix): seen.append})
            x = torch.cat(seen)
            with torch.no_grad():
                before, after = (m.get_submodule(path)(x).mean(0) for m in (dense, model))
            torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def test_values_stay_dense_and_all_else_is_factorised(model: PreTrainedModel, family: str) -> None:
    dense = tiny.build(family)
    lines = anatomy_of(dense).linears
    tiny.compress(model, EQUAL)
    for line in lines:
        module = model.get_submodule(line.path)
        assert isinstance(module, LowRankLinear) == (line.role not in LEFT_DENSE)
        if line.role in LEFT_DENSE:
            assert torch.equal(module.weight, dense.get_submodule(line.path).weight)
        else:
            assert module.second.bias is not None


def test_pooled_covariances_are_about_the_mean_of_each_group() -> None:
    model = tiny.build("llama")
    block = next(iter(stream(model, TOKENS, batch_size=1)))
    seen: list[Tensor] = []
    block.observe({"self_attn.q_proj": seen.append})
    wide = [part.double() for part in seen]
    pooled = sum((x - x.mean(0)).T @ (x - x.mean(0)) for x in wide)
    found = Inputs.of_all(block, ["self_attn.q_proj"], centred=True, pooled=True)["self_attn.q_proj"]
    torch.testing.assert_close(found.moment, torch.as_tensor(pooled), rtol=1e-4, atol=1e-4)
    assert found.mean is not None
    torch.testing.assert_close(found.mean, torch.cat(wide).mean(0))


def test_full_rank_changes_nothing(llama: PreTrainedModel) -> None:
    lines = [line for line in anatomy_of(llama).linears if line.role == "down"]
    before = tiny.logits_of(llama)
    plan = Recipe.parse("bolaco(trials=0,share=0.5)").plan(anatomy_of(llama), Budget.parse("none")).stages[0]
    full = {
        line.path: plan.modules[line.path].model_copy(
            update={"arguments": {**plan.modules[line.path].arguments, "rank": line.out_features}}
        )
        for line in lines
    }
    put_in_place(llama, plan.model_copy(update={"modules": full}), outputs_of(llama, TOKENS, lines))
    torch.testing.assert_close(tiny.logits_of(llama), before, rtol=1e-4, atol=1e-4)


def test_the_held_back_loss_is_that_of_the_whole_model(model: PreTrainedModel) -> None:
    with torch.no_grad():
        expected = float(model(TOKENS, labels=TOKENS).loss)
    assert held_back_loss(model, TOKENS) == pytest.approx(expected, rel=1e-5)


@given(st.lists(st.floats(0.2, 1.0), min_size=3, max_size=3), st.floats(0.1, 1.0))
def test_ratios_are_kept_in_proportion_within_the_budget(ratios: list[float], share: float) -> None:
    shapes = {"a": (48, 48), "b": (112, 48), "c": (48, 112)}
    offers = {name: low_rank_settings([0.0] * min(m, n), m, n, m) for name, (m, n) in shapes.items()}
    dense = sum(settings[-1].cost for settings in offers.values())
    budget = int(share * dense)
    named = dict(zip(shapes, ratios, strict=True))
    chosen = at_ratios(offers, named, budget)
    spent = sum(offers[name][index].cost for name, index in chosen.items())
    assert spent <= budget
    kept = {name: offers[name][index].cost / offers[name][-1].cost for name, index in chosen.items()}
    for first in kept:
        for second in kept:
            if max(kept[first], kept[second]) < 0.9 and min(kept.values()) > 0.1:
                assert kept[first] / kept[second] == pytest.approx(named[first] / named[second], rel=0.35)


@needs_optuna
def test_the_search_tells_its_trials_and_starts_from_equal_ratios(family: str) -> None:
    model = tiny.build(family)
    plan = tiny.compress(model, "bolaco(trials=4,share=0.5)").stages[0]
    losses = plan.notes["held_out_loss"]
    assert len(losses) == 4
    roles = {line.role for line in tiny.anatomy(family).linears} - LEFT_DENSE - {"key"}
    assert set(plan.notes["ratios"]) == roles
    equal = tiny.build(family)
    lines = [line for line in anatomy_of(equal).linears if line.role not in LEFT_DENSE]
    same = Recipe.parse(EQUAL).plan(anatomy_of(equal), Budget.parse("none")).stages[0]
    put_in_place(equal, same, outputs_of(equal, TOKENS[:3], lines))
    assert losses[0] == pytest.approx(held_back_loss(equal, TOKENS[3:]), rel=2e-2)


@needs_optuna
def test_the_best_trial_is_the_one_carried_out(llama: PreTrainedModel) -> None:
    lines = [line for line in anatomy_of(llama).linears if line.role not in LEFT_DENSE]
    plan = tiny.compress(llama, "bolaco(trials=6,share=0.5)").stages[0]
    again = tiny.build("llama")
    put_in_place(again, plan, outputs_of(again, TOKENS[:3], lines))
    assert held_back_loss(again, TOKENS[3:]) == pytest.approx(min(plan.notes["held_out_loss"]), rel=1e-6)


@needs_optuna
def test_query_and_key_share_a_ratio() -> None:
    plan = tiny.compress(tiny.build("opt"), "bolaco(trials=5,share=0.4)").stages[0]
    ranks: dict[str, Any] = {}
    for line in tiny.anatomy("opt").linears:
        if line.role in ("query", "key") and line.path in plan.modules:
            ranks.setdefault(line.role, []).append(plan.modules[line.path].arguments["rank"])
    # Topping up may give one of two equal linears a rank more.
    assert all(abs(q - k) <= 1 for q, k in zip(ranks["query"], ranks["key"], strict=True))


@needs_optuna
@pytest.mark.parametrize("budget", ["params=0.85", "bytes=0.8"])
def test_budgets_are_used_to_a_percent(family: str, budget: str) -> None:
    model = tiny.build(family)
    dense, parsed = anatomy_of(model), Budget.parse(budget)
    target = parsed.target(dense.size(parsed.metric))
    plan = tiny.compress(model, "bolaco(trials=3)", budget)
    assert 0.99 * target <= plan.final.size(parsed.metric) <= target
    assert total_params(ledger(model)) == plan.final.params


@needs_optuna
def test_a_trial_whose_values_overflow_is_the_worst_and_not_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tried = tiny.build("llama"), []

    def overflows_once(model: PreTrainedModel, tokens: Tensor) -> float:
        tried.append(1)
        if len(tried) == 1:
            with torch.no_grad():
                model.get_submodule("model.layers.1.mlp.down_proj.second").bias.fill_(torch.inf)
        return held_back_loss(model, tokens)

    monkeypatch.setattr(bolaco, "held_back_loss", overflows_once)
    losses = tiny.compress(model, "bolaco(trials=3,share=0.5)").stages[0].notes["held_out_loss"]
    assert losses[0] == max(losses) == 1e3
    assert tiny.logits_of(model).isfinite().all()


@needs_optuna
def test_the_seed_decides_the_trials() -> None:
    ratios = [
        tiny.compress(tiny.build("llama"), "bolaco(trials=4,share=0.5)", seed=seed).stages[0].notes
        for seed in (0, 0, 1)
    ]
    assert ratios[0] == ratios[1]
    assert ratios[0]["held_out_loss"] != ratios[2]["held_out_loss"]


def test_a_missing_extra_is_named_in_planning(without: Callable[[str], None]) -> None:
    without("optuna")
    anatomy = tiny.anatomy("llama")
    with pytest.raises(MissingExtra, match=r"weighin\[search\]"):
        Recipe.parse("bolaco").plan(anatomy, Budget.parse("params=0.8"))
    assert Recipe.parse("bolaco(trials=0)").plan(anatomy, Budget.parse("params=0.8")).stages


@needs_optuna
def test_one_sequence_is_too_little_to_hold_text_back(llama: PreTrainedModel) -> None:
    recipe = Recipe.parse("bolaco(trials=2,share=0.5)")
    plan = recipe.plan(anatomy_of(llama), Budget.parse("none"))
    with pytest.raises(InputError, match="two sequences or more"):
        recipe.compress(llama, plan, Calibration(TOKENS[:1], "0"))


def test_an_impossible_budget_says_what_stays(llama: PreTrainedModel) -> None:
    with pytest.raises(ImpossibleBudget, match="value projections stay dense"):
        Recipe.parse("bolaco(trials=0)").plan(anatomy_of(llama), Budget.parse("params=0.1"))
