"""What the suite knows of an architecture, checked against the models themselves."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import GPT2Config, PreTrainedModel

from suite.conformance import tiny
from suite.errors import InputError
from suite.layers import LowRankLinear, ModuleSpec, replace
from suite.models.anatomy import Anatomy, anatomy_of, drop_blocks
from suite.models.layouts import LAYOUTS, layout_of
from suite.recipe import Recipe
from suite.specs import Budget
from suite.streaming import stream

EVERY = list(tiny.CONFIGS)
LLAMA_ROLES = {"query", "key", "value", "output", "gate", "up", "down"}
ROLES = {
    "opt": {"query", "key", "value", "output", "up", "down"},
    "opt-350m-like": {"query", "key", "value", "output", "up", "down"},
    "gpt-neox": {"query_key_value", "output", "up", "down"},
}
RECIPES = [
    "svd(share=0.5)",
    "layerchop(remove=2)",
    "random-layers(remove=1)",
    "rtn-int8",
    "rtn-int4(embedding=4, group=20, symmetric=false)",
    "layerchop(remove=1)+svd(share=0.6)+rtn-int8(embedding=8)",
]
SLICED = [
    "slicegpt(width=40)",
    "slicegpt(layout=official,width=40)+rtn-int4(embedding=8,group=20)",
    "layerchop(remove=1)+slicegpt(layout=tie-preserving,width=32)+svd(share=0.5)",
]


def by_path(anatomy: Anatomy) -> dict[str, Any]:
    """Entries and linears, which may be listed in another order."""
    return {
        "entries": {entry.path: entry for entry in anatomy.entries},
        "linears": {linear.path: linear for linear in anatomy.linears},
        "blocks": anatomy.n_blocks,
        "bytes": anatomy.bytes,
        "params": anatomy.params,
        "decoder": anatomy.decoder_params,
    }


@pytest.mark.parametrize("name", EVERY)
def test_parameters_are_counted_once_each(name: str) -> None:
    model = tiny.build(name)
    anatomy = anatomy_of(model)
    assert anatomy.params == tiny.unique_params(model)
    assert anatomy.bytes == sum(p.numel() * p.element_size() for p in model.parameters())


@pytest.mark.parametrize("name", EVERY)
def test_the_meta_device_tells_the_same_as_real_weights(name: str) -> None:
    assert tiny.anatomy(name) == anatomy_of(tiny.build(name))


@pytest.mark.parametrize("name", EVERY)
def test_every_linear_of_every_block_has_its_role(name: str) -> None:
    model = tiny.build(name)
    anatomy = anatomy_of(model)
    roles = ROLES.get(name, LLAMA_ROLES)
    assert anatomy.n_blocks == tiny.BLOCKS
    assert Counter((line.block, line.role) for line in anatomy.linears) == Counter(
        (block, role) for block in range(tiny.BLOCKS) for role in roles
    )
    inside = {
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and path.startswith(anatomy.layout.blocks)
    }
    assert {line.path for line in anatomy.linears} == inside
    for line in anatomy.linears:
        linear = model.get_submodule(line.path)
        assert isinstance(linear, nn.Linear)
        assert (line.out_features, line.in_features) == linear.weight.shape
        assert line.bias == (linear.bias is not None)
        assert not line.packed


@pytest.mark.parametrize("name", EVERY)
def test_the_layout_names_modules_that_exist(name: str) -> None:
    model = tiny.build(name)
    layout = layout_of(model.config)
    assert isinstance(model.get_submodule(layout.blocks), nn.ModuleList)
    assert model.get_submodule(layout.embedding) is model.get_input_embeddings()
    assert model.get_submodule(layout.head) is model.get_output_embeddings()
    block = model.get_submodule(f"{layout.blocks}.0")
    assert isinstance(block.get_submodule(layout.attention), nn.Module)
    for norm in layout.norms:
        assert "norm" in type(block.get_submodule(norm)).__name__.lower()
    if name != "opt-350m-like":  # post-norm: it has none
        assert "norm" in type(model.get_submodule(layout.final_norm)).__name__.lower()


@pytest.mark.parametrize("name", EVERY)
def test_the_decoder_share_counts_the_linears_and_nothing_else(name: str) -> None:
    model = tiny.build(name)
    anatomy = anatomy_of(model)
    assert anatomy.decoder_params == sum(
        parameter.numel()
        for line in anatomy.linears
        for parameter in model.get_submodule(line.path).parameters()
    )


@pytest.mark.parametrize(
    ("name", "heads", "key_value_heads", "head_dim"),
    [
        ("llama", 4, 2, 12),
        ("qwen2", 4, 2, 12),
        ("qwen3", 4, 2, 16),
        ("opt", 4, 4, 12),
        ("gpt-neox", 4, 4, 12),
    ],
)
def test_heads_and_key_value_heads_are_read_off_the_config(
    name: str, heads: int, key_value_heads: int, head_dim: int
) -> None:
    anatomy = tiny.anatomy(name)
    assert (anatomy.heads, anatomy.key_value_heads, anatomy.head_dim) == (heads, key_value_heads, head_dim)


@pytest.mark.parametrize("name", EVERY)
def test_embedding_and_head_are_counted_together_and_once_when_tied(name: str) -> None:
    model = tiny.build(name)
    anatomy = anatomy_of(model)
    table = model.get_input_embeddings().weight
    assert anatomy.tied == (model.get_output_embeddings().weight is table)
    assert anatomy.embedding_params == table.numel() * (1 if anatomy.tied else 2)
    assert (anatomy.vocab_size, anatomy.embedding_size) == table.shape


def test_an_unsupported_family_is_refused_by_name() -> None:
    with pytest.raises(InputError) as caught:
        layout_of(GPT2Config())
    assert "model family 'gpt2' is not supported" in str(caught.value)
    for family in LAYOUTS:
        assert family in str(caught.value)


def test_a_block_of_another_form_is_refused(llama: PreTrainedModel) -> None:
    del llama.model.layers[2].mlp.up_proj
    with pytest.raises(InputError, match=r"has no 'mlp\.up_proj' in block 2"):
        anatomy_of(llama)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", [*tiny.FAMILIES, "opt-350m-like"])
def test_a_plan_predicts_the_anatomy_of_the_compressed_model(name: str, recipe: str) -> None:
    model = tiny.build(name)
    plan = tiny.compress(model, recipe)
    assert by_path(plan.final) == by_path(anatomy_of(model))


@pytest.mark.parametrize("recipe", SLICED)
@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_a_plan_predicts_the_anatomy_of_a_sliced_model(name: str, recipe: str) -> None:
    model = tiny.build(name)
    plan = tiny.compress(model, recipe)
    assert by_path(plan.final) == by_path(anatomy_of(model))


@pytest.mark.parametrize("name", EVERY)
def test_branches_added_to_the_stream_make_the_block(name: str) -> None:
    """The layout's attention and MLP are those of the model's own block, where norms come first."""
    model = tiny.build(name)
    anatomy = anatomy_of(model)
    assert anatomy.pre_norm == (name != "opt-350m-like")
    if not anatomy.pre_norm:
        return
    block = next(stream(model, tiny.token_ids()))
    hidden, arguments = block.inputs[0], block.arguments[0]
    attended = anatomy.layout.attend(block.module, hidden, arguments)
    between = hidden if anatomy.parallel else hidden + attended
    found = hidden + attended + anatomy.layout.feed_forward(block.module, between)
    torch.testing.assert_close(found, block.module(hidden, **arguments))


@pytest.mark.parametrize("name", EVERY)
def test_the_kind_of_norm_is_read_off_the_model(name: str) -> None:
    norms = anatomy_of(tiny.on_meta(name)).norms
    layer_norm = name.startswith(("opt", "gpt"))
    assert (norms.centred, norms.bias) == (layer_norm, layer_norm)
    assert norms.eps == (1e-5 if layer_norm else 1e-6)


def test_what_the_head_reads_is_known_also_once_it_is_replaced() -> None:
    dense = tiny.anatomy("opt")
    assert (dense.embedding_size, dense.head_size, dense.head_bias, dense.tied) == (48, 48, False, True)
    plan = Recipe.parse("slicegpt(layout=official,width=30)").plan(dense, Budget(metric="none")).final
    assert (plan.embedding_size, plan.head_size, plan.head_bias, plan.tied) == (30, 48, True, False)
    packed = Recipe.parse("rtn-int4(embedding=4)").plan(dense, Budget(metric="none")).final
    assert (packed.embedding_size, packed.head_size, packed.tied) == (48, 48, True)


def test_factors_keep_the_role_and_block_of_the_linear_they_replace() -> None:
    dense = tiny.anatomy("llama")
    down = "model.layers.3.mlp.down_proj"
    spec = ModuleSpec(
        type="low_rank", arguments={"in_features": 112, "out_features": 48, "rank": 5, "bias": False}
    )
    after = dense.after(modules={down: spec})
    factors = [line for line in after.linears if line.path.startswith(down)]
    assert [(line.path, line.role, line.block) for line in factors] == [
        (f"{down}.first", "down", 3),
        (f"{down}.second", "down", 3),
    ]
    assert len(after.linears) == len(dense.linears) + 1
    assert after.params == dense.params - 112 * 48 + 5 * (112 + 48)


def test_a_plan_of_nothing_leaves_the_anatomy_as_it_is(family: str) -> None:
    assert tiny.anatomy(family).after() is tiny.anatomy(family)


def test_a_method_that_needs_dense_weights_is_told_when_they_are_packed(family: str) -> None:
    model = tiny.build(family)
    dense = anatomy_of(model)
    assert dense.dense_linears("svd") == dense.linears
    tiny.compress(model, "rtn-int8")
    with pytest.raises(InputError, match=r"Put the quantizer last: svd\+"):
        anatomy_of(model).dense_linears("svd")


def test_dropping_blocks_renumbers_the_rest(model: PreTrainedModel) -> None:
    blocks = model.get_submodule(layout_of(model.config).blocks)
    kept = [blocks[0], blocks[3]]
    drop_blocks(model, [2, 1])
    after = model.get_submodule(layout_of(model.config).blocks)
    assert list(after) == kept
    assert model.config.num_hidden_layers == 2
    numbers = [
        [module.layer_idx for module in block.modules() if hasattr(module, "layer_idx")] for block in after
    ]
    assert all(numbers)
    assert all(set(found) == {index} for index, found in enumerate(numbers))
    if getattr(model.config, "layer_types", None):
        assert len(model.config.layer_types) == 2


@pytest.mark.parametrize("drop", [{1}, {0}, {3}, {1, 2}, {0, 3}])
def test_dropping_blocks_equals_skipping_them(model: PreTrainedModel, drop: set[int]) -> None:
    with tiny.skipping(model, drop):
        skipped = tiny.logits_of(model)
    assert not torch.equal(skipped, tiny.logits_of(model))
    drop_blocks(model, sorted(drop))
    assert torch.equal(tiny.logits_of(model), skipped)


def test_dropping_no_block_leaves_the_logits_alone(model: PreTrainedModel) -> None:
    before = tiny.logits_of(model)
    drop_blocks(model, [])
    assert torch.equal(tiny.logits_of(model), before)


def test_generation_agrees_with_and_without_a_cache_once_blocks_are_gone(model: PreTrainedModel) -> None:
    drop_blocks(model, [0, 2])
    assert torch.equal(tiny.greedy(model, use_cache=True), tiny.greedy(model, use_cache=False))


def test_each_block_keeps_its_kind_of_attention_when_others_go() -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    model = tiny.build("qwen2", use_sliding_window=True, sliding_window=8, layer_types=kinds)
    drop_blocks(model, [0, 1])
    assert model.config.layer_types == kinds[2:]


@given(st.sets(st.integers(0, tiny.BLOCKS - 1), max_size=tiny.BLOCKS - 1))
def test_the_size_without_some_blocks_is_predicted(drop: set[int]) -> None:
    model = tiny.build("llama")
    replace(model, "model.layers.3.mlp.up_proj", LowRankLinear(48, 112, 3))  # the blocks differ
    predicted = anatomy_of(model).after(sorted(drop))
    drop_blocks(model, sorted(drop))
    assert by_path(predicted) == by_path(anatomy_of(model))


def test_a_restricted_view_offers_fewer_linears_and_the_same_sizes(family: str) -> None:
    anatomy = tiny.anatomy(family)
    chosen = anatomy.linears[2]
    view = anatomy.restricted({chosen.path})
    assert view.linears == (chosen,)
    assert (view.params, view.bytes, view.n_blocks) == (anatomy.params, anatomy.bytes, anatomy.n_blocks)
    plan = Recipe.parse("svd(share=0.5)").plan(view, Budget.parse("none")).stages[0]
    assert list(plan.modules) == [chosen.path]
    assert plan.apply(view).params == plan.apply(anatomy).params < anatomy.params
