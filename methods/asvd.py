"""Activation-aware SVD: weights scaled by the size of their inputs, ranks by sensitivity."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, Self

from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import PreTrainedModel

from methods.low_rank import SvdConfig, TruncatedSvd, rank_at, top_up
from methods.reduced_order import low_rank_plan
from suite.calibration import Calibration
from suite.layers import LowRankLinear, replace
from suite.linalg import truncated_svd
from suite.method import Plan, Target, register
from suite.models.anatomy import Anatomy, LinearShape, anatomy_of
from suite.streaming import BlockOnStream, stream

RATIOS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0)
"""Kept shares whose loss is looked at; those under 0.4, the paper's least, only where a budget needs them."""
_LEAST_OF_PAPER = 5
_EPSILON = 1e-6


class AsvdConfig(SvdConfig):
    """`share`, `shares`: as for `svd`.

    `alpha`: power of the mean absolute input that columns are scaled by; 0 is the plain SVD.
    `allocation`: "searched" keeps more of the linears that would lose more; "uniform" the same share.
    """

    alpha: float = Field(default=0.5, ge=0)
    allocation: Literal["searched", "uniform"] = "searched"

    @model_validator(mode="after")
    def _allocated_once(self) -> Self:
        if self.shares is not None and "allocation" in self.model_fields_set:
            raise ValueError("shares decides what allocation would: give one of them")
        return self


@register
class Asvd(TruncatedSvd):
    """Every linear W becomes B·A with B·A·diag(s) the truncated SVD of W·diag(s), s = E|x|^α + 1e-6.

    The rank search is the paper's with a proxy for its sensitivity: instead of the perplexity with one
    linear factorised, tr((W−W')·C·(W−W')ᵀ) / tr(W·C·Wᵀ) with C the second moment of its dense inputs.
    One threshold on that loss holds for all: each linear keeps the least of the shares 0.9, 0.8, … whose
    loss is under it. What the threshold leaves of the planned size buys ranks. The SVD is exact, not
    the randomised one of the authors' code.
    """

    name = "asvd"
    family = "low-rank"
    source = "Yuan et al., ASVD: Activation-aware Singular Value Decomposition (arXiv 2312.05821, section 3)"
    needs = frozenset({"calibration"})
    adaptive = True
    Config = AsvdConfig
    config: AsvdConfig

    def compress(self, model: PreTrainedModel, plan: Plan, calibration: Calibration | None) -> Plan | None:
        assert calibration is not None
        if not plan.modules:
            return None
        anatomy = anatomy_of(model).restricted(plan.modules.keys())
        searched = self.config.allocation == "searched" and self.config.shares is None
        ratios = searched_ratios(anatomy, plan) if searched else ()
        scales: dict[str, Tensor] = {}
        losses: dict[str, list[float]] = {}
        for block in stream(model, calibration.tokens):
            self._look(block, anatomy, ratios, scales, losses)
        done = self._search(anatomy, plan, ratios, losses) if searched else plan
        for path, spec in done.modules.items():
            linear = model.get_submodule(path)
            assert isinstance(linear, nn.Linear)
            left, right = scaled_svd(linear.weight, scales[path], spec.arguments["rank"])
            replace(model, path, LowRankLinear.from_factors(left, right, linear))
        return done

    def _look(
        self,
        block: BlockOnStream,
        anatomy: Anatomy,
        ratios: tuple[float, ...],
        scales: dict[str, Tensor],
        losses: dict[str, list[float]],
    ) -> None:
        """Note the scale of every linear's inputs in a dense block, and what each ratio would cost it."""
        prefix = f"{block.path}."
        lines = {x.path.removeprefix(prefix): x for x in anatomy.linears if x.block == block.index}
        groups = anatomy.layout.inputs_shared(list(lines))
        seen = block.input_statistics((group[0] for group in groups), advance=True)
        for group in groups:
            inputs = seen[group[0]]
            scale = inputs.size.pow(self.config.alpha) + _EPSILON
            for path in group:
                scales[prefix + path] = scale
                if ratios:
                    weight = block.module.get_submodule(path).weight
                    assert isinstance(weight, Tensor)
                    ranks = [rank_at(lines[path], ratio) or 1 for ratio in ratios]
                    losses[prefix + path] = proxy_losses(weight, scale, inputs.moment, ranks)

    def _search(
        self,
        anatomy: Anatomy,
        plan: Plan,
        ratios: tuple[float, ...],
        losses: Mapping[str, list[float]],
    ) -> Plan:
        """The ranks of the least threshold whose size is no more than the plan's, topped up."""
        target = Target("params", plan.apply(anatomy).params)

        def under(threshold: float) -> Plan:
            ranks = {
                line.path: _least(line, ratios, losses[line.path], threshold) for line in anatomy.linears
            }
            return low_rank_plan(anatomy.linears, ranks, False, {})

        thresholds = sorted({loss for of_linear in losses.values() for loss in of_linear})
        found = _first(thresholds, lambda threshold: target.fits(under(threshold).apply(anatomy)))
        chosen = under(found)
        while (more := top_up(chosen, "searched", anatomy, target)).modules != chosen.modules:
            chosen = more
        knobs = {**chosen.knobs, "share": plan.knobs["share"], "allocation": self.config.allocation}
        return Plan(knobs=knobs, notes={"loss_threshold": found}, modules=chosen.modules)


def _least(line: LinearShape, ratios: tuple[float, ...], losses: list[float], threshold: float) -> int | None:
    """Rank of the least ratio with a loss of at most `threshold`; None is dense."""
    fits = [ratio for ratio, loss in zip(ratios, losses, strict=True) if loss <= threshold]
    return rank_at(line, min(fits)) if fits else None


def _first(rising: list[float], fits: Callable[[float], bool]) -> float:
    """The first of `rising` that fits, by bisection; the last one does."""
    low, high = 0, len(rising) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(rising[middle]) else (middle + 1, high)
    return rising[low]


def searched_ratios(anatomy: Anatomy, plan: Plan) -> tuple[float, ...]:
    """Shares for the search, down to one at which every linear of the plan together fits its size."""
    size = plan.apply(anatomy).params
    for least in range(_LEAST_OF_PAPER, len(RATIOS)):
        ranks = {line.path: rank_at(line, RATIOS[least]) for line in anatomy.linears}
        if low_rank_plan(anatomy.linears, ranks, False, {}).apply(anatomy).params <= size:
            return RATIOS[: least + 1]
    return RATIOS


def scaled_svd(weight: Tensor, scale: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors (m × rank, rank × n) of W': the truncated SVD of `weight`·diag(`scale`), the scale undone."""
    left, right = truncated_svd(weight.detach().double() * scale, rank)
    return left, right / scale


def proxy_losses(weight: Tensor, scale: Tensor, moment: Tensor, ranks: list[int]) -> list[float]:
    """tr((W−W')·C·(W−W')ᵀ) / tr(W·C·Wᵀ) with C = `moment` for the scaled SVD at each of `ranks`."""
    matrix = weight.detach().double()
    left, right = scaled_svd(matrix, scale, max(ranks))
    outputs = matrix @ moment
    whole = float((outputs * matrix).sum())
    if whole <= 0:
        return [0.0 for _ in ranks]
    losses = []
    for rank in ranks:
        error = matrix - left[:, :rank] @ right[:rank]
        losses.append(float(((error @ moment) * error).sum()) / whole)
    return losses
