"""Low-rank factorisation of the decoder's linears."""

from __future__ import annotations

from typing import Self

from pydantic import Field, FilePath, model_validator
from torch import nn
from transformers import PreTrainedModel

from suite.calibration import Calibration
from suite.layers import LowRankLinear, ModuleSpec, replace
from suite.linalg import truncated_svd
from suite.method import Method, MethodConfig, Plan, Target, largest_share, register
from suite.models.anatomy import Anatomy, LinearShape
from suite.shares import shares_for


class SvdConfig(MethodConfig):
    """`share`: kept share of every linear's parameters; solved for the budget when not given.

    `shares`: an allocation file instead, with a share for each linear (`weighin profile --allocate`).
    """

    share: float | None = Field(default=None, ge=0, le=1)
    shares: FilePath | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if self.share is not None and self.shares is not None:
            raise ValueError("give share or shares, not both")
        return self


@register
class TruncatedSvd(Method[SvdConfig]):
    """Every linear W (m × n) becomes B·A of rank r = ⌊κ·m·n/(m+n)⌋, the same share κ everywhere.

    The best approximation of the weights in the Frobenius norm, blind to the inputs: a control for
    every activation-aware low-rank method. Ranks are topped up by one, widest layers last, until
    the budget is used.
    """

    name = "svd"
    family = "low-rank"
    source = "Eckart & Young 1936; as baseline in SVD-LLM (arXiv 2403.07378, table 1)"
    Config = SvdConfig

    def plan(self, anatomy: Anatomy, target: Target | None, seed: int) -> Plan:
        linears = anatomy.dense_linears(self.name)
        if self.config.shares is not None:
            shares = shares_for(self.config.shares, anatomy)
            plan = _plan(
                "by file", {line.path: rank_at(line, shares[line.path]) for line in linears}, linears
            )
            roomy = target is not None and target.fits(plan.apply(anatomy))
            return top_up(plan, "by file", anatomy, target) if target and roomy else plan
        if self.config.share is not None or target is None:
            share = 1.0 if self.config.share is None else self.config.share
            return _plan(share, {line.path: rank_at(line, share) for line in linears}, linears)

        def build(share: float) -> Plan:
            return _plan(share, {line.path: rank_at(line, share) for line in linears}, linears)

        share, plan = largest_share(build, anatomy, target)
        return top_up(plan, share, anatomy, target) if share < 1 else plan

    def compress(self, model: PreTrainedModel, plan: Plan, calibration: Calibration | None) -> Plan | None:
        for path, spec in plan.modules.items():
            linear = model.get_submodule(path)
            assert isinstance(linear, nn.Linear)
            left, right = truncated_svd(linear.weight, spec.arguments["rank"])
            replace(model, path, LowRankLinear.from_factors(left, right, linear))
        return None


def rank_at(linear: LinearShape, share: float) -> int | None:
    """Rank that keeps `share` of a linear's parameters, at least 1; None leaves it dense.

    Where even factors of rank 1 would save nothing, as for a single channel, it stays dense as well.
    """
    m, n = linear.out_features, linear.in_features
    return None if share >= 1 or m * n <= m + n else max(1, int(share * m * n / (m + n)))


def _plan(share: float | str, ranks: dict[str, int | None], linears: tuple[LinearShape, ...]) -> Plan:
    modules = {
        line.path: ModuleSpec(
            type="low_rank",
            arguments={
                "in_features": line.in_features,
                "out_features": line.out_features,
                "rank": rank,
                "bias": line.bias,
            },
        )
        for line in linears
        if (rank := ranks[line.path]) is not None
    }
    kept = sorted({rank for rank in ranks.values() if rank is not None})
    knobs = {
        "share": share if isinstance(share, str) else round(share, 6),
        "ranks": f"{kept[0]}..{kept[-1]}" if kept else "full",
    }
    return Plan(knobs=knobs, modules=modules)


def top_up(plan: Plan, share: float | str, anatomy: Anatomy, target: Target) -> Plan:
    """Spend what rounding the ranks down left over: one more rank where it still fits.

    A linear whose factors would then be no smaller than the matrix itself stays dense instead.
    """
    unused = target.value - plan.apply(anatomy).size(target.metric)
    bytes_each = anatomy.dtype.itemsize if target.metric == "bytes" else 1
    linears = anatomy.linears
    ranks: dict[str, int | None] = dict.fromkeys(line.path for line in linears)
    ranks |= {path: spec.arguments["rank"] for path, spec in plan.modules.items()}
    for line in sorted(linears, key=lambda line: line.in_features + line.out_features):
        rank, each = ranks[line.path], line.in_features + line.out_features
        if rank is None:
            continue
        full = line.in_features * line.out_features
        step = min(each, full - rank * each) * bytes_each
        if step <= unused:
            ranks[line.path] = rank + 1 if (rank + 1) * each < full else None
            unused -= step
    return _plan(share, ranks, linears)
