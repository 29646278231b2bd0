"""Modules of a model whose residual stream was rotated and narrowed (SliceGPT, arXiv 2401.15024).

The stream of a sliced model is `width` wide where the dense one is `size` wide. Every module here
takes its stream as the last dimension: input … × width, output … × width or … × size.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from suite.layers import ModuleSpec, module_type
from suite.models.anatomy import Anatomy, LinearShape
from suite.models.layouts import LAYOUTS

READS_ATTENTION = frozenset({"query", "key", "value", "query_key_value"})
"""Roles of the linears that read the stream through the norm before attention."""
READS_MLP = frozenset({"gate", "up"})
"""Roles of the linears that read the stream through the norm before the MLP."""

SlicedLayout = Literal["tie-preserving", "official"]


def normalise(x: Tensor, size: int, eps: float) -> Tensor:
    """`x / sqrt(Σ x² / size + eps)` over the last dimension, computed in at least float32.

    `size` is the width before slicing: directions cut off were small, but the divisor is the model's.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) / size + eps)).to(x.dtype)


@module_type("unscaled_norm")
class UnscaledNorm(nn.Module):
    """RMSNorm whose scale was folded into the linears that read it; it has no tensors."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.size, self.eps = size, eps

    def arguments(self) -> dict[str, Any]:
        return {"size": self.size, "eps": self.eps}

    def forward(self, x: Tensor) -> Tensor:
        return normalise(x, self.size, self.eps)


@module_type("expanding_norm")
class ExpandingNorm(nn.Module):
    """The final norm of a sliced model whose head still reads the dense model's `size` coordinates."""

    def __init__(self, width: int, size: int, eps: float, bias: bool = False):
        super().__init__()
        self.eps = eps
        self.expand = nn.Linear(width, size, bias=False)
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None

    def arguments(self) -> dict[str, Any]:
        return {
            "width": self.expand.in_features,
            "size": self.expand.out_features,
            "eps": self.eps,
            "bias": self.bias is not None,
        }

    def forward(self, x: Tensor) -> Tensor:
        expanded = self.expand(normalise(x, self.expand.out_features, self.eps)) * self.weight
        return cast(Tensor, expanded if self.bias is None else expanded + self.bias)


@module_type("embedding")
class ResizedEmbedding(nn.Embedding):
    """An ordinary embedding table of another width than the dense model's."""

    def __init__(self, num_embeddings: int, embedding_dim: int):
        super().__init__(num_embeddings, embedding_dim)

    def arguments(self) -> dict[str, Any]:
        return {"num_embeddings": self.num_embeddings, "embedding_dim": self.embedding_dim}


@module_type("positions")
class ResizedPositions(nn.Embedding):
    """OPT's table of learned positions in another width; position p stands in row p + `offset`."""

    def __init__(self, num_embeddings: int, embedding_dim: int, offset: int):
        super().__init__(num_embeddings, embedding_dim)
        self.offset = offset

    def arguments(self) -> dict[str, Any]:
        return {
            "num_embeddings": self.num_embeddings,
            "embedding_dim": self.embedding_dim,
            "offset": self.offset,
        }

    def forward(  # type: ignore[override]
        self, attention_mask: Tensor, past_length: int = 0, *, position_ids: Tensor
    ) -> Tensor:
        return super().forward(position_ids + self.offset)


@module_type("sliced_block")
class SlicedBlock(GradientCheckpointingLayer):
    """A decoder block that changes the basis and width of its residual stream at each addition.

    `h = A x + attention(norm(x))`, then `B h + mlp(norm(h))`, with A (between × entering) and
    B (leaving × between); where attention and MLP read the same x (`between` None) B alone, leaving ×
    entering. Without `attention_skip` or `mlp_skip` that matrix is the identity. `entrance` is the
    width of a stream to be projected onto `entering` coordinates first. Dropout of the block itself
    is left out. `family` is the model type whose layout says where norms, attention and MLP are.
    """

    def __init__(
        self,
        family: str,
        entering: int,
        between: int | None,
        leaving: int,
        entrance: int | None = None,
        attention_skip: bool = True,
        mlp_skip: bool = True,
    ):
        super().__init__()
        self.family, self.entering, self.between, self.leaving = family, entering, between, leaving
        self.entrance = None if entrance is None else nn.Linear(entrance, entering, bias=False)
        middle = entering if between is None else between
        self.attention_skip = nn.Linear(entering, middle, bias=False) if attention_skip else None
        self.mlp_skip = nn.Linear(middle, leaving, bias=False) if mlp_skip else None

    def adopt(self, block: nn.Module) -> None:
        """Take over norms, attention and MLP of `block`."""
        for name, child in block.named_children():
            self.add_module(name, child)

    def arguments(self) -> dict[str, Any]:
        return {
            "family": self.family,
            "entering": self.entering,
            "between": self.between,
            "leaving": self.leaving,
            "entrance": None if self.entrance is None else self.entrance.in_features,
            "attention_skip": self.attention_skip is not None,
            "mlp_skip": self.mlp_skip is not None,
        }

    def forward(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
        layout = LAYOUTS[self.family]
        if self.entrance is not None:
            hidden_states = self.entrance(hidden_states)
        attended = layout.attend(self, hidden_states, arguments)
        if self.between is None:
            return _skip(self.mlp_skip, hidden_states) + attended + layout.feed_forward(self, hidden_states)
        hidden_states = _skip(self.attention_skip, hidden_states) + attended
        return _skip(self.mlp_skip, hidden_states) + layout.feed_forward(self, hidden_states)


def _skip(matrix: nn.Linear | None, hidden: Tensor) -> Tensor:
    return hidden if matrix is None else cast(Tensor, matrix(hidden))


def sliced_modules(
    anatomy: Anatomy, widths: list[int], layout: SlicedLayout, keep_whole: bool = True
) -> dict[str, ModuleSpec]:
    """The modules of a model sliced to `widths`, one for every point where the stream is read.

    Between two points of full width nothing is rotated, unless `keep_whole` is False.
    """
    parts, size, eps = anatomy.layout, anatomy.hidden_size, anatomy.norms.eps
    norm = ModuleSpec(type="unscaled_norm", arguments={"size": size, "eps": eps})
    official = layout == "official"
    modules: dict[str, ModuleSpec] = {}

    def rotates(before: int, after: int) -> bool:
        return not keep_whole or min(before, after) < size

    for index, (entering, between, leaving) in enumerate(_by_block(widths, anatomy.parallel)):
        path = f"{parts.blocks}.{index}"
        middle = entering if between is None else between
        arguments = {
            "family": anatomy.model_type,
            "entering": entering,
            "between": between,
            "leaving": leaving,
            "entrance": size if index == 0 and not official else None,
            "attention_skip": between is not None and rotates(entering, between),
            "mlp_skip": rotates(middle, leaving),
        }
        modules[path] = ModuleSpec(type="sliced_block", arguments=arguments)
        modules |= {f"{path}.{inner}": norm for inner in parts.norms}
        of_role = dict.fromkeys(READS_ATTENTION, entering) | dict.fromkeys(READS_MLP, middle)
        writes = {"output": leaving if between is None else between, "down": leaving}
        for line in anatomy.linears:
            if line.block == index:
                modules[line.path] = _linear(line, of_role, writes, anatomy.norms.bias)
    last, table = widths[-1], {"num_embeddings": anatomy.vocab_size, "embedding_dim": widths[0]}
    if not official:
        arguments = {"width": last, "size": size, "eps": eps, "bias": anatomy.norms.bias}
        return modules | {parts.final_norm: ModuleSpec(type="expanding_norm", arguments=arguments)}
    modules |= {parts.embedding: ModuleSpec(type="embedding", arguments=table), parts.final_norm: norm}
    if parts.positions is not None:
        modules[parts.positions] = _positions(anatomy, parts.positions, widths[0])
    head = {"in_features": last, "out_features": anatomy.vocab_size}
    bias = anatomy.head_bias or anatomy.norms.bias
    return modules | {parts.head: ModuleSpec(type="linear", arguments={**head, "bias": bias})}


def _by_block(widths: list[int], parallel: bool) -> Iterator[tuple[int, int | None, int]]:
    """Widths entering, before the MLP (None where both branches read the same) and leaving a block."""
    if parallel:
        yield from ((entering, None, leaving) for entering, leaving in pairwise(widths))
    else:
        yield from zip(widths[:-1:2], widths[1::2], widths[2::2], strict=True)


def _linear(line: LinearShape, reads: dict[str, int], writes: dict[str, int], norm_bias: bool) -> ModuleSpec:
    return ModuleSpec(
        type="linear",
        arguments={
            "in_features": reads.get(line.role, line.in_features),
            "out_features": writes.get(line.role, line.out_features),
            "bias": line.bias or (norm_bias and line.role in reads),
        },
    )


def _positions(anatomy: Anatomy, path: str, width: int) -> ModuleSpec:
    params = next(entry.params for entry in anatomy.entries if entry.path == path)
    rows = params // anatomy.hidden_size
    return ModuleSpec(
        type="positions", arguments={"num_embeddings": rows, "embedding_dim": width, "offset": 2}
    )
