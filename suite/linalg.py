"""Matrix factorisations shared by the methods."""

from __future__ import annotations

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
