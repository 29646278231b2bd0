"""How much the language-model loss minds an error in a linear's output.

For an error ΔW of a linear with inputs x and loss gradients g at its outputs, the loss rises by
about ½ tr(G ΔW C ΔWᵀ) with C = E[x xᵀ] and G = E[g gᵀ]: the Kronecker-factored Fisher
approximation (Martens & Grosse, arXiv 1503.05671). It is one currency for the whole model, which
the squared error of a linear's outputs is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from suite.streaming import BlockOnStream, leave, second_moment, stream

CHUNK = 128
"""Positions of which logits are made at a time."""
_NOTHING = -100


def loss_gradients(
    model: PreTrainedModel, tokens: Tensor, see: Callable[[BlockOnStream, dict[str, Tensor]], None]
) -> list[list[Tensor]]:
    """Gradients of the summed loss on `tokens` at every block's output, by block and sequence.

    `see` is called with every block, the last one first, and G of the outputs of the linears in it
    (by path inside the block). Held are the hidden states between blocks, for these tokens alone,
    and the inside of one block for one sequence.
    """
    blocks: list[BlockOnStream] = []
    for block in stream(model, tokens, batch_size=1):
        blocks.append(BlockOnStream(block.index, block.path, block.module, [*block.inputs], block.arguments))
        leaving = block.inputs
    rows = zip(tokens.split(1), leaving, strict=True)
    gradients = [_at_the_end(model, ids, hidden) for ids, hidden in rows]
    by_block: list[list[Tensor]] = []
    for block in reversed(blocks):
        by_block.append(gradients)
        moments, gradients = pull_back(block, gradients)
        see(block, moments)
        block.inputs = []
    return by_block[::-1]


def pull_back(block: BlockOnStream, gradients: Sequence[Tensor]) -> tuple[dict[str, Tensor], list[Tensor]]:
    """From the gradients at a block's output, one for each of its first batches, to those at its input.

    Also returns G = Σ g gᵀ (float64) at the outputs of each linear, by path inside the block.
    """
    moments: dict[str, Tensor] = {}

    def watch(path: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def on_gradient(gradient: Tensor) -> None:
            part = second_moment(gradient.reshape(-1, gradient.shape[-1]))
            moments[path] = moments[path] + part if path in moments else part

        def on_output(_: nn.Module, __: Any, output: Tensor) -> None:
            output.register_hook(on_gradient)

        return on_output

    linears = {path: child for path, child in block.module.named_modules() if isinstance(child, nn.Linear)}
    handles = [linear.register_forward_hook(watch(path)) for path, linear in linears.items()]
    try:
        pulled = []
        for hidden, arguments, gradient in zip(block.inputs, block.arguments, gradients, strict=False):
            with torch.enable_grad():
                entering = hidden.detach().requires_grad_(True)
                output = block.module(entering, **arguments)
            pulled.append(torch.autograd.grad(output, entering, gradient)[0])
    finally:
        for handle in handles:
            handle.remove()
    return moments, pulled


def _at_the_end(model: PreTrainedModel, ids: Tensor, hidden: Tensor) -> Tensor:
    """The gradient of one sequence's summed loss at the output of the last block."""
    with torch.enable_grad():
        leaving = hidden.detach().requires_grad_(True)
        final = leave(model, ids, leaving)
        parts = [part.detach().requires_grad_(True) for part in final[0].split(CHUNK)]
        gradients = [torch.autograd.grad(loss, part)[0] for loss, part in _losses(model, ids, parts)]
    return torch.autograd.grad(final, leaving, torch.cat(gradients)[None])[0]


@torch.no_grad()
def loss_at_the_end(model: PreTrainedModel, tokens: Tensor, hidden: Sequence[Tensor]) -> float:
    """Mean loss per token (nats) given the outputs of the last block, in batches."""
    total = 0.0
    rows = [row for batch in hidden for row in batch.split(1)]
    for ids, row in zip(tokens.split(1), rows, strict=True):
        final = leave(model, ids, row)[0].split(CHUNK)
        total += sum(float(loss) for loss, _ in _losses(model, ids, final))
    return total / (tokens.shape[0] * (tokens.shape[1] - 1))


def _losses(model: PreTrainedModel, ids: Tensor, parts: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Summed loss of each part of a sequence's final states; logits exist for one part at a time."""
    head: Any = model.get_output_embeddings()
    # The last position predicts nothing.
    targets = torch.cat([ids[0, 1:], torch.tensor([_NOTHING])]).to(parts[0].device).split(CHUNK)
    for part, target in zip(parts, targets, strict=True):
        logits = head(part)
        wide = logits if logits.dtype == torch.float64 else logits.float()
        yield functional.cross_entropy(wide, target, ignore_index=_NOTHING, reduction="sum"), part
