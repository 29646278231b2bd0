"""A decoder-only language model seen as embeddings, blocks, linears, norms and heads.

All knowledge of architectures lives here. An `Anatomy` holds shapes only: it is read off a model on
the meta device, so a 70B model costs nothing, and `after` predicts what a plan makes of it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from suite.errors import InputError
from suite.layers import ModuleSpec
from suite.measure.ledger import Entry, ledger, total_disk, total_params
from suite.models.layouts import Layout, layout_of
from suite.packed_layers import PackedLinear
from suite.sparse_layers import SparseLinear


@dataclass(frozen=True)
class LinearShape:
    """One linear layer inside a block: weight is `out_features × in_features`.

    `packed` weights are integers already, `sparse` ones are stored without their zeros; neither can be
    factorised or quantized any more.
    """

    path: str
    role: str
    block: int
    out_features: int
    in_features: int
    bias: bool
    packed: bool = False
    sparse: bool = False


@dataclass(frozen=True)
class Norms:
    """What the norms of a model do: subtract the mean or not, add a bias or not, and their epsilon."""

    centred: bool
    bias: bool
    eps: float


@dataclass(frozen=True)
class Anatomy:
    """Shapes of a model, and its ledger."""

    model_type: str
    layout: Layout
    dtype: torch.dtype
    n_blocks: int
    hidden_size: int
    embedding_size: int
    """Width of the embedding table; OPT-350M projects it to the hidden size."""
    head_size: int
    """Width of what the head reads."""
    head_bias: bool
    vocab_size: int
    heads: int
    key_value_heads: int
    head_dim: int
    tied: bool
    norms: Norms
    pre_norm: bool
    """Whether norms stand before attention and MLP, and not after them as in OPT-350M."""
    parallel: bool
    """Whether attention and MLP of a block read the same stream, as in most GPT-NeoX models."""
    linears: tuple[LinearShape, ...]
    entries: tuple[Entry, ...]

    @property
    def params(self) -> int:
        """Unique parameters, embeddings included, tied weights once."""
        return total_params(self.entries)

    @property
    def bytes(self) -> int:
        """Bytes of the weights as a checkpoint stores them."""
        return total_disk(self.entries)

    @property
    def embedding_params(self) -> int:
        """Parameters of embedding and head together."""
        return total_params(e for e in self.entries if e.path in (self.layout.embedding, self.layout.head))

    def size(self, metric: str) -> int:
        """`params` or `bytes`."""
        return self.params if metric == "params" else self.bytes

    @property
    def decoder_params(self) -> int:
        """Parameters of the blocks' linears (whatever replaced them included), norms left out."""
        return decoder_params(self.entries, self.layout)

    @property
    def packed(self) -> bool:
        """Whether a quantizer has packed linears of the blocks."""
        return any(linear.packed for linear in self.linears)

    @property
    def sliced(self) -> bool:
        """Whether the residual stream of a block may have another basis than that of the next one."""
        return any(entry.path.endswith("_skip") for entry in self.entries)

    def dense_linears(self, method: str, or_sparse: bool = False) -> tuple[LinearShape, ...]:
        """The linears, all still dense; sparse ones are let pass when `or_sparse`.

        Raises:
            InputError: an earlier stage packed them, or stored them without their zeros.
        """
        if self.packed:
            raise InputError(
                f"'{method}' needs dense weights, but an earlier stage quantized them."
                f" Put the quantizer last: {method}+..."
            )
        if any(linear.sparse for linear in self.linears) and not or_sparse:
            raise InputError(
                f"'{method}' needs dense weights, but an earlier stage pruned them and stores the kept ones"
                f" alone, which have no rows and columns to act on. Leave {method} out or put it before the"
                " pruning, if it leaves dense weights itself."
            )
        return self.linears

    def restricted(self, paths: Collection[str]) -> Anatomy:
        """A view for planning one part: only these linears to act on, the sizes of the whole model."""
        return replace(self, linears=tuple(line for line in self.linears if line.path in paths))

    def after(self, drop: Sequence[int] = (), modules: Mapping[str, ModuleSpec] | None = None) -> Anatomy:
        """The anatomy once blocks `drop` are gone and then `modules` stand at their paths."""
        result = self._without(set(drop)) if drop else self
        return result._with(modules) if modules else result

    def _without(self, drop: set[int]) -> Anatomy:
        if self.sliced:
            raise InputError(
                "the blocks of a sliced model hand on streams in bases of their own, so none of them can"
                " be removed. Put slicegpt after the stage that removes blocks."
            )
        if any(".coefficients" in entry.path for entry in self.entries):
            raise InputError(
                "the blocks of this model stand on bases that they share with their neighbours, so none of"
                " them can be removed. Put basis-sharing after the stage that removes blocks."
            )
        kept = [block for block in range(self.n_blocks) if block not in drop]
        renumbered = {old: new for new, old in enumerate(kept)}
        prefix = re.compile(re.escape(self.layout.blocks) + r"\.(\d+)\b")

        def moved(path: str) -> str | None:
            match = prefix.match(path)
            if not match:
                return path
            block = int(match[1])
            if block in drop:
                return None
            return f"{self.layout.blocks}.{renumbered[block]}{path[match.end() :]}"

        linears = tuple(
            replace(linear, path=path, block=renumbered[linear.block])
            for linear in self.linears
            if (path := moved(linear.path)) is not None
        )
        entries = tuple(e.at(path) for e in self.entries if (path := moved(e.path)) is not None)
        return replace(self, n_blocks=len(kept), linears=linears, entries=entries)

    def _with(self, modules: Mapping[str, ModuleSpec]) -> Anatomy:
        gone = {path for path, spec in modules.items() if not spec.wraps}
        entries = [entry for entry in self.entries if not _inside(entry.path, gone)]
        linears = [linear for linear in self.linears if not _inside(linear.path, gone)]
        before = {linear.path: linear for linear in self.linears}
        for path, spec in modules.items():
            own_entries, own_linears = _skeleton(spec, self.dtype)
            entries += [e.at(_join(path, e.path)) for e in own_entries]
            parent = before.get(path)
            if parent is not None:
                linears += [
                    replace(line, path=_join(path, line.path), role=parent.role, block=parent.block)
                    for line in own_linears
                ]
        result = replace(self, entries=tuple(entries), linears=tuple(linears))
        if (table := modules.get(self.layout.embedding)) is not None:
            result = replace(result, embedding_size=table.arguments["embedding_dim"])
        if (head := modules.get(self.layout.head)) is not None and (own := _skeleton(head, self.dtype)[1]):
            result = replace(result, tied=False, head_size=own[0].in_features, head_bias=own[0].bias)
        return result


def _inside(path: str, modules: Container[str]) -> bool:
    """Whether a path is, or lies in, one of the replaced modules."""
    while path:
        if path in modules:
            return True
        path = path.rpartition(".")[0]
    return False


def _join(parent: str, child: str) -> str:
    return f"{parent}.{child}" if child else parent


@functools.lru_cache(maxsize=4096)
def _skeleton(spec: ModuleSpec, dtype: torch.dtype) -> tuple[tuple[Entry, ...], tuple[LinearShape, ...]]:
    """Entries and linears inside a module of this spec; cached, as shapes repeat in every block."""
    module = spec.build(dtype)
    return ledger(module), tuple(_linears_of(module))


def _linears_of(module: nn.Module) -> list[LinearShape]:
    return [
        LinearShape(
            path=path,
            role="",
            block=-1,
            out_features=child.out_features,
            in_features=child.in_features,
            bias=child.bias is not None,
            packed=isinstance(child, PackedLinear),
            sparse=isinstance(child, SparseLinear),
        )
        for path, child in module.named_modules()
        if isinstance(child, (nn.Linear, PackedLinear, SparseLinear))
    ]


def anatomy_of(model: PreTrainedModel) -> Anatomy:
    """Read the anatomy off a dense or compressed model, on any device including meta."""
    config: Any = model.config
    layout = layout_of(config)
    blocks = model.get_submodule(layout.blocks)
    linears: list[LinearShape] = []
    for index, block in enumerate(blocks.children()):
        for inner, role in layout.roles.items():
            try:
                module = block.get_submodule(inner)
            except AttributeError:
                raise InputError(
                    f"this {config.model_type} model has no '{inner}' in block {index}: its blocks"
                    " are not of the usual form, so it is not supported."
                ) from None
            path = f"{layout.blocks}.{index}.{inner}"
            linears += [
                replace(line, path=_join(path, line.path), role=role, block=index)
                for line in _linears_of(module)
            ]
    heads = config.num_attention_heads
    head = _linears_of(model.get_submodule(layout.head))
    table: Any = model.get_submodule(layout.embedding)
    embedding_size = table.embedding_dim if isinstance(table, nn.Embedding) else table.columns
    norm: Any = model.get_submodule(f"{layout.blocks}.0.{layout.norms[0]}")
    return Anatomy(
        model_type=config.model_type,
        layout=layout,
        dtype=model.dtype,
        n_blocks=len(list(blocks.children())),
        hidden_size=config.hidden_size,
        embedding_size=embedding_size,
        head_size=head[0].in_features if head else embedding_size,
        head_bias=bool(head) and head[0].bias,
        vocab_size=config.vocab_size,
        heads=heads,
        key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        tied=bool(config.tie_word_embeddings),
        norms=Norms(
            centred=isinstance(norm, nn.LayerNorm),
            bias=getattr(norm, "bias", None) is not None,
            eps=norm.eps if hasattr(norm, "eps") else norm.variance_epsilon,
        ),
        pre_norm=getattr(config, "do_layer_norm_before", True),
        parallel=getattr(config, "use_parallel_residual", False),
        linears=tuple(linears),
        entries=ledger(model),
    )


def decoder_params(entries: Sequence[Entry], layout: Layout) -> int:
    """Parameters inside the blocks that do not belong to norms."""
    inside = re.compile(re.escape(layout.blocks) + r"\.\d+\.(.+)")
    total = 0
    for entry in entries:
        match = inside.match(entry.path)
        if match and not match[1].endswith(layout.norms) and "norm" not in match[1].rpartition(".")[2]:
            total += entry.params
    return total


def drop_blocks(model: PreTrainedModel, drop: Sequence[int]) -> None:
    """Remove blocks in place and renumber the rest, in the modules and in the config."""
    layout = layout_of(model.config)
    blocks = model.get_submodule(layout.blocks)
    kept = [index for index in range(len(list(blocks.children()))) if index not in set(drop)]
    children = list(blocks.children())
    model.set_submodule(layout.blocks, nn.ModuleList(children[index] for index in kept))
    for position, index in enumerate(kept):
        for module in children[index].modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = position  # type: ignore[assignment]
    config: Any = model.config
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[index] for index in kept]
    config.num_hidden_layers = len(kept)
