"""Sparsity-preserving tuning for `heal(mode=spp)`: few factors that scale the kept weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from suite.sparse_layers import SparseLinear


class Scales(nn.Module):
    """Kept weights w_ij become w_ij·(1 + s·α_⌊i·r/m⌋,j·β_i), with α (r × n) random and β (m) zero at first.

    Every row of α serves m/r rows of the weight (m × n), one more or less where r does not divide m.
    Being factors, they leave zeros zero, and β = 0 leaves the model as it was. (Lu et al., SPP, arXiv
    2405.16057, section 3; without its dropout, as training here is repeatable.)
    """

    served: Tensor
    row: Tensor
    column: Tensor

    def __init__(self, linear: SparseLinear, rank: int, scale: float):
        super().__init__()
        device = linear.kept.device
        rank = min(rank, linear.rows)
        self.scale = scale
        self.alpha = nn.Parameter(torch.randn(rank, linear.columns, device=device, dtype=torch.float32))
        self.beta = nn.Parameter(torch.zeros(linear.rows, device=device, dtype=torch.float32))
        self.row, self.column = linear.places().nonzero(as_tuple=True)
        self.served = self.row * rank // linear.rows

    def forward(self, values: Tensor) -> Tensor:
        factor = 1 + self.scale * self.alpha[self.served, self.column] * self.beta[self.row]
        return (values.flatten() * factor).reshape(values.shape).to(values.dtype)


def add_scales(model: PreTrainedModel, rank: int, alpha: float) -> list[nn.Parameter]:
    """Put scales, of strength s = `alpha` / `rank`, on every sparse linear; returns what is to be trained."""
    trained: list[nn.Parameter] = []
    for linear in [module for module in model.modules() if isinstance(module, SparseLinear)]:
        scales = Scales(linear, rank, alpha / rank)
        parametrize.register_parametrization(linear, "kept", scales)
        trained += [scales.alpha, scales.beta]
    return trained


def merge_scales(model: PreTrainedModel) -> None:
    """Multiply the scales into the kept weights and take them off."""
    for module in list(model.modules()):
        if isinstance(module, SparseLinear) and parametrize.is_parametrized(module, "kept"):
            parametrize.remove_parametrizations(module, "kept", leave_parametrized=True)
