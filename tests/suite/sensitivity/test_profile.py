"""The parts of a model, and the file that keeps what was measured of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest

from suite.conformance import tiny
from suite.errors import InputError
from suite.sensitivity.profile import (
    Granularity,
    Point,
    load_profile,
    parts_of,
    save_profile,
)
from tests.suite.sensitivity import examples

ROLES = {"llama": 7, "llama-untied": 7, "qwen2": 7, "opt": 6, "gpt-neox": 4}


@pytest.mark.parametrize("by", get_args(Granularity))
def test_the_parts_hold_every_linear_once(family: str, by: Granularity) -> None:
    anatomy = tiny.anatomy(family)
    paths = [path for part in parts_of(anatomy, by) for path in part.paths]
    assert sorted(paths) == sorted(line.path for line in anatomy.linears)


def test_there_are_as_many_parts_as_blocks_roles_or_both(family: str) -> None:
    anatomy, roles = tiny.anatomy(family), ROLES[family]
    assert len(parts_of(anatomy, "block")) == tiny.BLOCKS
    assert len(parts_of(anatomy, "role")) == roles
    assert len(parts_of(anatomy, "linear")) == tiny.BLOCKS * roles


@pytest.mark.parametrize("by", get_args(Granularity))
@pytest.mark.parametrize("metric", ["params", "bytes"])
def test_the_parts_and_what_no_part_holds_make_up_the_model(
    family: str, by: Granularity, metric: Any
) -> None:
    anatomy = tiny.anatomy(family)
    paths = {line.path for line in anatomy.linears}
    rest = [entry for entry in anatomy.entries if entry.path not in paths]
    beside = sum(entry.params if metric == "params" else entry.disk for entry in rest)
    total = sum(part.size(anatomy.entries, metric) for part in parts_of(anatomy, by))
    assert total + beside == anatomy.size(metric)


def test_chosen_blocks_alone_are_parts_and_a_role_says_which() -> None:
    anatomy = tiny.anatomy("llama")
    assert [part.name for part in parts_of(anatomy, "block", [3, 1])] == ["block 1", "block 3"]
    down = parts_of(anatomy, "role", [1, 3])[-1]
    assert down.name == "down in blocks 1,3"
    assert down.paths == ("model.layers.1.mlp.down_proj", "model.layers.3.mlp.down_proj")


def test_a_block_that_is_not_there_is_refused() -> None:
    with pytest.raises(InputError, match="no block 4: this model has blocks 0 to 3"):
        parts_of(tiny.anatomy("llama"), "block", [0, 4])


@pytest.mark.parametrize(
    "changes", [{"seed": 1}, {"held_back": 4}, {"by": "role"}, {"recipe": "svd(share=0.5)"}]
)
def test_another_question_is_another_file(changes: dict[str, Any], tmp_path: Path) -> None:
    assert examples.spec_of(**changes).path(tmp_path) != examples.spec_of().path(tmp_path)


def test_a_profile_comes_back_as_it_was_kept(tmp_path: Path) -> None:
    _, profile = examples.rising_with_depth(tiny.anatomy("llama"))
    path = profile.spec.path(tmp_path)
    assert load_profile(path) is None
    save_profile(profile, path)
    assert load_profile(path) == profile
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_points_that_another_process_kept_meanwhile_stay(tmp_path: Path) -> None:
    _, profile = examples.rising_with_depth(tiny.anatomy("llama"))
    path = tmp_path / "profile.json"
    theirs = profile.model_copy(update={"points": profile.points[:5]})
    mine = profile.model_copy(update={"points": profile.points[3:]})
    save_profile(theirs, path)
    joined = save_profile(mine, path)
    assert joined == load_profile(path)
    assert sorted(joined.points, key=repr) == sorted(profile.points, key=repr)


@pytest.mark.parametrize("content", ['{"half', '{"foreign": true}'])
def test_a_file_that_is_no_profile_is_refused_and_left_alone(content: str, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text(content)
    with pytest.raises(InputError, match="Move it away"):
        load_profile(path)
    assert path.read_text() == content


def test_only_what_was_asked_for_is_shown() -> None:
    anatomy = tiny.anatomy("llama")
    _, profile = examples.rising_with_depth(anatomy)
    shown = profile.only(parts_of(anatomy, "block", [2]), [0.5])
    assert [(point.part, point.strength) for point in shown.points] == [("block 2", 0.5)]
    assert isinstance(profile.find("block 2", 0.25), Point)
    assert shown.find("block 2", 0.25) is None
