"""Folding norms and changing bases leaves what a linear computes alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from suite.models.folding import reading, scale_and_shift, times, writing

SIZE, WIDTH, OUT = 12, 7, 5
GENERATOR = torch.Generator().manual_seed(0)


def basis(width: int) -> Tensor:
    square = torch.randn(SIZE, SIZE, dtype=torch.float64, generator=GENERATOR)
    return torch.linalg.qr(square)[0][:, :width]


def linear(inputs: int, outputs: int, bias: bool) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=bias, dtype=torch.float64)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shifted", [True, False])
def test_a_reading_linear_takes_the_norm_and_the_rotation_in(bias: bool, shifted: bool) -> None:
    dense, turned = linear(SIZE, OUT, bias), basis(WIDTH)
    scale = torch.randn(SIZE, dtype=torch.float64, generator=GENERATOR)
    shift = torch.randn(SIZE, dtype=torch.float64, generator=GENERATOR) if shifted else None
    coordinates = torch.randn(4, WIDTH, dtype=torch.float64, generator=GENERATOR)
    normed = coordinates @ turned.T * scale + (0 if shift is None else shift)
    found = reading(dense, turned, scale, shift)
    assert ("bias" in found) == (bias or shifted)
    torch.testing.assert_close(coordinates @ found["weight"].T + found.get("bias", 0), dense(normed))


@pytest.mark.parametrize("bias", [True, False])
def test_a_writing_linear_writes_the_coordinates(bias: bool) -> None:
    dense, turned = linear(OUT, SIZE, bias), basis(WIDTH)
    x = torch.randn(4, OUT, dtype=torch.float64, generator=GENERATOR)
    found = writing(dense, turned)
    assert ("bias" in found) == bias
    torch.testing.assert_close(x @ found["weight"].T + found.get("bias", 0), dense(x) @ turned)


def test_a_product_is_rounded_once_from_double_precision() -> None:
    weight = torch.randn(20_000, SIZE, generator=GENERATOR).bfloat16()
    turned = basis(WIDTH)
    found = times(weight, turned)
    assert torch.equal(found, (weight.double() @ turned).bfloat16())


def test_a_norm_without_weights_scales_by_one() -> None:
    scale, shift = scale_and_shift(nn.LayerNorm(SIZE, elementwise_affine=False), SIZE)
    assert torch.equal(scale, torch.ones(SIZE, dtype=torch.float64))
    assert shift is None
    scale, shift = scale_and_shift(nn.LayerNorm(SIZE), SIZE)
    assert shift is not None
    assert scale.dtype == shift.dtype == torch.float64
