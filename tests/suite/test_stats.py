from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax

from suite import stats
from suite.compare import Chosen, choose
from suite.records import RecordStore
from suite.stats import Floats, Intervals

STORE = RecordStore(Path(__file__).resolve().parents[2] / "results")
ROWS = {
    "dense": "dense",
    "rtn-int8": "rtn-int8@bytes=0.55",
    "rtn-int4": "rtn-int4@bytes=0.45",
    "rtn-int4 embedding too": "rtn-int4@bytes=0.3",
    "svd": "svd@bytes=0.45",
    "layerchop": "layerchop@params=0.8",
    "random-layers": "random-layers@params=0.9",
}
TASKS = np.repeat(["large", "b", "c"], [40, 12, 12])


@pytest.fixture
def outcomes() -> Floats:
    """Four rows of made-up outcomes: two equal ones, a slightly worse one and a bad one."""
    generator = np.random.default_rng(0)
    good = (generator.random(64) < 0.8).astype(float)
    worse = good * (generator.random(64) < 0.9)
    return np.array([good, good, worse, (generator.random(64) < 0.3).astype(float)])


def test_the_estimate_is_the_difference_of_the_means_over_tasks(outcomes: Floats) -> None:
    found = stats.macro_differences(outcomes, TASKS, [(0, 3)])
    means = [np.mean([row[task == TASKS].mean() for task in np.unique(TASKS)]) for row in outcomes]
    assert found.estimate[0] == pytest.approx(means[3] - means[0])


def test_without_pseudo_pairs_the_error_is_that_of_a_stratified_mean(outcomes: Floats) -> None:
    found = stats.macro_differences(outcomes, TASKS, [(0, 2)], pseudo_pairs=0)
    change = outcomes[2] - outcomes[0]
    parts = [change[task == TASKS].var(ddof=1) / (task == TASKS).sum() for task in np.unique(TASKS)]
    assert found.standard_error[0] == pytest.approx(np.sqrt(sum(parts)) / 3)


def test_rows_that_agree_on_every_item_are_equal_but_not_certain(outcomes: Floats) -> None:
    found = stats.macro_differences(outcomes, TASKS, [(0, 1)])
    assert found.estimate[0] == 0
    assert 0 < found.half_width[0] < 0.1


def test_more_comparisons_widen_every_interval(outcomes: Floats) -> None:
    one = stats.macro_differences(outcomes, TASKS, [(0, 2)])
    pairs = stats.all_pairs(4)
    several = stats.macro_differences(outcomes, TASKS, pairs)
    assert several.half_width[pairs.index((0, 2))] > one.half_width[0]
    # Never wider than six comparisons that know nothing of each other (Bonferroni).
    bonferroni = stats.macro_differences(outcomes, TASKS, [(0, 2)], confidence=1 - 0.05 / 6)
    assert several.critical < bonferroni.critical * 1.02


def test_the_same_comparison_twice_needs_no_wider_interval(outcomes: Floats) -> None:
    once = stats.macro_differences(outcomes, TASKS, [(0, 2)])
    twice = stats.macro_differences(outcomes, TASKS, [(0, 2), (1, 2)])
    assert twice.critical == pytest.approx(once.critical, rel=0.02)


def test_equal_inputs_give_equal_intervals(outcomes: Floats) -> None:
    found = [stats.macro_differences(outcomes, TASKS, stats.all_pairs(4)) for _ in range(2)]
    assert found[0].critical == found[1].critical


@given(st.integers(0, 2**32 - 1))
def test_the_order_of_items_and_the_direction_of_a_pair_do_not_matter(seed: int) -> None:
    generator = np.random.default_rng(seed)
    rows = generator.random((2, 64)).round(1)
    order = generator.permutation(64)
    straight = stats.macro_differences(rows, TASKS, [(0, 1)])
    shuffled = stats.macro_differences(rows[:, order], TASKS[order], [(1, 0)])
    assert straight.low[0] == pytest.approx(-shuffled.high[0])
    assert straight.high[0] == pytest.approx(-shuffled.low[0])


@pytest.mark.parametrize(
    ("values", "tasks", "pairs"),
    [
        (np.zeros((2, 3)), ["a", "a", "b"], [(0, 1)]),
        (np.zeros((2, 3)), ["a", "a"], [(0, 1)]),
        (np.zeros((2, 2)), ["a", "a"], []),
        (np.zeros(2), ["a", "a"], [(0, 1)]),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    values: Floats, tasks: list[str], pairs: list[tuple[int, int]]
) -> None:
    with pytest.raises(ValueError, match=r"pairs must not be empty|fewer than two items"):
        stats.macro_differences(values, tasks, pairs)


def test_a_row_surely_better_than_two_of_three_is_first() -> None:
    estimate = np.array([-0.2, -0.3, -0.05])
    intervals = Intervals(estimate, np.full(3, 0.05), 2.0)
    assert stats.rank_intervals(intervals, stats.all_pairs(3), 3) == [(1, 1), (2, 3), (2, 3)]


def test_rows_that_are_not_told_apart_share_all_ranks() -> None:
    intervals = Intervals(np.array([0.01, -0.01, 0.0]), np.full(3, 0.05), 2.0)
    assert stats.rank_intervals(intervals, stats.all_pairs(3), 3) == [(1, 3)] * 3


@given(st.lists(st.sampled_from([-1.0, 0.0, 1.0]), min_size=6, max_size=6))
def test_rank_intervals_are_never_empty_for_any_pattern_of_wins(wins: list[float]) -> None:
    ranks = stats.rank_intervals(Intervals(np.array(wins), np.full(6, 0.1), 2.0), stats.all_pairs(4), 4)
    assert all(1 <= low <= high <= 4 for low, high in ranks)


def test_mcnemar_looks_at_discordant_items_alone() -> None:
    assert stats.mcnemar(0, 0) == 1
    assert stats.mcnemar(5, 5) == 1
    assert stats.mcnemar(0, 6) == pytest.approx(2 * 0.5**6)
    assert stats.mcnemar(1, 9) == stats.mcnemar(9, 1)


def test_flips_count_both_ways() -> None:
    assert stats.flips([1, 1, 0, 0.5], [0, 1, 1, 0.25]) == (2, 1)


def test_holm_multiplies_the_smallest_most_and_keeps_the_order() -> None:
    assert stats.holm([0.04, 0.01, 0.03, 0.9]) == pytest.approx([0.09, 0.04, 0.09, 0.9])


def test_the_log_probability_ignores_what_all_choices_share() -> None:
    assert stats.log_probability([-5.0, -6.0], 0) == pytest.approx(stats.log_probability([-50.0, -51.0], 0))
    assert stats.log_probability([-2.5], 0) == -2.5


@pytest.mark.parametrize("sizes", [[200], [110] * 6 + [1400], [60, 500]])
def test_the_smallest_difference_is_found_with_the_promised_power(sizes: list[int]) -> None:
    discordant = 0.3
    difference = stats.smallest_difference(sizes, discordant)
    assert difference is not None
    generator = np.random.default_rng(0)
    chances = [(discordant - difference) / 2, 1 - discordant, (discordant + difference) / 2]
    trials = 20_000
    mean, variance = np.zeros((2, trials))
    for n in sizes:
        lost, _, won = generator.multinomial(n, chances, size=trials).T
        gap = (won - lost) / n
        mean += gap / len(sizes)
        variance += ((won + lost) / n - gap**2) / (n - 1) / len(sizes) ** 2
    assert (mean / np.sqrt(variance) > 1.96).mean() == pytest.approx(0.8, abs=0.03)


def test_too_few_items_show_no_difference_at_all() -> None:
    assert stats.smallest_difference([5], 0.1) is None
    assert stats.smallest_difference([1], 0.1) is None


@given(st.lists(st.integers(2, 2000), min_size=1, max_size=8), st.sampled_from([0.1, 0.2, 0.4]))
def test_more_items_never_show_less(sizes: list[int], discordant: float) -> None:
    few = stats.smallest_difference(sizes, discordant)
    many = stats.smallest_difference([2 * size for size in sizes], discordant)
    assert few is None or (many is not None and many < few)


# Coverage: the real rows of the committed board, taken as the population that items are drawn from.


@pytest.fixture(scope="module")
def chosen() -> dict[str, Chosen]:
    return {name: choose(STORE, row, protocol="embedded", device="cpu") for name, row in ROWS.items()}


@pytest.fixture(scope="module")
def real(chosen: dict[str, Chosen]) -> dict[str, pd.DataFrame]:
    return {name: row.items for name, row in chosen.items()}


def coverage(
    population: Floats, tasks: np.ndarray, pairs: list[tuple[int, int]], trials: int, **settings: float
) -> float:
    """Share of samples, drawn within tasks, whose intervals all hold the population's differences."""
    numbers = np.unique(tasks, return_inverse=True)[1]  # compared a thousand times, which takes names long
    places = [np.flatnonzero(numbers == number) for number in np.unique(numbers)]
    means = np.mean([population[:, place].mean(axis=1) for place in places], axis=0)
    truth = np.array([means[second] - means[first] for first, second in pairs])
    generator = np.random.default_rng(1)
    held = 0
    for _ in range(trials):
        drawn = np.concatenate([generator.choice(place, len(place)) for place in places])
        found = stats.macro_differences(population[:, drawn], numbers[drawn], pairs, **settings)
        held += bool(((found.low <= truth + 1e-12) & (truth <= found.high + 1e-12)).all())
    return held / trials


# Four standard errors of 1,500 trials around 93 to 97 %, but wider above for few differing items.
PAIRS = [
    ("dense", "rtn-int8", 0.985),
    ("dense", "rtn-int4", 0.97),
    ("rtn-int4", "rtn-int4 embedding too", 0.97),
    ("dense", "layerchop", 0.97),
    ("svd", "layerchop", 0.97),
]


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second", "most"), PAIRS)
def test_accuracy_intervals_hold_as_often_as_they_say(
    real: dict[str, pd.DataFrame], first: str, second: str, most: float
) -> None:
    population = np.array([real[name]["correct"] for name in (first, second)])
    assert 0.93 <= coverage(population, real[first]["task"].to_numpy(), [(0, 1)], 1500) <= most


@pytest.mark.slow
@pytest.mark.parametrize(
    "differing", [0, 1, 2, 3, 5, 8, *(pytest.param(n, marks=pytest.mark.exhaustive) for n in (4, 6, 7))]
)
@pytest.mark.parametrize("both_ways", [True, False])
def test_intervals_hold_when_few_items_differ(
    real: dict[str, pd.DataFrame], differing: int, both_ways: bool
) -> None:
    tasks = real["dense"]["task"].to_numpy()
    population = np.zeros((2, len(tasks)))
    places = np.flatnonzero(tasks == "pronoun")[:differing]
    population[np.arange(differing) % 2 if both_ways else 1, places] = 1
    assert coverage(population, tasks, [(0, 1)], 1000) >= 0.93


@pytest.mark.slow
def test_simultaneous_intervals_hold_all_at_once(real: dict[str, pd.DataFrame]) -> None:
    population = np.array([frame["correct"] for frame in real.values()])
    tasks = real["dense"]["task"].to_numpy()
    for pairs in (stats.all_pairs(len(ROWS)), [(0, row) for row in range(1, len(ROWS))]):
        assert 0.93 <= coverage(population, tasks, pairs, 500) <= 0.98


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second", "_"), PAIRS)
def test_log_probability_intervals_hold_as_often_as_they_say(
    real: dict[str, pd.DataFrame], first: str, second: str, _: float
) -> None:
    population = np.array(
        [
            [
                log_softmax(values)[int(answer)]
                for values, answer in zip(real[name]["log_likelihoods"], real[name]["target"], strict=True)
            ]
            for name in (first, second)
        ]
    )
    tasks = real[first]["task"].to_numpy()
    assert 0.93 <= coverage(population, tasks, [(0, 1)], 1000, pseudo_pairs=0) <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second", "_"), PAIRS)
def test_perplexity_intervals_hold_as_often_as_they_say(
    chosen: dict[str, Chosen], first: str, second: str, _: float
) -> None:
    nlls = [chosen[name].measurements.perplexity.window_nlls for name in (first, second)]
    population = np.array(nlls)
    one = np.zeros(population.shape[1])
    assert 0.93 <= coverage(population, one, [(0, 1)], 2000, pseudo_pairs=0) <= 0.97
