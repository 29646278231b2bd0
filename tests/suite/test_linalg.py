"""Factorisations: the truncated singular value decomposition, and factors of damped inverses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from suite.linalg import inverse_factor, truncated_svd

SIDES = st.integers(1, 14)


def random_matrix(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(SIDES, SIDES, st.integers(0, 99))
def test_full_rank_reproduces_the_weight(rows: int, columns: int, seed: int) -> None:
    weight = random_matrix(rows, columns, seed)
    left, right = truncated_svd(weight, min(rows, columns))
    assert (left @ right - weight).abs().max() < 1e-9


@given(SIDES, SIDES, st.integers(0, 99))
def test_the_error_is_what_the_discarded_singular_values_hold(rows: int, columns: int, seed: int) -> None:
    weight = random_matrix(rows, columns, seed)
    values = torch.linalg.svdvals(weight)
    last = float("inf")
    for rank in range(1, min(rows, columns) + 1):
        left, right = truncated_svd(weight, rank)
        assert left.shape == (rows, rank)
        assert right.shape == (rank, columns)
        error = float((left @ right - weight).square().sum())
        assert error == pytest.approx(float(values[rank:].square().sum()), abs=1e-10)
        assert error <= last + 1e-12
        last = error


@given(SIDES, SIDES, st.integers(0, 99))
def test_both_factors_carry_the_same_share_of_the_singular_values(rows: int, columns: int, seed: int) -> None:
    weight = random_matrix(rows, columns, seed)
    rank = (min(rows, columns) + 1) // 2
    left, right = truncated_svd(weight, rank)
    roots = torch.linalg.svdvals(weight)[:rank].sqrt()
    torch.testing.assert_close(left.norm(dim=0), roots)
    torch.testing.assert_close(right.norm(dim=1), roots)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (1, 5)])
def test_a_matrix_of_zeros_has_finite_factors(shape: tuple[int, int], dtype: torch.dtype) -> None:
    left, right = truncated_svd(torch.zeros(shape, dtype=dtype), 1)
    for factor in (left.to(dtype), right.to(dtype)):
        assert factor.isfinite().all()
    assert (left @ right).abs().max() == 0


@given(st.integers(2, 12), st.integers(2, 12), st.integers(0, 99), st.sampled_from([1e-20, 1.0, 1e12]))
def test_a_rank_deficient_matrix_is_reproduced_with_finite_factors(
    rows: int, columns: int, seed: int, scale: float
) -> None:
    weight = scale * random_matrix(rows, 1, seed) @ random_matrix(1, columns, seed + 1)
    left, right = truncated_svd(weight, min(rows, columns))
    assert left.isfinite().all()
    assert right.isfinite().all()
    assert (left @ right - weight).norm() <= 1e-7 * weight.norm()


def test_the_weight_itself_is_left_alone() -> None:
    weight = torch.nn.Parameter(random_matrix(5, 4, 0))
    before = weight.detach().clone()
    left, _ = truncated_svd(weight, 2)
    assert torch.equal(weight, before)
    assert not left.requires_grad


def random_moment(n: int, seed: int) -> torch.Tensor:
    inputs = random_matrix(3 * n, n, seed)
    return inputs.T @ inputs


def test_the_factor_is_that_of_the_damped_inverse() -> None:
    moment = random_moment(12, 2)
    factor, raised = inverse_factor(moment, 0.01)
    damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(12)
    assert factor is not None
    assert raised == 0
    assert torch.equal(factor, factor.triu())
    assert torch.allclose(factor.T @ factor @ damped, torch.eye(12).double(), atol=1e-9)


def test_damping_is_raised_where_the_moment_is_not_positive() -> None:
    moment = random_moment(12, 3)
    values, vectors = torch.linalg.eigh(moment)
    values[0] = -0.05 * moment.diagonal().mean()
    factor, raised = inverse_factor(vectors @ values.diag() @ vectors.T, 0.01)
    assert factor is not None
    assert raised == 1


def test_columns_without_input_count_as_average_ones() -> None:
    moment = random_moment(6, 4)
    moment[2], moment[:, 2] = 0, 0
    factor, _ = inverse_factor(moment, 0.01)
    assert factor is not None
    live = moment.diagonal()[moment.diagonal() != 0].mean()
    assert float((factor.T @ factor)[2, 2]) == pytest.approx(1 / (1.01 * float(live)))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -1e9])
def test_a_moment_that_no_damping_mends_has_no_factor(value: float) -> None:
    moment = random_moment(4, 5)
    moment[0, 0] = value
    assert inverse_factor(moment, 0.01) == (None, 2)
