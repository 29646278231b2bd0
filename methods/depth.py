"""Removing whole decoder blocks that calibration text shows to matter least."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from methods.layer_pruning import fewest_removed
from suite.calibration import Calibration
from suite.curvature import loss_at_the_end
from suite.errors import InputError
from suite.method import Method, MethodConfig, Plan, Target, register
from suite.models.anatomy import Anatomy, drop_blocks
from suite.streaming import BlockOnStream, stream


class DepthConfig(MethodConfig):
    """`remove`: how many blocks go; solved for the budget when not given."""

    remove: int | None = Field(default=None, ge=0)


DepthConfigT = TypeVar("DepthConfigT", bound=DepthConfig)


class DepthPruning(Method[DepthConfigT]):
    """Remove blocks chosen by what they do to calibration text; the plan knows only how many.

    The plan stands for any choice, as all blocks must be of one size; the one carried out names the
    blocks. The papers compare what enters a block with what leaves it, which is made for blocks that add
    to the stream; where norms come after (OPT-350M), they turn what every block hands on.

    Raises:
        InputError: an earlier stage gave blocks different sizes.
    """

    family = "layer pruning"
    needs = frozenset({"calibration"})
    acts_on_parts = None

    def plan(self, anatomy: Anatomy, target: Target | None, seed: int) -> Plan:
        def remove(count: int) -> Plan:
            # Stand-ins of the right number: which blocks go is known only with the data.
            drop = tuple(range(anatomy.n_blocks - count, anatomy.n_blocks))
            return Plan(knobs={"remove": count}, drop=drop)

        if any(inside != blocks_of(anatomy)[0] for inside in blocks_of(anatomy)):
            raise InputError(
                f"'{self.name}' chooses among blocks of one size, but an earlier stage made them unequal."
                f" Put {self.name} first: {self.name}+..."
            )
        return fewest_removed(remove, anatomy, target, self.config.remove, self.name)

    def compress(self, model: PreTrainedModel, plan: Plan, calibration: Calibration | None) -> Plan:
        if not plan.drop:
            return plan
        assert calibration is not None
        chosen, notes = self.choose(model, calibration.tokens, len(plan.drop))
        drop = tuple(sorted(chosen))
        drop_blocks(model, drop)
        return plan.model_copy(
            update={"knobs": {**plan.knobs, "blocks": list(drop)}, "drop": drop, "notes": notes}
        )

    @abstractmethod
    def choose(self, model: PreTrainedModel, tokens: Tensor, count: int) -> tuple[list[int], dict[str, Any]]:
        """The `count` blocks to remove, and what the record should keep of why.

        The model still has all its blocks; weights of those that stay may be changed in place.
        """


@register
class ShortGpt(DepthPruning[DepthConfig]):
    """Remove the blocks of least Block Influence at once, without training.

    The influence of block i is one minus the cosine between its input and its output, each token on
    its own, averaged over all tokens: between 0 (the direction stays) and 2.
    """

    name = "shortgpt"
    source = "Men et al., ShortGPT (arXiv 2403.03853, section 3)"
    Config = DepthConfig

    def choose(self, model: PreTrainedModel, tokens: Tensor, count: int) -> tuple[list[int], dict[str, Any]]:
        influence = block_influence(model, tokens)
        return least(influence, count), {"influence": rounded(influence)}


def block_influence(model: PreTrainedModel, tokens: Tensor) -> list[float]:
    """Block Influence of every block on `tokens` (sequences × length)."""
    influence = []
    for block in stream(model, tokens):
        before = [*block.inputs]
        block.advance()
        pairs = zip(before, block.inputs, strict=True)
        influence.append(1 - sum(float(cosine(x, y).sum()) for x, y in pairs) / tokens.numel())
    return influence


@register
class Angular(DepthPruning[DepthConfig]):
    """Remove the run of n neighbouring blocks across which the last token turns least.

    The angle d(l, n) = arccos(cos(h_l, h_{l+n})) / π lies between 0 and 1 and is averaged over
    sequences; h_L is the last block's own output, before the final norm. The paper heals with adapters
    afterwards: `angular+heal(mode=lora)`.
    """

    name = "angular"
    source = "Gromov et al., The Unreasonable Ineffectiveness of the Deeper Layers (arXiv 2403.17887)"
    Config = DepthConfig

    def choose(self, model: PreTrainedModel, tokens: Tensor, count: int) -> tuple[list[int], dict[str, Any]]:
        distances = angular_distances(model, tokens, count)
        start = least(distances, 1)[0]
        return [*range(start, start + count)], {"angular_distance": rounded(distances)}


def angular_distances(model: PreTrainedModel, tokens: Tensor, count: int) -> list[float]:
    """d(l, `count`) at the last token of `tokens` (sequences × length), for l = 0 … L − `count`."""
    states: list[Tensor] = []
    for block in stream(model, tokens):
        if not states:
            states.append(_last(block))
        block.advance()
        states.append(_last(block))
    return [
        float(cosine(first, last).clamp(-1, 1).arccos().mean()) / math.pi
        for first, last in zip(states, states[count:], strict=False)
    ]


def _last(block: BlockOnStream) -> Tensor:
    return torch.cat([hidden[:, -1] for hidden in block.inputs])


class GreedyDepthConfig(DepthConfig):
    """`remove`: see `DepthConfig`. `sequences`: how many calibration sequences every trial is scored on.

    `one_shot`: judge every block once, in the whole model, and remove the best k together.
    """

    sequences: int = Field(default=16, gt=0)
    one_shot: bool = False


@register
class GreedyDepth(DepthPruning[GreedyDepthConfig]):
    """Remove the block without which the calibration loss is least, then the next, until k are gone.

    About k·L²/2 block evaluations for each sequence. With `one_shot` the blocks are judged once, as
    Shortened LLaMA does, but none is spared beforehand: there the first four and the last two are.
    """

    name = "greedy-depth"
    source = "Song et al., SLEB (arXiv 2402.09025); one_shot: Kim et al., Shortened LLaMA (arXiv 2402.02834)"
    Config = GreedyDepthConfig

    def choose(self, model: PreTrainedModel, tokens: Tensor, count: int) -> tuple[list[int], dict[str, Any]]:
        tokens = tokens[: self.config.sequences]
        gone: list[int] = []
        losses = []
        for _ in range(1 if self.config.one_shot else count):
            without = losses_without(model, tokens, gone)
            left = [block for block in range(len(without) + len(gone)) if block not in gone]
            best = least(without, count if self.config.one_shot else 1)
            gone += [left[index] for index in best]
            losses += [without[index] for index in best]
        return gone, {"order": gone, "calibration_loss": rounded(losses)}


@torch.no_grad()
def losses_without(model: PreTrainedModel, tokens: Tensor, gone: Sequence[int]) -> list[float]:
    """Mean loss (nats per token) with blocks `gone` removed and one more, for each that is left, in order.

    Three sets of hidden states are held at most.
    """
    blocks = [block for block in entering(model, tokens) if block.index not in gone]
    hidden = blocks[0].inputs
    losses = []
    for position, block in enumerate(blocks):
        rest = hidden
        for later in blocks[position + 1 :]:
            rest = through(later, rest)
        losses.append(loss_at_the_end(model, tokens, rest))
        hidden = through(block, hidden)
    return losses


def entering(model: PreTrainedModel, tokens: Tensor) -> list[BlockOnStream]:
    """All blocks with their arguments; their inputs are what enters the first, and nothing is run."""
    blocks = []
    for block in stream(model, tokens):
        block.advanced = True
        blocks.append(block)
    return blocks


@torch.no_grad()
def through(block: BlockOnStream, hidden: Sequence[Tensor]) -> list[Tensor]:
    """What `block` makes of hidden states, batch by batch."""
    pairs = zip(hidden, block.arguments, strict=True)
    return [block.module(states, **arguments) for states, arguments in pairs]


def cosine(first: Tensor, second: Tensor) -> Tensor:
    """Cosines (float64) between vectors along the last dimension."""
    return functional.cosine_similarity(first.double(), second.double(), dim=-1)


def blocks_of(anatomy: Anatomy) -> list[list[tuple[str, str, int, int]]]:
    """What every block consists of: path inside it, type, parameters and bytes of each module."""
    found: list[list[tuple[str, str, int, int]]] = [[] for _ in range(anatomy.n_blocks)]
    start = anatomy.layout.blocks + "."
    for entry in anatomy.entries:
        if entry.path.startswith(start):
            index, _, inner = entry.path.removeprefix(start).partition(".")
            found[int(index)].append((inner, entry.type, entry.params, entry.disk))
    return [sorted(inside) for inside in found]


def least(values: Sequence[float], count: int) -> list[int]:
    """Indices of the `count` smallest values, smallest first; NaN counts as large, ties go to the earlier."""
    return sorted(range(len(values)), key=lambda index: (math.isnan(values[index]), values[index]))[:count]


def rounded(values: Sequence[float]) -> list[float]:
    """Values as the record keeps them."""
    return [round(value, 6) for value in values]
