"""Weights on quantiles of the normal distribution."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from suite.conformance import tiny
from suite.models.anatomy import anatomy_of
from suite.packed_layers import PackedEmbedding, PackedLinear


def packed_of(linear: nn.Linear, group: int = 64) -> PackedLinear:
    packed = PackedLinear(linear.in_features, linear.out_features, 4, group, grid="normal-float")
    packed.quantize_(linear.weight)
    return packed


def test_zeros_and_the_largest_weights_stay_as_they_are() -> None:
    linear = nn.Linear(128, 6, bias=False)
    with torch.no_grad():
        linear.weight.copy_(linear.weight.bfloat16())
        linear.weight[:, ::3] = 0
    values = packed_of(linear).dequantize(torch.float32)
    assert (values[:, ::3] == 0).all()
    largest = linear.weight.abs().reshape(6, 2, 64).argmax(-1) + torch.tensor([0, 64])
    assert torch.equal(values.gather(1, largest), linear.weight.gather(1, largest))


def test_quantizing_its_own_values_changes_nothing() -> None:
    linear = nn.Linear(100, 6, bias=False)
    first = packed_of(linear)
    with torch.no_grad():
        linear.weight.copy_(first.dequantize(torch.float32))
    assert torch.equal(packed_of(linear).packed, first.packed)


def test_the_values_are_those_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    linear = nn.Linear(192, 16, bias=False)
    with torch.no_grad():
        linear.weight.copy_(linear.weight.bfloat16())
    quantized, state = functional.quantize_4bit(linear.weight.data, blocksize=64, quant_type="nf4")
    theirs = functional.dequantize_4bit(quantized, state)
    assert torch.allclose(packed_of(linear).dequantize(torch.float32), theirs, atol=1e-7)


def distance(family: str, recipe: str, dtype: torch.dtype = torch.float32) -> float:
    """Relative distance of the logits from the dense model's."""
    model = tiny.build(family, dtype)
    dense = tiny.logits_of(model).float()
    tiny.compress(model, recipe)
    return float((tiny.logits_of(model).float() - dense).norm() / dense.norm())


def test_it_is_nearer_to_the_dense_model_than_a_uniform_symmetric_grid(family: str) -> None:
    assert distance(family, "nf4") < distance(family, "rtn-int4")
    assert distance(family, "nf4", torch.bfloat16) < 0.5


def test_four_bit_embeddings_are_on_the_same_grid_and_eight_bit_ones_uniform() -> None:
    for bits, grid in ((4, "normal-float"), (8, "uniform")):
        model = tiny.build("llama-untied")
        tiny.compress(model, f"nf4(embedding={bits})")
        table, head = model.get_input_embeddings(), model.get_output_embeddings()
        assert isinstance(table, PackedEmbedding)
        assert isinstance(head, PackedLinear)
        assert (table.grid, head.grid) == (grid, grid)
        assert {model.get_submodule(line.path).grid for line in anatomy_of(model).linears} == {"normal-float"}
