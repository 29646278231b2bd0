"""Token sequences that share a beginning, laid out so that every token is computed once.

Requests become token trees: a shared context is one path from the root, its continuations are
branches. A tree is one row of a batch; each token attends to its ancestors only and sits at the
position it has in its own sequence, so the hidden states equal those of the separate sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Request:
    """`tokens` of which the last `scored` are predicted; the very last one is never an input."""

    tokens: tuple[int, ...]
    scored: int


@dataclass
class Tree:
    """One row: input tokens with their depths, the segments they form, and who reads where.

    `segments` holds (start, end, parent): nodes start..end−1 follow each other below node `parent`
    (−1 for the root). `reads` holds, per request, its index and the nodes that predict its scored
    tokens.
    """

    tokens: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    segments: list[tuple[int, int, int]] = field(default_factory=list)
    reads: list[tuple[int, list[int]]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.tokens)


def build_trees(requests: Sequence[Request], largest: int, longest_shared: int | None = None) -> list[Tree]:
    """Merge requests with a common beginning into trees of at most `largest` nodes; longest trees first.

    Sorted requests have their longest common beginning with their neighbour. A request joins its
    neighbour's tree when what is there already is at least half of what it adds. A request
    of more than `longest_shared` tokens stays alone (its attention window would be cut otherwise).
    """
    trees: list[Tree] = []
    path: list[int] = []
    before: tuple[int, ...] = ()
    for index in sorted(range(len(requests)), key=lambda i: requests[i].tokens):
        request = requests[index]
        inputs = request.tokens[:-1]
        shared = _common(before, inputs)
        new = len(inputs) - shared
        fits = bool(trees) and len(trees[-1]) + new <= largest
        alone = longest_shared is not None and max(len(inputs), len(before)) > longest_shared
        if alone or not fits or shared < 0.5 * new:
            trees.append(Tree())
            path, shared, new = [], 0, len(inputs)
        tree = trees[-1]
        path = path[:shared]
        if new:
            start = len(tree)
            tree.segments.append((start, start + new, path[-1] if path else -1))
            tree.tokens += inputs[shared:]
            tree.depths += range(shared, len(inputs))
            path += range(start, start + new)
        tree.reads.append((index, path[len(path) - request.scored :]))
        before = inputs
    return sorted(trees, key=len, reverse=True)


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    length = 0
    for left, right in zip(first, second, strict=False):
        if left != right:
            break
        length += 1
    return length


@dataclass(frozen=True)
class Layout:
    """Tensors of one batch: ids and positions (rows × length), and the mask or None for plain rows.

    `mask` (rows × 1 × length × length) is True where a token attends; None means causal.
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor | None


def layout(batch: Sequence[Tree]) -> Layout:
    """Pad the trees on the right into one batch."""
    rows, length = len(batch), max(len(tree) for tree in batch)
    ids = torch.zeros(rows, length, dtype=torch.int64)
    positions = torch.zeros(rows, length, dtype=torch.int64)
    for row, tree in enumerate(batch):
        ids[row, : len(tree)] = torch.tensor(tree.tokens)
        positions[row, : len(tree)] = torch.tensor(tree.depths)
    if all(len(tree.segments) == 1 for tree in batch):
        return Layout(ids, torch.arange(length).expand(rows, length), None)
    # Padding attends to itself: a row of the softmax with nothing in it would be NaN.
    mask = torch.eye(length, dtype=torch.bool).repeat(rows, 1, 1)
    for row, tree in enumerate(batch):
        for start, end, parent in tree.segments:
            if parent >= 0:
                mask[row, start:end, :start] = mask[row, parent, :start]
            mask[row, start:end, start:end] = torch.ones(end - start, end - start).tril().bool()
    return Layout(ids, positions, mask.unsqueeze(1))
