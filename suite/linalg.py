"""Matrix factorisations shared by the methods."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def truncated_svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best rank-`rank` approximation `left @ right` of `weight` (m × n) in the Frobenius norm.

    Works on the eigenvectors of the smaller Gram matrix in float64, several times faster than a
    full SVD and exact to about 1e-8 of the largest singular value (Eckart & Young 1936). The
    singular values are split evenly between `left` (m × rank) and `right` (rank × n).
    """
    matrix = weight.detach().double()
    transposed = matrix.shape[0] < matrix.shape[1]
    if transposed:
        matrix = matrix.T
    values, vectors = torch.linalg.eigh(matrix.T @ matrix)
    top = vectors.flip(-1)[:, :rank]
    # Directions below rounding noise carry nothing; the floor keeps their scale finite.
    floor = max(1e-16 * float(values[-1]), 1e-60)
    scale = values.flip(-1)[:rank].clamp(min=floor).pow(0.25)
    left, right = matrix @ (top / scale), (top * scale).T
    return (right.T, left.T) if transposed else (left, right)


_RAISES = (1, 10, 100)
"""Times the damping, tried in turn until a Cholesky factorisation succeeds."""


def inverse_factor(moment: Tensor, damping: float) -> tuple[Tensor | None, int]:
    """U (upper triangular, float64) with Uᵀ U = (C + d·mean(diag C)·I)⁻¹ for C = `moment` (n × n).

    Columns without any input get the mean on the diagonal. Also returns how often the damping d had
    to be raised tenfold; U is None when the last raise did not help either, or C is not finite.
    """
    moment = moment.double().clone()
    diagonal = moment.diagonal()
    live = diagonal != 0
    mean = diagonal[live].mean() if live.any() else torch.ones_like(diagonal[0])
    diagonal[~live] = mean
    identity = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    for raised, times in enumerate(_RAISES):
        lower, failed = torch.linalg.cholesky_ex(moment + times * damping * mean * identity)
        if failed:
            continue
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed and upper.isfinite().all():
            return upper, raised
    return None, len(_RAISES) - 1


@dataclass(frozen=True)
class Projection:
    """Principal directions of a linear's outputs, the strongest first: W ≈ expand[:, :r] · reduce[:r] · W.

    `values` (k) are the output moments along them, `reduce` is k × m and `expand` m × k, with
    k = min(m, n) for a weight of m × n; `reduce · expand` is the identity.
    """

    values: Tensor
    reduce: Tensor
    expand: Tensor


def principal_outputs(weight: Tensor, moment: Tensor, metric: Tensor | None = None) -> Projection:
    """Directions of the outputs of `weight` (m × n) for inputs with Σ x xᵀ = `moment` (n × n), in float64.

    The first r give the W' of rank r with the least tr(M (W−W') C (W−W')ᵀ), which is then the sum
    of the other `values`. M is `metric` (m × m, positive definite), by default the identity: then
    `expand` holds the eigenvectors of W C Wᵀ (Chavan et al., arXiv 2312.07046, section 2).
    """
    root = None if metric is None else torch.linalg.cholesky(metric.double())
    matrix = weight.detach().double() if root is None else root.T @ weight.detach().double()
    if matrix.shape[0] <= matrix.shape[1]:
        values, vectors = torch.linalg.eigh(_symmetric(matrix @ moment.double() @ matrix.T))
        vectors = vectors.flip(-1)
    else:
        # Fewer inputs than outputs: the same directions from the smaller Gram matrix.
        inner, axes = torch.linalg.eigh(_symmetric(moment.double()))
        outputs = matrix @ (axes * inner.clamp(min=0).sqrt())
        values, axes = torch.linalg.eigh(_symmetric(outputs.T @ outputs))
        vectors = torch.linalg.qr(outputs @ axes.flip(-1)).Q
    values = values.flip(-1).clamp(min=0)
    if root is None:
        return Projection(values, vectors.T, vectors)
    expand = torch.linalg.solve_triangular(root.T, vectors, upper=True)
    return Projection(values, vectors.T @ root.T, expand)


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.T) / 2
