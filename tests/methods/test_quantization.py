"""Rounding to the nearest grid point."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from suite.conformance import tiny
from suite.layers import PackedEmbedding, PackedLinear, TiedHead
from suite.models.anatomy import anatomy_of
from suite.models.layouts import layout_of


def distance(family: str, recipe: str) -> float:
    """Relative distance of the logits from those of the dense model."""
    model = tiny.build(family)
    dense = tiny.logits_of(model)
    tiny.compress(model, recipe)
    return float((tiny.logits_of(model) - dense).norm() / dense.norm())


def test_eight_bits_stay_close_to_the_dense_model_and_four_do_worse(family: str) -> None:
    eight, four = distance(family, "rtn-int8"), distance(family, "rtn-int4")
    assert 0 < eight < 0.03
    assert 3 * eight < four < 0.6


def test_a_finer_group_brings_four_bits_closer(family: str) -> None:
    assert distance(family, "rtn-int4(group=8)") < distance(family, "rtn-int4(group=channel)")


def test_fewer_bits_in_the_embedding_cost_accuracy_and_save_bytes(family: str) -> None:
    recipes = [f"rtn-int8(embedding={bits})" for bits in (16, 8, 4)]
    distances = [distance(family, recipe) for recipe in recipes]
    assert distances[0] <= distances[1] < distances[2]
    sizes = []
    for recipe in recipes:
        model = tiny.build(family)
        tiny.compress(model, recipe)
        sizes.append(anatomy_of(model).bytes)
    assert sizes[0] > sizes[1] > sizes[2]


@pytest.mark.parametrize("recipe", ["rtn-int8", "rtn-int4(symmetric=false, group=20)"])
def test_every_weight_lands_on_the_nearest_point_of_its_grid(family: str, recipe: str) -> None:
    dense, model = tiny.build(family), tiny.build(family)
    tiny.compress(model, recipe)
    for line in anatomy_of(dense).linears:
        packed, linear = model.get_submodule(line.path), dense.get_submodule(line.path)
        assert isinstance(packed, PackedLinear)
        assert isinstance(linear, nn.Linear)
        step = packed.scales.float().repeat_interleave(packed.group, 1)[:, : packed.columns]
        error = (packed.dequantize(torch.float32) - linear.weight).abs()
        assert (error <= 1.02 * step).all()
        assert (error <= 0.5001 * step).float().mean() > 0.97  # the ends of the grid clip
        assert (packed.bias is None) == (linear.bias is None)
        if packed.bias is not None:
            assert torch.equal(packed.bias, linear.bias)


def test_only_the_linears_of_the_decoder_change_unless_asked(model: PreTrainedModel) -> None:
    linears = {line.path for line in anatomy_of(model).linears}
    before = {
        name: tensor.clone()
        for name, tensor in model.state_dict().items()
        if name.rpartition(".")[0] not in linears
    }
    tiny.compress(model, "rtn-int4")
    packed = {path for path, module in model.named_modules() if isinstance(module, PackedLinear)}
    assert packed == linears
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_untied_embedding_and_head_are_packed_one_by_one() -> None:
    for family in ("llama-untied", "gpt-neox"):
        model = tiny.build(family)
        tiny.compress(model, "rtn-int8(embedding=4)")
        layout = layout_of(model.config)
        table, head = model.get_submodule(layout.embedding), model.get_submodule(layout.head)
        assert isinstance(table, PackedEmbedding)
        assert isinstance(head, PackedLinear)
        assert (table.bits, head.bits) == (4, 4)
        assert not torch.equal(table.packed, head.packed)


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt"])
def test_a_tied_head_reads_the_packed_embedding(family: str) -> None:
    model = tiny.build(family)
    tiny.compress(model, "rtn-int8(embedding=8)")
    layout = layout_of(model.config)
    table, head = model.get_submodule(layout.embedding), model.get_submodule(layout.head)
    assert isinstance(table, PackedEmbedding)
    assert isinstance(head, TiedHead)
    x = torch.randn(2, 48)
    assert torch.equal(head(x), x @ table.dequantize(torch.float32).T)


def test_a_group_wider_than_a_row_is_the_whole_row(llama: PreTrainedModel) -> None:
    plan = tiny.compress(llama, "rtn-int4(group=1000)").stages[0]
    other = tiny.compress(tiny.build("llama"), "rtn-int4(group=channel)").stages[0]
    assert plan.modules == other.modules


def test_a_quantized_model_quantized_from_its_own_weights_is_itself(llama: PreTrainedModel) -> None:
    again = tiny.build("llama")
    tiny.compress(llama, "rtn-int4")
    with torch.no_grad():
        for line in anatomy_of(again).linears:
            packed = llama.get_submodule(line.path)
            assert isinstance(packed, PackedLinear)
            again.get_submodule(line.path).weight.copy_(packed.dequantize(torch.float32))
    tiny.compress(again, "rtn-int4")
    assert torch.equal(tiny.logits_of(again), tiny.logits_of(llama))


def test_factors_are_packed_each_on_its_own_grid(llama: PreTrainedModel) -> None:
    tiny.compress(llama, "svd(share=0.5)")
    dense = tiny.logits_of(llama)
    tiny.compress(llama, "rtn-int8")
    down = llama.get_submodule("model.layers.0.mlp.down_proj")
    assert isinstance(down.first, PackedLinear)
    assert isinstance(down.second, PackedLinear)
    assert float((tiny.logits_of(llama) - dense).norm() / dense.norm()) < 0.03


@pytest.mark.parametrize("recipe", ["rtn-int8", "rtn-int4(embedding=4)"])
def test_half_precision_models_can_be_quantized(family: str, recipe: str) -> None:
    model = tiny.build(family, torch.bfloat16)
    tiny.compress(model, recipe)
    logits = tiny.logits_of(model)
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()
