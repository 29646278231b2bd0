"""From a profile to a budget allocation: where to keep weights so that the predicted harm is least."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from suite.allocation import Setting, lower_hull, spread
from suite.errors import ImpossibleBudget, InputError
from suite.method import Method, methods
from suite.models.anatomy import Anatomy, LinearShape
from suite.sensitivity.profile import Part, Profile
from suite.shares import Allocation, LinearShare
from suite.specs import Budget

_STEPS = 256
# Among settings of equal loss the larger one wins, so that no budget is left unused.
_TIE_BREAK = 1e-9


def check_allocatable(method: type[Method[Any]], measures: str, budget: Budget, metric: str) -> None:
    """Refuse what no allocation can be made of, before anything is measured.

    Raises:
        InputError: with what is possible.
    """
    if measures == "accuracy":
        raise InputError(
            "--allocate never tunes on items that a board scores: use --metric perplexity or both;"
            " the allocation is made of the perplexity on held-back calibration text."
        )
    if budget.metric != metric:
        raise InputError(f"--allocate {budget}: this profile counts {metric}; use {metric}=SHARE.")
    able = [name for name in methods if "shares" in methods.get(name).Config.model_fields]
    if "shares" not in method.Config.model_fields:
        raise InputError(
            f"'{method.name}' takes no allocation: it has no knob 'shares'."
            f"  (Methods that have it: {', '.join(able)}.)"
        )


def allocate(profile: Profile, parts: Sequence[Part], anatomy: Anatomy, budget: Budget) -> Allocation:
    """The shares that meet `budget` with the least sum of predicted increases.

    Between measured strengths the increase is interpolated on the lower convex hull; parts that were
    not measured stay dense. The sum over parts takes their harm to add up, which is only roughly so.

    Raises:
        InputError: the strengths measured do not reach that far down.
    """
    metric = profile.spec.metric
    fixed = anatomy.size(metric) - sum(part.size(anatomy.entries, metric) for part in parts)
    offers = {part.name: _offers(profile, part, anatomy) for part in parts}
    dense = anatomy.size(metric)
    try:
        chosen = spread(offers, budget.target(dense) - fixed)
    except ImpossibleBudget:
        least = fixed + sum(min(setting.cost for setting in offer) for offer in offers.values())
        raise InputError(
            f"--allocate {budget}: the strengths measured reach {metric}={least / dense:.3f};"
            " measure a lower --strength, or more blocks."
        ) from None
    shares = {line.path: 1.0 for line in anatomy.linears}
    for part in parts:
        shares |= dict.fromkeys(
            part.paths, _share(offers[part.name][chosen[part.name]].cost, part, anatomy, metric)
        )
    return Allocation(
        model=profile.spec.model,
        model_digest=profile.spec.model_digest,
        method=profile.spec.method,
        profile=profile.digest(),
        budget=str(budget),
        predicted_increase=sum(offers[name][index].loss for name, index in chosen.items()),
        linears={
            line.path: LinearShare(
                out_features=line.out_features, in_features=line.in_features, share=shares[line.path]
            )
            for line in anatomy.linears
        },
    )


def _offers(profile: Profile, part: Part, anatomy: Anatomy) -> list[Setting]:
    """Sizes of a part from its strongest compression to dense, with interpolated increases."""
    size = part.size(anatomy.entries, profile.spec.metric)
    measured = [
        # A part cannot gain by being compressed; a negative increase is noise.
        Setting(round(point.kept * size), max(point.increase, 0.0) + _TIE_BREAK * (1 - point.kept))
        for point in profile.of(part.name)
        if point.increase is not None
    ]
    corners = [*measured, Setting(size, 0.0)]
    hull = [corners[index] for index in lower_hull(corners)]
    costs = np.unique(np.linspace(hull[0].cost, size, _STEPS).astype(int))
    losses = np.interp(costs, [corner.cost for corner in hull], [corner.loss for corner in hull])
    return [Setting(int(cost), float(loss)) for cost, loss in zip(costs, losses, strict=True)]


def _share(size: int, part: Part, anatomy: Anatomy, metric: str) -> float:
    """The share of the weights alone, once the biases have taken their place."""
    lines: list[LinearShape] = [line for line in anatomy.linears if line.path in part.paths]
    each = anatomy.dtype.itemsize if metric == "bytes" else 1
    weights = each * sum(line.out_features * line.in_features for line in lines)
    biases = each * sum(line.out_features for line in lines if line.bias)
    return min(1.0, max(0.0, (size - biases) / weights))
