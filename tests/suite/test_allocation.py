"""A size spread over matrices: never above it, and as good as trying everything."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from suite.allocation import Setting, even, even_at, low_rank_settings, lower_hull, rank_of, spread
from suite.errors import ImpossibleBudget


def convex(steps: list[int]) -> list[Setting]:
    """Settings of cost 1, 2, … whose losses fall by these steps, the largest first."""
    falls = sorted(steps, reverse=True)
    return [Setting(1 + i, float(sum(falls[i:]))) for i in range(len(falls) + 1)]


CONVEX = st.lists(st.integers(1, 50), min_size=1, max_size=4).map(convex)
ANY = st.lists(
    st.builds(Setting, st.integers(1, 30), st.floats(0, 100)),
    min_size=1,
    max_size=6,
    unique_by=lambda s: s.cost,
).map(sorted)


def offers_of(lists: list[list[Setting]]) -> dict[str, list[Setting]]:
    return {f"matrix {i}": settings for i, settings in enumerate(lists)}


def cost_of(offers: dict[str, list[Setting]], chosen: dict[str, int]) -> int:
    return sum(offers[name][index].cost for name, index in chosen.items())


def loss_of(offers: dict[str, list[Setting]], chosen: dict[str, int]) -> float:
    return sum(offers[name][index].loss for name, index in chosen.items())


@given(st.lists(CONVEX, min_size=1, max_size=4), st.integers(4, 20))
def test_no_other_choice_loses_less_where_losses_are_convex(lists: list[list[Setting]], budget: int) -> None:
    offers = offers_of(lists)
    budget = max(budget, len(offers))
    best = min(
        loss_of(offers, dict(zip(offers, indices, strict=True)))
        for indices in itertools.product(*(range(len(settings)) for settings in lists))
        if cost_of(offers, dict(zip(offers, indices, strict=True))) <= budget
    )
    assert loss_of(offers, spread(offers, budget)) == pytest.approx(best)


@given(st.lists(ANY, min_size=1, max_size=6), st.integers(1, 150))
def test_the_budget_is_never_exceeded_and_nothing_more_would_fit(
    lists: list[list[Setting]], budget: int
) -> None:
    offers = offers_of(lists)
    smallest = sum(min(settings).cost for settings in lists)
    if budget < smallest:
        with pytest.raises(ImpossibleBudget) as caught:
            spread(offers, budget)
        assert caught.value.smallest == smallest
        budget = smallest
    chosen = spread(offers, budget)
    left = budget - cost_of(offers, chosen)
    assert left >= 0
    for name, index in chosen.items():
        here = offers[name][index]
        fitting = [s for s in offers[name] if here.cost < s.cost <= here.cost + left]
        assert all(s.loss >= here.loss for s in fitting)


@given(ANY)
def test_a_hull_falls_ever_more_slowly(settings: list[Setting]) -> None:
    hull = [settings[index] for index in lower_hull(settings)]
    slopes = [(b.loss - a.loss) / (b.cost - a.cost) for a, b in itertools.pairwise(hull)]
    assert all(slope < 0 for slope in slopes)
    assert slopes == sorted(slopes)
    assert hull[-1].loss == min(s.loss for s in settings)


@given(st.floats(0.1, 1.0))
def test_equal_slopes_that_differ_by_rounding_do_not_overtake_one_another(share: float) -> None:
    """A matrix whose loss is a straight line climbs it in order, so that costs add up."""
    offers = {
        name: [Setting(cost, slope * (1000 - cost) / 7) for cost in range(100, 1001, 3)]
        for name, slope in (("a", 0.1), ("b", 0.1), ("c", 0.1))
    }
    budget = int(300 + 2700 * share)
    assert 0 <= budget - cost_of(offers, spread(offers, budget)) < 300


def test_staying_dense_is_one_step_past_break_even() -> None:
    """6 × 4 breaks even at rank 2.4: rank 1, rank 2, then dense without loss."""
    settings = low_rank_settings([9.0, 4.0, 1.0, 0.0], 6, 4)
    assert settings == [Setting(10, 9.0), Setting(20, 4.0), Setting(24, 0.0)]
    assert [rank_of(settings, index) for index in range(3)] == [1, 2, None]
    assert low_rank_settings([9.0, 4.0], 6, 4, bias_cost=6)[0] == Setting(16, 9.0)


def test_a_sensitive_matrix_stays_dense_and_another_pays() -> None:
    spectrum = [float(2 ** (10 - rank)) for rank in range(10)]
    offers = {
        "sensitive": low_rank_settings([1000 * loss for loss in spectrum], 10, 10),
        "indifferent": low_rank_settings(spectrum, 10, 10),
    }
    chosen = spread(offers, 130)
    assert rank_of(offers["sensitive"], chosen["sensitive"]) is None
    assert rank_of(offers["indifferent"], chosen["indifferent"]) == 1


@given(
    st.lists(st.tuples(st.integers(2, 40), st.integers(2, 40)), min_size=1, max_size=6), st.floats(0.2, 1.0)
)
def test_even_keeps_about_the_same_share_of_every_matrix(shapes: list[tuple[int, int]], share: float) -> None:
    offers = {f"{i}": low_rank_settings([0.0] * min(m, n), m, n) for i, (m, n) in enumerate(shapes)}
    whole = sum(settings[-1].cost for settings in offers.values())
    smallest = sum(settings[0].cost for settings in offers.values())
    budget = max(int(share * whole), smallest)
    chosen = even(offers, budget)
    assert cost_of(offers, chosen) <= budget
    steps = [s[i + 1].cost - s[i].cost for name, i in chosen.items() if i + 1 < len(s := offers[name])]
    assert budget - cost_of(offers, chosen) < sum(steps) + 1 or not steps


def test_even_says_how_much_the_cheapest_settings_cost() -> None:
    offers = {"a": low_rank_settings([0.0] * 4, 6, 4), "b": low_rank_settings([0.0] * 3, 3, 5)}
    with pytest.raises(ImpossibleBudget) as caught:
        even(offers, 17)
    assert caught.value.smallest == 18
    assert even(offers, 18) == {"a": 0, "b": 0}


@given(st.lists(ANY, min_size=1, max_size=3), st.floats(0, 1))
def test_a_share_is_kept_to_unless_the_cheapest_settings_cost_more(
    lists: list[list[Setting]], share: float
) -> None:
    offers = offers_of(lists)
    cheapest = sum(settings[0].cost for settings in offers.values())
    dearest = sum(settings[-1].cost for settings in offers.values())
    assert cost_of(offers, even_at(offers, share)) <= max(cheapest, share * dearest)
