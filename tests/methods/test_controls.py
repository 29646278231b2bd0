"""The rows every other row is compared with."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from suite.conformance import tiny
from suite.models.anatomy import anatomy_of
from suite.recipe import Recipe
from suite.specs import Budget


def drawn(seed: int, budget: str = "none", recipe: str = "random-layers(remove=2)") -> tuple[int, ...]:
    return Recipe.parse(recipe).plan(tiny.anatomy("llama"), Budget.parse(budget), seed).stages[0].drop


def test_the_dense_row_changes_nothing(model: PreTrainedModel) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan = tiny.compress(model, "dense")
    assert plan.final == anatomy_of(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@given(st.integers(0, 10**6))
def test_random_blocks_are_the_same_under_the_same_seed(seed: int) -> None:
    blocks = drawn(seed)
    assert blocks == drawn(seed)
    assert len(set(blocks)) == 2
    assert list(blocks) == sorted(blocks)
    assert set(blocks) <= set(range(tiny.BLOCKS))


def test_another_seed_draws_other_blocks() -> None:
    draws = {drawn(seed) for seed in range(40)}
    assert len(draws) == 6  # every pair of the four blocks comes up


def test_the_seed_decides_which_blocks_go_but_not_how_many() -> None:
    draws = {drawn(seed, "params=0.7", "random-layers") for seed in range(20)}
    assert len(draws) > 1
    assert len({len(blocks) for blocks in draws}) == 1


def test_random_blocks_that_go_are_those_the_plan_names(model: PreTrainedModel) -> None:
    plan = Recipe.parse("random-layers(remove=2)").plan(anatomy_of(model), Budget.parse("none"), seed=3)
    with tiny.skipping(model, set(plan.stages[0].drop)):
        skipped = tiny.logits_of(model)
    tiny.compress(model, "random-layers(remove=2)", seed=3)
    assert torch.equal(tiny.logits_of(model), skipped)
