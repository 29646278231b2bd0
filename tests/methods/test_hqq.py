"""Zero points that leave few large errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from methods.hqq import HqqInt4, codes_by, half_quadratic
from suite.conformance import tiny
from suite.grids import codes_on, grouped, range_grid, values_of
from suite.models.anatomy import anatomy_of
from suite.packed_layers import PackedLinear, PackedMatrix


@given(st.sampled_from([2, 3, 4, 8]), st.integers(1, 40), st.integers(1, 48), st.integers(0, 999))
def test_the_mean_error_of_every_group_is_at_most_that_of_rounding(
    bits: int, columns: int, group: int, seed: int
) -> None:
    weight = torch.randn(4, columns, generator=torch.Generator().manual_seed(seed))
    blocks, filled = grouped(weight, group), grouped(torch.ones(1, columns), group)
    scales, zeros = half_quadratic(blocks, filled, bits)
    assert torch.equal(zeros, zeros.half().float())
    error = (blocks - values_of(codes_by(blocks, scales, zeros, bits), scales, zeros)) * filled
    plain = range_grid(blocks, bits, symmetric=False)
    rounded = (blocks - values_of(codes_on(blocks, *plain, bits), *plain)) * filled
    assert (error.abs().sum(-1) <= rounded.abs().sum(-1) + 1e-5).all()


def test_the_zeros_it_finds_lower_the_error_of_random_weights() -> None:
    blocks = grouped(torch.randn(64, 128, generator=torch.Generator().manual_seed(0)), 64)
    found = half_quadratic(blocks, torch.ones(1, 2, 64), 4)
    plain = range_grid(blocks, 4, symmetric=False)
    error = (blocks - values_of(codes_by(blocks, *found, 4), *found)).abs().mean()
    rounded = (blocks - values_of(codes_on(blocks, *plain, 4), *plain)).abs().mean()
    assert error < 0.995 * rounded


@pytest.mark.parametrize("recipe", ["hqq-int4(group=20)", "hqq-int3(group=16,embedding=8)"])
def test_the_model_holds_the_zeros_as_float16_and_stays_near(family: str, recipe: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny.build(family, dtype)
        dense = tiny.logits_of(model).float()
        tiny.compress(model, recipe)
        distance = (tiny.logits_of(model).float() - dense).norm() / dense.norm()
        assert 0 < distance < 0.6
        for line in anatomy_of(model).linears:
            packed = model.get_submodule(line.path)
            assert isinstance(packed, PackedLinear)
            assert packed.zeros.dtype == torch.float16


@pytest.mark.parametrize("columns", [64, 70])
def test_rows_are_solved_by_themselves(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(5, columns, generator=torch.Generator().manual_seed(0))
    packed = []
    for at_once in (1 << 18, 2 * columns, 1):
        monkeypatch.setattr("methods.hqq.WEIGHTS_AT_ONCE", at_once)
        matrix = PackedMatrix(5, columns, 4, 32, symmetric=False, grid="float-zero")
        HqqInt4(HqqInt4.Config()).pack(matrix, weight)
        packed.append(matrix.state_dict())
    for other in packed[1:]:
        assert all(torch.equal(other[name], packed[0][name]) for name in packed[0])
