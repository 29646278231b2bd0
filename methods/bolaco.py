"""Bolaco: projections on centred principal outputs, their ratios found by Bayesian optimisation."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from methods.reduced_order import Inputs, factors_of, low_rank_plan, within_share
from suite.allocation import Setting, even_for, low_rank_settings, rank_of
from suite.calibration import Calibration
from suite.curvature import loss_at_the_end
from suite.errors import CellFailed, InputError, require
from suite.layers import replace
from suite.linalg import Projection, principal_outputs
from suite.method import Method, MethodConfig, Plan, Target, register
from suite.models.anatomy import Anatomy, LinearShape, anatomy_of
from suite.streaming import stream

LEFT_DENSE = frozenset(("value", "query_key_value"))
POOLS = 32
"""Groups of sequences whose covariances, each about its own mean, are pooled."""
SMALLEST_RATIO = 0.2
HELD_BACK = 16
"""Sequences of the last quarter of the calibration text that trials are judged on, at most."""
_WORST_LOSS = 1e3
_HALVINGS = 40


class BolacoConfig(MethodConfig):
    """`trials`: ratios tried on held-back calibration text; 0 gives all linears the same share.

    `share`: kept share of the parameters of the linears that are factorised; solved for the budget
    when not given.
    """

    trials: int = Field(default=20, ge=0)
    share: float | None = Field(default=None, gt=0, le=1)


@register
class Bolaco(Method[BolacoConfig]):
    """Every linear W becomes V·Vᵀ·W with a bias that keeps its mean output; values stay dense.

    V are the principal directions of the outputs about their mean: of the covariance pooled over groups
    of sequences, from the dense model. One ratio for query and key, output, gate, up and down (those
    the architecture has) holds in all blocks. A Gaussian process proposes them in [0.2, 1]; a proposal is
    scaled to the planned size, which replaces the paper's constraint, and judged by its perplexity on the
    last quarter of the calibration text, of which 16 sequences at most, without the paper's small KL term.
    Equal ratios are the first trial. A fused query-key-value projection holds values: it stays dense.
    """

    name = "bolaco"
    family = "low-rank"
    source = "Ji et al., Feature-based Low-Rank Compression with Bayesian Optimization (arXiv 2405.10616)"
    needs = frozenset({"calibration"})
    library: ClassVar[str] = "optuna"
    adaptive = True
    Config = BolacoConfig

    def plan(self, anatomy: Anatomy, target: Target | None, seed: int) -> Plan:
        if self.config.trials:
            require(self.library, "bolaco's search")
        offers = _offers([x for x in anatomy.dense_linears(self.name) if x.role not in LEFT_DENSE])
        chosen = even_for(offers, self.config.share, anatomy, target, "value projections stay dense")
        return self._plan(anatomy.linears, offers, chosen).model_copy(update={"notes": {"seed": seed}})

    def _plan(
        self,
        linears: tuple[LinearShape, ...],
        offers: Mapping[str, list[Setting]],
        chosen: Mapping[str, int],
    ) -> Plan:
        ranks = {path: rank_of(offers[path], index) for path, index in chosen.items()}
        return low_rank_plan(linears, ranks, True, {"trials": self.config.trials})

    def compress(self, model: PreTrainedModel, plan: Plan, calibration: Calibration | None) -> Plan | None:
        assert calibration is not None
        if not plan.modules:
            return None
        anatomy, tokens = anatomy_of(model), calibration.tokens
        lines = [line for line in anatomy.linears if line.path in plan.modules]
        done = plan
        if self.config.trials and len({_searched_role(line) for line in lines}) > 1:
            done = self._search(model, anatomy, lines, plan, tokens)
        put_in_place(model, done, outputs_of(model, tokens, lines))
        return done

    def _search(
        self, model: PreTrainedModel, anatomy: Anatomy, lines: list[LinearShape], plan: Plan, tokens: Tensor
    ) -> Plan:
        """The plan of the ratios with the least held-back loss, of no more than the planned size."""
        import optuna

        if len(tokens) < 2:
            raise InputError(
                "bolaco holds back calibration text: give it two sequences or more, or trials=0."
            )
        held = max(1, len(tokens) // 4)
        outputs = outputs_of(model, tokens[:-held], lines)
        watching = tokens[-held:][:HELD_BACK]
        offers = _offers(lines)
        budget = sum(offers[line.path][plan.modules[line.path].arguments["rank"] - 1].cost for line in lines)
        roles = {line.path: _searched_role(line) for line in lines}

        def planned(ratios: Mapping[str, float]) -> Plan:
            chosen = at_ratios(offers, {path: ratios[role] for path, role in roles.items()}, budget)
            return self._plan(anatomy.linears, offers, chosen)

        def objective(trial: Any) -> float:
            ratios = {r: trial.suggest_float(r, SMALLEST_RATIO, 1.0) for r in dict.fromkeys(roles.values())}
            dense = put_in_place(model, planned(ratios), outputs)
            try:
                loss = held_back_loss(model, watching)
            except CellFailed:  # a trial whose values overflow is a bad one, not the end of the search
                loss = math.inf
            for path, linear in dense.items():
                model.set_submodule(path, linear)
            return loss if math.isfinite(loss) else _WORST_LOSS

        verbosity = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                sampler = optuna.samplers.GPSampler(seed=plan.notes["seed"])
                study = optuna.create_study(sampler=sampler)
                study.enqueue_trial(dict.fromkeys(roles.values(), 1.0))
                study.optimize(objective, n_trials=self.config.trials)
        finally:
            optuna.logging.set_verbosity(verbosity)
        losses = [trial.value for trial in study.trials]
        notes = {**plan.notes, "ratios": study.best_params, "held_out_loss": losses}
        return planned(study.best_params).model_copy(update={"notes": notes})


def _searched_role(line: LinearShape) -> str:
    """Query and key share a ratio."""
    return "query" if line.role == "key" else line.role


def _offers(lines: list[LinearShape]) -> dict[str, list[Setting]]:
    """Settings by rank, then dense; a linear without a bias gains one with any rank."""
    offers = {}
    for line in lines:
        m, n = line.out_features, line.in_features
        offers[line.path] = low_rank_settings([0.0] * min(m, n), m, n, 0 if line.bias else m)
    return offers


def at_ratios(
    offers: Mapping[str, list[Setting]], ratios: Mapping[str, float], budget: int
) -> dict[str, int]:
    """Settings whose shares are in proportion to `ratios` (at most 1) and cost no more than `budget`.

    What rounding leaves over buys one step more where that fits, cheap steps first.
    """

    def at(scale: float) -> dict[str, int]:
        return {p: within_share(offers[p], min(1.0, scale * ratio)) for p, ratio in ratios.items()}

    def total(chosen: Mapping[str, int]) -> int:
        return sum(offers[path][index].cost for path, index in chosen.items())

    low, high = 0.0, 1 / min(ratios.values())
    if total(at(high)) <= budget:
        return at(high)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if total(at(middle)) <= budget else (low, middle)
    chosen = at(low)
    left = budget - total(chosen)
    open_paths = [path for path, index in chosen.items() if index + 1 < len(offers[path])]
    steps = [(offers[p][chosen[p] + 1].cost - offers[p][chosen[p]].cost, p) for p in open_paths]
    for cost, path in sorted(steps):
        if cost <= left:
            chosen[path], left = chosen[path] + 1, left - cost
    return chosen


def outputs_of(
    model: PreTrainedModel, tokens: Tensor, lines: list[LinearShape]
) -> dict[str, tuple[Projection, Tensor]]:
    """Principal directions of the dense outputs of every linear about their mean, and the mean input (n).

    The directions of all linears are held at once, in float32: about as many numbers as weights.
    """
    found = {}
    for block in stream(model, tokens, batch_size=math.ceil(len(tokens) / POOLS)):
        prefix = f"{block.path}."
        inside = [line.path.removeprefix(prefix) for line in lines if line.block == block.index]
        groups = anatomy_of(model).layout.inputs_shared(inside)
        first = [group[0] for group in groups]
        inputs_of = Inputs.of_all(block, first, centred=True, pooled=True, advance=True)
        for group in groups:
            inputs = inputs_of[group[0]]
            assert inputs.mean is not None
            for path in group:
                weight = cast(nn.Linear, block.module.get_submodule(path)).weight
                full = principal_outputs(weight, inputs.moment)
                narrow = Projection(full.values, full.reduce.float(), full.expand.float())
                found[prefix + path] = (narrow, inputs.mean)
    return found


@torch.no_grad()
def put_in_place(
    model: PreTrainedModel, plan: Plan, outputs: Mapping[str, tuple[Projection, Tensor]]
) -> dict[str, nn.Module]:
    """Factorise the linears of `plan`; returns the dense ones by path."""
    dense: dict[str, nn.Module] = {}
    for path, spec in plan.modules.items():
        linear = cast(nn.Linear, model.get_submodule(path))
        projection, mean = outputs[path]
        wide = Projection(projection.values, projection.reduce.double(), projection.expand.double())
        replace(model, path, factors_of(linear, wide, spec.arguments["rank"], mean))
        dense[path] = linear
    return dense


def held_back_loss(model: PreTrainedModel, tokens: Tensor) -> float:
    """Mean loss per token (nats) on `tokens` (sequences × length): the logarithm of the perplexity."""
    leaving: list[Tensor] = []
    for block in stream(model, tokens):
        leaving = block.inputs
    return loss_at_the_end(model, tokens, leaving)
