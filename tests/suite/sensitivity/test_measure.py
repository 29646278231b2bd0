"""Points of a profile: one part is compressed, the rest stays dense, and nothing is measured twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from suite.calibration import Calibration, draw, token_ids
from suite.checkpoint import surgery_of
from suite.conformance import tiny
from suite.data import text
from suite.errors import ImpossibleBudget, InputError
from suite.evaluate.perplexity import window_nlls
from suite.method import Method, MethodConfig, Plan, Target
from suite.models.anatomy import Anatomy, anatomy_of
from suite.sensitivity import measure
from suite.sensitivity.measure import Profiler, method_for, metric_of, plan_part, strengths_for
from suite.sensitivity.profile import load_profile, parts_of
from tests.suite.sensitivity import examples

FolderOf = Callable[[str], Path]


@pytest.mark.parametrize("recipe", ["svd", "rtn-int4"])
@pytest.mark.parametrize("by", ["block", "role", "linear"])
def test_a_plan_for_a_part_touches_no_other_module(family: str, recipe: str, by: Any) -> None:
    anatomy, method = tiny.anatomy(family), method_for(recipe, by)
    for part in parts_of(anatomy, by):
        plan = plan_part(method, anatomy, part, 0.6, examples.spec_of(recipe, by))
        assert set(plan.modules) == set(part.paths)


@pytest.mark.parametrize("by", ["block", "role", "linear"])
@pytest.mark.parametrize("strength", [0.8, 0.5, 0.3])
def test_a_part_keeps_the_share_asked_for_and_no_more(family: str, by: Any, strength: float) -> None:
    anatomy, method = tiny.anatomy(family), method_for("svd", by)
    for part in parts_of(anatomy, by):
        plan = plan_part(method, anatomy, part, strength, examples.spec_of("svd", by))
        size = part.size(anatomy.entries, "params")
        kept = 1 - (anatomy.params - plan.apply(anatomy).params) / size
        # One rank of the widest linear of these models is less than a twentieth of the smallest one.
        assert strength - 0.07 < kept <= strength


def test_the_rest_of_the_model_stays_bit_identical(folder_of: FolderOf, family: str, tmp_path: Path) -> None:
    profiler = examples.profiler(folder_of(family), tmp_path)
    dense = tiny.build(family)
    before = {name: tensor.clone() for name, tensor in profiler._model.state_dict().items()}
    part = parts_of(profiler.anatomy, "block")[1]
    plan = plan_part(profiler.method, profiler.anatomy, part, 0.5, profiler.spec)
    model = profiler._compressed(part, plan)
    assert set(surgery_of(model)) == set(part.paths)
    for name, tensor in dense.state_dict().items():
        if name.rpartition(".")[0] not in part.paths:
            assert torch.equal(model.state_dict()[name], tensor)
    after = profiler._model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


USUAL = [("llama", "block"), ("opt", "linear"), ("gpt-neox", "linear")]


@pytest.mark.parametrize("recipe", ["rom", "tensor-network", "rtn-int4"])
@pytest.mark.parametrize(
    ("family", "by"),
    [
        pytest.param(family, by, marks=[] if (family, by) in USUAL else pytest.mark.exhaustive)
        for family in tiny.FAMILIES
        for by in ("block", "linear")
    ],
)
def test_other_methods_too_change_the_part_alone(
    folder_of: FolderOf, recipe: str, family: str, by: Any, tmp_path: Path
) -> None:
    profiler = examples.profiler(folder_of(family), tmp_path, recipe, by)
    parts = parts_of(profiler.anatomy, by, [1])
    profile = profiler.run([parts[0], parts[-1]], [0.5])
    assert not profiler.skipped
    assert all(0.4 < point.kept <= 0.5 or recipe == "rtn-int4" for point in profile.points)


def test_the_increase_is_that_of_the_same_compression_by_hand(folder_of: FolderOf, tmp_path: Path) -> None:
    profiler = examples.profiler(folder_of("llama"), tmp_path)
    parts = parts_of(profiler.anatomy, "block")
    profile = profiler.run(parts, [0.5])
    dense, model = tiny.build("llama"), tiny.build("llama")
    _, held_back = profiler._texts
    plan = plan_part(profiler.method, anatomy_of(model), parts[2], 0.5, profiler.spec)
    profiler.method.compress(model, plan, None)
    rises = (window_nlls(model, held_back) - window_nlls(dense, held_back)) / (held_back.shape[1] - 1)
    point = profile.find("block 2", 0.5)
    assert point is not None
    assert point.increase == pytest.approx(float(rises.mean()), abs=1e-6)
    assert point.standard_error == pytest.approx(float(rises.std() / len(rises) ** 0.5), abs=1e-6)
    assert point.kept == pytest.approx(0.5, abs=0.05)


def test_keeping_nearly_everything_changes_next_to_nothing(folder_of: FolderOf, tmp_path: Path) -> None:
    profiler = examples.profiler(folder_of("llama"), tmp_path, "rtn-int8")
    profile = profiler.run(parts_of(profiler.anatomy, "block"), [0.9])
    assert all(abs(point.increase or 0) < 0.01 for point in profile.points)


def test_the_text_is_disjoint_from_the_calibration_that_a_run_draws(
    folder_of: FolderOf, tmp_path: Path
) -> None:
    profiler = examples.profiler(folder_of("llama"), tmp_path)
    sample, held_back = profiler._texts
    tokenizer = profiler._tokenizer
    assert sample.digest == draw(examples.CALIBRATION, tokenizer, 0).digest
    assert held_back.shape == (3, 16)
    ids = token_ids(tokenizer, text("pydoc"))
    windows = ids[: len(ids) // 16 * 16].reshape(-1, 16)

    def places(rows: torch.Tensor) -> set[int]:
        return {int(i) for row in rows for i in (windows == row).all(1).nonzero()}

    assert not places(sample.tokens) & places(held_back)


def test_removing_a_block_is_what_the_point_of_a_depth_method_measures(
    folder_of: FolderOf, family: str, tmp_path: Path
) -> None:
    profiler = examples.profiler(folder_of(family), tmp_path, "layerchop")
    parts = parts_of(profiler.anatomy, "block", [0, 3])
    profile = profiler.run(parts, strengths_for(profiler.method, None))
    model = tiny.build(family)
    _, held_back = profiler._texts
    dense = window_nlls(model, held_back)
    for block in (0, 3):
        with tiny.skipping(model, {block}):
            expected = float((window_nlls(model, held_back) - dense).mean()) / 15
        point = profile.find(f"block {block}", measure.REMOVED)
        assert point is not None
        assert point.increase == pytest.approx(expected, abs=1e-5)
        assert point.kept == 0


def test_what_is_measured_is_not_measured_again(
    folder_of: FolderOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = examples.profiler(folder_of("llama"), tmp_path)
    parts = parts_of(first.anatomy, "block")
    some = first.run(parts[:2], [0.5])
    seen: list[str] = []
    original = Profiler._compressed

    def watched(self: Profiler, part: Any, plan: Plan) -> PreTrainedModel:
        seen.append(part.name)
        return original(self, part, plan)

    monkeypatch.setattr(Profiler, "_compressed", watched)
    everything = examples.profiler(folder_of("llama"), tmp_path).run(parts, [0.5])
    assert seen == ["block 2", "block 3"]
    assert everything.points[:2] == some.points


def test_a_stop_halfway_loses_nothing(folder_of: FolderOf, tmp_path: Path) -> None:
    whole = examples.profiler(folder_of("llama"), tmp_path / "whole")
    parts = parts_of(whole.anatomy, "block")
    expected = whole.run(parts, [0.5])
    stopped = examples.profiler(folder_of("llama"), tmp_path / "stopped")

    def stop(what: str, done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped.run(parts, [0.5], stop)
    kept = load_profile(stopped.path)
    assert kept is not None
    assert kept.points == expected.points[:2]
    again = examples.profiler(folder_of("llama"), tmp_path / "stopped").run(parts, [0.5])
    assert again.points == expected.points


def test_equal_plans_are_measured_once(
    folder_of: FolderOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profiler = examples.profiler(folder_of("llama"), tmp_path, "rtn-int4")
    calls: list[str] = []
    original = Profiler._compressed
    monkeypatch.setattr(
        Profiler,
        "_compressed",
        lambda self, part, plan: (calls.append(part.name), original(self, part, plan))[1],
    )
    profile = profiler.run(parts_of(profiler.anatomy, "block", [1]), [0.8, 0.5])
    assert calls == ["block 1"]
    assert [point.strength for point in profile.points] == [0.8, 0.5]
    assert profile.points[0].kept == profile.points[1].kept < 0.5


def test_a_strength_out_of_reach_is_said_and_the_others_are_measured(
    folder_of: FolderOf, tmp_path: Path
) -> None:
    profiler = examples.profiler(folder_of("llama"), tmp_path, "rtn-int4")
    profile = profiler.run(parts_of(profiler.anatomy, "block", [1]), [0.5, 0.05])
    assert [point.strength for point in profile.points] == [0.5]
    (skipped,) = profiler.skipped
    assert not skipped.failed
    assert "rtn-int4 cannot bring block 1 to 0.05 of its bytes" in skipped.reason


def test_a_quantizer_leaves_embedding_and_head_alone(family: str) -> None:
    anatomy = tiny.anatomy(family)
    part = parts_of(anatomy, "block")[0]
    with pytest.raises(ImpossibleBudget):
        plan_part(method_for("rtn-int4", "block"), anatomy, part, 0.05, examples.spec_of("rtn-int4"))


def test_a_method_that_breaks_costs_its_point_alone(
    folder_of: FolderOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profiler = examples.profiler(folder_of("llama"), tmp_path)
    original = type(profiler.method).compress

    def breaks(self: Any, model: Any, plan: Plan, calibration: Calibration | None) -> None:
        if "model.layers.1.mlp.up_proj" in plan.modules:
            raise RuntimeError("no luck")
        original(self, model, plan, calibration)

    monkeypatch.setattr(type(profiler.method), "compress", breaks)
    profile = profiler.run(parts_of(profiler.anatomy, "block"), [0.5])
    assert [point.part for point in profile.points] == ["block 0", "block 2", "block 3"]
    (skipped,) = profiler.skipped
    assert skipped.failed
    assert "block 1 at 0.5: RuntimeError: no luck" in skipped.reason


def test_a_method_that_changes_more_than_the_part_is_caught(
    folder_of: FolderOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profiler = examples.profiler(folder_of("llama"), tmp_path)
    original = type(profiler.method).compress

    def greedy(self: Any, model: Any, plan: Plan, calibration: Calibration | None) -> None:
        other = method_for("svd(share=0.5)", "block").plan(anatomy_of(model), None, 0)
        original(self, model, other, calibration)

    monkeypatch.setattr(type(profiler.method), "compress", greedy)
    profiler.run(parts_of(profiler.anatomy, "block", [1]), [0.5])
    assert "svd changed more of the model than block 1" in profiler.skipped[0].reason


class Whole(Method[MethodConfig]):
    """Drops a block, whatever it is given; says it acts on linears."""

    name = "whole"
    family = "example"
    source = "a test"

    def plan(self, anatomy: Anatomy, target: Target | None, seed: int) -> Plan:
        return Plan(drop=(1,))

    def compress(self, model: PreTrainedModel, plan: Plan, calibration: Calibration | None) -> None:
        raise NotImplementedError


def test_a_plan_for_more_than_the_part_is_refused() -> None:
    anatomy = tiny.anatomy("llama")
    part = parts_of(anatomy, "block")[0]
    with pytest.raises(InputError, match=r"'whole' acts on a model as a whole.*Methods that can: .*svd"):
        plan_part(Whole(MethodConfig()), anatomy, part, 0.5, examples.spec_of())


@pytest.mark.parametrize(
    ("recipe", "by", "message"),
    [
        ("dense", "block", "'dense' acts on a model as a whole"),
        ("layerchop", "role", "--by block"),
        ("svd+rtn-int4", "block", "2 stages"),
    ],
)
def test_methods_that_cannot_act_on_such_parts_are_refused(recipe: str, by: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        method_for(recipe, by)


def test_strengths_are_sorted_once_each_and_lie_between_0_and_1() -> None:
    svd, layerchop = method_for("svd", "block"), method_for("layerchop", "block")
    assert strengths_for(svd, [0.3, 0.9, 0.3]) == (0.9, 0.3)
    assert strengths_for(svd, None) == measure.DEFAULT_STRENGTHS
    for wrong in (0.0, 1.0, 1.5, -0.1):
        with pytest.raises(InputError, match="between 0 and 1"):
            strengths_for(svd, [wrong])
    with pytest.raises(InputError, match="leave --strength out"):
        strengths_for(layerchop, [0.5])


def test_strengths_count_bytes_only_where_parameters_stay() -> None:
    assert metric_of(method_for("svd", "block")) == "params"
    assert metric_of(method_for("layerchop", "block")) == "params"
    assert metric_of(method_for("rtn-int4", "block")) == "bytes"


def test_accuracy_is_measured_when_asked_for(folder_of: FolderOf, tmp_path: Path) -> None:
    profiler = examples.profiler(folder_of("llama"), tmp_path, measures="both", limit=4)
    profile = profiler.run(parts_of(profiler.anatomy, "block", [1]), [0.3])
    (point,) = profile.points
    assert set(point.accuracy) == set(profile.dense.accuracy) == {"physical"}
    assert point.accuracy_change == point.accuracy["physical"] - profile.dense.accuracy["physical"]
    assert point.increase is not None
