"""Choosing the shapes of tensor networks: factors of a matrix's sides, and bonds by what they cost."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from suite.tensors import Mpo, Network, Tucker

Form = Literal["mpo", "tucker"]
Pairing = Literal["crossed", "square"]

_EVEN_ENOUGH = 1.35
"""Sites whose sizes differ by no more than this factor count as equal."""


@dataclass(frozen=True)
class Rung:
    """One choice of bonds with its parameters and, where a spectrum is known, its squared error."""

    parameters: int
    bonds: tuple[int, ...]
    loss: float = math.nan


@functools.lru_cache(maxsize=1024)
def network_of(rows: int, columns: int, form: Form, sites: int, pairing: Pairing) -> Network:
    """The network of a rows × columns matrix, its factors chosen for sites of equal size.

    Equal site sizes m_k·n_k give the largest and most finely graded bonds. Among those choices
    "square" takes the sites whose m_k : n_k is closest to m : n, as CompactifAI's example has it;
    "crossed" pairs large row factors with small column factors and the reverse. Factors of 1 are
    used only where a side has too few prime factors.
    """

    def unsuited(factors: tuple[tuple[int, ...], tuple[int, ...]]) -> tuple[float, ...]:
        sizes = [m * n for m, n in zip(*factors, strict=True)]
        spread = max(sizes) / min(sizes)
        skew = sum(
            abs(math.log(m / n) - math.log(rows / columns) / sites) for m, n in zip(*factors, strict=True)
        )
        ones = (*factors[0], *factors[1]).count(1)
        uneven = spread if spread > _EVEN_ENOUGH else 0.0
        # With everything else equal, the first site holds most rows.
        return ones, uneven, round(-skew if pairing == "crossed" else skew, 9), spread, -factors[0][0]

    best = min(itertools.product(_factorisations(rows, sites), _factorisations(columns, sites)), key=unsuited)
    return (Tucker if form == "tucker" else Mpo)(*best)


def _factorisations(number: int, count: int) -> Iterator[tuple[int, ...]]:
    """All ordered ways to write `number` as a product of `count` factors."""
    if count == 1:
        yield (number,)
        return
    for factor in (d for d in range(1, number + 1) if number % d == 0):
        for rest in _factorisations(number // factor, count - 1):
            yield (factor, *rest)


@functools.lru_cache(maxsize=1024)
def ladder(network: Network, extra: int = 0) -> tuple[Rung, ...]:
    """Bonds from the smallest network to the largest that is smaller than the dense matrix.

    Each rung raises the bond that is least filled, so all bonds keep the same share of their full
    size. `extra` parameters are added to every rung. Empty when no network is smaller than dense.
    """
    full = network.full_bonds
    bonds = [1] * len(full)
    rungs = []
    while (cost := network.parameters(bonds) + extra) < math.prod(network.shape):
        rungs.append(Rung(cost, tuple(bonds)))
        least = min(range(len(full)), key=lambda k: (bonds[k] + 1) / full[k])
        if bonds[least] == full[least]:
            break
        bonds[least] += 1
    return tuple(rungs)


def ladder_on_loss(network: Network, spectra: Sequence[Tensor], extra: int = 0) -> tuple[Rung, ...]:
    """As `ladder`, but every rung is the one below it with the most useful direction added.

    From the full bonds down, the direction whose loss is smallest per parameter saved goes first.
    `spectra` holds the squared singular values of every bond's unfolding; the squared error of a rung
    is at most the sum of what it discards (Oseledets 2011, theorem 2.2), which is taken as its loss.
    """
    tails = [[*_tails(spectrum)] for spectrum in spectra]
    bonds = list(network.full_bonds)
    rungs = []
    while True:
        cost = network.parameters(bonds) + extra
        if cost < math.prod(network.shape):
            loss = sum(tail[bond] for tail, bond in zip(tails, bonds, strict=True))
            rungs.append(Rung(cost, tuple(bonds), loss))
        choices = []
        for k, bond in enumerate(bonds):
            if bond > 1:
                smaller = [*bonds[:k], bond - 1, *bonds[k + 1 :]]
                saved = cost - extra - network.parameters(smaller)
                choices.append(((tails[k][bond - 1] - tails[k][bond]) / saved, k))
        if not choices:
            return tuple(reversed(rungs))
        bonds[min(choices)[1]] -= 1


def _tails(spectrum: Tensor) -> Iterator[float]:
    """What is lost when the first 0, 1, 2 … values are kept."""
    backwards = itertools.accumulate(reversed(spectrum.tolist()), initial=0.0)
    yield from reversed(list(backwards))
