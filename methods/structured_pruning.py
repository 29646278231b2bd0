"""Structured pruning: whole MLP channels, and on request key-value heads, by what the loss says of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from methods.distillation import WIDENING, narrowed
from suite.allocation import Setting, even
from suite.calibration import Calibration
from suite.errors import InputError
from suite.layers import ModuleSpec, replace
from suite.method import Method, MethodConfig, Plan, Target, largest_fitting, register
from suite.models.anatomy import Anatomy, LinearShape, anatomy_of
from suite.streaming import leave

GROUPS = 8
"""Groups of structures that a part is masked in, one at a time, for its pruning errors."""
ROUNDS = 4
"""How often pruning errors are measured; they do not add up, so only some groups go each time."""


class StructuredConfig(MethodConfig):
    """`share`: kept share of the channels in the pruned blocks; solved for the budget when not given.

    `importance`: "taylor", "exits" or "mope". `attention`: also prune key-value heads, each with its queries.
    `first`, `last`: blocks left alone at either end, by default the paper's 4 and 2 of 32, scaled down
    for fewer blocks. `samples` × `length`: the calibration sequences looked at and their tokens.
    """

    share: float | None = Field(default=None, gt=0, le=1)
    importance: Literal["taylor", "exits", "mope"] = "taylor"
    attention: bool = False
    first: int | None = Field(default=None, ge=0)
    last: int | None = Field(default=None, ge=0)
    samples: int = Field(default=10, gt=0)
    length: int = Field(default=64, gt=1)


@dataclass(frozen=True)
class Part:
    """What may be narrowed in one block: `count` structures that cost `each` (params or bytes) to keep.

    `cut` says for each linear whether its outputs or inputs belong to them, and how many to each.
    """

    count: int
    each: int
    cut: Mapping[LinearShape, tuple[Literal["out", "in"], int]]

    @property
    def gate(self) -> str:
        """The linear through whose inputs the structures act: zeros there are as good as deletion."""
        return next(line.path for line, (side, _) in self.cut.items() if side == "in")


@register
class LlmPruner(Method[StructuredConfig]):
    """Coupled rows and columns of MLPs go: row j of gate and up, and column j of down, as one channel.

    `taylor`: a channel's importance is |Σ g·w| over each of its rows and columns, added up, with the
    loss gradients g of few short sequences. Channels are compared within a block, and all pruned
    blocks keep the same share.

    `exits`: the same, COST-EFF-style: the loss is the mean over exits after every block, each through the
    final norm and the head that all share. Scope: only the paper's choice of what is cut (its exits are
    no saving under a budget, and its distillation is not this stage's).

    `mope`: MoPE-style. The pruning error of a group of channels (of near importance by `taylor`) is
    what the loss rises by when it is masked; the groups with the least error per parameter go, in
    whichever block, and errors are measured again as groups go. Scope: MoPE-CLIP scores heads, channel
    groups and layers of a vision-language model by retrieval, and distils; this is its pruning error
    as the score for channels (and heads), by language-model loss, without distillation.
    """

    name = "llm-pruner"
    family = "structured pruning"
    source = (
        "Ma et al., LLM-Pruner (arXiv 2305.11627, section 3.2); COST-EFF (arXiv 2210.15523) for `exits`,"
        " MoPE-CLIP (arXiv 2403.07839) for `mope`"
    )
    needs = frozenset({"calibration"})
    adaptive = True
    acts_on_parts = None
    Config = StructuredConfig

    def plan(self, anatomy: Anatomy, target: Target | None, seed: int) -> Plan:
        parts = self._parts(anatomy, target.metric if target else "params")
        if self.config.share is not None or target is None:
            share = 1.0 if self.config.share is None else self.config.share
            return self._plan({name: max(1, int(share * part.count)) for name, part in parts.items()}, parts)
        why = "one channel stays in every block, and blocks at the ends are left alone (first, last)"
        largest_fitting([self._plan(dict.fromkeys(parts, 1), parts)], anatomy, target, why)
        offers = {
            name: [Setting(part.each * kept, 0.0) for kept in range(1, part.count + 1)]
            for name, part in parts.items()
        }
        others = anatomy.size(target.metric) - sum(settings[-1].cost for settings in offers.values())
        chosen = even(offers, target.value - others)
        return self._plan({name: index + 1 for name, index in chosen.items()}, parts)

    def _parts(self, anatomy: Anatomy, metric: str) -> dict[str, Part]:
        """Parts of the blocks that are not left alone, by a name of their own."""
        linears = {line.path: line for line in anatomy.dense_linears(self.name)}
        layout, depth = anatomy.layout, anatomy.n_blocks
        if anatomy.sliced and self.config.importance == "exits":
            raise InputError(
                "llm-pruner(importance=exits) reads every block's stream through the final norm, but the"
                " blocks of a sliced model hand on streams in bases of their own. Put slicegpt after it."
            )
        if len(linears) != len(layout.roles) * depth:
            raise InputError(
                f"'{self.name}' cuts whole linears, but an earlier stage factorised them."
                f" Put {self.name} first: {self.name}+..."
            )
        if self.config.attention and not layout.heads_by_block:
            raise InputError(
                f"llm-pruner(attention=true): {anatomy.model_type} models have as many heads in every"
                " block. Those of llama, mistral, qwen2 and qwen3 can go; leave attention out here."
            )
        first = min(4, round(depth / 8)) if self.config.first is None else self.config.first
        last = min(2, round(depth / 16)) if self.config.last is None else self.config.last
        if first + last >= depth:
            raise InputError(
                f"llm-pruner(first={first}, last={last}) leaves none of {depth} blocks to prune."
            )
        each = anatomy.dtype.itemsize if metric == "bytes" else 1
        parts = {}
        for block in range(first, depth - last):
            by_role = {
                role: linears[f"{layout.blocks}.{block}.{path}"] for path, role in layout.roles.items()
            }
            cut: dict[LinearShape, tuple[Literal["out", "in"], int]] = {
                by_role[role]: ("out", 1) for role in WIDENING if role in by_role
            }
            cut[by_role["down"]] = ("in", 1)
            parts[f"{block}.mlp"] = Part(by_role["down"].in_features, each * _cost(cut), cut)
            if self.config.attention:
                width = anatomy.head_dim
                queries = width * anatomy.heads // anatomy.key_value_heads
                cut = {by_role["query"]: ("out", queries), by_role["output"]: ("in", queries)}
                cut |= {by_role[role]: ("out", width) for role in ("key", "value")}
                heads = by_role["key"].out_features // width
                parts[f"{block}.attention"] = Part(heads, each * _cost(cut), cut)
        return parts

    def _plan(self, kept: Mapping[str, int], parts: Mapping[str, Part]) -> Plan:
        modules = {}
        for name, part in parts.items():
            for line, (side, size) in part.cut.items() if kept[name] < part.count else ():
                shape = {"in_features": line.in_features, "out_features": line.out_features}
                shape["out_features" if side == "out" else "in_features"] = kept[name] * size
                modules[line.path] = ModuleSpec(type="linear", arguments={**shape, "bias": line.bias})
        widths = [kept[name] for name in parts if name.endswith(".mlp")]
        full = sum(part.each * part.count for part in parts.values())
        knobs = {
            "share": round(sum(part.each * kept[name] for name, part in parts.items()) / full, 6),
            "importance": self.config.importance,
            "widths": f"{min(widths)}..{max(widths)}",
        }
        if self.config.attention:
            heads = [kept[name] for name in parts if name.endswith(".attention")]
            knobs["key_value_heads"] = f"{min(heads)}..{max(heads)}"
        return Plan(knobs=knobs, modules=modules)

    def compress(self, model: PreTrainedModel, plan: Plan, calibration: Calibration | None) -> Plan:
        assert calibration is not None
        parts = self._parts(anatomy_of(model), "params")
        tokens = calibration.tokens[: self.config.samples, : self.config.length].to(model.device)
        counts = {name: _planned(part, plan) for name, part in parts.items()}
        if all(counts[name] == part.count for name, part in parts.items()):
            return plan
        loss = _loss_at_exits if self.config.importance == "exits" else _loss
        scores = taylor(model, parts, tokens, loss)
        if self.config.importance == "mope":
            cost = sum(part.each * (part.count - counts[name]) for name, part in parts.items())
            kept = least_pruning_error(model, parts, scores, tokens, cost)
        else:
            kept = {name: scores[name].topk(count).indices.sort().values for name, count in counts.items()}
        for name, part in parts.items():
            if len(kept[name]) < part.count:
                _cut(model, part, kept[name])
        return self._plan({name: len(stay) for name, stay in kept.items()}, parts)


def _cost(cut: Mapping[LinearShape, tuple[str, int]]) -> int:
    """Parameters of one structure."""
    return sum(
        size * (line.out_features if side == "in" else line.in_features + line.bias)
        for line, (side, size) in cut.items()
    )


def _planned(part: Part, plan: Plan) -> int:
    line, (side, size) = next(iter(part.cut.items()))
    if line.path not in plan.modules:
        return part.count
    width = plan.modules[line.path].arguments["out_features" if side == "out" else "in_features"]
    return int(width) // size


def _cut(model: PreTrainedModel, part: Part, stay: Tensor) -> None:
    for line, (side, size) in part.cut.items():
        linear = model.get_submodule(line.path)
        assert isinstance(linear, nn.Linear)
        rows = (stay[:, None] * size + torch.arange(size, device=stay.device)).flatten()
        replace(model, line.path, narrowed(linear, (side, rows)))


def taylor(
    model: PreTrainedModel,
    parts: Mapping[str, Part],
    tokens: Tensor,
    loss: Callable[[PreTrainedModel, Tensor], Tensor],
) -> dict[str, Tensor]:
    """Importance of every structure of every part (float64): Σ over its rows and columns of |Σ g·w|.

    g is the gradient of the mean over sequences of `loss` on `tokens` (sequences × length); gradients
    of one sequence are held at a time.
    """
    lines = [(line, *cut) for part in parts.values() for line, cut in part.cut.items()]
    weights = [model.get_parameter(f"{line.path}.weight") for line, *_ in lines]
    sums = [torch.zeros((), dtype=torch.float64, device=tokens.device) for _ in lines]
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        for ids in tokens.split(1):
            with torch.enable_grad():
                gradients = torch.autograd.grad(loss(model, ids), weights)
            for index, (gradient, (_, side, _)) in enumerate(zip(gradients, lines, strict=True)):
                product = gradient.double() * weights[index].detach().double()
                sums[index] = sums[index] + product.sum(1 if side == "out" else 0)
    finally:
        for parameter, needed in before:
            parameter.requires_grad_(needed)
    by_path = {line.path: total.abs() / len(tokens) for (line, *_), total in zip(lines, sums, strict=True)}
    return {
        name: torch.stack([by_path[line.path].reshape(part.count, -1).sum(1) for line in part.cut]).sum(0)
        for name, part in parts.items()
    }


def least_pruning_error(
    model: PreTrainedModel, parts: Mapping[str, Part], scores: Mapping[str, Tensor], tokens: Tensor, cost: int
) -> dict[str, Tensor]:
    """Sorted structures that stay in every part once such of total cost `cost` or a little more are gone.

    Groups with the least rise of the loss per cost go first; one structure of every part stays.
    """
    waiting = {name: scores[name].argsort() for name in parts}
    gone: dict[str, Tensor] = {name: waiting[name][:0] for name in parts}
    left = cost
    with masked(model, parts, gone):
        for turn in range(ROUNDS, 0, -1):
            groups = [
                (name, group)
                for name, part in parts.items()
                for group in waiting[name][:-1].split(math.ceil(part.count / GROUPS))
                if len(group)
            ]
            errors = pruning_errors(model, gone, groups, tokens)
            rates = [
                error / (parts[name].each * len(group))
                for (name, group), error in zip(groups, errors, strict=True)
            ]
            quota = left - left // turn if turn > 1 else 0
            for index in sorted(range(len(groups)), key=rates.__getitem__):
                if left <= quota:
                    break
                name, group = groups[index]
                group = group[: math.ceil(left / parts[name].each)]
                gone[name] = torch.cat([gone[name], group])
                waiting[name] = waiting[name][~torch.isin(waiting[name], group)]
                left -= parts[name].each * len(group)
    return {name: stay.sort().values for name, stay in waiting.items()}


def pruning_errors(
    model: PreTrainedModel,
    gone: dict[str, Tensor],
    groups: Sequence[tuple[str, Tensor]],
    tokens: Tensor,
) -> list[float]:
    """What masking each group adds to the loss on `tokens`, beside the structures `gone` already.

    To be called inside `masked(model, parts, gone)`.
    """
    errors = []
    with torch.no_grad():
        base = float(_loss(model, tokens))
        for name, group in groups:
            before = gone[name]
            gone[name] = torch.cat([before, group])
            errors.append(float(_loss(model, tokens)) - base)
            gone[name] = before
    return errors


@contextmanager
def masked(model: PreTrainedModel, parts: Mapping[str, Part], gone: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the `with`, what `gone` says at the time of a call is zero, as good as deleted."""

    def hook_of(name: str, size: int) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            if not len(gone[name]):
                return None
            mask = torch.ones(parts[name].count, dtype=args[0].dtype, device=args[0].device)
            mask[gone[name]] = 0
            return (args[0] * mask.repeat_interleave(size), *args[1:])

        return hook

    handles = [
        model.get_submodule(part.gate).register_forward_pre_hook(
            hook_of(name, next(size for side, size in part.cut.values() if side == "in"))
        )
        for name, part in parts.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _loss(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Mean next-token loss in nats."""
    loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


def _loss_at_exits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Mean over all blocks of the next-token loss of the model that ends after that block."""
    output = model(input_ids=ids, labels=ids, use_cache=False, output_hidden_states=True)
    head: Any = model.get_output_embeddings()

    def at_exit(hidden: Tensor) -> Tensor:
        logits = head(leave(model, ids, hidden))
        loss: Tensor = model.loss_function(logits, ids, vocab_size=logits.shape[-1])
        return loss

    # Made anew for its gradient: the logits of all exits together could be more than the model.
    early = [checkpoint(at_exit, hidden, use_reentrant=False) for hidden in output.hidden_states[1:-1]]
    return torch.stack([*early, output.loss]).mean()
