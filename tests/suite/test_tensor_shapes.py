"""Factors are balanced, ladders climb, and what does not pay stays dense."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from suite.tensor_shapes import Form, Pairing, ladder, ladder_on_loss, network_of
from suite.tensors import Mpo

SIDES = st.integers(1, 200)


@given(SIDES, SIDES, st.sampled_from([2, 3]), st.sampled_from(["crossed", "square"]))
def test_factors_multiply_to_the_sides(m: int, n: int, sites: int, pairing: Pairing) -> None:
    network = network_of(m, n, "mpo", sites, pairing)
    assert network.shape == (m, n)
    assert len(network.rows) == len(network.columns) == sites


@pytest.mark.parametrize("pairing", ["crossed", "square"])
@pytest.mark.parametrize("sites", [2, 3])
@pytest.mark.parametrize(
    ("m", "n"), [(576, 576), (192, 576), (1536, 576), (576, 1536), (4096, 4096), (8192, 8192), (14336, 4096)]
)
def test_sites_are_of_one_size_and_genuine(m: int, n: int, sites: int, pairing: Pairing) -> None:
    network = network_of(m, n, "mpo", sites, pairing)
    sizes = [a * b for a, b in zip(network.rows, network.columns, strict=True)]
    assert max(sizes) <= 2 * min(sizes)
    assert min(*network.rows, *network.columns) > 1


def test_square_and_crossed_pairings_are_what_they_say() -> None:
    assert network_of(576, 576, "mpo", 2, "square") == Mpo((24, 24), (24, 24))
    assert network_of(576, 576, "mpo", 2, "crossed") == Mpo((288, 2), (2, 288))


def test_a_prime_side_is_left_whole() -> None:
    network = network_of(43, 64, "mpo", 2, "crossed")
    assert sorted(network.rows) == [1, 43]


@pytest.mark.parametrize("form", ["mpo", "tucker"])
@pytest.mark.parametrize("overhead", [0, 36])
def test_rungs_climb_to_just_below_the_dense_size(form: Form, overhead: int) -> None:
    network = network_of(24, 36, form, 2, "square")
    rungs = ladder(network, overhead)
    sizes = [rung.parameters for rung in rungs]
    assert sizes == sorted(set(sizes))
    assert sizes[-1] < 24 * 36
    assert rungs[0].bonds == (1,) * len(network.full_bonds)
    assert all(rung.parameters == network.parameters(rung.bonds) + overhead for rung in rungs)


def test_no_rung_where_no_network_is_smaller() -> None:
    assert ladder(network_of(2, 2, "mpo", 2, "square"), 0) == ()


@pytest.mark.parametrize("sites", [2, 3])
def test_three_sites_share_their_bonds_evenly(sites: int) -> None:
    network = network_of(96, 96, "mpo", sites, "square")
    for rung in ladder(network)[20:]:
        shares = [bond / full for bond, full in zip(rung.bonds, network.full_bonds, strict=True)]
        assert max(shares) - min(shares) <= 1.5 / min(network.full_bonds)


@given(st.integers(0, 100))
def test_on_loss_each_rung_costs_more_and_loses_less(seed: int) -> None:
    network = network_of(24, 36, "mpo", 3, "square")
    matrix = torch.randn(24, 36, generator=torch.Generator().manual_seed(seed)).double()
    spectra = [network.spectrum(matrix, bond) for bond in range(2)]
    rungs = ladder_on_loss(network, spectra)
    assert [rung.parameters for rung in rungs] == sorted(rung.parameters for rung in rungs)
    assert [rung.loss for rung in rungs] == sorted((rung.loss for rung in rungs), reverse=True)
    for rung in rungs:
        error = (network.contract(network.decompose(matrix, rung.bonds)) - matrix).square().sum()
        assert float(error) <= rung.loss * (1 + 1e-9) + 1e-9


def test_on_loss_a_bond_that_carries_nothing_is_closed_first() -> None:
    network = Mpo((4, 4, 4), (4, 4, 4))
    spectra = [torch.ones(16).double(), torch.zeros(16).double()]
    assert all(rung.bonds[1] == 1 for rung in ladder_on_loss(network, spectra) if rung.bonds[0] < 16)


def test_a_ladder_is_quick_for_the_largest_models() -> None:
    assert len(ladder(network_of(28672, 8192, "mpo", 3, "square"))) > 100
    assert math.isnan(ladder(network_of(28672, 8192, "mpo", 3, "square"))[0].loss)
