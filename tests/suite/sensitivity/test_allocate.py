"""From a profile to shares that meet a budget with the least predicted harm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from suite.conformance import tiny
from suite.errors import InputError
from suite.method import methods
from suite.models.anatomy import Anatomy
from suite.recipe import Recipe
from suite.sensitivity.allocate import allocate, check_allocatable
from suite.sensitivity.profile import Profile, parts_of
from suite.shares import Allocation
from suite.specs import Budget
from tests.suite.sensitivity import examples

STRENGTHS = (0.75, 0.5, 0.25)


def size_of(allocation: Allocation, anatomy: Anatomy) -> float:
    """Parameters of the model once every linear keeps its share of the weights."""
    removed = sum(
        (1 - line.share) * line.out_features * line.in_features for line in allocation.linears.values()
    )
    return anatomy.params - removed


def budget(share: float) -> Budget:
    return Budget(metric="params", value=share)


@pytest.mark.parametrize("by", ["block", "role", "linear"])
@pytest.mark.parametrize("share", [0.9, 0.8, 0.6])
def test_the_budget_is_met_within_one_percent(family: str, by: Any, share: float) -> None:
    anatomy = tiny.anatomy(family)
    parts, profile = examples.rising_with_depth(anatomy, by)
    size = size_of(allocate(profile, parts, anatomy, budget(share)), anatomy)
    assert 0.99 * share * anatomy.params <= size <= share * anatomy.params + 1


@given(st.lists(st.floats(0.001, 1), min_size=4, max_size=4), st.floats(0.5, 0.99))
def test_no_exchange_between_two_blocks_predicts_less(sensitivities: list[float], share: float) -> None:
    anatomy = tiny.anatomy("llama")
    parts = parts_of(anatomy, "block")
    profile = examples.made_up(
        parts,
        {
            strength: {
                part.name: each * (1 - strength) ** 2 for part, each in zip(parts, sensitivities, strict=True)
            }
            for strength in STRENGTHS
        },
    )
    allocation = allocate(profile, parts, anatomy, budget(share))
    kept = [allocation.linears[part.paths[0]].share for part in parts]
    assert all(0.24 <= value <= 1 for value in kept)
    # Where one block is more sensitive than another at every strength, it keeps at least as much.
    for a, first in enumerate(sensitivities):
        for b, second in enumerate(sensitivities):
            if first > second * 1.001:
                assert kept[a] >= kept[b] - 0.05


def test_a_block_that_bears_nothing_stays_dense_and_the_others_pay() -> None:
    anatomy = tiny.anatomy("llama")
    parts = parts_of(anatomy, "block")
    increases = {
        s: {part.name: (1 - s) ** 2 * (10.0 if part.block == 0 else 0.01) for part in parts}
        for s in STRENGTHS
    }
    allocation = allocate(examples.made_up(parts, increases), parts, anatomy, budget(0.8))
    shares = {part.name: {allocation.linears[path].share for path in part.paths} for part in parts}
    assert shares["block 0"] == {1.0}
    assert all(max(shares[name]) < 1 for name in shares if name != "block 0")


def test_the_prediction_is_no_worse_than_that_of_equal_shares() -> None:
    anatomy = tiny.anatomy("llama")
    parts, profile = examples.rising_with_depth(anatomy)
    compressible = sum(part.size(anatomy.entries, "params") for part in parts)
    equal = 0.5 * compressible + (anatomy.params - compressible)
    allocation = allocate(profile, parts, anatomy, budget(equal / anatomy.params))
    points = [profile.find(part.name, 0.5) for part in parts]
    assert allocation.predicted_increase <= sum(p.increase or 0 for p in points if p) + 1e-6


def test_gains_by_noise_are_not_predicted() -> None:
    anatomy = tiny.anatomy("llama")
    parts = parts_of(anatomy, "block")
    noisy = examples.made_up(parts, {s: {part.name: -0.3 for part in parts} for s in STRENGTHS})
    allocation = allocate(noisy, parts, anatomy, budget(0.8))
    assert 0 <= allocation.predicted_increase < 1e-6
    assert size_of(allocation, anatomy) >= 0.99 * 0.8 * anatomy.params


def test_blocks_that_were_not_measured_stay_dense() -> None:
    anatomy = tiny.anatomy("llama")
    _, profile = examples.rising_with_depth(anatomy)
    allocation = allocate(profile, parts_of(anatomy, "block", [2, 3]), anatomy, budget(0.85))
    dense = {line.block for line in anatomy.linears if allocation.linears[line.path].share == 1}
    assert dense == {0, 1}


def test_a_budget_below_the_strengths_measured_says_how_far_they_reach() -> None:
    anatomy = tiny.anatomy("llama")
    parts, profile = examples.rising_with_depth(anatomy)
    with pytest.raises(InputError, match=r"reach params=0\.\d+; measure a lower --strength"):
        allocate(profile, parts, anatomy, budget(0.1))


@pytest.mark.parametrize(
    ("method", "measures", "wanted", "message"),
    [
        ("svd", "accuracy", "params=0.8", "never tunes on items"),
        ("svd", "perplexity", "bytes=0.8", "this profile counts params"),
        ("layerchop", "both", "params=0.8", "no knob 'shares'.*Methods that have it: .*svd"),
    ],
)
def test_what_cannot_be_allocated_is_refused(method: str, measures: str, wanted: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_allocatable(methods.get(method), measures, Budget.parse(wanted), "params")


@pytest.mark.parametrize("by", ["block", "role", "linear"])
def test_a_run_meets_the_budget_with_the_allocation(family: str, by: Any, tmp_path: Path) -> None:
    anatomy = tiny.anatomy(family)
    parts, profile = examples.rising_with_depth(anatomy, by)
    file = tmp_path / "allocation.json"
    file.write_text(allocate(profile, parts, anatomy, budget(0.8)).model_dump_json())
    plan = Recipe.parse(f"svd(shares={file})").plan(anatomy, Budget.parse("params=0.8"))
    assert 0.99 * 0.8 <= plan.final.params / anatomy.params <= 0.8


def test_two_profiles_of_the_same_contents_have_one_digest() -> None:
    anatomy = tiny.anatomy("llama")
    parts, profile = examples.rising_with_depth(anatomy)
    again = Profile.model_validate_json(profile.model_dump_json())
    assert allocate(profile, parts, anatomy, budget(0.8)) == allocate(again, parts, anatomy, budget(0.8))
    assert profile.digest() == again.digest()
