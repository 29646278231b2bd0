"""Fitting a tensor network to a matrix, for the inputs it meets and the outputs that matter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from suite.minimise import lbfgs
from suite.tensors import Network, on_both_sides, on_leg

Weighting = Literal["none", "diagonal", "kronecker"]

_DAMPING = 1e-2
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Importance:
    """What errors of a linear's weight W (m × n) count: tr(G (W−W') C (W−W')ᵀ).

    `inputs` is C (n × n), the second moment of the inputs; `outputs` is G (m × m, positive definite),
    the identity when None.
    """

    inputs: Tensor
    outputs: Tensor | None = None

    def of(self, error: Tensor) -> Tensor:
        """tr(G E C Eᵀ) for an error E (m × n)."""
        with torch.no_grad():
            weighed = error @ self.inputs
            weighed = weighed if self.outputs is None else self.outputs @ weighed
            value = (error * weighed).sum()
        # G and C are symmetric: the gradient is 2·G E C, so no product need be differentiated.
        return 2 * (error * weighed).sum() - value


@dataclass(frozen=True)
class Coordinates:
    """A change of basis that a network can absorb: W̃ = (⊗ rows) W (⊗ columns) diag(scale).

    `rows` and `columns` hold a symmetric matrix per site; `scale` (n) has to be undone on the input.
    """

    rows: tuple[Tensor, ...]
    columns: tuple[Tensor, ...]
    scale: Tensor | None = None

    @classmethod
    def chosen(cls, network: Network, weighting: Weighting, importance: Importance) -> Coordinates:
        """Coordinates in which the plain squared error is closest to what counts.

        "diagonal": scale = √C_jj. "kronecker": the root of C's (and G's) marginal on every leg, the
        rest of its legs traced out, damped with 1 % of its mean diagonal.
        """
        like = importance.inputs
        ones = [
            [torch.eye(f, dtype=like.dtype, device=like.device) for f in legs]
            for legs in (network.rows, network.columns)
        ]
        if weighting == "diagonal":
            diagonal = like.diagonal() + _DAMPING * like.diagonal().mean()
            scale = diagonal.sqrt() if float(diagonal.min()) > 0 else torch.ones_like(diagonal)
            return cls(tuple(ones[0]), tuple(ones[1]), scale)
        if weighting == "none":
            return cls(tuple(ones[0]), tuple(ones[1]))
        columns = [_root(_marginal(like, network.columns, k)) for k in range(len(network.columns))]
        outputs = importance.outputs
        rows = ones[0]
        if outputs is not None:
            rows = [_root(_marginal(outputs, network.rows, k)) for k in range(len(network.rows))]
        return cls(tuple(rows), tuple(columns))

    def inverse(self) -> Coordinates:
        """The change back."""
        rows, columns = (tuple(map(torch.linalg.inv, legs)) for legs in (self.rows, self.columns))
        return Coordinates(rows, columns, None if self.scale is None else 1 / self.scale)

    def apply(self, matrix: Tensor, network: Network) -> Tensor:
        """A dense matrix (m × n) in these coordinates."""
        result = on_both_sides(matrix, network, self.rows, self.columns)
        return result if self.scale is None else result * self.scale

    def importance(self, plain: Importance, network: Network) -> Importance:
        """What errors written in these coordinates count."""
        back = self.inverse()
        inputs = _between(plain.inputs, back.columns)
        if back.scale is not None:
            inputs = back.scale[:, None] * inputs * back.scale
        return Importance(inputs, None if plain.outputs is None else _between(plain.outputs, back.rows))


@dataclass(frozen=True)
class Fit:
    """Cores of W' · diag(1/scale) or, without a scale, of W'; and relative losses on the way."""

    cores: list[Tensor]
    scale: Tensor | None
    losses: list[float]


def fit(
    weight: Tensor,
    network: Network,
    bonds: Sequence[int],
    importance: Importance,
    weighting: Weighting,
    steps: int,
) -> Fit:
    """A network W' of the given bonds with small tr(G (W−W') C (W−W')ᵀ), for W (m × n).

    Starts from the better of two truncations, plain and in the coordinates of `weighting`, and takes
    up to `steps` steps of L-BFGS on all cores at once, never uphill. Steps are computed in float32
    (float64 for a float64 weight), all else in float64. Losses are shares of tr(G W C Wᵀ).

    With W̃ and the cores in the coordinates of `weighting`, and each core in the gauge in which the
    rest of the network is orthonormal around it, the Hessian is close to the identity: 20 steps then
    do what several hundred of Adam on the raw cores do not.
    """
    matrix = weight.detach().double()
    plain: Weighting = "none"
    total = float(importance.of(matrix))
    choices = list(dict.fromkeys((weighting, plain))) if total > 0 else [plain]
    starts = []
    for choice in choices:
        coordinates = Coordinates.chosen(network, choice, importance)
        if weighting == "diagonal" and coordinates.scale is None:
            coordinates = Coordinates(coordinates.rows, coordinates.columns, torch.ones_like(matrix[0]))
        target = coordinates.apply(matrix, network)
        cores = network.decompose(target, bonds)
        local = coordinates.importance(importance, network)
        loss = float(local.of(target - network.contract(cores))) / total if total > 0 else 0.0
        starts.append((loss, coordinates, target, cores, local))
    loss, coordinates, target, cores, local = min(starts, key=lambda start: start[0])
    losses = [loss]
    if steps and loss > 0:
        cores, losses = _refined(network, cores, target, local, total, steps, weight.dtype)
    back = coordinates.inverse()
    cores = network.balanced(network.on_legs(cores, back.rows, back.columns))
    return Fit(cores, back.scale, losses)


def _refined(
    network: Network,
    cores: Sequence[Tensor],
    target: Tensor,
    importance: Importance,
    total: float,
    steps: int,
    dtype: torch.dtype,
) -> tuple[list[Tensor], list[float]]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    start, links = network.preconditioned(cores)
    narrow_links = [link.to(wide) for link in links]
    goal = target.to(wide)
    outputs = None if importance.outputs is None else importance.outputs.to(wide)
    counted = Importance((importance.inputs / total).to(wide), outputs)

    def loss(point: list[Tensor]) -> Tensor:
        return counted.of(network.contract(network.linked(point, narrow_links)) - goal)

    found, losses = lbfgs(loss, [core.to(wide) for core in start], steps, _TOLERANCE)
    return network.linked([core.double() for core in found], links), losses


def _marginal(moment: Tensor, legs: Sequence[int], leg: int) -> Tensor:
    """The second moment on one leg, the others traced out, with a mean diagonal of 1."""
    before, size, after = math.prod(legs[:leg]), legs[leg], math.prod(legs[leg + 1 :])
    marginal = torch.einsum("aibajb->ij", moment.reshape(before, size, after, before, size, after))
    mean = marginal.diagonal().mean()
    return marginal / mean if float(mean) > 0 else torch.eye(size, dtype=moment.dtype, device=moment.device)


def _root(moment: Tensor) -> Tensor:
    """The symmetric root of a damped second moment."""
    values, vectors = torch.linalg.eigh(moment)
    root: Tensor = (vectors * (values.clamp(min=0) + _DAMPING * values.mean()).sqrt()) @ vectors.T
    return root


def _between(moment: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """(⊗ matrices) M (⊗ matrices)ᵀ for a moment M whose both sides have those legs."""
    legs = [len(matrix) for matrix in matrices]
    tensor = moment.reshape(*legs, *legs)
    for leg, matrix in enumerate((*matrices, *matrices)):
        tensor = on_leg(tensor, leg, matrix)
    return tensor.reshape(moment.shape)
