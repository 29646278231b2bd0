"""Low-rank factors that are best for the inputs: the weights are truncated after whitening them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from methods.low_rank import SvdConfig, TruncatedSvd
from suite.calibration import Calibration
from suite.errors import CellFailed
from suite.layers import LowRankLinear, replace
from suite.linalg import truncated_svd
from suite.method import Plan, register
from suite.models.layouts import layout_of
from suite.streaming import stream

DAMPINGS = (0.0, 1e-10, 1e-8, 1e-6, 1e-4, 1e-2)
"""Tried in turn: how much of its mean diagonal is added to a moment that has no Cholesky factor."""
_SMALLEST_PIVOT = 1e-12


class SvdLlmConfig(SvdConfig):
    """`share`, `shares`: as for `svd`.

    `update`: refit each second factor, from the first block on, to what the dense linear makes of the
    inputs that the linears already compressed give it.
    """

    update: bool = False


@register
class SvdLlm(TruncatedSvd):
    """Every linear W becomes the factors of SVD(W·S) with S·Sᵀ the second moment of its dense inputs.

    Among all factors of the rank, these leave the least ‖(W − B·A)·x‖² on the calibration text. The same
    share everywhere, ranks topped up as for `svd`. This is the paper's "SVD-LLM(W)"; its low-rank tuning
    of one factor after the other is the stage `heal` here. `update=true` is the closed-form update of
    the paper's code, group after group: B ← argmin ‖W·x − B·A·x‖² over inputs x of the compressed prefix.
    """

    name = "svd-llm"
    family = "low-rank"
    source = "Wang et al., SVD-LLM (arXiv 2403.07378, section 3)"
    needs = frozenset({"calibration"})
    Config = SvdLlmConfig
    config: SvdLlmConfig

    def compress(self, model: PreTrainedModel, plan: Plan, calibration: Calibration | None) -> Plan | None:
        assert calibration is not None
        if not plan.modules:
            return None
        layout = layout_of(model.config)
        passes = [stream(model, calibration.tokens) for _ in range(2 if self.config.update else 1)]
        # The dense pass leaves a block before it is changed, the compressed one after.
        for dense, *compressed in zip(*passes, strict=False):
            prefix = f"{dense.path}."
            inside = [path.removeprefix(prefix) for path in plan.modules if path.startswith(prefix)]
            groups = layout.inputs_shared(inside)
            moments = dense.second_moments((group[0] for group in groups), advance=True)
            for group in groups:
                moment = moments[group[0]]
                met = compressed[0].second_moment(group[0]) if compressed else None
                for path in group:
                    linear = dense.module.get_submodule(path)
                    assert isinstance(linear, nn.Linear)
                    rank = plan.modules[prefix + path].arguments["rank"]
                    left, right = whitened_svd(linear.weight, moment, rank)
                    if met is not None:
                        left = refitted(linear.weight, left, right, met)
                    replace(model, prefix + path, LowRankLinear.from_factors(left, right, linear))
                for block in compressed:
                    block.settle(group)
        return None


def whitening_root(moment: Tensor) -> Tensor:
    """Lower triangular S (n × n, float64) with S·Sᵀ = `moment`, damped as little as that needs.

    Raises:
        CellFailed: the moment is not finite.
    """
    matrix = moment.double()
    if not torch.isfinite(matrix).all():
        raise CellFailed("the second moment of a linear's inputs is not finite: its activations overflow")
    mean = float(matrix.diagonal().mean())
    identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    if mean <= 0:
        return identity
    for damping in DAMPINGS:
        root, failed = torch.linalg.cholesky_ex(matrix + damping * mean * identity)
        if not failed and float(root.diagonal().min()) ** 2 > _SMALLEST_PIVOT * mean:
            found: Tensor = root
            return found
    raise CellFailed("the second moment of a linear's inputs is not positive semi-definite")


def whitened_svd(weight: Tensor, moment: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors (m × rank, rank × n) of W' with the least tr((W−W')·C·(W−W')ᵀ) for C = `moment` (n × n).

    That loss is the sum of the squared singular values of W·S left out, S·Sᵀ = C; with C = I this is
    the plain SVD. The kept singular values are split evenly between the factors.
    """
    root = whitening_root(moment)
    left, right = truncated_svd(weight.detach().double() @ root, rank)
    return left, torch.linalg.solve_triangular(root, right, upper=False, left=False)


def refitted(weight: Tensor, left: Tensor, right: Tensor, moment: Tensor) -> Tensor:
    """The second factor (m × rank) closest to `left` with the least tr((W−B·A)·C·(W−B·A)ᵀ), A = `right`."""
    reduced = right @ moment  # rank × n
    error = weight.detach().double() - left @ right
    # A pseudo-inverse, as fewer tokens than ranks leave directions without evidence.
    correction: Tensor = torch.linalg.pinv(reduced @ right.T, hermitian=True, rtol=1e-10)
    return left + error @ reduced.T @ correction
