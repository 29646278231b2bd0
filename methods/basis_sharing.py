"""Basis Sharing: neighbouring blocks write their linears in one common basis."""

from __future__ import annotations

from typing import Any, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from methods.whitened import whitened_svd
from suite.allocation import even_for, low_rank_settings, rank_of
from suite.calibration import Calibration
from suite.layers import LowRankLinear, ModuleSpec, module_type, replace
from suite.method import Method, MethodConfig, Plan, Target, register
from suite.models.anatomy import Anatomy, LinearShape
from suite.models.layouts import layout_of
from suite.streaming import stream

SHARED_ROLES = frozenset(("query", "key", "value", "query_key_value", "gate", "up"))


@module_type("shared_basis_linear")
class SharedBasisLinear(nn.Module):
    """`y = coefficients(basis(x))`; the basis (rank × in) serves linears of other blocks too."""

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = False):
        super().__init__()
        self.basis = nn.Linear(in_features, rank, bias=False)
        self.coefficients = nn.Linear(rank, out_features, bias=bias)

    def arguments(self) -> dict[str, Any]:
        return {
            "in_features": self.basis.in_features,
            "out_features": self.coefficients.out_features,
            "rank": self.basis.out_features,
            "bias": self.coefficients.bias is not None,
        }

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.coefficients(self.basis(x)))


@module_type("borrowed_basis_linear")
class BorrowedBasisLinear(nn.Module):
    """`y = coefficients(basis(x))` with the basis of the `shared_basis_linear` at `source`; it owns none."""

    def __init__(self, out_features: int, rank: int, source: str, bias: bool = False):
        super().__init__()
        self.source = source
        self.coefficients = nn.Linear(rank, out_features, bias=bias)
        self._owner: list[SharedBasisLinear] = []  # a list hides the module from state_dict()

    def bind(self, model: nn.Module) -> None:
        """Point at the owner of the basis; called once all modules are in place."""
        self._owner = [cast(SharedBasisLinear, model.get_submodule(self.source))]

    def arguments(self) -> dict[str, Any]:
        return {
            "out_features": self.coefficients.out_features,
            "rank": self.coefficients.in_features,
            "source": self.source,
            "bias": self.coefficients.bias is not None,
        }

    def forward(self, x: Tensor) -> Tensor:
        # Asked for anew each time: a later stage may have put another module there, a packed one say.
        return cast(Tensor, self.coefficients(self._owner[0].basis(x)))


class BasisSharingConfig(MethodConfig):
    """`group`: neighbouring blocks that share a basis; 1 is `svd-llm`.

    `share`: kept share of the linears' parameters; solved for the budget when not given.
    """

    group: int = Field(default=2, ge=1)
    share: float | None = Field(default=None, gt=0, le=1)


@register
class BasisSharing(Method[BasisSharingConfig]):
    """The query, key, value, gate and up projections of `group` blocks stand on one basis per role.

    Their weights are stacked by outputs and factorised together, whitened by the sum of the second
    moments of the dense inputs (as in `svd-llm`); the basis (rank × in) is stored once, in the group's
    first block, and each block has coefficients (out × rank) of its own. Output and down projections are
    factorised alone. A last group may be shorter. The same share everywhere: rank κ·n·M/(n+M) for M
    stacked outputs. Every block multiplies by the basis, so operations fall less than parameters. Blocks
    of such a model can no longer be removed.
    """

    name = "basis-sharing"
    family = "low-rank"
    source = "Wang et al., Basis Sharing: Cross-Layer Parameter Sharing (arXiv 2410.03765, section 3)"
    needs = frozenset({"calibration"})
    Config = BasisSharingConfig

    def plan(self, anatomy: Anatomy, target: Target | None, seed: int) -> Plan:
        units = self._units(anatomy, anatomy.dense_linears(self.name))
        # A unit costs and behaves as one matrix: its linears stacked by outputs.
        offers = {}
        for owner, lines in units.items():
            m, n = sum(line.out_features for line in lines), lines[0].in_features
            offers[owner] = low_rank_settings([0.0] * min(m, n), m, n)
        chosen = even_for(offers, self.config.share, anatomy, target)
        ranks = {owner: rank_of(offers[owner], index) for owner, index in chosen.items()}
        kept = sum(offers[owner][index].cost for owner, index in chosen.items())
        return self._plan(units, ranks, kept / sum(settings[-1].cost for settings in offers.values()))

    def _units(self, anatomy: Anatomy, linears: tuple[LinearShape, ...]) -> dict[str, list[LinearShape]]:
        """Linears factorised together, by the path of the one that owns the basis."""
        found: dict[tuple[str, int, int], list[LinearShape]] = {}
        # In the order they run, which replacing some of them does not keep.
        for line in sorted(linears, key=lambda line: line.block):
            size = self.config.group if line.role in SHARED_ROLES else 1
            inner = line.path.removeprefix(f"{anatomy.layout.blocks}.{line.block}.")
            found.setdefault((inner, line.block // size, line.in_features), []).append(line)
        return {lines[0].path: lines for lines in found.values()}

    def _plan(self, units: dict[str, list[LinearShape]], ranks: dict[str, int | None], share: float) -> Plan:
        modules = {}
        for owner, lines in units.items():
            rank = ranks[owner]
            for line in lines if rank is not None else ():
                arguments = {"out_features": line.out_features, "rank": rank, "bias": line.bias}
                if line.path != owner:
                    spec = ModuleSpec(type="borrowed_basis_linear", arguments=arguments | {"source": owner})
                else:
                    kind = "shared_basis_linear" if len(lines) > 1 else "low_rank"
                    spec = ModuleSpec(type=kind, arguments=arguments | {"in_features": line.in_features})
                modules[line.path] = spec
        found = sorted(rank for rank in ranks.values() if rank is not None)
        shown = f"{found[0]}..{found[-1]}" if found else "full"
        return Plan(
            knobs={"group": self.config.group, "share": round(share, 6), "ranks": shown}, modules=modules
        )

    def compress(self, model: PreTrainedModel, plan: Plan, calibration: Calibration | None) -> None:
        assert calibration is not None
        if not plan.modules:
            return
        units: dict[str, list[str]] = {}
        for path, spec in plan.modules.items():
            units.setdefault(spec.arguments.get("source", path), []).append(path)
        owner_of = {path: owner for owner, paths in units.items() for path in paths}
        layout = layout_of(model.config)
        moments: dict[str, Tensor] = {}
        for block in stream(model, calibration.tokens):
            prefix = f"{block.path}."
            inside = [path.removeprefix(prefix) for path in owner_of if path.startswith(prefix)]
            groups = layout.inputs_shared(inside)
            # Dense statistics for all: a unit is replaced after its last block has run.
            seen = block.second_moments((group[0] for group in groups), advance=True)
            for group in groups:
                moment = seen[group[0]]
                for owner in (owner_of[prefix + path] for path in group):
                    moments[owner] = moments[owner] + moment if owner in moments else moment
            for owner in [owner for owner in moments if units[owner][-1].startswith(prefix)]:
                factorise(model, plan, units[owner], moments.pop(owner))


@torch.no_grad()
def factorise(model: PreTrainedModel, plan: Plan, paths: list[str], moment: Tensor) -> None:
    """Put the linears at `paths`, whose inputs have Σ x xᵀ = `moment` together, on one basis."""
    linears = [cast(nn.Linear, model.get_submodule(path)) for path in paths]
    specs = [plan.modules[path] for path in paths]
    stacked = torch.cat([linear.weight for linear in linears])
    left, basis = whitened_svd(stacked, moment, specs[0].arguments["rank"])
    parts = left.split([linear.out_features for linear in linears])
    for path, linear, spec, part in zip(paths, linears, specs, parts, strict=True):
        if spec.type == "low_rank":
            replace(model, path, LowRankLinear.from_factors(part, basis, linear))
            continue
        module = cast(Any, spec.build(linear.weight.dtype, str(linear.weight.device)))
        module.coefficients.weight.copy_(part)
        if linear.bias is not None:
            module.coefficients.bias.copy_(linear.bias)
        if spec.type == "shared_basis_linear":
            module.basis.weight.copy_(basis)
        replace(model, path, module)
        if spec.type == "borrowed_basis_linear":
            module.bind(model)
