"""Which items a limit leaves of a task in several parts."""

from __future__ import annotations

from collections import Counter

from suite.evaluate.items import spread

SIZES = {f"part {n:02}": 2 + n % 3 for n in range(57)}


def test_no_limit_leaves_everything_in_order() -> None:
    everything = [(name, i) for name, size in SIZES.items() for i in range(size)]
    assert spread(SIZES, None) == spread(SIZES, 9999) == everything
    assert spread({}, None) == []


def test_one_part_is_cut_to_its_first_items() -> None:
    assert spread({"alone": 9}, 3) == [("alone", 0), ("alone", 1), ("alone", 2)]


def test_fewer_items_than_parts_do_not_come_from_the_first_parts_alone() -> None:
    chosen = [list(SIZES).index(name) for name, _ in spread(SIZES, 12)]
    assert len(set(chosen)) == 12
    assert chosen == sorted(chosen)
    assert min(chosen) < 19 < 38 < max(chosen)


def test_every_part_gives_one_item_before_any_gives_two_and_small_limits_are_within_larger() -> None:
    counts = Counter(name for name, _ in spread(SIZES, 70)).values()
    assert (min(counts), max(counts), len(counts)) == (1, 2, 57)
    for limit in range(1, 100):
        assert set(spread(SIZES, limit)) < set(spread(SIZES, limit + 1))
