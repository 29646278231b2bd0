"""Layers with 8-bit weights and 8-bit activations."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from suite.dynamic_layers import DynamicInt8Linear, OutlierInt8Linear
from suite.kernels import per_token
from suite.layers import ModuleSpec, spec_of
from suite.measure.ledger import ledger, total_disk, total_params
from suite.models.anatomy import _linears_of
from suite.run import audit

SEEDS = st.integers(0, 999)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear_of(in_features: int, out_features: int, bias: bool = True) -> nn.Linear:
    linear = nn.Linear(in_features, out_features, bias=bias)
    with torch.no_grad():
        for tensor in linear.parameters():
            tensor.copy_(random(*tensor.shape))
    return linear


@given(st.integers(1, 5), st.integers(1, 40), SEEDS, st.sampled_from([1e-30, 1e-3, 1.0, 1e4]))
def test_every_token_uses_the_whole_range_and_moves_by_at_most_half_a_step(
    tokens: int, features: int, seed: int, size: float
) -> None:
    x = size * random(tokens, features, seed=seed)
    codes, scales = per_token(x)
    assert codes.dtype == torch.int8
    assert (codes.abs().amax(1) == 127).all()
    assert ((codes.float() * scales - x).abs() <= 0.5001 * scales).all()


def test_a_token_of_zeros_stays_zero() -> None:
    codes, scales = per_token(torch.zeros(2, 3))
    assert (codes == 0).all()
    assert torch.isfinite(scales).all()


@given(st.integers(1, 40), st.integers(1, 20), st.booleans(), SEEDS)
def test_the_product_is_that_of_rounded_activations_and_rounded_weights(
    in_features: int, out_features: int, bias: bool, seed: int
) -> None:
    linear = linear_of(in_features, out_features, bias)
    layer = DynamicInt8Linear.holding(linear)
    x = random(2, 3, in_features, seed=seed)
    codes, scales = per_token(x.reshape(-1, in_features))
    rounded = (codes.double() * scales.double()) @ layer.dequantize(torch.float64).t()
    expected = rounded if linear.bias is None else rounded + linear.bias.double()
    torch.testing.assert_close(layer(x).double().reshape(6, -1), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layer", [DynamicInt8Linear, OutlierInt8Linear])
def test_a_token_gets_the_same_whatever_stands_beside_it(layer: type[DynamicInt8Linear]) -> None:
    module = layer.holding(linear_of(48, 20))
    x = random(1, 6, 48)
    x[:, 3, 5] = 40.0  # an outlier in one token only
    with torch.no_grad():
        together, alone = module(x), torch.cat([module(token) for token in x.split(1, 1)], 1)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-4)


def test_large_activations_are_spared_and_no_longer_set_the_scale_of_the_others() -> None:
    linear = linear_of(48, 20)
    x = random(4, 48)
    x[1, 7], x[2, 9] = 60.0, -80.0
    plain, mixed = DynamicInt8Linear.holding(linear), OutlierInt8Linear.holding(linear, threshold=6.0)
    weight = plain.dequantize(torch.float32)
    exact = x @ weight.t() + linear.bias
    errors = [(layer(x) - exact).norm(dim=1) for layer in (plain, mixed)]
    assert (errors[1][1:3] < 0.2 * errors[0][1:3]).all()
    assert torch.equal(errors[1][[0, 3]], errors[0][[0, 3]])  # tokens without outliers


def test_a_threshold_above_all_activations_changes_nothing_and_one_of_nearly_zero_leaves_floats() -> None:
    linear = linear_of(30, 10)
    x = random(4, 30)
    plain = DynamicInt8Linear.holding(linear)
    assert torch.equal(OutlierInt8Linear.holding(linear, threshold=100.0)(x), plain(x))
    everything = OutlierInt8Linear.holding(linear, threshold=1e-9)(x)
    torch.testing.assert_close(everything, x @ plain.dequantize(torch.float32).t() + linear.bias)


def test_gradients_are_those_of_the_product_with_dequantized_weights() -> None:
    layer = DynamicInt8Linear.holding(linear_of(21, 10))
    x, gradient = random(2, 3, 21).requires_grad_(), random(2, 3, 10, seed=1)
    layer(x).backward(gradient)
    torch.testing.assert_close(x.grad, gradient @ layer.dequantize(torch.float32))
    assert layer.bias is not None
    torch.testing.assert_close(layer.bias.grad, gradient.sum((0, 1)))
    with torch.no_grad():
        without = layer(x)
    torch.testing.assert_close(layer(x), without)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("layer", [DynamicInt8Linear, OutlierInt8Linear])
def test_another_precision_comes_out_as_it_went_in(
    layer: type[DynamicInt8Linear], dtype: torch.dtype
) -> None:
    module = layer.holding(linear_of(48, 20).to(dtype))
    x = (8 * random(3, 48)).to(dtype)
    got = module(x)
    assert got.dtype == dtype
    expected = x.float() @ module.dequantize(torch.float32).t()
    assert (got.float() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize(
    "module",
    [
        DynamicInt8Linear(20, 12, True),
        DynamicInt8Linear(20, 12),
        OutlierInt8Linear(20, 12, True, threshold=4.5),
    ],
    ids=str,
)
def test_a_spec_rebuilds_it_and_it_is_counted_as_packed_weights(module: DynamicInt8Linear) -> None:
    spec = spec_of(module)
    assert spec is not None
    rebuilt = ModuleSpec.model_validate_json(spec.model_dump_json()).build(torch.float32, "cpu")
    assert type(rebuilt) is type(module)
    assert spec_of(rebuilt) == spec
    biases = 12 if module.bias is not None else 0
    entries = ledger(rebuilt)
    assert total_params(entries) == 20 * 12 + biases
    assert total_disk(entries) == 20 * 12 + 2 * 12 + 4 * biases
    assert [line.packed for line in _linears_of(rebuilt)] == [True]
    audit.counted_honestly(rebuilt, torch.float32)
