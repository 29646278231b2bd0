"""Rounding to the nearest grid point, and what all quantizers share."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from methods.quantization import steps
from suite.conformance import tiny
from suite.errors import InputError
from suite.layers import ModuleSpec
from suite.measure.ledger import ledger, total_disk
from suite.method import Plan
from suite.models.anatomy import anatomy_of
from suite.models.layouts import LLAMA_LIKE, layout_of
from suite.packed_layers import PackedEmbedding, PackedLinear, TiedHead
from suite.packing import unpack
from suite.recipe import Recipe
from suite.specs import Budget


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


@pytest.mark.parametrize("bits", [3, 4])
def test_a_whole_grid_reaches_its_last_negative_point_and_a_searched_one_errs_least(bits: int) -> None:
    dense = tiny.build("llama")
    path = anatomy_of(dense).linears[0].path
    weight = dense.get_submodule(path).weight.detach()
    errors = {}
    for scale in ("largest", "whole", "searched"):
        model = tiny.build("llama")
        tiny.compress(model, f"rtn-int{bits}(group=8,scale={scale})")
        packed = model.get_submodule(path)
        assert isinstance(packed, PackedLinear)
        errors[scale] = (
            (packed.dequantize(torch.float32) - weight).square().reshape(len(weight), -1, 8).sum(-1)
        )
        if scale == "whole":
            largest = weight.reshape(len(weight), -1, 8).abs().amax(-1)
            assert torch.allclose(packed.scales.float(), largest / (2 ** (bits - 1) - 0.5), rtol=1e-3)
            codes = unpack(packed.packed, bits, packed.columns).float() - 2 ** (bits - 1)
            assert int(codes.min()) == -(2 ** (bits - 1))
            # compressed-tensors divides by the float32 scale, and so decides where the largest weights go.
            steps = weight.reshape(len(weight), -1, 8) / (largest / (2 ** (bits - 1) - 0.5)).unsqueeze(-1)
            theirs = steps.round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            assert torch.equal(codes, theirs.flatten(1))
    assert (errors["searched"] <= errors["largest"] * (1 + 1e-6)).all()
    assert errors["searched"].sum() < errors["whole"].sum()


def test_three_bits_use_the_whole_grid_and_asymmetric_ones_always_do() -> None:
    assert distance("llama", "rtn-int3") == distance("llama", "rtn-int3(scale=whole)")
    assert distance("llama", "rtn-int4") == distance("llama", "rtn-int4(scale=largest)")
    plain = distance("llama", "rtn-int3(symmetric=false,scale=largest)")
    assert distance("llama", "rtn-int3(symmetric=false,scale=whole)") == plain
    assert distance("llama", "rtn-int3(symmetric=false,scale=searched)") != plain


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


def planned(recipe: str, family: str = "llama") -> Plan:
    return Recipe.parse(recipe).plan(tiny.anatomy(family), Budget(metric="none")).stages[-1]


def test_three_bits_are_worse_than_four_and_smaller(family: str) -> None:
    assert distance(family, "rtn-int4") < distance(family, "rtn-int3") < 1
    three, four = (Recipe.parse(r).plan(tiny.anatomy(family), Budget(metric="none")).final.bytes
                   for r in ("rtn-int3", "rtn-int4"))  # fmt: skip
    assert three < four


@pytest.mark.parametrize(
    ("recipe", "bits"),
    [
        ("rtn-int4", 4 + 16 / 64),
        ("rtn-int4(symmetric=false)", 4 + (16 + 4) / 64),
        ("rtn-int3", 3 + 16 / 64),
        ("gptq-int4", 4 + 16 / 64),
        ("gptq-int3", 3 + 16 / 64),
        ("awq-int4", 4 + (16 + 4) / 64),
        ("nf4", 4 + 16 / 64),
        ("hqq-int4", 4 + (16 + 16) / 64),
        ("hqq-int3", 3 + (16 + 16) / 64),
        ("rtn-int8", 8 + 16 / 512),
        ("gptq-int8", 8 + 16 / 512),
    ],
)
def test_the_bits_of_a_weight_are_those_of_the_formula(recipe: str, bits: float) -> None:
    spec = Recipe.parse(recipe).stages[0]._linear(int(bits), 3, 512, False)
    assert total_disk(ledger(spec.build(torch.float32))) == 3 * 512 * bits / 8


def test_a_uniform_grid_is_planned_with_the_arguments_it_always_had() -> None:
    arguments = {"in_features": 48, "out_features": 48, "bits": 4, "group": 48, "symmetric": True}
    expected = ModuleSpec(type="packed_linear", arguments={**arguments, "bias": False})
    plan = planned("rtn-int4")
    assert plan.modules["model.layers.0.self_attn.q_proj"] == expected
    assert plan.knobs == {"group": 64, "symmetric": True, "embedding": 16}


@pytest.mark.parametrize("recipe", ["rtn-int4", "gptq-int4", "awq-int4", "nf4", "hqq-int4"])
def test_a_group_that_does_not_divide_a_row_leaves_a_shorter_one_and_the_plan_says_so(recipe: str) -> None:
    plan = planned(f"{recipe}(group=16)")
    assert not plan.notes  # 48 and 112 are multiples of 16
    plan = planned(f"{recipe}(group=32)")
    assert plan.notes == {"linears_with_a_shorter_last_group": 7 * tiny.BLOCKS}
    model = tiny.build("llama")
    done = tiny.compress(model, f"{recipe}(group=32)").stages[0]
    assert done.notes["linears_with_a_shorter_last_group"] == 7 * tiny.BLOCKS
    query = model.get_submodule("model.layers.0.self_attn.q_proj")
    assert isinstance(query, PackedLinear)
    assert query.scales.shape == (48, 2)


@pytest.mark.parametrize("recipe", ["nf4(symmetric=true)", "hqq-int4(symmetric=false)"])
def test_a_grid_without_a_choice_takes_no_symmetry(recipe: str) -> None:
    with pytest.raises(InputError, match="unknown field 'symmetric'"):
        Recipe.parse(recipe)


def test_steps_run_in_order_and_share_what_is_read(llama: PreTrainedModel) -> None:
    tiny.compress(llama, "svd(share=0.5)")
    block = llama.get_submodule("model.layers.0")
    paths = [p for p, module in block.named_modules() if isinstance(module, nn.Linear)]
    found = list(steps(LLAMA_LIKE, block, paths))
    attention = [f"self_attn.{name}_proj" for name in "qkv"]
    assert found[0] == tuple(f"{path}.first" for path in attention)
    assert found[1:4] == [(f"{path}.second",) for path in attention]
    assert found[-2:] == [("mlp.down_proj.first",), ("mlp.down_proj.second",)]
    assert sorted(path for step in found for path in step) == sorted(paths)
    dense = tiny.build("llama").get_submodule("model.layers.0")
    order = [list(group) for group in steps(LLAMA_LIKE, dense, list(LLAMA_LIKE.roles))]
    assert order == [attention, ["self_attn.o_proj"], ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]
