"""Spreading a size over matrices so that the sum of their losses is least.

Every matrix offers settings, each with a cost and a loss. Costs and losses only need one unit each:
parameters and squared error, say. Nothing here knows what a setting is.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from heapq import heappop, heappush
from typing import TYPE_CHECKING, NamedTuple

from suite.errors import ImpossibleBudget

if TYPE_CHECKING:
    from suite.method import Target
    from suite.models.anatomy import Anatomy

_HALVINGS = 40


class Setting(NamedTuple):
    """What one setting of a matrix costs, and the loss it leaves."""

    cost: int
    loss: float


def spread(offers: Mapping[str, Sequence[Setting]], budget: int) -> dict[str, int]:
    """The chosen setting of every matrix (an index into its offers) within `budget`.

    Walks down the lower convex hulls of all offers together, steepest step first, which is optimal
    for the budgets it passes through; a step from a low rank to "stay dense" is one edge of the hull.
    What is left over is then spent on whatever single change still fits and saves most.

    Raises:
        ImpossibleBudget: the cheapest settings cost more than `budget`.
    """
    hulls = {name: lower_hull(settings) for name, settings in offers.items()}
    chosen = {name: hull[0] for name, hull in hulls.items()}
    left = budget - sum(offers[name][index].cost for name, index in chosen.items())
    if left < 0:
        raise ImpossibleBudget(budget - left)
    # One step of each matrix waits at a time: equal slopes differ by rounding and must not overtake.
    waiting: list[_Step] = []
    for name in hulls:
        _put(waiting, _step(name, offers[name], hulls[name], chosen[name], left))
    while waiting:
        step = heappop(waiting)
        name, settings = step.name, offers[step.name]
        if settings[step.to].cost - settings[chosen[name]].cost <= left:
            left -= settings[step.to].cost - settings[chosen[name]].cost
            chosen[name] = step.to
        _put(waiting, _step(name, settings, hulls[name], chosen[name], left))
    return chosen


class _Step(NamedTuple):
    gain: float
    """Minus the loss saved per cost, so that the best step comes first."""
    cost: int
    name: str
    to: int


def _put(waiting: list[_Step], step: _Step | None) -> None:
    if step is not None:
        heappush(waiting, step)


def _step(name: str, settings: Sequence[Setting], hull: Sequence[int], here: int, left: int) -> _Step | None:
    """The next corner of the hull; where that is too dear, the steepest of all steps that fit."""
    now = settings[here]

    def step(to: int) -> _Step:
        there = settings[to]
        return _Step((there.loss - now.loss) / (there.cost - now.cost), there.cost, name, to)

    corner = next((index for index in hull if settings[index].cost > now.cost), None)
    if corner is not None and settings[corner].cost <= now.cost + left:
        return step(corner)
    within = (i for i, s in enumerate(settings) if now.cost < s.cost <= now.cost + left and s.loss < now.loss)
    return min(map(step, within), default=None)


def lower_hull(settings: Sequence[Setting]) -> list[int]:
    """Indices of the settings on the lower convex hull, from the cheapest to the least loss."""
    hull: list[int] = []
    for index in sorted(range(len(settings)), key=lambda index: settings[index]):
        point = settings[index]
        if hull and point.loss >= settings[hull[-1]].loss:
            continue
        while len(hull) > 1 and not _turns_up(settings[hull[-2]], settings[hull[-1]], point):
            hull.pop()
        hull.append(index)
    return hull


def _turns_up(first: Setting, middle: Setting, last: Setting) -> bool:
    """Whether the loss falls more steeply before `middle` than after it."""
    before = (middle.loss - first.loss) * (last.cost - middle.cost)
    return before < (last.loss - middle.loss) * (middle.cost - first.cost)


def low_rank_settings(
    losses: Sequence[float], out_features: int, in_features: int, bias_cost: int = 0
) -> list[Setting]:
    """Settings of a factorised matrix: rank 1, 2, … below break-even, then dense without loss.

    `losses[r - 1]` is the loss at rank r; `bias_cost` is what any rank costs beside its factors.
    """
    each, dense = out_features + in_features, out_features * in_features
    ranks = range(1, min(len(losses), (dense - bias_cost - 1) // each) + 1)
    return [*(Setting(rank * each + bias_cost, losses[rank - 1]) for rank in ranks), Setting(dense, 0.0)]


def rank_of(offers: Sequence[Setting], index: int) -> int | None:
    """The rank that an index into `low_rank_settings` stands for; None is dense."""
    return None if index == len(offers) - 1 else index + 1


def even(offers: Mapping[str, Sequence[Setting]], budget: int) -> dict[str, int]:
    """The same share of its dearest setting for every matrix, rounded down; settings by rising cost.

    What rounding leaves over buys one step more where that fits, cheap steps first.

    Raises:
        ImpossibleBudget: the cheapest settings cost more than `budget`.
    """
    costs = {name: [setting.cost for setting in settings] for name, settings in offers.items()}

    def at(share: float) -> dict[str, int]:
        return {name: max(0, bisect_right(cost, share * cost[-1]) - 1) for name, cost in costs.items()}

    def total(chosen: Mapping[str, int]) -> int:
        return sum(costs[name][index] for name, index in chosen.items())

    chosen, low, high = at(0.0), 0.0, 1.0
    if total(chosen) > budget:
        raise ImpossibleBudget(total(chosen))
    if total(at(1.0)) <= budget:
        return at(1.0)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if total(at(middle)) <= budget:
            low, chosen = middle, at(middle)
        else:
            high = middle
    left = budget - total(chosen)
    steps = [(costs[n][i + 1] - costs[n][i], n) for n, i in chosen.items() if i + 1 < len(costs[n])]
    for cost, name in sorted(steps):
        if cost <= left:
            chosen[name], left = chosen[name] + 1, left - cost
    return chosen


def even_at(offers: Mapping[str, Sequence[Setting]], share: float) -> dict[str, int]:
    """`even` at a share of all the dearest settings, or the cheapest settings where those cost more."""
    cheapest = sum(settings[0].cost for settings in offers.values())
    dearest = sum(settings[-1].cost for settings in offers.values())
    return even(offers, max(int(share * dearest), cheapest))


def even_for(
    offers: Mapping[str, Sequence[Setting]],
    share: float | None,
    anatomy: Anatomy,
    target: Target | None,
    why: str = "",
) -> dict[str, int]:
    """`even` so that the whole model meets `target`, or at `share` where one is given; dense without either.

    Costs are in parameters of the model's dtype, and the dearest setting of each matrix is what it costs
    in `anatomy`. `why`: what else the smallest size is due to, for the message.

    Raises:
        ImpossibleBudget: the cheapest settings make the model larger than `target`.
    """
    if share is not None or target is None:
        return even_at(offers, 1.0 if share is None else share)
    width = anatomy.dtype.itemsize if target.metric == "bytes" else 1
    fixed = anatomy.size(target.metric) - width * sum(settings[-1].cost for settings in offers.values())
    try:
        return even(offers, (target.value - fixed) // width)
    except ImpossibleBudget as error:
        raise ImpossibleBudget(fixed + error.smallest * width, why) from None
