"""MoDeGPT: MLPs narrowed to the channels from which the others can be rebuilt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from methods.depth import block_influence
from methods.distillation import WIDENING, narrowed
from methods.whitened import whitening_root
from suite.allocation import Setting, even_for
from suite.calibration import Calibration
from suite.errors import InputError
from suite.layers import ModuleSpec, ResizedLinear, replace
from suite.method import Method, MethodConfig, Plan, Target, register
from suite.models.anatomy import Anatomy, LinearShape, anatomy_of
from suite.streaming import stream

_DAMPING = 1e-6
"""Of the mean energy of a channel: products in float32 leave noise of that order."""


class ModeGptConfig(MethodConfig):
    """`share`: kept share of the MLP channels; solved for the budget when not given.

    `allocation`: "influence" takes more from blocks that change the stream less, "uniform" the same
    from all. `smoothing`: temperature of that softmax; a large one comes near to uniform.
    `ridge`: λ of the leverage scores, as a share of the mean energy of a channel.
    """

    share: float | None = Field(default=None, gt=0, le=1)
    allocation: Literal["influence", "uniform"] = "influence"
    smoothing: float = Field(default=0.1, gt=0)
    ridge: float = Field(default=0.01, gt=0)


@register
class ModeGpt(Method[ModeGptConfig]):
    """Every MLP keeps the channels J of largest ridge leverage, and the down projection rebuilds the rest.

    With z the inputs of the down projection and C = Σ z·zᵀ, channel j scores [C·(C + λI)⁻¹]ⱼⱼ; gate and up
    keep rows J, and down becomes W·C[:, J]·C[J, J]⁻¹, the least squares fit (Nyström, the paper's type I).
    Statistics come from the dense model. Channels to remove are spread by softmax(−BI/ε) of the block
    influence BI = 1 − E cos(block input, block output), ε = `smoothing`; one channel always stays.
    Left out are the paper's types II and III (query and key, value and output): they need head sizes
    that differ between blocks, which the model code here does not have. Attention stays dense.
    """

    name = "modegpt"
    family = "low-rank"
    source = "Lin et al., MoDeGPT: Modular Decomposition (arXiv 2408.09632, sections 3.2 and 3.3)"
    needs = frozenset({"calibration"})
    adaptive = True
    acts_on_parts = None
    Config = ModeGptConfig

    def plan(self, anatomy: Anatomy, target: Target | None, seed: int) -> Plan:
        if anatomy.sliced and self.config.allocation == "influence":
            raise InputError(
                "modegpt(allocation=influence) compares what enters a block with what leaves it, but the"
                " blocks of a sliced model hand on streams in bases of their own: give allocation=uniform"
                " or put slicegpt after it."
            )
        mlps = self._mlps(anatomy)
        offers = {str(block): _settings(lines) for block, lines in enumerate(mlps)}
        chosen = even_for(offers, self.config.share, anatomy, target, "attention stays as it is")
        return self._plan(anatomy, [chosen[str(block)] + 1 for block in range(anatomy.n_blocks)])

    def _mlps(self, anatomy: Anatomy) -> list[dict[str, LinearShape]]:
        """The linears of each block's MLP by role.

        Raises:
            InputError: they are not whole dense linears.
        """
        paths = {role: path for path, role in anatomy.layout.roles.items() if role in (*WIDENING, "down")}
        lines = {line.path: line for line in anatomy.dense_linears(self.name)}
        mlps = []
        for block in range(anatomy.n_blocks):
            prefix = f"{anatomy.layout.blocks}.{block}."
            mlps.append({role: lines[prefix + p] for role, p in paths.items() if prefix + p in lines})
            if len(mlps[-1]) < len(paths):
                raise InputError(
                    f"'{self.name}' narrows whole MLPs, but an earlier stage factorised them."
                    f" Put {self.name} first: {self.name}+..."
                )
        return mlps

    def _plan(self, anatomy: Anatomy, widths: Sequence[int]) -> Plan:
        modules = {}
        mlps = self._mlps(anatomy)
        for lines, width in zip(mlps, widths, strict=True):
            for role, line in lines.items() if width < lines["down"].in_features else ():
                shape = {"in_features": line.in_features, "out_features": line.out_features}
                cut = "in_features" if role == "down" else "out_features"
                modules[line.path] = ModuleSpec(
                    type="linear", arguments={**shape, cut: width, "bias": line.bias}
                )
        full = sum(lines["down"].in_features for lines in mlps)
        knobs = {
            "share": round(sum(widths) / full, 6),
            "widths": f"{min(widths)}..{max(widths)}",
            "allocation": self.config.allocation,
        }
        return Plan(knobs=knobs, modules=modules)

    def compress(self, model: PreTrainedModel, plan: Plan, calibration: Calibration | None) -> Plan | None:
        assert calibration is not None
        if not plan.modules:
            return None
        anatomy = anatomy_of(model)
        mlps = self._mlps(anatomy)
        full = [lines["down"].in_features for lines in mlps]
        widths = [_planned_width(plan, lines["down"]) for lines in mlps]
        notes: dict[str, Any] = {}
        if self.config.allocation == "influence" and len(set(map(_channel_cost, mlps))) == 1:
            influence = block_influence(model, calibration.tokens)
            widths = influence_widths(influence, full, sum(widths), self.config.smoothing)
            notes = {"block_influence": influence, "widths": widths}
        done = self._plan(anatomy, widths).model_copy(update={"notes": notes})
        for block in stream(model, calibration.tokens):
            lines, width = mlps[block.index], widths[block.index]
            down_path = lines["down"].path
            if width == full[block.index]:
                continue
            down = down_path.removeprefix(f"{block.path}.")
            # The next block's statistics are those of the dense model too.
            moment = block.second_moments([down], advance=True)[down]
            channels = leverage_scores(moment, self.config.ridge).topk(width).indices.sort().values
            for role, line in lines.items():
                linear = cast(nn.Linear, model.get_submodule(line.path))
                if role != "down":
                    replace(model, line.path, narrowed(linear, ("out", channels)))
                    continue
                weight = nystrom(linear.weight, moment, channels)
                narrow = ResizedLinear.from_weight(weight, linear.bias, linear.weight.dtype)
                replace(model, line.path, narrow)
        return done


def _channel_cost(lines: dict[str, LinearShape]) -> int:
    """Parameters of one channel: its rows in gate and up, with their biases, and its column in down."""
    wide = [line for role, line in lines.items() if role != "down"]
    return sum(line.in_features + line.bias for line in wide) + lines["down"].out_features


def _settings(lines: dict[str, LinearShape]) -> list[Setting]:
    cost = _channel_cost(lines)
    return [Setting(width * cost, 0.0) for width in range(1, lines["down"].in_features + 1)]


def _planned_width(plan: Plan, down: LinearShape) -> int:
    spec = plan.modules.get(down.path)
    return down.in_features if spec is None else cast(int, spec.arguments["in_features"])


def leverage_scores(moment: Tensor, ridge: float) -> Tensor:
    """[C·(C + λI)⁻¹]ⱼⱼ in [0, 1] (channels) for C = `moment`, with λ = `ridge` of its mean diagonal.

    A channel scores low when it is weak, or when the others tell what it holds.
    """
    matrix = moment.double()
    level = ridge * float(matrix.diagonal().mean()) or 1.0
    identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    # C·(C + λI)⁻¹ = I − λ·(C + λI)⁻¹, whose second part is a positive definite inverse.
    inverse = torch.cholesky_inverse(whitening_root(matrix + level * identity))
    return 1 - level * inverse.diagonal()


def nystrom(weight: Tensor, moment: Tensor, channels: Tensor) -> Tensor:
    """The down projection (out × kept) of the `channels` kept: W·C[:, J]·C[J, J]⁻¹ for C = `moment`.

    Written as W[:, J] + W[:, R]·C[R, J]·C[J, J]⁻¹ with R the channels that go, which equals W when
    none do, however badly conditioned C is.
    """
    matrix, c = weight.detach().double(), moment.double()
    gone = torch.ones(len(c), dtype=torch.bool, device=c.device)
    gone[channels] = False
    within = c[channels][:, channels]
    level = _DAMPING * float(within.diagonal().mean())
    root = whitening_root(within + level * torch.eye(len(channels), dtype=c.dtype, device=c.device))
    explained = torch.cholesky_solve(c[channels][:, gone], root)  # kept × gone
    kept: Tensor = matrix[:, channels]
    return kept + matrix[:, gone] @ explained.T


def influence_widths(
    influence: Sequence[float], full: Sequence[int], total: int, smoothing: float
) -> list[int]:
    """Widths of at least 1 that sum to `total`; what goes is spread by softmax(−influence / smoothing).

    Where a block would lose more than it has, the rest is taken from the others in proportion.
    """
    most = [width - 1 for width in full]
    remove = sum(full) - total
    wanted = [float(channels) for channels in most]
    open_blocks = list(range(len(full)))
    while open_blocks:
        left = remove - sum(most[block] for block in range(len(full)) if block not in open_blocks)
        scores = torch.tensor([-influence[block] / smoothing for block in open_blocks], dtype=torch.float64)
        for block, part in zip(open_blocks, (left * torch.softmax(scores, 0)).tolist(), strict=True):
            wanted[block] = part
        exceeded = [block for block in open_blocks if wanted[block] > most[block]]
        if not exceeded:
            break
        for block in exceeded:
            wanted[block] = float(most[block])
        open_blocks = [block for block in open_blocks if block not in exceeded]
    gone = [int(value) for value in wanted]
    # Rounding down keeps too many: the largest remainders go first.
    order = sorted(range(len(full)), key=lambda block: gone[block] - wanted[block])
    while (short := remove - sum(gone)) > 0:
        for block in [block for block in order if gone[block] < most[block]][:short]:
            gone[block] += 1
    return [width - lost for width, lost in zip(full, gone, strict=True)]
