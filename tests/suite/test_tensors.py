"""Tensor networks are exact at full bonds, lose what they discard, and change gauge freely."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from suite.tensors import Mpo, Network, Tucker, on_both_sides

NETWORKS = [
    Mpo((6, 4), (4, 9)),
    Mpo((12, 2), (3, 12)),
    Mpo((2, 3, 4), (6, 3, 2)),
    Mpo((4, 2, 3), (2, 6, 3)),
    Tucker((6, 4), (4, 9)),
]
THREE_SITES = Mpo((2, 3, 4), (4, 3, 2))


def random_matrix(network: Network, seed: int = 0) -> Tensor:
    return torch.randn(network.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def half(network: Network) -> tuple[int, ...]:
    return tuple(max(1, bond // 2) for bond in network.full_bonds)


def error(network: Network, matrix: Tensor, bonds: tuple[int, ...]) -> float:
    return float((network.contract(network.decompose(matrix, bonds)) - matrix).square().sum())


@pytest.mark.parametrize("network", NETWORKS)
def test_full_bonds_are_exact(network: Network) -> None:
    matrix = random_matrix(network)
    cores = network.decompose(matrix, network.full_bonds)
    assert float((network.contract(cores) - matrix).abs().max()) <= 1e-12


@pytest.mark.parametrize("network", NETWORKS)
def test_a_fuller_bond_would_not_be_any_larger(network: Network) -> None:
    matrix = random_matrix(network)
    for bond, size in enumerate(network.full_bonds):
        assert len(network.spectrum(matrix, bond)) == size
        assert float(network.spectrum(matrix, bond)[-1]) > 0


@pytest.mark.parametrize("network", [n for n in NETWORKS if isinstance(n, Mpo)])
def test_the_error_of_sequential_truncation_is_what_each_step_discards(network: Mpo) -> None:
    matrix, bonds = random_matrix(network), half(network)
    # Repeats the sweep with its own SVDs, and adds up what they throw away.
    discarded, left = 0.0, 1
    rest = network.unfolding(matrix, 0)
    for k, bond in enumerate(bonds):
        _, values, v = torch.linalg.svd(
            rest.reshape(left * network.rows[k] * network.columns[k], -1), full_matrices=False
        )
        discarded += float(values[bond:].square().sum())
        rest, left = values[:bond, None] * v[:bond], bond
    assert error(network, matrix, bonds) == pytest.approx(discarded, rel=1e-10)


@given(st.integers(0, 1000), st.integers(1, 8), st.integers(1, 8))
def test_the_error_is_at_most_the_tails_of_the_unfoldings_together(
    seed: int, first: int, second: int
) -> None:
    matrix = random_matrix(THREE_SITES, seed)
    tails = sum(
        float(THREE_SITES.spectrum(matrix, bond)[kept:].sum()) for bond, kept in enumerate((first, second))
    )
    assert error(THREE_SITES, matrix, (first, second)) <= tails * (1 + 1e-9) + 1e-20


@given(st.integers(0, 1000), st.integers(1, 7))
def test_the_error_never_grows_with_the_bond(seed: int, bond: int) -> None:
    matrix = random_matrix(THREE_SITES, seed)
    assert error(THREE_SITES, matrix, (bond + 1,) * 2) <= error(THREE_SITES, matrix, (bond,) * 2) + 1e-9


@pytest.mark.parametrize("network", NETWORKS)
def test_tucker_and_mpo_lose_at_most_the_tails(network: Network) -> None:
    matrix, bonds = random_matrix(network), half(network)
    tails = sum(float(network.spectrum(matrix, k)[bond:].sum()) for k, bond in enumerate(bonds))
    assert error(network, matrix, bonds) <= tails * (1 + 1e-9) + 1e-20


@pytest.mark.parametrize("network", NETWORKS)
def test_parameters_are_the_numbers_in_the_cores(network: Network) -> None:
    cores = network.decompose(random_matrix(network), half(network))
    assert network.parameters(half(network)) == sum(core.numel() for core in cores)
    assert network.core_shapes(half(network)) == tuple(tuple(core.shape) for core in cores)


@pytest.mark.parametrize("bond", [1, 10, 36])
def test_the_papers_example_has_the_papers_count(bond: int) -> None:
    assert Mpo((6, 6, 6), (6, 6, 6)).parameters((bond, bond)) == 72 * bond + 36 * bond**2


@pytest.mark.parametrize(
    ("rows", "columns", "full", "count"),
    [
        ((8, 8, 9), (8, 8, 9), (64, 81), 342_433),
        ((4, 6, 8), (9, 8, 8), (36, 64), 115_984),
        ((16, 12, 8), (8, 8, 9), (128, 72), 906_304),
        ((8, 8, 9), (16, 12, 8), (128, 72), 906_304),
        ((24, 24), (24, 24), (576,), 663_552),
    ],
)
def test_counts_are_those_of_the_card(
    rows: tuple[int, ...], columns: tuple[int, ...], full: tuple[int, ...], count: int
) -> None:
    network = Mpo(rows, columns)
    assert network.full_bonds == full
    assert network.parameters(full) == count


def test_tucker_counts_core_and_factors() -> None:
    ranks, sides = (2, 3, 4, 5), (6, 4, 4, 9)
    expected = math.prod(ranks) + sum(r * d for r, d in zip(ranks, sides, strict=True))
    assert Tucker((6, 4), (4, 9)).parameters(ranks) == expected


def test_one_sided_sites_are_the_truncated_svd() -> None:
    network = Mpo((24, 1), (1, 36))
    matrix = random_matrix(network)
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    best = u[:, :7] * values[:7] @ v[:7]
    torch.testing.assert_close(network.contract(network.decompose(matrix, (7,))), best, rtol=0, atol=1e-12)
    assert network.parameters((7,)) == 7 * (24 + 36)


@pytest.mark.parametrize("network", NETWORKS)
def test_gauges_change_the_cores_and_not_the_matrix(network: Network) -> None:
    cores = network.decompose(random_matrix(network), half(network))
    matrix = network.contract(cores)
    prepared, links = network.preconditioned(cores)
    torch.testing.assert_close(network.contract(network.linked(prepared, links)), matrix, rtol=0, atol=1e-12)
    torch.testing.assert_close(network.contract(network.balanced(cores)), matrix, rtol=0, atol=1e-12)


@pytest.mark.parametrize("network", NETWORKS)
def test_balanced_cores_have_one_norm(network: Network) -> None:
    cores = network.decompose(random_matrix(network), half(network))
    lopsided = [cores[0] * 1e3, *(core / 1e3 ** (1 / (len(cores) - 1)) for core in cores[1:])]
    norms = [float(core.norm()) for core in network.balanced(lopsided)]
    assert max(norms) <= min(norms) * (1 + 1e-9)


@pytest.mark.parametrize("network", NETWORKS)
def test_a_change_of_a_preconditioned_core_changes_the_matrix_as_much(network: Network) -> None:
    cores, links = network.preconditioned(network.decompose(random_matrix(network), half(network)))
    matrix = network.contract(network.linked(cores, links))
    for k, core in enumerate(cores):
        change = random_matrix(Mpo((core.numel(), 1), (1, 1)), k).reshape(core.shape)
        changed = [*cores[:k], core + change, *cores[k + 1 :]]
        moved = network.contract(network.linked(changed, links)) - matrix
        assert float(moved.norm()) == pytest.approx(float(change.norm()), rel=1e-9)


@pytest.mark.parametrize("network", NETWORKS)
def test_a_matrix_without_full_rank_is_no_trouble(network: Network) -> None:
    for matrix in (torch.zeros(network.shape, dtype=torch.float64), random_matrix(network)):
        matrix[:, 1:] = 0
        cores = network.decompose(matrix, half(network))
        before = network.contract(cores)
        prepared, links = network.preconditioned(cores)
        for same in (network.linked(prepared, links), network.balanced(cores)):
            torch.testing.assert_close(network.contract(same), before, rtol=0, atol=1e-10)


@pytest.mark.parametrize("network", NETWORKS)
def test_matrices_on_the_legs_are_kronecker_products_on_the_sides(network: Network) -> None:
    cores = network.decompose(random_matrix(network), half(network))
    rows = [random_matrix(Mpo((f,), (f,)), f) for f in network.rows]
    columns = [random_matrix(Mpo((f,), (f,)), 50 + f) for f in network.columns]
    matrix = network.contract(cores)
    expected = functools.reduce(torch.kron, rows) @ matrix @ functools.reduce(torch.kron, columns).T
    torch.testing.assert_close(network.contract(network.on_legs(cores, rows, columns)), expected)
    torch.testing.assert_close(on_both_sides(matrix, network, rows, columns), expected)
