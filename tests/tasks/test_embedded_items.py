"""The items that ship with the suite: their form, and that nothing but the content gives an answer away."""

import json
from collections import Counter
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from tasks.embedded import minimal_pairs

Item = dict[str, Any]
Strategy = Callable[[Item, list[Item]], list[float]]  # item, its family -> preference for each option

KEYS = ["id", "family", "prompt", "options", "answer"]
MARGIN = 0.05  # how far above chance a strategy that never reads the prompt may come


def read(path: Path) -> list[Item]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


EMBEDDED = Path(str(resources.files("tasks"))) / "embedded"
FILES = {path.stem: read(path) for path in sorted(EMBEDDED.glob("*.jsonl"))}
ITEMS = [item for items in FILES.values() for item in items]
FAMILIES = {
    name: [i for i in ITEMS if i["family"] == name] for name in dict.fromkeys(i["family"] for i in ITEMS)
}

each_file = pytest.mark.parametrize("file", FILES)
each_family = pytest.mark.parametrize("family", FAMILIES)


def repeated(values: list[Any]) -> list[Any]:
    return [value for value, count in Counter(values).items() if count > 1]


def right(item: Item) -> str:
    return str(item["options"][item["answer"]])


def longest(item: Item, family: list[Item]) -> list[float]:
    return [len(option) for option in item["options"]]


def shortest(item: Item, family: list[Item]) -> list[float]:
    return [-len(option) for option in item["options"]]


def most_often_right(item: Item, family: list[Item]) -> list[float]:
    """How often each option's text is the right one among the other items of the family."""
    times = Counter(right(other) for other in family if other is not item)
    return [times[option] for option in item["options"]]


def always_at(position: int) -> Strategy:
    """Take one position, counted from the front or (negative) from the back; guess where there is none."""

    def prefer(item: Item, family: list[Item]) -> list[float]:
        places = range(len(item["options"]))
        return [place in (position, position + len(places)) for place in places]

    return prefer


STRATEGIES = {
    "longest": longest,
    "shortest": shortest,
    "most-often-right": most_often_right,
    **{f"position{place:+d}": always_at(place) for place in range(-4, 4)},
}


def chance(family: list[Item]) -> float:
    return sum(1 / len(item["options"]) for item in family) / len(family)


def accuracy(strategy: Strategy, family: list[Item]) -> float:
    """Accuracy of taking the most preferred option; options preferred equally share the credit."""
    credit = 0.0
    for item in family:
        scores = strategy(item, family)
        if scores[item["answer"]] == max(scores):
            credit += 1 / scores.count(max(scores))
    return credit / len(family)


@each_file
def test_items_have_exactly_the_five_keys_in_order(file: str) -> None:
    assert FILES[file]
    assert [item["id"] for item in FILES[file] if list(item) != KEYS] == []


@each_file
def test_file_ends_with_one_newline(file: str) -> None:
    text = (EMBEDDED / f"{file}.jsonl").read_bytes()
    assert text.endswith(b"}\n")
    assert b"\r" not in text


def test_ids_are_unique_over_all_files() -> None:
    assert repeated([item["id"] for item in ITEMS]) == []


def test_no_prompt_and_options_occur_twice() -> None:
    assert repeated([(item["prompt"], *sorted(item["options"])) for item in ITEMS]) == []


@each_family
def test_ids_number_the_family_from_one(family: str) -> None:
    ids = [item["id"] for item in FAMILIES[family]]
    assert ids == [f"{family}-{number:03d}" for number in range(1, len(ids) + 1)]


@each_family
def test_text_is_printable(family: str) -> None:
    for item in FAMILIES[family]:
        assert item["id"].isascii()
        assert item["prompt"].replace("\n", " ").isprintable(), item["id"]
        assert all(option.isprintable() for option in item["options"]), item["id"]


@each_family
def test_prompt_is_not_empty_and_has_no_outer_space(family: str) -> None:
    assert [i["id"] for i in FAMILIES[family] if not i["prompt"] or i["prompt"] != i["prompt"].strip()] == []


@each_family
def test_two_to_four_distinct_options_without_outer_space(family: str) -> None:
    for item in FAMILIES[family]:
        options = item["options"]
        assert 2 <= len(options) <= 4, item["id"]
        assert len(set(options)) == len(options), item["id"]
        assert all(option and option == option.strip() for option in options), item["id"]


@each_family
def test_answer_is_the_index_of_an_option(family: str) -> None:
    for item in FAMILIES[family]:
        assert type(item["answer"]) is int, item["id"]
        assert 0 <= item["answer"] < len(item["options"]), item["id"]


@each_family
def test_answer_positions_are_balanced_within_each_option_count(family: str) -> None:
    for size in {len(item["options"]) for item in FAMILIES[family]}:
        answers = Counter(item["answer"] for item in FAMILIES[family] if len(item["options"]) == size)
        total = answers.total()
        for place in range(size):
            assert abs(answers[place] - total / size) <= 1 + 0.05 * total, (size, answers)


@each_family
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_answers_cannot_be_guessed_without_the_prompt(family: str, strategy: str) -> None:
    items = FAMILIES[family]
    assert accuracy(STRATEGIES[strategy], items) <= chance(items) + MARGIN + 1e-9


def test_minimal_pairs_cover_twelve_phenomena_with_a_hundred_pairs_each() -> None:
    sizes = Counter(item["family"] for item in FILES["minimal_pairs"])
    assert len(sizes) >= 12
    assert min(sizes.values()) >= 100
    assert {len(item["options"]) for item in FILES["minimal_pairs"]} == {2}


def test_first_minimal_pairs_cover_the_phenomena_evenly() -> None:
    families = [item["family"] for item in FILES["minimal_pairs"]]
    count = len(set(families))
    assert families == families[:count] * (len(families) // count)


def test_four_hundred_multiple_choice_items_over_five_other_families() -> None:
    others = [item for file, items in FILES.items() if file != "minimal_pairs" for item in items]
    assert len(others) >= 400
    assert len({item["family"] for item in others}) >= 5


def test_generator_reproduces_the_minimal_pairs_exactly() -> None:
    text = (EMBEDDED / "minimal_pairs.jsonl").read_text(encoding="utf-8")
    lines = [json.dumps(item, ensure_ascii=False) for item in minimal_pairs.generate()]
    assert lines == text.split("\n")[:-1]
