"""Reduced-order modelling: linears projected onto the principal directions of their own outputs."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field, FilePath, model_validator
from torch import Tensor, nn
from transformers import PreTrainedModel

from suite.allocation import Setting, even, even_for, low_rank_settings, rank_of, spread
from suite.calibration import Calibration
from suite.curvature import loss_at_the_end, loss_gradients, pull_back
from suite.errors import CellFailed, ImpossibleBudget, InputError
from suite.layers import LowRankLinear, ModuleSpec, replace
from suite.linalg import Projection, principal_outputs
from suite.method import Method, MethodConfig, Plan, Target, register
from suite.models.anatomy import Anatomy, LinearShape, anatomy_of
from suite.shares import shares_for
from suite.streaming import BlockOnStream, second_moment, stream

Ranks = dict[str, int | None]
"""Path of a linear -> its rank; None is dense."""

SENSED = 8
"""Sequences whose loss gradients are taken."""
DAMPING = 0.2
"""How much of the identity is mixed into the moment of the gradients: few tokens leave it noisy."""
DEPTHS = (0.25, 0.375, 0.5, 0.75, 1.0)
"""The paper's shares of the blocks to reduce, counted from the last; see card and section 3.3."""
LEAST_SHARE = 0.05
TEMPERS = (0.85, 1.0, 1.15)
"""Searched: powers of each linear's total loss, below one nearer to equal shares."""
TRIAL_SEQUENCES = 16


class ReducedOrderConfig(MethodConfig):
    """`share`: kept share of the linears' parameters; solved for the budget when not given.

    `allocation`: how it is spread. "water-filled" minimises the predicted rise of the loss over the
    whole model; "searched" tries several tempers of that on held-back calibration text; "modules"
    is the paper's: the last `blocks` blocks at one share, the rest dense (`blocks` chosen on
    held-back text when not given); "uniform" is the same share everywhere.

    `metric`: directions that matter most to the "loss" (to second order), or the paper's, largest
    in the "outputs". `centred`: directions about the mean output, which a bias keeps exact. `shares`:
    an allocation file (`weighin profile --allocate`) instead of `share` and `allocation`.
    """

    share: float | None = Field(default=None, gt=0, le=1)
    allocation: Literal["water-filled", "searched", "modules", "uniform"] = "water-filled"
    blocks: int | None = Field(default=None, ge=1)
    metric: Literal["loss", "outputs"] = "loss"
    centred: bool = False
    shares: FilePath | None = None

    @model_validator(mode="after")
    def _blocks_only_for_modules(self) -> ReducedOrderConfig:
        if self.blocks is not None and self.allocation != "modules":
            raise ValueError(f"blocks={self.blocks} needs allocation=modules")
        if self.shares is not None and (self.share is not None or "allocation" in self.model_fields_set):
            raise ValueError("shares decides what share and allocation would: give it alone")
        return self


@register
class ReducedOrder(Method[ReducedOrderConfig]):
    """Every linear W becomes second·first = V·Vᵀ·W with V the top principal directions of its outputs.

    Uncentred, this is the best approximation of rank r to the outputs W·x on the calibration text.
    Each linear sees the inputs that the linears already reduced give it. In the metric of the loss,
    outputs are weighted by the second moment of the loss gradient (G) before directions are chosen,
    and W becomes L⁻ᵀ·V·Vᵀ·Lᵀ·W with G = L·Lᵀ. The paper has neither gradients nor water-filling:
    `rom(allocation=modules,metric=outputs)` is its own method.
    """

    name = "rom"
    family = "low-rank"
    source = "Chavan et al., Reduced Order Modelling of Latent Features in LLMs (arXiv 2312.07046)"
    needs = frozenset({"calibration"})
    adaptive = True
    Config = ReducedOrderConfig

    def plan(self, anatomy: Anatomy, target: Target | None, seed: int) -> Plan:
        linears = anatomy.dense_linears(self.name)
        inside = self._inside(linears, anatomy.n_blocks, self.config.blocks)
        offers = {line.path: self._settings(line) for line in inside}
        if self.config.shares is not None:
            shares = shares_for(self.config.shares, anatomy)
            chosen = {path: within_share(settings, shares[path]) for path, settings in offers.items()}
            return self._plan(linears, _ranks(offers, chosen))
        chosen = even_for(offers, self.config.share, anatomy, target, self._why())
        return self._plan(linears, _ranks(offers, chosen))

    def compress(self, model: PreTrainedModel, plan: Plan, calibration: Calibration | None) -> Plan | None:
        assert calibration is not None
        if not plan.modules:
            return None
        work = _Work(self.config, model, calibration.tokens)
        ranks, notes = self._allocate(work, plan)
        work.reduce(ranks)
        done = self._plan(work.anatomy.linears, ranks)
        return done.model_copy(update={"notes": notes})

    def _allocate(self, work: _Work, plan: Plan) -> tuple[Ranks, dict[str, Any]]:
        """Ranks of at most the planned size, and what is worth keeping about how they came about."""
        linears = work.anatomy.linears
        planned: Ranks = {line.path: None for line in linears}
        planned |= {path: spec.arguments["rank"] for path, spec in plan.modules.items()}
        budget = sum(self._cost(line, planned[line.path]) for line in linears)
        if self.config.allocation == "uniform" or self.config.blocks or self.config.shares:
            return planned, {}
        if self.config.allocation == "modules":
            return self._best(work, self._by_depth(linears, work.anatomy.n_blocks, budget))
        # What the plan leaves dense stays so: it may have been made for one part of the model.
        free = [line for line in linears if line.path in plan.modules]
        budget -= sum(self._cost(line, None) for line in linears if line not in free)
        offers = {line.path: self._settings(line, work.losses[line.path]) for line in free}
        candidates = {
            f"temper {temper:g}": planned | _ranks(offers, spread(_tempered(offers, temper), budget))
            for temper in (TEMPERS if self.config.allocation == "searched" else (1.0,))
        }
        return self._best(work, candidates)

    def _best(self, work: _Work, candidates: Mapping[str, Ranks]) -> tuple[Ranks, dict[str, Any]]:
        if len(candidates) == 1:
            return next(iter(candidates.values())), {}
        trials = {name: work.trial(ranks) for name, ranks in candidates.items()}
        best = min(trials, key=lambda name: trials[name])
        return candidates[best], {"chosen": best, "held_out_loss": trials}

    def _by_depth(self, linears: tuple[LinearShape, ...], n_blocks: int, budget: int) -> dict[str, Ranks]:
        candidates = {}
        for blocks in sorted({max(1, round(depth * n_blocks)) for depth in DEPTHS}):
            inside = self._inside(linears, n_blocks, blocks)
            offers = {line.path: self._settings(line) for line in inside}
            dense = sum(settings[-1].cost for settings in offers.values())
            left = budget - sum(self._cost(line, None) for line in linears) + dense
            if left >= LEAST_SHARE * dense or blocks == n_blocks:
                try:
                    ranks = _ranks(offers, even(offers, left))
                except ImpossibleBudget:
                    continue
                candidates[f"last {blocks}"] = {line.path: ranks.get(line.path) for line in linears}
        return candidates

    def _why(self) -> str:
        return f"only the last {self.config.blocks} blocks may change" if self.config.blocks else ""

    def _inside(
        self, linears: tuple[LinearShape, ...], n_blocks: int, blocks: int | None
    ) -> list[LinearShape]:
        if blocks is not None and blocks > n_blocks:
            raise InputError(
                f"{self.name}(blocks={blocks}): this model has {n_blocks} blocks; ask for fewer."
            )
        return [line for line in linears if blocks is None or line.block >= n_blocks - blocks]

    def _settings(self, line: LinearShape, losses: Iterable[float] | None = None) -> list[Setting]:
        m, n = line.out_features, line.in_features
        by_rank = [0.0] * min(m, n) if losses is None else list(losses)
        return low_rank_settings(by_rank, m, n, m if self.config.centred and not line.bias else 0)

    def _cost(self, line: LinearShape, rank: int | None) -> int:
        settings = self._settings(line)
        return settings[-1].cost if rank is None else settings[rank - 1].cost

    def _plan(self, linears: Iterable[LinearShape], ranks: Ranks) -> Plan:
        return low_rank_plan(linears, ranks, self.config.centred, {"allocation": self.config.allocation})


class _Work:
    """One model being reduced, and what its dense form and the calibration text say about it."""

    def __init__(self, config: ReducedOrderConfig, model: PreTrainedModel, tokens: Tensor):
        self.config, self.model, self.tokens = config, model, tokens
        self.anatomy = anatomy_of(model)
        self.held = len(tokens) // 4
        fitting = tokens[: len(tokens) - self.held]
        self.fitting, self.watching = fitting[:TRIAL_SEQUENCES], tokens[len(fitting) :][:TRIAL_SEQUENCES]
        self.sensed = fitting[:SENSED]
        self.losses: dict[str, list[float]] = {}
        """Predicted rise of the mean loss (nats a token) of each linear at rank 1, 2, …"""
        self.gradients: list[list[Tensor]] = []
        if config.metric == "loss" or config.allocation in ("water-filled", "searched"):
            self.gradients = loss_gradients(model, self.sensed, self._sense)

    def _sense(self, block: BlockOnStream, moments: dict[str, Tensor]) -> None:
        """Note what every rank of every linear in a dense block would cost the loss."""
        if self.config.allocation not in ("water-filled", "searched"):
            return
        groups = self._groups(block)
        inputs_of = Inputs.of_all(block, [group[0] for group in groups], self.config.centred)
        for group in groups:
            inputs = inputs_of[group[0]]
            for path in group:
                metric, scale = _metric(moments[path])
                projection = self._project(block, path, inputs, metric)
                parts = projection.values
                if self.config.metric == "outputs":
                    parts = parts * (projection.reduce @ metric * projection.reduce).sum(1)
                tail = parts.flip(0).cumsum(0).flip(0)[1:].tolist()
                unit = scale / (2 * self.sensed.numel() ** 2)
                self.losses[f"{block.path}.{path}"] = [unit * loss for loss in (*tail, 0.0)]

    def _groups(self, block: BlockOnStream) -> list[tuple[str, ...]]:
        """Paths inside a block by shared input, in the order they run; factors stand alone."""
        prefix = f"{block.path}."
        inside = [
            line.path.removeprefix(prefix) for line in self.anatomy.linears if line.block == block.index
        ]
        return self.anatomy.layout.inputs_shared(inside)

    def _project(self, block: BlockOnStream, path: str, inputs: Inputs, metric: Tensor | None) -> Projection:
        weight = _linear(block, path).weight
        used = metric if self.config.metric == "loss" else None
        return principal_outputs(weight, inputs.moment, used)

    def reduce(self, ranks: Ranks) -> None:
        """Reduce the model to `ranks`, from the first block on, with all calibration text."""
        for block in stream(self.model, self.tokens, batch_size=1):
            self._reduce_block(block, ranks)

    def trial(self, ranks: Ranks) -> float:
        """Mean loss on held-back text of the model reduced to `ranks`, infinite where values overflow.

        The model is left dense.
        """
        dense: dict[str, nn.Module] = {}
        # The watching stream comes first, so that zip lets it pass through the last block too.
        pair = (stream(self.model, self.watching, 1), stream(self.model, self.fitting, 1))
        watched: list[Tensor] = []
        try:
            for watching, block in zip(*pair, strict=False):
                watched = watching.inputs
                self._put_back(dense)
                dense = self._reduce_block(block, ranks)
        except CellFailed:
            return math.inf
        finally:
            self._put_back(dense)
        return loss_at_the_end(self.model, self.watching, watched)

    def _put_back(self, modules: Mapping[str, nn.Module]) -> None:
        for path, module in modules.items():
            self.model.set_submodule(path, module)

    def _reduce_block(self, block: BlockOnStream, ranks: Ranks) -> dict[str, nn.Module]:
        """Put the factors in place, group by group; returns the dense linears by path."""
        prefix = f"{block.path}."
        before: dict[str, nn.Module] = {}
        chosen = {p.removeprefix(prefix): r for p, r in ranks.items() if r and p.startswith(prefix)}
        if not chosen:
            return before
        moments: dict[str, Tensor] = {}
        if self.config.metric == "loss":
            moments, _ = pull_back(block, self.gradients[block.index])
        for group in self._groups(block):
            if reduced := chosen.keys() & set(group):
                inputs = Inputs.of_all(block, [group[0]], self.config.centred)[group[0]]
            for path in reduced:
                linear = _linear(block, path)
                metric = _metric(moments[path])[0] if moments else None
                projection = self._project(block, path, inputs, metric)
                before[prefix + path] = linear
                factors = factors_of(linear, projection, chosen[path], inputs.mean)
                replace(self.model, prefix + path, factors)
            block.settle(group)
        return before


@dataclass(frozen=True)
class Inputs:
    """Second moment of a linear's inputs; about their mean (n) when that is given."""

    moment: Tensor
    mean: Tensor | None

    @classmethod
    def of_all(
        cls,
        block: BlockOnStream,
        paths: Sequence[str],
        centred: bool,
        pooled: bool = False,
        advance: bool = False,
    ) -> dict[str, Inputs]:
        """The inputs of the linears at `paths`, in one pass; pooled ones are about the mean of each batch.

        With `advance`, that pass makes the next block's inputs too.
        """
        if not centred:
            return {path: cls(moment, None) for path, moment in block.second_moments(paths, advance).items()}
        moments: dict[str, Tensor] = {}
        sums: dict[str, list[tuple[Tensor, int]]] = {path: [] for path in paths}

        def add(path: str, value: Tensor) -> None:
            part = second_moment(value)
            moments[path] = moments[path].add_(part) if path in moments else part
            sums[path].append((value.double().sum(0), len(value)))

        block.observe({path: partial(add, path) for path in paths}, advance)
        return {path: cls._about_the_mean(moments[path], sums[path], pooled) for path in paths}

    @classmethod
    def _about_the_mean(cls, moment: Tensor, sums: list[tuple[Tensor, int]], pooled: bool) -> Inputs:
        total, tokens = torch.zeros_like(sums[0][0]), sum(count for _, count in sums)
        for part, _ in sums:
            total.add_(part)
        for part, count in sums if pooled else [(total, tokens)]:
            moment = moment - count * torch.outer(part / count, part / count)
        return cls(moment, total / tokens)


def _linear(block: BlockOnStream, path: str) -> nn.Linear:
    linear = block.module.get_submodule(path)
    assert isinstance(linear, nn.Linear)
    return linear


def _metric(moment: Tensor) -> tuple[Tensor, float]:
    """The damped moment of a linear's gradients with mean diagonal 1, and the scale it had."""
    size = len(moment)
    scale = float(moment.trace()) / size
    identity = torch.eye(size, dtype=moment.dtype, device=moment.device)
    if scale == 0:
        return identity, 0.0
    return (1 - DAMPING) * moment / scale + DAMPING * identity, scale


def factors_of(linear: nn.Linear, projection: Projection, rank: int, mean: Tensor | None) -> LowRankLinear:
    """The two thin linears; with a `mean` input (n), a bias keeps the output for it."""
    weight = linear.weight.detach().double()
    left, right = projection.expand[:, :rank], projection.reduce[:rank] @ weight
    module = LowRankLinear.from_factors(left, right, linear)
    if mean is not None:
        bias = weight @ mean - left @ (right @ mean)
        if linear.bias is not None:
            bias = bias + linear.bias.double()
        module.second.bias = nn.Parameter(bias.to(linear.weight.dtype))
    return module


def _tempered(offers: Mapping[str, list[Setting]], power: float) -> dict[str, list[Setting]]:
    """Offers whose losses are scaled so that each linear's largest becomes its `power`."""
    tempered = {}
    for path, settings in offers.items():
        factor = settings[0].loss ** (power - 1) if settings[0].loss > 0 else 1.0
        tempered[path] = [Setting(cost, loss * factor) for cost, loss in settings]
    return tempered


def within_share(settings: list[Setting], share: float) -> int:
    """The dearest setting of at most `share` of the weights; settings by rising cost."""
    costs = [setting.cost for setting in settings]
    return max(0, bisect_right(costs, share * costs[-1]) - 1)


def _ranks(offers: Mapping[str, list[Setting]], chosen: Mapping[str, int]) -> Ranks:
    return {path: rank_of(offers[path], index) for path, index in chosen.items()}


def low_rank_plan(
    linears: Iterable[LinearShape], ranks: Ranks, with_bias: bool, knobs: Mapping[str, Any]
) -> Plan:
    """A plan that factorises the linears at `ranks`; those without a rank, or at None, stay dense.

    The knobs shown gain the share kept of all `linears` and the range of ranks.
    """
    modules = {}
    kept = total = 0
    for line in linears:
        m, n, rank = line.out_features, line.in_features, ranks.get(line.path)
        bias = line.bias or with_bias
        total += m * n
        kept += m * n if rank is None else rank * (m + n) + m * (bias and not line.bias)
        if rank is not None:
            modules[line.path] = ModuleSpec(
                type="low_rank",
                arguments={"in_features": n, "out_features": m, "rank": rank, "bias": bias},
            )
    found = sorted(spec.arguments["rank"] for spec in modules.values())
    shown = {"share": round(kept / total, 6), "ranks": f"{found[0]}..{found[-1]}" if found else "full"}
    return Plan(knobs={**shown, **knobs}, modules=modules)
