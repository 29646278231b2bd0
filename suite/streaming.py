"""Calibration tokens on their way through a model, one block at a time.

At most one block's activations are held, whatever the model's depth. The caller may change a block
while it stands there; the next block is fed what the changed one gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from suite.errors import CellFailed
from suite.models.layouts import layout_of
from suite.rebuilding import rebuilt_once

BATCH_SIZE = 8


class _Enough(Exception):
    """What was wanted has been seen; the rest of the forward pass is not needed."""


@dataclass(frozen=True)
class InputStatistics:
    """What is kept of the inputs x of a linear: Σ x xᵀ (n × n) and the mean of |x| (n)."""

    moment: Tensor
    size: Tensor

    def to(self, dtype: torch.dtype) -> InputStatistics:
        """The same in another dtype."""
        return InputStatistics(self.moment.to(dtype), self.size.to(dtype))

    def divided_by(self, scale: Tensor) -> InputStatistics:
        """As they are once feature by feature the inputs are divided by `scale` (n)."""
        return InputStatistics(self.moment / torch.outer(scale, scale), self.size / scale)


@dataclass
class BlockOnStream:
    """One block with the inputs that the blocks before it, as they now are, give it."""

    index: int
    path: str
    module: nn.Module
    inputs: list[Tensor]
    """Hidden states entering the block, by batch (sequences × length × hidden size)."""
    arguments: list[dict[str, Any]]
    """The other arguments of the block's forward, by batch."""
    advanced: bool = False
    """Whether the inputs are the next block's already."""
    _settled: set[str] = field(default_factory=set, init=False)
    _outputs: dict[str, dict[int, Any]] = field(default_factory=dict, init=False)

    def settle(self, paths: Iterable[str]) -> None:
        """Say that the submodules at `paths`, and all that runs before them, will not change any more.

        Later passes remember what these gave: linears compressed one after another then take together
        little more than one pass over the block.
        """
        self._settled.update(paths)

    @torch.no_grad()
    def observe(self, watched: Mapping[str, Callable[[Tensor], None]], advance: bool = False) -> None:
        """Call what is `watched` with the input of the submodule at its path, batch by batch.

        Paths are inside the block, inputs two-dimensional (tokens × features). All are seen in one pass;
        what comes after the last of them is not run, unless the same pass is to `advance` as well.
        """
        if not watched and not advance:
            return
        left: set[str] = set()

        def hook(path: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            value = args[0] if args else kwargs["hidden_states"]
            watched[path](value.reshape(-1, value.shape[-1]))
            left.discard(path)
            if not left and not advance:
                raise _Enough

        handles = [
            self.module.get_submodule(path).register_forward_pre_hook(partial(hook, path), with_kwargs=True)
            for path in watched
        ]
        # What is remembered as a whole from now on still needs its parts, this once.
        remembered = {path: self._outputs.get(path, {}) for path in self._largest_settled(watched)}
        wholes = tuple(f"{path}." for path in remembered)
        parts = {path: outputs for path, outputs in self._outputs.items() if path.startswith(wholes)}
        try:
            with rebuilt_once():
                for position, (hidden, arguments) in enumerate(zip(self.inputs, self.arguments, strict=True)):
                    left.update(watched)
                    with suppress(_Enough), self._remembering(parts | remembered, position):
                        output = self.module(hidden, **arguments)
                        if advance:
                            self.inputs[position] = output
        finally:
            for handle in handles:
                handle.remove()
        self._outputs = {} if advance else remembered
        self.advanced = self.advanced or advance

    def _largest_settled(self, watched: Iterable[str]) -> list[str]:
        """Paths of the settled submodules, of wholes where all parts are, with nothing `watched` inside."""

        def is_settled(path: str, module: nn.Module) -> bool:
            if path in self._settled:
                return True
            tensors = chain(module.parameters(recurse=False), module.buffers(recurse=False))
            parts = module.named_children()
            return next(tensors, None) is None and all(is_settled(f"{path}.{n}", part) for n, part in parts)

        found: list[str] = []
        for path, module in self.module.named_modules():
            inside = f"{path}."
            if not any(f"{settled}.".startswith(inside) for settled in self._settled):
                continue
            if path.startswith(tuple(f"{whole}." for whole in found)):
                continue
            if path and not any(w.startswith(inside) for w in watched) and is_settled(path, module):
                found.append(path)
        return found

    @contextmanager
    def _remembering(self, remembered: Mapping[str, dict[int, Any]], position: int) -> Iterator[None]:
        """Let the submodules that are `remembered` run for the batch at `position` but once."""
        with ExitStack() as stack:
            for path, outputs in remembered.items():
                module = self.module.get_submodule(path)
                once = partial(_once, outputs, position, module.forward)
                stack.enter_context(_instead([module], once))
            yield

    def second_moment(self, path: str) -> Tensor:
        """C = Σ x xᵀ (features × features, float64) of the inputs of the submodule at `path`."""
        return self.second_moments([path])[path]

    def second_moments(self, paths: Iterable[str], advance: bool = False) -> dict[str, Tensor]:
        """C = Σ x xᵀ (features × features, float64) of the inputs of the submodules at `paths`, in one pass.

        With `advance`, for a block that is not to change before, that pass makes the next block's inputs too.
        Batches are multiplied in float32 (float64 for a float64 model) and summed in float64.
        """
        totals: dict[str, Tensor] = {}

        def add(path: str, value: Tensor) -> None:
            part = second_moment(value)
            totals[path] = totals[path].add_(part) if path in totals else part

        self.observe({path: partial(add, path) for path in paths}, advance)
        return totals

    def input_statistics(self, paths: Iterable[str], advance: bool = False) -> dict[str, InputStatistics]:
        """Second moments as in `second_moments`, and mean sizes (features, float64), in one pass."""
        moments: dict[str, Tensor] = {}
        sizes: dict[str, Tensor] = {}
        counts: dict[str, int] = {}

        def add(path: str, value: Tensor) -> None:
            moment, size = second_moment(value), value.double().abs().sum(0)
            moments[path] = moments[path].add_(moment) if path in moments else moment
            sizes[path] = sizes[path].add_(size) if path in sizes else size
            counts[path] = counts.get(path, 0) + len(value)

        self.observe({path: partial(add, path) for path in paths}, advance)
        return {path: InputStatistics(moments[path], sizes[path] / counts[path]) for path in moments}

    def advance(self) -> None:
        """Replace the inputs by what the block, as it now is, makes of them."""
        self.observe({}, advance=True)


def _once(
    outputs: dict[int, Any], position: int, forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """What `forward` gave at `position`, or gives now."""
    if position not in outputs:
        outputs[position] = forward(*args, **kwargs)
    return outputs[position]


def second_moment(value: Tensor) -> Tensor:
    """Σ x xᵀ of rows (tokens × features) as float64, multiplied in at least float32."""
    wide = value if value.dtype == torch.float64 else value.float()
    size = wide.shape[1]
    moment = wide.new_empty(size, size)
    # It is symmetric: four strips, each from the diagonal on, are five eighths of the arithmetic.
    strip = max(1, -(-size // 4))
    for start in range(0, size, strip):
        stop = start + strip
        moment[start:stop, start:] = wide[:, start:stop].T @ wide[:, start:]
        moment[stop:, start:stop] = moment[start:stop, stop:].T
    return moment.double()


@torch.no_grad()
def stream(model: PreTrainedModel, tokens: Tensor, batch_size: int = BATCH_SIZE) -> Iterator[BlockOnStream]:
    """Yield the blocks in order, each with its inputs; after the body runs, its outputs go on.

    A body that computes the outputs itself puts them into `inputs` and sets `advanced`.
    `tokens` is sequences × length, without padding. The list of inputs is shared by all blocks.

    Raises:
        CellFailed: what a block gives is not finite, so that nothing after it has a meaning.
    """
    layout = layout_of(model.config)
    blocks: Sequence[nn.Module] = list(model.get_submodule(layout.blocks).children())
    inputs: list[Tensor] = []
    arguments: list[list[dict[str, Any]]] = []
    for batch in tokens.split(batch_size):
        hidden, by_block = _enter(model, blocks, batch.to(model.device))
        inputs.append(hidden)
        arguments.append(by_block)
    for index, module in enumerate(blocks):
        block = BlockOnStream(
            index, f"{layout.blocks}.{index}", module, inputs, [by_block[index] for by_block in arguments]
        )
        yield block
        if not block.advanced:
            block.module = model.get_submodule(block.path)  # the body may have put another one there
            block.advance()
        if not all(bool(hidden.isfinite().all()) for hidden in inputs):
            raise CellFailed(
                f"{block.path} gives values that are not finite for this text, in {model.dtype}: an overflow,"
                " broken weights, or what an earlier stage made of them"
            )


def leave(model: PreTrainedModel, ids: Tensor, hidden: Tensor) -> Tensor:
    """What the head gets for `ids` (sequences × length), given the hidden states after the last block."""
    blocks = list(model.get_submodule(layout_of(model.config).blocks).children())
    with _instead(blocks, lambda *_, **__: hidden):
        final: Tensor = model.base_model(ids.to(model.device), use_cache=False).last_hidden_state
    return final


def _enter(
    model: PreTrainedModel, blocks: Sequence[nn.Module], ids: Tensor
) -> tuple[Tensor, list[dict[str, Any]]]:
    """The hidden states entering the first block, and the keyword arguments each block is called with."""
    entered: list[Tensor] = []
    arguments: list[dict[str, Any]] = []

    def pass_on(hidden_states: Tensor, **kwargs: Any) -> Tensor:
        entered.append(hidden_states)
        arguments.append(kwargs)
        if len(entered) == len(blocks):
            raise _Enough  # the last norm of a sliced model takes nothing but what its blocks give
        return hidden_states

    with _instead(blocks, pass_on), suppress(_Enough):
        model.base_model(ids, use_cache=False)
    return entered[0], arguments


@contextmanager
def _instead(blocks: Sequence[nn.Module], forward: Callable[..., Tensor]) -> Iterator[None]:
    """Let `forward` stand for the forward of every block inside the `with`."""
    # An instance has a forward of its own only where something else stands in for its class's.
    before = [vars(block).get("forward") for block in blocks]
    try:
        for block in blocks:
            block.forward = forward
        yield
    finally:
        for block, own in zip(blocks, before, strict=True):
            if own is None:
                del block.forward
            else:
                block.forward = own
