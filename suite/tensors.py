"""Matrices as small tensor networks: factor shapes, decompositions, contraction and gauges.

A matrix of m = Π m_k rows and n = Π n_k columns is read as a tensor with one row leg and one column
leg per site. Two forms share one interface, so that what solves, refines or stores a network need not
know which it is: `Mpo`, a chain of cores, and `Tucker`, one core with a factor matrix on every leg.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_FLOOR = 1e-3
"""Singular values below this share of the largest one are not scaled up any further."""


@dataclass(frozen=True)
class Network(ABC):
    """The form of a network for one matrix shape; `rows` and `columns` hold one factor per site."""

    rows: tuple[int, ...]
    columns: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        return math.prod(self.rows), math.prod(self.columns)

    @property
    @abstractmethod
    def full_bonds(self) -> tuple[int, ...]:
        """The bonds with which every matrix is represented exactly; beyond them nothing is gained."""

    @abstractmethod
    def core_shapes(self, bonds: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """Shapes of the cores for these bonds."""

    @abstractmethod
    def legs(self, bond: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """The two (core, leg) that a bond joins."""

    @abstractmethod
    def unfolding(self, matrix: Tensor, bond: int) -> Tensor:
        """`matrix` (m × n) laid out so that its rank is the size that bond must have."""

    @abstractmethod
    def decompose(self, matrix: Tensor, bonds: Sequence[int]) -> list[Tensor]:
        """Cores of an approximation of `matrix` (m × n) in the Frobenius norm."""

    @abstractmethod
    def contract(self, cores: Sequence[Tensor]) -> Tensor:
        """The matrix (m × n) that the cores stand for."""

    @abstractmethod
    def orthogonal(self, cores: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Cores in which each holds the singular values of its bonds, and those values by bond.

        Dividing every bond by its values once gives the matrix; around each core the rest of the
        network is then orthonormal (Vidal, quant-ph/0301063).
        """

    @abstractmethod
    def on_legs(
        self, cores: Sequence[Tensor], rows: Sequence[Tensor], columns: Sequence[Tensor]
    ) -> list[Tensor]:
        """Cores of (R_1 ⊗ R_2 …) W (S_1 ⊗ S_2 …)ᵀ, given those of W and one square matrix per leg."""

    def parameters(self, bonds: Sequence[int]) -> int:
        """Numbers in all cores together."""
        return sum(math.prod(shape) for shape in self.core_shapes(bonds))

    def spectrum(self, matrix: Tensor, bond: int) -> Tensor:
        """Squared singular values (float64, largest first) of the unfolding of that bond."""
        unfolded = self.unfolding(matrix.double(), bond)
        if unfolded.shape[0] > unfolded.shape[1]:
            unfolded = unfolded.T
        values: Tensor = torch.linalg.eigvalsh(unfolded @ unfolded.T)
        return values.flip(0).clamp(min=0)

    def preconditioned(self, cores: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The same matrix as cores and a fixed vector per bond, to be joined by `linked`.

        The squared change of the matrix is that of any one core's entries, so that gradients of all
        cores have one scale (the idea of ScaledGD: Tong, Ma & Chi, arXiv 2005.08898).
        """
        result, values_by_bond = self.orthogonal(cores)
        links = []
        for bond, values in enumerate(values_by_bond):
            floored = values.clamp(min=_FLOOR * float(values.max()) or 1.0)
            both = torch.where(values > 0, (floored / values).sqrt(), 0)
            result = self._scaled(result, bond, both, both)
            links.append(1 / floored)
        return result, links

    def linked(self, cores: Sequence[Tensor], links: Sequence[Tensor]) -> list[Tensor]:
        """The cores with each bond's vector multiplied into one of the two cores that it joins."""
        result = list(cores)
        for bond, link in enumerate(links):
            result = self._scaled(result, bond, link)
        return result

    def balanced(self, cores: Sequence[Tensor]) -> list[Tensor]:
        """The same matrix with the root of every singular value on both sides of its bond.

        All cores then have the same norm: none dwarfs the others in training or in rounding.
        """
        result, values_by_bond = self.orthogonal(cores)
        for bond, values in enumerate(values_by_bond):
            root = torch.where(values > 0, values.rsqrt(), 0)
            result = self._scaled(result, bond, root, root)
        norms = torch.stack([core.norm() for core in result])
        if not bool((norms > 0).all()):
            return result
        even = norms.log().mean().exp()
        return [core * (even / norm) for core, norm in zip(result, norms, strict=True)]

    def _scaled(
        self, cores: list[Tensor], bond: int, first: Tensor, second: Tensor | None = None
    ) -> list[Tensor]:
        result = list(cores)
        for (core, leg), vector in zip(self.legs(bond), (first, second), strict=True):
            if vector is not None:
                shape = [-1 if axis == leg else 1 for axis in range(result[core].ndim)]
                result[core] = result[core] * vector.reshape(shape)
        return result


class Mpo(Network):
    """Matrix product operator (TT-matrix): core k is r_{k−1} × m_k × n_k × r_k, with bonds r_k.

    Source: Oseledets, Tensor-Train Decomposition (2011); Novikov et al. (arXiv 1509.06569).
    """

    @property
    def full_bonds(self) -> tuple[int, ...]:
        sites = [m * n for m, n in zip(self.rows, self.columns, strict=True)]
        return tuple(min(math.prod(sites[:k]), math.prod(sites[k:])) for k in range(1, len(sites)))

    def core_shapes(self, bonds: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        ends, sites = (1, *bonds, 1), zip(self.rows, self.columns, strict=True)
        return tuple((ends[k], m, n, ends[k + 1]) for k, (m, n) in enumerate(sites))

    def legs(self, bond: int) -> tuple[tuple[int, int], tuple[int, int]]:
        return (bond, 3), (bond + 1, 0)

    def _interleaved(self, matrix: Tensor) -> Tensor:
        sites = len(self.rows)
        order = [leg for k in range(sites) for leg in (k, sites + k)]
        return matrix.reshape(*self.rows, *self.columns).permute(order)

    def unfolding(self, matrix: Tensor, bond: int) -> Tensor:
        before = math.prod(self.rows[: bond + 1] + self.columns[: bond + 1])
        return self._interleaved(matrix).reshape(before, -1)

    def decompose(self, matrix: Tensor, bonds: Sequence[int]) -> list[Tensor]:
        """Sequential truncated SVD from the first site to the last (TT-SVD).

        The squared error is the sum of the squared singular values discarded on the way.
        """
        cores: list[Tensor] = []
        rest = self._interleaved(matrix)
        for shape in self.core_shapes(bonds)[:-1]:
            left, values, right = torch.linalg.svd(
                rest.reshape(math.prod(shape[:3]), -1), full_matrices=False
            )
            bond = shape[3]
            cores.append(_sized(left[:, :bond], 1, bond).reshape(shape))
            rest = _sized(values[:bond, None] * right[:bond], 0, bond)
        return [*cores, rest.reshape(self.core_shapes(bonds)[-1])]

    def contract(self, cores: Sequence[Tensor]) -> Tensor:
        """From the first site on; the largest intermediate is the matrix times one bond."""
        matrix, (_, m, n, _) = cores[0], cores[0].shape
        for core in cores[1:]:
            bond, rows, columns, right = core.shape
            joined = matrix.reshape(m * n, bond) @ core.reshape(bond, -1)
            matrix = joined.reshape(m, n, rows, columns * right).transpose(1, 2)
            m, n = m * rows, n * columns
        return matrix.reshape(m, n)

    def orthogonal(self, cores: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        result = list(cores)
        for k in range(len(result) - 1):
            bond = result[k].shape[3]
            q, r = torch.linalg.qr(result[k].reshape(-1, bond))
            result[k] = _sized(q, 1, bond).reshape(result[k].shape)
            result[k + 1] = torch.tensordot(_sized(r, 0, bond), result[k + 1], 1)
        values_by_bond = []
        for k in range(len(result) - 1, 0, -1):
            bond = result[k].shape[0]
            left, values, right = torch.linalg.svd(result[k].reshape(bond, -1), full_matrices=False)
            values = _sized(values, 0, bond)
            result[k] = (values[:, None] * _sized(right, 0, bond)).reshape(result[k].shape)
            result[k - 1] = (result[k - 1] @ _sized(left, 1, bond)) * values
            values_by_bond.append(values)
        return result, values_by_bond[::-1]

    def on_legs(
        self, cores: Sequence[Tensor], rows: Sequence[Tensor], columns: Sequence[Tensor]
    ) -> list[Tensor]:
        return [
            torch.einsum("amnb,pm,qn->apqb", core, row, column)
            for core, row, column in zip(cores, rows, columns, strict=True)
        ]


class Tucker(Network):
    """A core r_1 × … × r_4 and one factor d_i × r_i for each leg (m_1, m_2, n_1, n_2), in that order.

    Source: De Lathauwer, De Moor & Vandewalle, A Multilinear Singular Value Decomposition (2000).
    """

    @property
    def _dimensions(self) -> tuple[int, ...]:
        return self.rows + self.columns

    @property
    def full_bonds(self) -> tuple[int, ...]:
        return self._dimensions

    def core_shapes(self, bonds: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        return (tuple(bonds), *zip(self._dimensions, bonds, strict=True))

    def legs(self, bond: int) -> tuple[tuple[int, int], tuple[int, int]]:
        return (0, bond), (bond + 1, 1)

    def unfolding(self, matrix: Tensor, bond: int) -> Tensor:
        return _unfolded(matrix.reshape(self._dimensions), bond)

    def decompose(self, matrix: Tensor, bonds: Sequence[int]) -> list[Tensor]:
        """Truncated higher-order SVD: leading left singular vectors of every unfolding."""
        factors = [
            _sized(torch.linalg.svd(self.unfolding(matrix, leg), full_matrices=False)[0][:, :bond], 1, bond)
            for leg, bond in enumerate(bonds)
        ]
        return [_applied(matrix.reshape(self._dimensions), [factor.T for factor in factors]), *factors]

    def contract(self, cores: Sequence[Tensor]) -> Tensor:
        return _applied(cores[0], cores[1:]).reshape(self.shape)

    def orthogonal(self, cores: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        core, bases = cores[0], []
        for leg, factor in enumerate(cores[1:]):
            q, r = torch.linalg.qr(factor)
            bases.append(_sized(q, 1, factor.shape[1]))
            core = on_leg(core, leg, _sized(r, 0, factor.shape[1]))
        factors, values_by_bond = [], []
        for leg, basis in enumerate(bases):
            left, values, _ = torch.linalg.svd(_unfolded(core, leg), full_matrices=False)
            left, values = _sized(left, 1, basis.shape[1]), _sized(values, 0, basis.shape[1])
            core = on_leg(core, leg, left.T)
            factors.append(basis @ left * values)
            values_by_bond.append(values)
        return [core, *factors], values_by_bond

    def on_legs(
        self, cores: Sequence[Tensor], rows: Sequence[Tensor], columns: Sequence[Tensor]
    ) -> list[Tensor]:
        maps = (*rows, *columns)
        return [cores[0], *(matrix @ factor for matrix, factor in zip(maps, cores[1:], strict=True))]


def on_both_sides(
    matrix: Tensor, network: Network, rows: Sequence[Tensor], columns: Sequence[Tensor]
) -> Tensor:
    """(R_1 ⊗ R_2 …) W (S_1 ⊗ S_2 …)ᵀ for a dense W (m × n), without forming the products."""
    return _applied(matrix.reshape(network.rows + network.columns), [*rows, *columns]).reshape(matrix.shape)


def _sized(tensor: Tensor, axis: int, size: int) -> Tensor:
    """`tensor` with zeros appended along `axis` until it has `size` entries there."""
    missing = size - tensor.shape[axis]
    if missing <= 0:
        return tensor
    shape = [missing if a == axis % tensor.ndim else s for a, s in enumerate(tensor.shape)]
    return torch.cat([tensor, tensor.new_zeros(shape)], axis)


def _unfolded(tensor: Tensor, leg: int) -> Tensor:
    return tensor.movedim(leg, 0).reshape(tensor.shape[leg], -1)


def on_leg(tensor: Tensor, leg: int, matrix: Tensor) -> Tensor:
    """`matrix` applied to one leg of a tensor."""
    result: Tensor = torch.tensordot(matrix, tensor, ([1], [leg]))
    return result.movedim(0, leg)


def _applied(tensor: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    for leg, matrix in enumerate(matrices):
        tensor = on_leg(tensor, leg, matrix)
    return tensor
