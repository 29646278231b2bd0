"""Merging neighbouring decoder blocks into one."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from methods.depth import DepthConfig, DepthPruning, cosine, entering, through
from suite.errors import CellFailed, InputError
from suite.method import Plan, Target, register
from suite.models.anatomy import Anatomy
from suite.models.layouts import layout_of
from suite.streaming import BlockOnStream, leave

Variant = Literal["paper", "notebook"]
_HALVINGS = 10


class LaCoConfig(DepthConfig):
    """`remove`: see `DepthConfig`. `layers`: how many blocks one merge makes one of, at most.

    `interval`: how far below a merge the next begins. `sequences`: calibration sequences compared.
    `variant`: "paper" adds every later block's difference to the first; "notebook" is what the authors'
    notebook comes to, the last block of the window in the place of the first.
    """

    layers: int = Field(default=4, ge=2)
    interval: int = Field(default=1, ge=1)
    sequences: int = Field(default=5, gt=0)
    variant: Variant = "paper"


@register
class LaCo(DepthPruning[LaCoConfig]):
    """Collapse m blocks into the one before them: each linear becomes θ_l + Σ_k (θ_{l+k} − θ_l), k = 1 … m.

    Walking from the top, a merge is kept when the final hidden states of the whole model keep a mean
    cosine to those of the dense one of at least a threshold. The threshold is the highest, to ten
    halvings, at which exactly as many blocks are gone as the budget wants; the last merge may be a
    smaller one. Norms stay those of block l. The paper's own settings give the threshold instead.
    """

    name = "laco"
    source = "Yang et al., LaCo: Large Language Model Pruning via Layer Collapse (arXiv 2402.11187)"
    Config = LaCoConfig

    def plan(self, anatomy: Anatomy, target: Target | None, seed: int) -> Plan:
        if len(anatomy.dense_linears(self.name)) != len(anatomy.layout.roles) * anatomy.n_blocks:
            raise InputError(
                f"'{self.name}' adds up whole linears, but an earlier stage factorised them."
                f" Put {self.name} first: {self.name}+..."
            )
        return super().plan(anatomy, target, seed)

    def choose(self, model: PreTrainedModel, tokens: Tensor, count: int) -> tuple[list[int], dict[str, Any]]:
        trials = _Trials(model, tokens[: self.config.sequences], count, self.config)
        low, high, stack = -1.0, 1.0, trials.walk(-math.inf)
        if len(stack) > trials.depth - count:
            raise CellFailed("the final hidden states are not finite, so no merge can be judged")
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            found = trials.walk(middle)
            if len(found) == trials.depth - count:
                low, stack = middle, found
            else:
                high = middle
        similarity = trials.similarity(stack)
        trials.write(stack)
        kept = {layer.base for layer in stack}
        bases = [*sorted(kept), trials.depth]
        merged = {str(a): list(range(a + 1, b)) for a, b in pairwise(bases) if b > a + 1}
        notes = {"threshold": round(low, 4), "similarity": round(similarity, 6), "merged": merged}
        return [block for block in range(trials.depth) if block not in kept], notes


class Layer(NamedTuple):
    """A block of a merged model: norms of block `base`, linears Σ weight · θ_block."""

    base: int
    parts: tuple[tuple[int, int], ...]
    """(block, weight) pairs; the weights add up to one."""


Stack = tuple[Layer, ...]


def merge(stack: Stack, first: int, count: int, variant: Variant) -> Stack:
    """`stack` with the `count` layers after `first` collapsed into it."""
    layer, others = stack[first], stack[first + 1 : first + 1 + count]
    parts = others[-1].parts
    if variant == "paper":
        total: dict[int, int] = {}
        for factor, source in [(1 - count, layer), *((1, other) for other in others)]:
            for block, weight in source.parts:
                total[block] = total.get(block, 0) + factor * weight
        parts = tuple(sorted((block, weight) for block, weight in total.items() if weight))
    return (*stack[:first], Layer(layer.base, parts), *stack[first + 1 + count :])


class _Trials:
    """Tentative merges, judged without changing the model; every stack of layers is judged once.

    What enters each block of the dense model is held, as a merge leaves the blocks before it as they are.
    """

    def __init__(self, model: PreTrainedModel, tokens: Tensor, count: int, config: LaCoConfig):
        self.model, self.tokens, self.count, self.config = model, tokens, count, config
        self.blocks = entering(model, tokens)
        self.depth = len(self.blocks)
        self.known: dict[Stack, float] = {}
        self.dense = tuple(Layer(block, ((block, 1),)) for block in range(self.depth))
        self.entered = [self.blocks[0].inputs]
        for block in self.blocks:
            self.entered.append(through(block, self.entered[-1]))
        self.expected = self._final(self.dense)

    def walk(self, threshold: float) -> Stack:
        """The merges kept at `threshold`, from the top down, again and again until one walk keeps none."""
        stack, before = self.dense, None
        while stack != before and len(stack) > self.depth - self.count:
            before, stack = stack, self._down(stack, threshold)
        return stack

    def _down(self, stack: Stack, threshold: float) -> Stack:
        first = len(stack) - self._width(stack) - 1
        while first >= 0 and (width := self._width(stack)):
            tried = merge(stack, first, width, self.config.variant)
            if self.similarity(tried) >= threshold:
                stack = tried
                first = min(first - self.config.interval, len(stack) - self._width(stack) - 1)
            else:
                first -= 1
        return stack

    def _width(self, stack: Stack) -> int:
        """How many blocks the next merge takes away."""
        return min(self.config.layers - 1, len(stack) - (self.depth - self.count))

    def similarity(self, stack: Stack) -> float:
        """Mean over sequences of the cosine between flattened final hidden states and the dense model's."""
        if stack not in self.known:
            found = self._final(stack)
            pairs = zip(found, self.expected, strict=True)
            self.known[stack] = sum(float(cosine(a, b).sum()) for a, b in pairs) / len(self.tokens)
        return self.known[stack]

    @torch.no_grad()
    def _final(self, stack: Stack) -> list[Tensor]:
        same = next((index for index, layer in enumerate(stack) if layer != self.dense[index]), len(stack))
        hidden = self.entered[same]
        for layer in stack[same:]:
            with self._merged(layer) as block:
                hidden = through(block, hidden)
        sizes = [len(states) for states in hidden]
        ids = self.tokens.split(sizes)
        return [leave(self.model, part, states).flatten(1) for part, states in zip(ids, hidden, strict=True)]

    @contextmanager
    def _merged(self, layer: Layer) -> Iterator[BlockOnStream]:
        """The block that `layer` stands for; a copy of one block where it differs from the model's."""
        block = self.blocks[layer.base]
        if layer.parts == ((layer.base, 1),):
            yield block
            return
        module = copy.deepcopy(block.module)
        self._fill(module, layer)
        yield BlockOnStream(block.index, block.path, module, block.inputs, block.arguments)

    @torch.no_grad()
    def _fill(self, module: nn.Module, layer: Layer) -> None:
        for path in layout_of(self.model.config).roles:
            for name, tensor in module.get_submodule(path).named_parameters():
                parts = [weight * self._wide(block, f"{path}.{name}") for block, weight in layer.parts]
                tensor.copy_(torch.stack(parts).sum(0))

    def _wide(self, block: int, name: str) -> Tensor:
        tensor = self.blocks[block].module.get_parameter(name)
        return tensor if tensor.dtype == torch.float64 else tensor.float()

    def write(self, stack: Stack) -> None:
        """Put the merged weights into the blocks that stay."""
        for layer in stack:
            if layer.parts != ((layer.base, 1),):
                with self._merged(layer) as block:
                    self.blocks[layer.base].module.load_state_dict(block.module.state_dict())
