"""A fitted network counts errors as it is told to, and refining it never makes it worse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from suite.tensor_fit import Coordinates, Fit, Importance, Weighting, fit
from suite.tensors import Mpo, Network, Tucker

NETWORKS = [Mpo((12, 2), (3, 12)), Mpo((6, 4), (4, 9)), Mpo((2, 3, 4), (6, 3, 2)), Tucker((6, 4), (4, 9))]
WEIGHTINGS: list[Weighting] = ["none", "diagonal", "kronecker"]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def moment(size: int, seed: int) -> Tensor:
    """A second moment with a steep spectrum, as activations have."""
    samples = normal(200, size, seed=seed) * torch.logspace(0, -2, size, dtype=torch.float64)
    mixed = samples @ normal(size, size, seed=seed + 1)
    return mixed.T @ mixed + 1e-3 * torch.eye(size, dtype=torch.float64)


WEIGHT = normal(24, 36)
INPUTS_ONLY = Importance(moment(36, 1))
BOTH = Importance(moment(36, 1), moment(24, 5))


def bonds_of(network: Network) -> tuple[int, ...]:
    return tuple(max(1, bond // 2) for bond in network.full_bonds)


def matrix_of(network: Network, found: Fit) -> Tensor:
    matrix = network.contract(found.cores)
    return matrix if found.scale is None else matrix * found.scale


def loss_of(network: Network, found: Fit, importance: Importance) -> float:
    error = WEIGHT - matrix_of(network, found)
    outputs = torch.eye(24, dtype=torch.float64) if importance.outputs is None else importance.outputs
    size = torch.trace(outputs @ WEIGHT @ importance.inputs @ WEIGHT.T)
    return float(torch.trace(outputs @ error @ importance.inputs @ error.T) / size)


@pytest.mark.parametrize("importance", [INPUTS_ONLY, BOTH])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("network", NETWORKS)
def test_refining_only_ever_helps(network: Network, weighting: Weighting, importance: Importance) -> None:
    bonds = bonds_of(network)
    plain = fit(WEIGHT, network, bonds, importance, "none", 0)
    start = fit(WEIGHT, network, bonds, importance, weighting, 0)
    refined = fit(WEIGHT, network, bonds, importance, weighting, 25)
    losses = [loss_of(network, found, importance) for found in (refined, start, plain)]
    assert losses == sorted(losses)
    assert losses[0] < 0.8 * losses[2]
    assert refined.losses == sorted(refined.losses, reverse=True)
    assert refined.losses[-1] == pytest.approx(losses[0], rel=1e-6)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("network", NETWORKS)
def test_full_bonds_are_exact_in_any_coordinates(network: Network, weighting: Weighting) -> None:
    found = fit(WEIGHT, network, network.full_bonds, BOTH, weighting, 0)
    torch.testing.assert_close(matrix_of(network, found), WEIGHT, rtol=0, atol=1e-10)
    assert found.losses[0] < 1e-12


@pytest.mark.parametrize("network", NETWORKS)
def test_for_moments_that_are_kronecker_products_the_coordinates_whiten(network: Network) -> None:
    inputs = torch.ones(1, 1, dtype=torch.float64)
    for seed, factor in enumerate(network.columns):
        inputs = torch.kron(inputs, moment(factor, 10 * seed))
    importance = Importance(inputs)
    local = Coordinates.chosen(network, "kronecker", importance).importance(importance, network).inputs
    white = local / local.diagonal().mean()
    before = inputs / inputs.diagonal().mean()
    identity = torch.eye(36, dtype=torch.float64)
    assert float((white - identity).norm()) < 0.5 * float((before - identity).norm())


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("network", NETWORKS)
def test_coordinates_count_errors_alike(network: Network, weighting: Weighting) -> None:
    coordinates, error = Coordinates.chosen(network, weighting, BOTH), normal(24, 36, seed=9)
    there = coordinates.importance(BOTH, network).of(coordinates.apply(error, network))
    assert float(there) == pytest.approx(float(BOTH.of(error)), rel=1e-9)
    back = coordinates.inverse().apply(coordinates.apply(error, network), network)
    torch.testing.assert_close(back, error)


def test_one_sided_sites_reach_the_weighted_optimum() -> None:
    """The best rank-r approximation in the weighted norm is known in closed form."""
    network, rank = Mpo((24, 1), (1, 36)), 6
    values, vectors = torch.linalg.eigh(INPUTS_ONLY.inputs)
    white = torch.linalg.svdvals(WEIGHT @ (vectors * values.sqrt()))
    optimum = float(white[rank:].square().sum() / white.square().sum())
    assert fit(WEIGHT, network, (rank,), INPUTS_ONLY, "kronecker", 200).losses[-1] <= 1.02 * optimum


def test_inputs_that_are_all_zero_count_nothing() -> None:
    nothing = Importance(torch.zeros(36, 36, dtype=torch.float64))
    for weighting in WEIGHTINGS:
        found = fit(WEIGHT, NETWORKS[0], (5,), nothing, weighting, 5)
        assert all(bool(core.isfinite().all()) for core in found.cores)
        assert found.losses == [0.0]


@pytest.mark.parametrize("importance", [INPUTS_ONLY, BOTH])
def test_the_gradient_of_what_counts_is_its_derivative(importance: Importance) -> None:
    error = normal(24, 36, seed=3).requires_grad_(True)
    assert torch.autograd.gradcheck(importance.of, error)
