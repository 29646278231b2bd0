"""Tensor networks in place of the decoder's linears."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BeforeValidator, Field, FilePath, model_validator
from torch import Tensor, nn
from transformers import PreTrainedModel

from methods.tensor_layers import MpoLinear, TensorLinear, TuckerLinear
from suite.allocation import Setting, even, even_at, spread
from suite.calibration import Calibration
from suite.curvature import loss_gradients, pull_back
from suite.errors import ImpossibleBudget, InputError
from suite.layers import ModuleSpec, replace
from suite.method import Method, MethodConfig, Plan, Target, register
from suite.models.anatomy import Anatomy, LinearShape, anatomy_of
from suite.shares import shares_for
from suite.streaming import BlockOnStream, stream
from suite.tensor_fit import Coordinates, Importance, Weighting, fit
from suite.tensor_shapes import Form, Pairing, Rung, ladder, ladder_on_loss, network_of
from suite.tensors import Network

SENSED = 8
"""Sequences whose loss gradients are taken."""
DAMPING = 0.2
"""How much of the identity is mixed into the moment of the gradients: few tokens leave it noisy."""


def _joined(value: object) -> object:
    """Lists and mappings, as Python and YAML give them, in the one form that a recipe can hold."""
    if isinstance(value, Mapping):
        return " ".join(f"{key}:{setting}" for key, setting in value.items())
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else value


Words = Annotated[str, BeforeValidator(_joined)]


class TensorNetworkConfig(MethodConfig):
    """`share`: kept share of the linears' parameters; solved for the budget when not given.

    `bonds`: "uniform" keeps the same share of every matrix, "water-filled" spreads the size over the
    model by what the calibration text says each bond is worth. `form`, `sites`, `pairing`: the shape
    of the networks (see `suite.tensor_shapes.network_of`); pairing is crossed for an MPO and square
    for Tucker unless given. `weighting`: the coordinates in which matrices are truncated. `metric`:
    errors count by what they cost the "loss" (to second order), or as squared errors of the
    "outputs". `refine`: at most so many steps of refinement.

    `exclude`, `shares` and `limits` name linears by role ("down"), by a piece of their path
    ("layers.0", "mlp.up_proj") or by all of it, separated by blanks; of several
    matches the last wins, `limits` before `shares` before `exclude`.
    `exclude=down layers.0` leaves them dense, `shares=gate:0.5 layers.29:1` fixes the kept share,
    `limits=layers.3:40` the largest bond. In Python, lists and mappings may be given. `shares` may
    also be an allocation file (`weighin profile --allocate`).
    """

    share: float | None = Field(default=None, gt=0, le=1)
    form: Form = "mpo"
    sites: Literal[2, 3] = 2
    pairing: Pairing | None = None
    bonds: Literal["uniform", "water-filled"] = "water-filled"
    weighting: Weighting = "kronecker"
    metric: Literal["loss", "outputs"] = "loss"
    refine: int = Field(default=20, ge=0)
    exclude: Words = ""
    shares: Annotated[FilePath | Words, Field(union_mode="left_to_right")] = ""
    limits: Words = ""

    @model_validator(mode="after")
    def _consistent(self) -> TensorNetworkConfig:
        if self.form == "tucker" and self.sites != 2:
            raise ValueError("form=tucker has 2 sites, four legs in all; leave out 'sites'")
        for name, kind, high in (("shares", float, 1.0), ("limits", int, float("inf"))):
            given = getattr(self, name)
            for word in [] if isinstance(given, Path) else given.split():
                key, _, text = word.rpartition(":")
                try:
                    fine = bool(key) and 0 < kind(text) <= high
                except ValueError:
                    fine = False
                if not fine:
                    example = "down:0.5" if kind is float else "down:40"
                    raise ValueError(f"'{word}' in {name} is not a linear and its value, such as {example}")
        return self


Offers = dict[str, tuple[Rung, ...]]
"""Path of a linear -> what it can become, by rising size; the last is dense and has no bonds."""


@register
class TensorNetwork(Method[TensorNetworkConfig]):
    """Every linear becomes a tensor network: a matrix product operator, or a Tucker decomposition.

    CompactifAI truncates each weight by sequential SVDs and makes up for it by retraining; that is
    `tensor-network(sites=3,pairing=square,bonds=uniform,weighting=none,metric=outputs,refine=0)`.
    By default the networks are fitted instead to the inputs they meet, given the networks before
    them, and to the outputs that the loss minds. Default factors are crossed, as in (288·2) × (2·288)
    for 576 × 576: site 1 holds most of the rows, site 2 most of the columns. With sites of one size
    this costs as many parameters as square factors (24·24) × (24·24), but has the smaller weighted
    error on nearly every matrix tried, and needs a twelfth of the multiplications when x runs
    through the cores. Embedding and head are left alone, and so is a matrix whose network would be
    no smaller.
    """

    name = "tensor-network"
    family = "tensor network"
    source = "Tomut et al., CompactifAI (arXiv 2401.14109); MPO: Novikov et al. (arXiv 1509.06569)"
    needs = frozenset({"calibration"})
    adaptive = True
    Config = TensorNetworkConfig

    def plan(self, anatomy: Anatomy, target: Target | None, seed: int) -> Plan:
        linears = anatomy.dense_linears(self.name)
        fixed = self._fixed(anatomy)
        offers = {line.path: self._offers(line) for line in linears if line.path not in fixed}
        settings = _settings(offers)
        if self.config.share is not None or target is None:
            chosen = even_at(settings, 1.0 if self.config.share is None else self.config.share)
        else:
            width = anatomy.dtype.itemsize if target.metric == "bytes" else 1
            dense = sum(line.out_features * line.in_features for line in linears)
            other = anatomy.size(target.metric) - width * (
                dense - sum(rung.parameters for rung in fixed.values())
            )
            try:
                chosen = even(settings, (target.value - other) // width)
            except ImpossibleBudget as error:
                why = "what is excluded or fixed stays" if fixed else ""
                raise ImpossibleBudget(other + error.smallest * width, why) from None
        return self._plan(linears, fixed | {path: offers[path][index] for path, index in chosen.items()})

    def compress(self, model: PreTrainedModel, plan: Plan, calibration: Calibration | None) -> Plan | None:
        assert calibration is not None
        if not plan.modules:
            return None
        work = _Work(self, model, calibration.tokens)
        anatomy = anatomy_of(model)
        linears = anatomy.linears
        rungs = self._planned(linears, plan)
        if self.config.bonds == "water-filled":
            # What the plan leaves dense stays so: it may have been made for one part of the model.
            free = plan.modules.keys() - self._fixed(anatomy).keys()
            budget = sum(rungs[path].parameters for path in free)
            offers = {path: found for path, found in work.offers.items() if path in free}
            chosen = spread(_settings(offers), budget)
            rungs |= {path: offers[path][index] for path, index in chosen.items()}
        losses = work.carry_out(rungs)
        done = self._plan(linears, rungs)
        return done.model_copy(update={"notes": {"relative_losses": losses}})

    def network(self, line: LinearShape) -> Network:
        """The form that a linear's network has."""
        config = self.config
        # Tucker has a factor matrix on every leg, so long legs are dear there.
        pairing: Pairing = config.pairing or ("square" if config.form == "tucker" else "crossed")
        return network_of(line.out_features, line.in_features, config.form, config.sites, pairing)

    def overhead(self, line: LinearShape) -> int:
        """Parameters of a network beside its cores and the linear's own bias."""
        return line.in_features if self.config.weighting == "diagonal" else 0

    def _offers(self, line: LinearShape) -> tuple[Rung, ...]:
        return (*ladder(self.network(line), self.overhead(line)), _dense(line))

    def _fixed(self, anatomy: Anatomy) -> dict[str, Rung]:
        """The linears whose size the configuration decides."""
        linears = anatomy.linears
        fixed: dict[str, Rung] = {}
        for word in self.config.exclude.split():
            fixed |= {line.path: _dense(line) for line in self._named(word, linears)}
        if isinstance(self.config.shares, Path):
            shares = shares_for(self.config.shares, anatomy)
            fixed |= {line.path: self._within(line, shares[line.path]) for line in linears}
        else:
            for word in self.config.shares.split():
                key, _, share = word.rpartition(":")
                fixed |= {line.path: self._within(line, float(share)) for line in self._named(key, linears)}
        for word in self.config.limits.split():
            key, _, limit = word.rpartition(":")
            for line in self._named(key, linears):
                within = [r for r in self._offers(line)[:-1] if max(r.bonds) <= int(limit)]
                fixed[line.path] = max(within, default=_dense(line), key=_size)
        return fixed

    def _within(self, line: LinearShape, share: float) -> Rung:
        """The largest network of at most `share` of the weights."""
        rungs = self._offers(line)
        largest = share * line.out_features * line.in_features
        return max((rung for rung in rungs if rung.parameters <= largest), default=rungs[0], key=_size)

    def _named(self, key: str, linears: Sequence[LinearShape]) -> list[LinearShape]:
        found = [line for line in linears if line.role == key or f".{key}." in f".{line.path}."]
        if not found:
            roles = ", ".join(dict.fromkeys(line.role for line in linears))
            raise InputError(
                f"{self.name}: no linear of this model is called '{key}'. Use a role ({roles}) or"
                f" whole components of a path such as {linears[0].path}."
            )
        return found

    def _planned(self, linears: Iterable[LinearShape], plan: Plan) -> dict[str, Rung]:
        rungs = {}
        for line in linears:
            spec = plan.modules.get(line.path)
            if spec is None:
                rungs[line.path] = _dense(line)
            else:
                bonds = tuple(spec.arguments["bonds"])
                size = self.network(line).parameters(bonds) + self.overhead(line)
                rungs[line.path] = Rung(size, bonds)
        return rungs

    def _plan(self, linears: Iterable[LinearShape], rungs: Mapping[str, Rung]) -> Plan:
        modules: dict[str, ModuleSpec] = {}
        kept = total = 0
        factored: dict[str, list[int | None]] = {}
        for line in linears:
            rung = rungs[line.path]
            total += line.out_features * line.in_features
            kept += rung.parameters
            if not rung.bonds:
                continue
            network = self.network(line)
            kind: type[TensorLinear] = TuckerLinear if self.config.form == "tucker" else MpoLinear
            arguments = {
                "rows": network.rows,
                "columns": network.columns,
                "bonds": rung.bonds,
                "bias": line.bias,
                "scaled": self.config.weighting == "diagonal",
            }
            modules[line.path] = ModuleSpec(type=kind.type_name, arguments=arguments)
            factors = "×".join(f"({'·'.join(map(str, side))})" for side in (network.rows, network.columns))
            factored.setdefault(factors, []).append(kind.rows_to_factor(network, rung.bonds))
        bonds = sorted(max(spec.arguments["bonds"]) for spec in modules.values())
        knobs = {
            "share": round(kept / total, 6),
            "bonds": f"{bonds[0]}..{bonds[-1]}" if bonds else "full",
            "dense": sum(not rung.bonds for rung in rungs.values()),
            "factored_up_to_rows": {factors: _range(rows) for factors, rows in factored.items()},
        }
        return Plan(knobs=knobs, modules=modules)


class _Work:
    """One model being tensorised, and what its dense form and the calibration text say about it."""

    def __init__(self, method: TensorNetwork, model: PreTrainedModel, tokens: Tensor):
        self.method, self.config, self.model, self.tokens = method, method.config, model, tokens
        self.sensed = tokens[:SENSED]
        self.linears: dict[int, list[LinearShape]] = {}
        for line in anatomy_of(model).linears:
            self.linears.setdefault(line.block, []).append(line)
        self.offers: Offers = {}
        self.gradients: list[list[Tensor]] = []
        if self.config.metric == "loss":
            self.gradients = loss_gradients(model, self.sensed, self._sense)
        elif self.config.bonds == "water-filled":
            for block in stream(model, self.sensed):
                self._sense(block, {})

    def _sense(self, block: BlockOnStream, gradients: dict[str, Tensor]) -> None:
        """Note what every choice of bonds for the linears of a dense block would lose."""
        if self.config.bonds != "water-filled":
            return
        for line, importance, scale in self._weighed(block, gradients):
            network = self.method.network(line)
            weight = _linear(self.model, line.path).weight.detach().double()
            coordinates = Coordinates.chosen(network, self.config.weighting, importance)
            matrix = coordinates.apply(weight, network)
            # Coordinates have a mean weight of 1 (none, kronecker) or carry the inputs' own (diagonal).
            unit = (
                scale
                if self.config.weighting == "diagonal"
                else scale * float(importance.inputs.trace()) / len(importance.inputs)
            )
            spectra = [unit * network.spectrum(matrix, bond) for bond in range(len(network.full_bonds))]
            rungs = ladder_on_loss(network, spectra, self.method.overhead(line))
            self.offers[line.path] = (*rungs, _dense(line))

    def carry_out(self, rungs: Mapping[str, Rung]) -> dict[str, tuple[float, float]]:
        """Put the networks in place from the first block on; relative losses before and after refining."""
        chosen = {
            index: [line for line in lines if rungs[line.path].bonds] for index, lines in self.linears.items()
        }
        if self._blind:
            return {
                line.path: self._fit(line, _plain(line, self.model.device), rungs)
                for lines in chosen.values()
                for line in lines
            }
        losses: dict[str, tuple[float, float]] = {}
        last = max((index for index, lines in chosen.items() if lines), default=-1)
        for block in stream(self.model, self.tokens, batch_size=1):
            if block.index > last:
                break
            if not chosen[block.index]:
                continue
            moments = pull_back(block, self.gradients[block.index])[0] if self.gradients else {}
            for line, importance, _ in self._weighed(block, moments, rungs):
                losses[line.path] = self._fit(line, importance, rungs)
        return losses

    @property
    def _blind(self) -> bool:
        """Whether nothing that the text could tell decides the networks, as in the paper's construction."""
        return self.config.weighting == "none" and self.config.metric == "outputs" and not self.config.refine

    def _fit(
        self, line: LinearShape, importance: Importance, rungs: Mapping[str, Rung]
    ) -> tuple[float, float]:
        linear = _linear(self.model, line.path)
        network, bonds = self.method.network(line), rungs[line.path].bonds
        found = fit(linear.weight, network, bonds, importance, self.config.weighting, self.config.refine)
        kind: type[TensorLinear] = TuckerLinear if self.config.form == "tucker" else MpoLinear
        replace(self.model, line.path, kind.from_cores(network, found.cores, linear, found.scale))
        return round(found.losses[0], 6), round(found.losses[-1], 6)

    def _weighed(
        self, block: BlockOnStream, gradients: Mapping[str, Tensor], rungs: Mapping[str, Rung] | None = None
    ) -> Iterable[tuple[LinearShape, Importance, float]]:
        """The block's linears (those with bonds) in the order they run, what their errors count, and a unit.

        The unit turns a loss counted so into nats a token, where gradients are known.
        """
        inputs: dict[str, Tensor] = {}
        prefix = f"{block.path}."
        groups = anatomy_groups(self.model)
        for line in self.linears[block.index]:
            path = line.path.removeprefix(prefix)
            first = groups.get(path, path)
            if rungs is None or rungs[line.path].bonds:
                if first not in inputs:
                    inputs[first] = block.second_moment(first)
                if path in gradients:
                    outputs, scale = _damped(gradients[path])
                    yield line, Importance(inputs[first], outputs), scale / (2 * self.sensed.numel() ** 2)
                else:
                    yield line, Importance(inputs[first]), 1.0
            block.settle([path])


def anatomy_groups(model: PreTrainedModel) -> dict[str, str]:
    """Path inside a block of each linear -> the first linear that reads the same input."""
    return {path: group[0] for group in anatomy_of(model).layout.groups for path in group}


def _damped(moment: Tensor) -> tuple[Tensor, float]:
    """The damped second moment of a linear's output gradients with mean diagonal 1, and its scale."""
    size = len(moment)
    scale = float(moment.trace()) / size
    identity = torch.eye(size, dtype=moment.dtype, device=moment.device)
    if scale == 0:
        return identity, 0.0
    return (1 - DAMPING) * moment / scale + DAMPING * identity, scale


def _plain(line: LinearShape, device: torch.device) -> Importance:
    """All inputs count alike."""
    return Importance(torch.eye(line.in_features, dtype=torch.float64, device=device))


def _dense(line: LinearShape) -> Rung:
    return Rung(line.out_features * line.in_features, (), 0.0)


def _size(rung: Rung) -> int:
    return rung.parameters


def _settings(offers: Mapping[str, Sequence[Rung]]) -> dict[str, list[Setting]]:
    return {path: [Setting(rung.parameters, rung.loss) for rung in rungs] for path, rungs in offers.items()}


def _range(rows: Sequence[int | None]) -> str:
    known = [count for count in rows if count is not None]
    if not known:
        return "any"
    highest = "any" if len(known) < len(rows) else str(max(known))
    return str(min(known)) if highest == str(min(known)) else f"{min(known)}..{highest}"


def _linear(model: PreTrainedModel, path: str) -> nn.Linear:
    linear = model.get_submodule(path)
    assert isinstance(linear, nn.Linear)
    return linear
