"""Pruning single weights: by magnitude, by Wanda's score, and with SparseGPT's correction of the rest."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import PreTrainedModel

from suite.allocation import Setting, even
from suite.calibration import Calibration
from suite.errors import CellFailed, InputError
from suite.layers import ModuleSpec, replace
from suite.linalg import inverse_factor
from suite.method import Method, MethodConfig, Plan, Target, largest_fitting, register
from suite.models.anatomy import Anatomy, LinearShape
from suite.models.layouts import layout_of
from suite.sparse_layers import SemiStructuredLinear, SparseLinear
from suite.streaming import BlockOnStream, stream

BLOCK = 128
DAMPING = 0.01


class PruningConfig(MethodConfig):
    """`sparsity`: share of every linear's weights that goes; solved for the budget when not given.

    `pattern`: "unstructured", or "2:4" for two in every four consecutive inputs, which is always half
    of every linear and needs no sparsity.
    """

    sparsity: float | None = Field(default=None, ge=0, lt=1)
    pattern: Literal["unstructured", "2:4"] = "unstructured"

    @model_validator(mode="after")
    def _half(self) -> Self:
        if self.pattern == "2:4" and self.sparsity not in (None, 0.5):
            raise ValueError("the pattern 2:4 has sparsity 0.5; leave sparsity out")
        return self


class Pruning(Method[PruningConfig]):
    """The same share of every linear's weights is pruned; the kept ones are stored with a bitmap.

    In all, a linear of m × n keeps m·k weights, the same share k/n everywhere but for what rounding
    leaves over. Where a budget is so mild that the bitmap would cost more than it saves, some linears
    stay dense. Subclasses say which weights go.
    """

    family = "pruning"
    needs = frozenset({"calibration"})
    Config = PruningConfig

    def plan(self, anatomy: Anatomy, target: Target | None, seed: int) -> Plan:
        linears = anatomy.dense_linears(self.name)
        if self.config.pattern == "2:4":
            odd = next((line for line in linears if line.in_features % 4), None)
            if odd is not None:
                raise InputError(
                    f"{self.name}(pattern=2:4) needs inputs in multiples of four, but {odd.path} has"
                    f" {odd.in_features}. Use pattern=unstructured."
                )
            plan = _plan({line.path: line.in_features // 2 for line in linears}, anatomy, "2:4")
            return plan if target is None else largest_fitting([plan], anatomy, target, "2:4 is always half")
        if self.config.sparsity is not None or target is None:
            sparsity = self.config.sparsity or 0.0
            kept = {line.path: line.in_features - int(line.in_features * sparsity) for line in linears}
            return _plan(kept, anatomy)
        largest_fitting([_plan({line.path: 1 for line in linears}, anatomy)], anatomy, target)
        offers = {line.path: kept_settings(line, anatomy.dtype.itemsize, target.metric) for line in linears}
        others = anatomy.size(target.metric) - sum(settings[-1].cost for settings in offers.values())
        chosen = even(offers, target.value - others)
        dense = {path: len(settings) - 1 for path, settings in offers.items()}
        kept = {
            line.path: line.in_features if chosen[line.path] == dense[line.path] else chosen[line.path] + 1
            for line in linears
        }
        return _plan(kept, anatomy)

    def compress(self, model: PreTrainedModel, plan: Plan, calibration: Calibration | None) -> None:
        if "calibration" not in self.needs:
            for path in plan.modules:
                self._prune(model, path, plan, torch.empty(0))
            return
        assert calibration is not None
        groups = layout_of(model.config).groups
        readers = {path: paths[0] for paths in groups for path in paths}
        for block in stream(model, calibration.tokens):
            prefix = f"{block.path}."
            paths = [path.removeprefix(prefix) for path in plan.modules if path.startswith(prefix)]
            # All statistics are of the block before it is pruned, as in both papers.
            sources = dict.fromkeys(readers.get(path, path) for path in paths)
            statistics = self._statistics(block, sources)
            for path in paths:
                self._prune(model, prefix + path, plan, statistics[readers.get(path, path)])

    def _prune(self, model: PreTrainedModel, path: str, plan: Plan, statistics: Tensor) -> None:
        linear, spec = model.get_submodule(path), plan.modules[path]
        assert isinstance(linear, nn.Linear)
        kept = spec.arguments.get("nonzeros")
        weight, places = self._pruned(linear.weight.detach(), kept, statistics)
        kind = SemiStructuredLinear if kept is None else SparseLinear
        replace(model, path, kind.from_weight(weight, places, linear))

    def _statistics(self, block: BlockOnStream, paths: Iterable[str]) -> Mapping[str, Tensor]:
        """What the weights of the linears at `paths` in `block` are judged by; none without data."""
        return {}

    @abstractmethod
    def _pruned(self, weight: Tensor, kept: int | None, statistics: Tensor) -> tuple[Tensor, Tensor]:
        """New weights (m × n) and which of them stay (bool): `kept` of them, or 2:4 when None."""


@register
class Magnitude(Pruning):
    """The smallest weights of every linear go, one threshold a matrix; no data.

    A control for every method that looks at the inputs.
    """

    name = "magnitude"
    source = "Han et al. (arXiv 1506.02626); as baseline in Wanda (arXiv 2306.11695, table 2)"
    needs = frozenset()

    def _pruned(self, weight: Tensor, kept: int | None, statistics: Tensor) -> tuple[Tensor, Tensor]:
        score = weight.abs()
        if kept is None:
            return weight, two_of_four(score)
        return weight, largest(score.reshape(1, -1), kept).view_as(weight)


@register
class Wanda(Pruning):
    """In every row the weights of least |w_ij|·‖x_j‖₂ go; the others stay as they are.

    The norm is over all calibration tokens, which come from the pruned blocks before.
    """

    name = "wanda"
    source = "Sun et al., A Simple and Effective Pruning Approach for LLMs (arXiv 2306.11695, section 3)"

    def _statistics(self, block: BlockOnStream, paths: Iterable[str]) -> Mapping[str, Tensor]:
        """Σ x² of every input (n, float64)."""
        sums: dict[str, list[Tensor]] = {path: [] for path in paths}
        block.observe({path: partial(_add_squares, parts) for path, parts in sums.items()})
        return {path: torch.stack(parts).sum(0) for path, parts in sums.items()}

    def _pruned(self, weight: Tensor, kept: int | None, statistics: Tensor) -> tuple[Tensor, Tensor]:
        score = weight.abs().double() * statistics.sqrt()
        places = two_of_four(score) if kept is None else largest(score, kept // len(weight))
        return weight, places


@register
class SparseGpt(Pruning):
    """Weights go in blocks of 128 inputs, and those of later inputs make up for the error.

    In every block, over all rows together, those of least w²/[C⁻¹]_jj go, C = Σ x xᵀ being of the inputs
    not yet passed. C is damped by 0.01 of its mean diagonal, and ten or a hundred times as much where that is
    not enough. The inputs come from the pruned blocks before.
    """

    name = "sparsegpt"
    source = "Frantar & Alistarh, SparseGPT (arXiv 2301.00774, section 3, algorithm 1)"

    def _statistics(self, block: BlockOnStream, paths: Iterable[str]) -> Mapping[str, Tensor]:
        return block.second_moments(paths)

    def _pruned(self, weight: Tensor, kept: int | None, statistics: Tensor) -> tuple[Tensor, Tensor]:
        return sparsegpt(weight, statistics, kept)


def kept_settings(line: LinearShape, itemsize: int, metric: str) -> list[Setting]:
    """Costs of a linear that keeps 1, 2, … weights a row, as long as dense costs more; then dense."""
    rows, columns = line.out_features, line.in_features
    each, index = (itemsize, rows * -(-columns // 8)) if metric == "bytes" else (1, 0)
    costs = (rows * kept * each + index for kept in range(1, columns))
    dense = rows * columns * each
    return [*(Setting(cost, 0.0) for cost in costs if cost < dense), Setting(dense, 0.0)]


def _plan(kept: dict[str, int], anatomy: Anatomy, pattern: str = "unstructured") -> Plan:
    """The plan that keeps so many weights a row; linears that keep all stay as they are."""
    modules, left, total = {}, 0, 0
    for line in anatomy.linears:
        nonzeros = line.out_features * kept[line.path]
        left, total = left + nonzeros, total + line.out_features * line.in_features
        if kept[line.path] == line.in_features:
            continue
        shape = {"in_features": line.in_features, "out_features": line.out_features, "bias": line.bias}
        modules[line.path] = (
            ModuleSpec(type="semi_structured_linear", arguments=shape)
            if pattern == "2:4"
            else ModuleSpec(type="sparse_linear", arguments=shape | {"nonzeros": nonzeros})
        )
    return Plan(knobs={"sparsity": round(1 - left / total, 6), "pattern": pattern}, modules=modules)


def largest(score: Tensor, count: int) -> Tensor:
    """The places (bool) of the `count` largest of every row of `score`."""
    return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, score.topk(count, -1).indices, True)


def two_of_four(score: Tensor) -> Tensor:
    """The places (bool) of the two largest in every four consecutive columns of `score`."""
    return largest(score.reshape(-1, 4), 2).view_as(score)


def _add_squares(sums: list[Tensor], inputs: Tensor) -> None:
    sums.append(inputs.double().square().sum(0))


def sparsegpt(weight: Tensor, moment: Tensor, kept: int | None) -> tuple[Tensor, Tensor]:
    """New weights (m × n), and which stay (bool): `kept` of them, or two in every four columns when None.

    `moment` is Σ x xᵀ (n × n). Works in float64 on the moment and in at least float32 on the weights.
    A block of columns s … e keeps ⌊kept·e/n⌋ − ⌊kept·s/n⌋, so that the number is exact.

    Raises:
        CellFailed: no damping makes the moment positive definite.
    """
    dead = moment.diagonal() == 0
    inverse, _ = inverse_factor(moment, DAMPING)
    if inverse is None:
        raise CellFailed("the second moment of a linear's inputs cannot be inverted: is it finite?")
    new = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    new[:, dead] = 0
    factor = inverse.to(new.dtype)
    columns = weight.shape[1]
    places = torch.zeros_like(weight, dtype=torch.bool)
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        part, stay, own = new[:, start:end], places[:, start:end], factor[start:end, start:end]
        scale = own.diagonal()
        if kept is not None:
            score = (part / scale).square().reshape(1, -1)
            count = kept * end // columns - kept * start // columns
            stay.copy_(largest(score, count).reshape(part.shape))
        errors = torch.zeros_like(part)
        for column in range(end - start):
            if kept is None and column % 4 == 0:
                four = slice(column, column + 4)
                stay[:, four] = two_of_four((part[:, four] / scale[four]).square())
            gone = part[:, column] * ~stay[:, column]
            errors[:, column] = gone / scale[column]
            part[:, column] -= gone
            part[:, column + 1 :] -= errors[:, column, None] * own[column, column + 1 :]
        new[:, end:] -= errors @ factor[start:end, end:]
    return new, places
