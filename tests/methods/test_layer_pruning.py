"""Removing blocks in a fixed pattern."""

from __future__ import annotations

from itertools import pairwise
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from methods.layer_pruning import Pattern, chop
from suite.conformance import tiny
from suite.errors import InputError
from suite.models.anatomy import anatomy_of
from suite.models.layouts import layout_of
from suite.recipe import Recipe
from suite.specs import Budget

PATTERNS = get_args(Pattern)


@given(st.sampled_from(PATTERNS), st.integers(2, 80), st.data())
def test_a_pattern_removes_as_many_inner_blocks_as_asked(
    pattern: Pattern, blocks: int, data: st.DataObject
) -> None:
    count = data.draw(st.integers(0, blocks - 2))
    chosen = chop(pattern, blocks, count)
    assert len(chosen) == len(set(chosen)) == count
    assert all(0 < index < blocks - 1 for index in chosen)
    assert list(chosen) == sorted(chosen)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_pattern_works_for_every_count(pattern: Pattern) -> None:
    for blocks in range(2, 34):
        for count in range(blocks - 1):
            assert len(set(chop(pattern, blocks, count)) & set(range(1, blocks - 1))) == count


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("input", [*range(1, 13)]),
        ("output", [*range(11, 23)]),
        ("middle", [*range(6, 18)]),
        ("both", [*range(1, 7), *range(17, 23)]),
    ],
)
def test_the_patterns_are_those_of_the_paper(pattern: Pattern, expected: list[int]) -> None:
    assert list(chop(pattern, 24, 12)) == expected


def test_half_of_the_inner_blocks_are_every_second_one() -> None:
    assert chop("max-gap", 10, 4) == (2, 4, 6, 8)


@given(st.integers(4, 60), st.data())
def test_the_spread_pattern_leaves_runs_of_nearly_equal_length(blocks: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, (blocks - 2) // 2))
    chosen = chop("max-gap", blocks, count)
    gaps = [later - earlier for earlier, later in pairwise(chosen)]
    assert not gaps or max(gaps) - min(gaps) <= 1


@given(st.integers(3, 80), st.data())
def test_the_spread_pattern_follows_the_general_formula(blocks: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, blocks - 2))
    step = (blocks - 2) / count
    # Rounding 1 + j·(L−2)/k + offset, the offset centring the pattern between the two ends.
    exact = [1 + j * step + (step - 1) / 2 for j in range(count)]
    chosen = chop("max-gap", blocks, count)
    assert all(abs(index - value) <= 0.5 + 1e-9 for index, value in zip(chosen, exact, strict=True))


@given(st.integers(3, 60), st.data())
def test_stretches_of_equal_length_lose_equally_many_blocks_but_one(blocks: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, blocks - 2))
    length = data.draw(st.integers(1, blocks - 2))
    gone = set(chop("max-gap", blocks, count))
    lost = [len(gone & set(range(start, start + length))) for start in range(1, blocks - length)]
    assert max(lost) - min(lost) <= 1


@given(st.integers(2, 80), st.data())
def test_the_other_patterns_follow_the_general_formulas(blocks: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, blocks - 2))
    inner = blocks - 2
    assert chop("input", blocks, count) == tuple(range(1, count + 1))
    assert chop("output", blocks, count) == tuple(range(blocks - 1 - count, blocks - 1))
    middle = chop("middle", blocks, count)
    if middle:
        before, after = middle[0] - 1, blocks - 2 - middle[-1]
        assert middle == tuple(range(middle[0], middle[0] + count))
        assert after - before in (0, 1)
    both = chop("both", blocks, count)
    at_start = [index for index in both if index <= inner / 2]
    assert both == (*range(1, (count + 1) // 2 + 1), *range(blocks - 1 - count // 2, blocks - 1))
    assert abs(len(at_start) - (count - len(at_start))) <= 1


@pytest.mark.parametrize("pattern", PATTERNS)
def test_blocks_are_renumbered_and_generation_with_a_cache_agrees(family: str, pattern: Pattern) -> None:
    model = tiny.build(family)
    tiny.compress(model, f"layerchop(pattern={pattern}, remove=1)")
    blocks = model.get_submodule(layout_of(model.config).blocks)
    assert len(blocks) == model.config.num_hidden_layers == tiny.BLOCKS - 1
    for position, block in enumerate(blocks.children()):
        numbers = {module.layer_idx for module in block.modules() if hasattr(module, "layer_idx")}
        assert numbers == {position}
    assert torch.equal(tiny.greedy(model, use_cache=True), tiny.greedy(model, use_cache=False))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_fewest_blocks_go_that_meet_the_budget(family: str, pattern: Pattern) -> None:
    anatomy = tiny.anatomy(family)
    for share in (0.95, 0.8, 0.7):
        target = Budget(metric="params", value=share)
        plan = Recipe.parse(f"layerchop(pattern={pattern})").plan(anatomy, target)
        removed = len(plan.stages[0].drop)
        assert plan.final.params <= share * anatomy.params
        one_fewer = anatomy.after(chop(pattern, anatomy.n_blocks, removed - 1))
        assert one_fewer.params > share * anatomy.params


def test_removing_nothing_leaves_the_logits_alone(model: PreTrainedModel) -> None:
    before = tiny.logits_of(model)
    tiny.compress(model, "layerchop(remove=0)")
    assert torch.equal(tiny.logits_of(model), before)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_blocks_that_stay_are_bit_identical(family: str, pattern: Pattern) -> None:
    dense, model = tiny.build(family), tiny.build(family)
    plan = tiny.compress(model, f"layerchop(pattern={pattern}, remove=2)").stages[0]
    assert plan.knobs["blocks"] == list(plan.drop) == [1, 2]
    path = layout_of(model.config).blocks
    for new, old in enumerate((0, 3)):
        kept = model.get_submodule(f"{path}.{new}").state_dict()
        source = dense.get_submodule(f"{path}.{old}").state_dict()
        assert kept.keys() == source.keys()
        assert all(torch.equal(kept[name], source[name]) for name in kept)
    assert model.config.num_hidden_layers == len(model.get_submodule(path)) == 2


def test_removing_blocks_equals_skipping_them(model: PreTrainedModel) -> None:
    plan = Recipe.parse("layerchop(remove=1)").plan(anatomy_of(model), Budget.parse("none"))
    with tiny.skipping(model, set(plan.stages[0].drop)):
        skipped = tiny.logits_of(model)
    tiny.compress(model, "layerchop(remove=1)")
    assert torch.equal(tiny.logits_of(model), skipped)


def test_the_first_and_the_last_block_must_stay(llama: PreTrainedModel) -> None:
    with pytest.raises(InputError, match=r"layerchop\(remove=3\): at most 2 of 4 blocks can go"):
        tiny.compress(llama, "layerchop(remove=3)")


def test_a_model_of_two_blocks_keeps_both() -> None:
    model = tiny.build("llama", num_hidden_layers=2)
    assert tiny.compress(model, "layerchop", "params=1").stages[0].drop == ()
    with pytest.raises(InputError, match="at most 0 of 2 blocks can go"):
        tiny.compress(model, "layerchop(remove=1)")
