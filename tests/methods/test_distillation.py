"""Students that start from the teacher's layers and channels, and meet the budget."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from methods import distillation
from methods.distillation import important_channels, narrowed
from suite.conformance import tiny
from suite.errors import ImpossibleBudget, InputError
from suite.healing import batch_loss
from suite.losses import Objective
from suite.models import load
from suite.models.anatomy import anatomy_of
from suite.models.layouts import layout_of
from suite.recipe import Recipe
from suite.specs import Budget


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHIN_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("family", tiny.FAMILIES)
@given(share=st.floats(0.45, 1.0))
def test_depth_and_width_together_meet_the_budget(family: str, share: float) -> None:
    dense = tiny.anatomy(family)
    plan = Recipe.parse("distill").plan(dense, Budget(metric="params", value=share))
    channel = sum(
        line.in_features + line.bias if line.role in ("gate", "up") else line.out_features
        for line in dense.linears
        if line.role in ("gate", "up", "down")
    )
    target = share * dense.params
    assert target - channel <= plan.final.params <= target


def test_depth_does_what_it_can_before_width() -> None:
    dense = tiny.anatomy("llama")
    for share in (0.9, 0.8, 0.6):
        budget = Budget(metric="params", value=share)
        depth = Recipe.parse("layerchop").plan(dense, budget).stages[0].knobs["remove"]
        assert Recipe.parse("distill").plan(dense, budget).stages[0].knobs["remove"] == depth - 1


@pytest.mark.parametrize("knobs", ["remove=1", "width=60", "remove=1,width=60"])
def test_given_knobs_are_kept(knobs: str) -> None:
    dense = tiny.anatomy("llama")
    found = Recipe.parse(f"distill({knobs})").plan(dense, Budget.parse("params=0.6")).stages[0].knobs
    assert all(f"{key}={found[key]}" in knobs.split(",") for key in ("remove", "width") if key in knobs)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("distill(remove=3)", "at most 2 of 4 blocks can go"),
        ("distill(width=113)", "the MLPs are 112 wide"),
    ],
)
def test_impossible_knobs_are_refused(recipe: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Recipe.parse(recipe).plan(tiny.anatomy("llama"), Budget.parse("none"))


def test_a_budget_below_two_narrow_blocks_is_refused() -> None:
    with pytest.raises(ImpossibleBudget, match="two blocks must stay"):
        Recipe.parse("distill").plan(tiny.anatomy("llama"), Budget.parse("params=0.1"))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_student_of_all_layers_starts_as_the_teacher(family: str) -> None:
    """Every loss is zero at the start: the teacher does not diverge from itself."""
    model = tiny.build(family)
    plan = tiny.compress(model, "distill(weight=1,hidden=1)")
    assert plan.stages[0].notes["loss"][0] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_before_training_such_a_student_gives_the_teachers_logits(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.build(family)
    before = tiny.logits_of(model)
    monkeypatch.setattr(distillation, "train", lambda *arguments: {})
    tiny.compress(model, "distill")
    assert torch.equal(tiny.logits_of(model), before)


@pytest.mark.parametrize("blocks", [22, 15, 11])
def test_a_student_of_some_blocks_has_as_many_parameters_as_the_formula_says(blocks: int) -> None:
    """SmolLM2-135M: 28,312,128 in embedding and final norm, 3,540,096 in every block."""
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152}
    config = tiny.config_of("llama", **shape, num_attention_heads=9, num_key_value_heads=3)
    dense = anatomy_of(load.skeleton(config))
    assert dense.params == 134_515_008
    plan = Recipe.parse(f"distill(remove={30 - blocks})").plan(dense, Budget.parse("none"))
    assert plan.final.params == 28_312_128 + 3_540_096 * blocks
    share = Budget.parse(f"params={0.95 * plan.final.params / dense.params:.4f}")
    narrower = Recipe.parse("distill").plan(dense, share).final.params
    assert 0.99 * share.value * dense.params < narrower <= share.value * dense.params


@pytest.mark.parametrize("before", ["svd", "tensor-network"])
def test_a_student_starts_from_whole_linears(before: str) -> None:
    factorised = Recipe.parse(before).plan(tiny.anatomy("llama"), Budget.parse("params=0.8")).final
    with pytest.raises(InputError, match=r"earlier stage factorised them\. Put distill first: distill\+"):
        Recipe.parse("distill").plan(factorised, Budget.parse("params=0.7"))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_channels_that_carry_nothing_go_first(family: str) -> None:
    """With the silent channels cut, the narrow student gives the teacher's logits before training."""
    model = tiny.build(family, dtype=torch.float64)
    layout = layout_of(model.config)
    down = next(path for path, role in layout.roles.items() if role == "down")
    silent = [3, 7, 20, 50]
    with torch.no_grad():
        for block in model.get_submodule(layout.blocks).children():
            block.get_submodule(down).weight[:, silent] = 0
    tokens = tiny.token_ids(4, 16)
    expected = tiny.logits_of(model, tokens)
    width = model.get_submodule(f"{layout.blocks}.0.{down}").in_features - len(silent)
    plan = Recipe.parse(f"distill(width={width})").plan(anatomy_of(model), Budget.parse("none")).stages[0]
    kept = important_channels(model, tokens, plan)
    for path in plan.modules:
        linear = model.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        model.set_submodule(path, narrowed(linear, kept[path]))
    torch.testing.assert_close(tiny.logits_of(model, tokens), expected)


def test_blocks_kept_after_a_removal_get_their_own_channels() -> None:
    model = tiny.build("llama")
    plan = Recipe.parse("distill(remove=2,width=40)").plan(anatomy_of(model), Budget.parse("none")).stages[0]
    kept = important_channels(model, tiny.token_ids(4, 16), plan)
    every = important_channels(
        model,
        tiny.token_ids(4, 16),
        Recipe.parse("distill(width=40)").plan(anatomy_of(model), Budget.parse("none")).stages[0],
    )
    survivors = [block for block in range(4) if block not in plan.drop]
    for new, old in enumerate(survivors):
        pair = (kept[f"model.layers.{new}.mlp.down_proj"], every[f"model.layers.{old}.mlp.down_proj"])
        assert torch.equal(pair[0][1], pair[1][1])


def test_mlps_that_an_earlier_stage_left_narrower_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "train", lambda *arguments: {})
    model = tiny.build("llama")
    plan = tiny.compress(model, "llm-pruner(share=0.5,first=0,last=1)+distill(width=80)")
    widths = [block.mlp.down_proj.in_features for block in model.model.layers]
    assert widths == [56, 56, 56, 80]
    assert plan.final.params == sum(parameter.numel() for parameter in model.parameters())


def test_the_student_is_taught_by_the_dense_model() -> None:
    """With the whole weight on divergence, training brings it closer to the teacher on what it saw."""
    teacher, tokens = tiny.build("llama"), tiny.token_ids(8, 16, seed=1)
    gaps = []
    for rate in ("1e-9", "3e-4"):
        student = tiny.build("llama")
        tiny.compress(student, f"distill(weight=1,learning_rate={rate})", "params=0.8")
        with torch.no_grad():
            gaps.append(float(batch_loss(student, teacher, tokens, Objective(distill=1))))
    assert gaps[1] < 0.9 * gaps[0]
