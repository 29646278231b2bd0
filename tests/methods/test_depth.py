"""Removing the blocks that calibration text shows to matter least."""

from __future__ import annotations

import math
from itertools import combinations, pairwise

import pytest
import torch
from transformers import PreTrainedModel

from methods.depth import angular_distances, block_influence, least, losses_without
from suite.conformance import tiny
from suite.errors import InputError
from suite.healing import batch_loss
from suite.losses import Objective
from suite.models.anatomy import anatomy_of
from suite.models.layouts import layout_of
from suite.recipe import Recipe
from suite.specs import Budget

DATA_DRIVEN = ["shortgpt", "angular", "greedy-depth", "greedy-depth(one_shot=true)"]
TOKENS = tiny.token_ids(4, 16)


def trapped_states(model: PreTrainedModel) -> list[torch.Tensor]:
    """Hidden states before every block and after the last one, caught by hooks on a whole forward pass."""
    caught: list[torch.Tensor] = []
    blocks = list(model.get_submodule(layout_of(model.config).blocks).children())

    def entering(_: object, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> None:
        caught.append(args[0] if args else kwargs["hidden_states"])

    def leaving(_: object, __: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        caught.append(output[0] if isinstance(output, tuple) else output)

    hooks = [block.register_forward_pre_hook(entering, with_kwargs=True) for block in blocks]
    hooks.append(blocks[-1].register_forward_hook(leaving))
    tiny.logits_of(model, TOKENS)
    for hook in hooks:
        hook.remove()
    return caught


def silence(model: PreTrainedModel, block: int) -> None:
    """Make a block pass on what it gets."""
    layout = layout_of(model.config)
    with torch.no_grad():
        for path, role in layout.roles.items():
            if role in ("output", "down"):
                for parameter in model.get_submodule(f"{layout.blocks}.{block}.{path}").parameters():
                    parameter.zero_()


def test_influence_is_one_minus_the_mean_cosine_over_all_tokens(model: PreTrainedModel) -> None:
    states = trapped_states(model)
    expected = [float((1 - torch.cosine_similarity(a, b, dim=-1)).mean()) for a, b in pairwise(states)]
    found = block_influence(model, TOKENS)
    assert found == pytest.approx(expected, abs=1e-5)
    assert all(0 <= value <= 2 for value in found)


def test_a_block_that_passes_its_input_on_has_no_influence_and_goes_first(model: PreTrainedModel) -> None:
    silence(model, 1)
    assert block_influence(model, TOKENS)[1] == pytest.approx(0, abs=1e-12)
    before = tiny.logits_of(model)
    assert tiny.compress(model, "shortgpt(remove=1)").stages[0].drop == (1,)
    torch.testing.assert_close(tiny.logits_of(model), before)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_angles_are_those_of_the_last_token_before_the_final_norm(model: PreTrainedModel, count: int) -> None:
    last = [hidden[:, -1].double() for hidden in trapped_states(model)]
    expected = [
        float(torch.cosine_similarity(a, b, dim=-1).arccos().mean()) / math.pi
        for a, b in zip(last, last[count:], strict=False)
    ]
    found = angular_distances(model, TOKENS, count)
    assert len(found) == tiny.BLOCKS + 1 - count
    assert found == pytest.approx(expected, abs=1e-6)
    assert all(0 <= value <= 1 for value in found)


def test_for_one_token_the_angle_of_a_block_is_that_of_its_influence(llama: PreTrainedModel) -> None:
    token = TOKENS[:1, :1]
    angles = [math.acos(1 - influence) / math.pi for influence in block_influence(llama, token)]
    assert angular_distances(llama, token, 1) == pytest.approx(angles, abs=1e-9)


def test_states_that_do_not_turn_have_no_angle_however_they_are_rounded(llama: PreTrainedModel) -> None:
    for block in range(tiny.BLOCKS):
        silence(llama, block)
    assert angular_distances(llama, TOKENS, 2) == pytest.approx([0, 0, 0], abs=1e-7)


def test_the_blocks_of_least_angle_are_neighbours(model: PreTrainedModel) -> None:
    silence(model, 1)
    silence(model, 2)
    before = tiny.logits_of(model)
    assert tiny.compress(model, "angular(remove=2)").stages[0].drop == (1, 2)
    torch.testing.assert_close(tiny.logits_of(model), before)


@pytest.mark.parametrize("gone", [[], [2]])
def test_a_trial_is_the_loss_of_the_model_without_the_block(model: PreTrainedModel, gone: list[int]) -> None:
    left = [block for block in range(tiny.BLOCKS) if block not in gone]
    expected = []
    for block in left:
        with tiny.skipping(model, {block, *gone}), torch.no_grad():
            expected.append(float(batch_loss(model, None, TOKENS, Objective())))
    assert losses_without(model, TOKENS, gone) == pytest.approx(expected, abs=1e-5)


def test_every_greedy_step_removes_the_block_whose_loss_hurts_least(model: PreTrainedModel) -> None:
    gone: list[int] = []
    for _ in range(2):
        losses = {}
        for block in set(range(tiny.BLOCKS)) - set(gone):
            with tiny.skipping(model, {block, *gone}), torch.no_grad():
                losses[block] = float(batch_loss(model, None, TOKENS, Objective()))
        gone.append(min(losses, key=losses.__getitem__))
    plan = tiny.compress(model, "greedy-depth(remove=2)").stages[0]
    assert plan.notes["order"] == gone
    assert plan.drop == tuple(sorted(gone))


def test_judged_once_the_best_blocks_go_together() -> None:
    model = tiny.build("llama")
    alone = losses_without(model, TOKENS, [])
    plan = tiny.compress(model, "greedy-depth(remove=2,one_shot=true)").stages[0]
    assert plan.notes["order"] == least(alone, 2)


def test_only_so_many_sequences_are_scored() -> None:
    plan = tiny.compress(tiny.build("llama"), "greedy-depth(remove=1,sequences=2)").stages[0]
    assert plan.notes["calibration_loss"] == [
        round(min(losses_without(tiny.build("llama"), TOKENS[:2], [])), 6)
    ]


@pytest.mark.parametrize("recipe", DATA_DRIVEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_stays_is_bit_identical_and_what_went_is_told(
    family: str, recipe: str, dtype: torch.dtype
) -> None:
    dense, model = tiny.build(family, dtype), tiny.build(family, dtype)
    before = anatomy_of(dense)
    planned = Recipe.parse(recipe).plan(before, Budget.parse("params=0.7"))
    done = tiny.compress(model, recipe, "params=0.7")
    drop = done.stages[0].drop
    assert done.final == planned.final == anatomy_of(model)
    assert len(drop) == planned.stages[0].knobs["remove"] == 2
    assert done.stages[0].knobs == {"remove": 2, "blocks": list(drop)}
    path = layout_of(model.config).blocks
    kept = [block for block in range(tiny.BLOCKS) if block not in drop]
    for new, old in enumerate(kept):
        source = dense.get_submodule(f"{path}.{old}").state_dict()
        found = model.get_submodule(f"{path}.{new}").state_dict()
        assert all(torch.equal(found[name], source[name]) for name in source)


@pytest.mark.parametrize("recipe", [*DATA_DRIVEN, "laco"])
def test_removing_nothing_leaves_the_logits_alone(model: PreTrainedModel, recipe: str) -> None:
    before = tiny.logits_of(model)
    recipe = recipe.replace(")", ",remove=0)") if "(" in recipe else f"{recipe}(remove=0)"
    tiny.compress(model, recipe)
    assert torch.equal(tiny.logits_of(model), before)


@pytest.mark.parametrize("recipe", ["shortgpt", "laco"])
def test_generation_with_a_cache_agrees(model: PreTrainedModel, recipe: str) -> None:
    tiny.compress(model, recipe, "params=0.7")
    assert torch.equal(tiny.greedy(model, use_cache=True), tiny.greedy(model, use_cache=False))


def test_blocks_that_an_earlier_stage_made_unequal_are_refused() -> None:
    dense = tiny.anatomy("llama")
    first = {line.path for line in dense.linears if line.block == 0}
    plan = (
        Recipe.parse("svd")
        .stages[0]
        .plan(
            dense.restricted(first), Recipe.parse("svd").plan(dense, Budget.parse("params=0.9")).targets[0], 0
        )
    )
    with pytest.raises(InputError, match=r"made them unequal\. Put shortgpt first: shortgpt\+"):
        Recipe.parse("shortgpt").plan(plan.apply(dense), Budget.parse("params=0.7"))


@pytest.mark.parametrize("recipe", ["svd(share=0.5)+shortgpt", "shortgpt+svd", "angular+rtn-int8"])
def test_the_choice_stacks_with_other_stages(recipe: str) -> None:
    model = tiny.build("llama")
    plan = tiny.compress(model, recipe, "bytes=0.3" if "int8" in recipe else "params=0.6")
    sizes = [{(e.path, e.type, e.params, e.disk) for e in a.entries} for a in (plan.final, anatomy_of(model))]
    assert sizes[0] == sizes[1]


def test_any_two_blocks_make_a_model_of_the_same_size() -> None:
    dense = tiny.anatomy("qwen3")
    first, *others = [dense.after(drop) for drop in combinations(range(tiny.BLOCKS), 2)]
    assert all(other == first for other in others)
