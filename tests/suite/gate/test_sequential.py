"""The sequential test errs as rarely as it says, whenever it stops, and needs few items."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from suite.gate import sequential
from tests.suite.gate.simulate import Pair, real_pair, simulate, unpaired_items

MARGIN = 0.03


def mixed(seed: int, drop: float, rounds: int = 110, tasks: int = 7) -> np.ndarray:
    chances = [0.1 - drop / 2, 0.8, 0.1 + drop / 2]
    return np.random.default_rng(seed).choice([-1.0, 0.0, 1.0], (rounds, tasks), p=chances)


@pytest.mark.parametrize("side", ["pass", "fail"])
@pytest.mark.parametrize("drops", [(MARGIN, MARGIN), (3 * MARGIN, -MARGIN), (0.2, 2 * MARGIN - 0.2)])
def test_the_expected_capital_never_exceeds_one_at_the_margin_whatever_each_task_does(
    side: sequential.Verdict, drops: tuple[float, float]
) -> None:
    # Exactly, over all outcomes of two rounds of two tasks whose mean drop is the margin.
    assert np.mean(drops) == pytest.approx(MARGIN)
    values, expected = (-1.0, 0.0, 1.0), np.zeros(2)
    chance = [dict(zip(values, (0.15 - d / 2, 0.7, 0.15 + d / 2), strict=True)) for d in drops]
    for outcome in itertools.product(values, repeat=4):
        means = np.array(outcome).reshape(2, 2)
        weight = math.prod(chance[k][means[r, k]] for r in range(2) for k in range(2))
        stakes = sequential.bets(means, MARGIN, side)
        expected += weight * np.exp(sequential.log_capital(means, MARGIN, stakes, side))
    assert (expected <= 1 + 1e-12).all()
    assert (expected > 0.9).all()


@given(st.integers(0, 10**6), st.floats(-0.1, 0.15), st.sampled_from([0.01, 0.03, 0.05]))
def test_bounds_and_verdict_agree_and_hold_the_estimate(seed: int, drop: float, margin: float) -> None:
    found = sequential.decide(mixed(seed, drop), margin)
    assert (found.verdict == "pass") == (found.upper < margin)
    assert (found.verdict == "fail") == (found.lower > margin)
    assert found.lower <= found.drop <= found.upper


@given(st.integers(0, 10**6), st.floats(-0.05, 0.12), st.integers(1, 109))
def test_a_verdict_never_depends_on_what_comes_after_it(seed: int, drop: float, look: int) -> None:
    means = mixed(seed, drop)
    early, late = sequential.decide(means[:look], MARGIN), sequential.decide(means, MARGIN)
    if early.verdict != "inconclusive":
        assert early == late
    else:
        assert late.verdict == "inconclusive" or late.rounds > look


def test_no_flips_at_all_pass_only_after_as_many_items_as_the_margin_asks_for() -> None:
    few = sequential.decide(np.zeros((5, 7)), 0.01)
    assert few.verdict == "inconclusive"
    assert few.upper > 0.05
    enough = sequential.decide(np.zeros((400, 1)), 0.01)
    assert enough.verdict == "pass"
    # The rule of three: 3 / n bounds a share of which none was seen.
    assert 300 < enough.rounds < 400


def test_a_broken_candidate_fails_within_a_few_items() -> None:
    found = sequential.decide(mixed(0, 0.2), MARGIN)
    assert found.verdict == "fail"
    assert found.rounds * 7 < 300


def test_the_order_is_fixed_by_protocol_and_task_and_holds_every_item_once() -> None:
    first = sequential.order("p", "a", 50)
    assert (first == sequential.order("p", "a", 50)).all()
    assert sorted(first) == list(range(50))
    assert (first != sequential.order("q", "a", 50)).any()
    assert (first != sequential.order("p", "b", 50)).any()


@given(st.dictionaries(st.text(min_size=1, max_size=3), st.integers(1, 300), min_size=1, max_size=5))
def test_rounds_take_one_of_every_task_at_least_and_all_items_in_the_end(sizes: dict[str, int]) -> None:
    ends = sequential.round_ends(sizes)
    for task, size in sizes.items():
        assert ends[task][0] == 0
        assert ends[task][-1] == size
        assert (np.diff(ends[task]) >= 1).all()
    stops = sequential.looks(ends)
    assert stops[0] == 0
    assert stops[-1] == min(sizes.values())
    assert stops == sorted(set(stops))


def test_a_round_is_the_mean_of_each_tasks_items_in_it() -> None:
    ends = {"a": np.array([0, 1, 2]), "b": np.array([0, 1, 4])}
    differences = {"a": np.array([1.0, 0.0]), "b": np.array([-1.0, 1.0, 1.0, -1.0])}
    means = sequential.round_means(differences, ends, 2)
    assert means.tolist() == [[1.0, -1.0], [0.0, pytest.approx(1 / 3)]]


@pytest.fixture(scope="module")
def int8() -> Pair:
    return real_pair("rtn-int8")


@pytest.fixture(scope="module")
def int4() -> Pair:
    return real_pair("rtn-int4")


@pytest.mark.parametrize("margin", [0.02, 0.03])
def test_equal_models_fail_in_less_than_one_in_twenty_runs(int4: Pair, margin: float) -> None:
    assert simulate(int4, margin, drop=0.0, replications=1000).failed <= 0.05


@pytest.mark.parametrize("enlarged", [1.0, 10.0])
def test_at_the_margin_itself_neither_verdict_is_wrong_too_often(int4: Pair, enlarged: float) -> None:
    found = simulate(int4, MARGIN, drop=MARGIN, enlarged=enlarged, replications=1000)
    # Three standard errors of a share of 5 % over 1,000 runs are 2.1 points.
    assert found.passed <= 0.05 + 0.021
    assert found.failed <= 0.05 + 0.021


def test_twice_the_margin_is_caught_nine_times_in_ten_when_there_are_items(int4: Pair) -> None:
    found = simulate(int4, MARGIN, drop=2 * MARGIN, enlarged=6.0, replications=500)
    assert found.failed >= 0.9
    assert found.passed <= 0.02


def test_near_lossless_candidates_need_three_times_fewer_items_than_an_unpaired_test(int8: Pair) -> None:
    found = simulate(int8, 0.01, drop=0.0, enlarged=5.0, replications=500)
    assert found.passed >= 0.9
    assert found.items * 3 <= unpaired_items(int8.accuracy, 0.01)
