"""Norms folded into linears, and linears moved into another basis of the residual stream.

A norm's scale and shift can go into the linears that read it; without them it commutes with
rotations. Everything is computed in float64. A basis is D × width, its columns the new coordinates
in the old ones; the stream is a row vector, so x becomes x @ basis.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_ROWS = 8192


def scale_and_shift(norm: nn.Module, size: int) -> tuple[Tensor, Tensor | None]:
    """Scale (`size`; ones where it has none) and shift (`size` or None) of a norm, in float64."""
    scale, shift = getattr(norm, "weight", None), getattr(norm, "bias", None)
    return (
        torch.ones(size, dtype=torch.float64) if scale is None else scale.double(),
        None if shift is None else shift.double(),
    )


def reading(linear: nn.Linear, basis: Tensor, scale: Tensor, shift: Tensor | None) -> dict[str, Tensor]:
    """Tensors of a linear that reads the rotated stream, `scale` and `shift` of the norm taken in.

    `weight` is out × width; there is a `bias` (out) where the linear has one or the norm a shift.
    """
    tensors = {"weight": times(linear.weight, scale.unsqueeze(-1).to(basis) * basis)}
    if shift is not None:
        bias = linear.weight.double() @ shift
        tensors["bias"] = bias if linear.bias is None else bias + linear.bias
    elif linear.bias is not None:
        tensors["bias"] = linear.bias
    return tensors


def writing(linear: nn.Linear, basis: Tensor) -> dict[str, Tensor]:
    """Tensors of a linear that writes the rotated stream: `weight` (width × in) and any `bias` (width)."""
    tensors = {"weight": basis.T @ linear.weight.double()}
    return tensors if linear.bias is None else tensors | {"bias": basis.T @ linear.bias.double()}


def times(weight: Tensor, right: Tensor) -> Tensor:
    """`weight @ right` in float64, some rows at a time, stored in the weight's dtype."""
    return torch.cat([(rows.double() @ right).to(weight.dtype) for rows in weight.split(_ROWS)])
