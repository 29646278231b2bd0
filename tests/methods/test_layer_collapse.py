"""Collapsing neighbouring blocks into one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from methods.layer_collapse import LaCo, LaCoConfig, Layer, _Trials, merge
from suite.conformance import tiny
from suite.errors import InputError
from suite.models.anatomy import anatomy_of
from suite.models.layouts import layout_of
from suite.recipe import Recipe
from suite.specs import Budget

TOKENS = tiny.token_ids(4, 16)
STACK = tuple(Layer(block, ((block, 1),)) for block in range(8))


def merged_block(model: PreTrainedModel, first: int, count: int, variant: str) -> dict[str, torch.Tensor]:
    trials = _Trials(model, TOKENS, count, LaCoConfig(variant=variant))  # type: ignore[arg-type]
    with trials._merged(merge(trials.dense, first, count, variant)[first]) as block:  # type: ignore[arg-type]
        return {name: tensor.clone() for name, tensor in block.module.state_dict().items()}


def linears_of(model: PreTrainedModel, block: int) -> dict[str, torch.Tensor]:
    layout = layout_of(model.config)
    state = model.get_submodule(f"{layout.blocks}.{block}").state_dict()
    return {n: t for n, t in state.items() if n.rpartition(".")[0] in layout.roles}


def test_the_first_block_gets_every_later_ones_difference(model: PreTrainedModel) -> None:
    found = merged_block(model, 1, 2, "paper")
    first, second, third = (linears_of(model, block) for block in (1, 2, 3))
    for name, theta in first.items():
        expected = theta + (second[name] - theta) + (third[name] - theta)
        torch.testing.assert_close(found[name], expected)


def test_one_block_folded_in_takes_the_place_of_the_first(model: PreTrainedModel) -> None:
    for variant in ("paper", "notebook"):
        found = merged_block(model, 1, 1, variant)
        assert all(torch.equal(found[name], theta) for name, theta in linears_of(model, 2).items())


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_notebook_copies_the_last_block_of_the_window(model: PreTrainedModel, count: int) -> None:
    found = merged_block(model, 0, count, "notebook")
    assert all(torch.equal(found[name], theta) for name, theta in linears_of(model, count).items())


@pytest.mark.parametrize("variant", ["paper", "notebook"])
def test_norms_stay_those_of_the_first_block(model: PreTrainedModel, variant: str) -> None:
    layout = layout_of(model.config)
    found = merged_block(model, 1, 2, variant)
    for norm in layout.norms:
        own = model.get_submodule(f"{layout.blocks}.1.{norm}").state_dict()
        assert all(torch.equal(found[f"{norm}.{name}"], tensor) for name, tensor in own.items())


def test_merging_equal_blocks_changes_no_weight(model: PreTrainedModel) -> None:
    blocks = model.get_submodule(layout_of(model.config).blocks)
    for block in (2, 3):
        blocks[block].load_state_dict(blocks[1].state_dict())
    found = merged_block(model, 1, 2, "paper")
    assert all(torch.equal(found[n], theta) for n, theta in linears_of(model, 1).items())


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(1, 4)), max_size=5))
def test_however_merges_are_nested_the_weights_add_up_to_one(steps: list[tuple[int, int]]) -> None:
    stack = STACK
    for first, count in steps:
        if first + count < len(stack):
            stack = merge(stack, first, count, "paper")
    seen = [block for layer in stack for block, _ in layer.parts]
    assert all(sum(weight for _, weight in layer.parts) == 1 for layer in stack)
    assert len(seen) == len(set(seen))
    assert [layer.base for layer in stack] == sorted({layer.base for layer in stack})


def test_a_nested_merge_is_the_formula_on_what_was_merged_before() -> None:
    inner = merge(STACK, 3, 2, "paper")
    assert inner[3].parts == ((3, -1), (4, 1), (5, 1))
    # θ_2 + (θ*_3 − θ_2) + (θ_6 − θ_2)
    assert merge(inner, 2, 2, "paper")[2].parts == ((2, -1), (3, -1), (4, 1), (5, 1), (6, 1))


@pytest.mark.parametrize("recipe", ["laco", "laco(variant=notebook)", "laco(layers=2,interval=2)"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exactly_as_many_blocks_go_as_the_budget_wants(family: str, recipe: str, dtype: torch.dtype) -> None:
    for share in (0.9, 0.7):
        model = tiny.build(family, dtype)
        planned = Recipe.parse(recipe).plan(anatomy_of(model), Budget(metric="params", value=share))
        done = tiny.compress(model, recipe, f"params={share}")
        assert done.final == planned.final == anatomy_of(model)
        assert len(done.stages[0].drop) == planned.stages[0].knobs["remove"]


def test_the_model_that_is_written_has_the_similarity_that_was_found(model: PreTrainedModel) -> None:
    dense = tiny.build(anatomy_family(model))
    notes = tiny.compress(model, "laco(remove=2)").stages[0].notes
    with torch.no_grad():
        states = [m.base_model(TOKENS, use_cache=False).last_hidden_state.flatten(1) for m in (dense, model)]
    similarity = float(torch.cosine_similarity(*states, dim=-1).mean())
    assert notes["similarity"] == pytest.approx(similarity, abs=1e-4)
    assert notes["similarity"] >= notes["threshold"] - 1e-4


def anatomy_family(model: PreTrainedModel) -> str:
    """The name under which `tiny` builds this model."""
    named = {"llama": "llama", "qwen2": "qwen2", "opt": "opt", "gpt_neox": "gpt-neox"}
    name = named[model.config.model_type]
    return name if name != "llama" or model.config.tie_word_embeddings else "llama-untied"


def test_trials_leave_the_model_as_it_is(llama: PreTrainedModel) -> None:
    before = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    trials = _Trials(llama, TOKENS, 2, LaCoConfig())
    assert trials.similarity(trials.dense) == pytest.approx(1)
    assert len(trials.walk(0.0)) == 2
    assert trials.walk(2.0) == trials.dense
    assert all(torch.equal(tensor, before[name]) for name, tensor in llama.state_dict().items())


def test_the_threshold_found_is_the_highest_that_meets_the_depth(llama: PreTrainedModel) -> None:
    trials = _Trials(llama, TOKENS, 2, LaCoConfig())
    _, notes = LaCo(LaCoConfig()).choose(tiny.build("llama"), TOKENS, 2)
    assert len(trials.walk(notes["threshold"] - 1e-4)) == 2
    assert len(trials.walk(notes["threshold"] + 0.003)) > 2


def test_factorised_linears_are_refused() -> None:
    factorised = Recipe.parse("svd").plan(tiny.anatomy("llama"), Budget.parse("params=0.8")).final
    with pytest.raises(InputError, match=r"earlier stage factorised them\. Put laco first: laco\+"):
        Recipe.parse("laco").plan(factorised, Budget.parse("params=0.7"))
