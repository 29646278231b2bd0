"""The truncated singular value decomposition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from suite.linalg import truncated_svd

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
