"""Where each supported model family keeps its parts."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig

from suite.errors import InputError, nearest


@dataclass(frozen=True)
class Layout:
    """Where one family keeps its parts, as paths inside the model or inside a block."""

    blocks: str
    embedding: str
    final_norm: str
    head: str
    attention: str
    mlp: tuple[str, ...]
    """Paths inside a block of what the normed stream runs through after attention, in order."""
    norms: tuple[str, str]
    """Paths inside a block of the norms before attention and before the MLP."""
    roles: Mapping[str, str]
    """Path inside a block -> role of that linear, in the order they run."""
    positions: str | None = None
    """The table of learned positions, where there is one."""
    heads_by_block: bool = False
    """Whether attention counts its heads by the width of its projections, so that blocks may differ."""

    def attend(self, block: nn.Module, hidden: Tensor, arguments: Mapping[str, Any]) -> Tensor:
        """What attention would add to the residual stream `hidden` (… × width of the stream)."""
        normed = block.get_submodule(self.norms[0])(hidden)
        result: tuple[Tensor, ...] = block.get_submodule(self.attention)(normed, **arguments)
        return result[0]

    def feed_forward(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """What the MLP would add to the residual stream `hidden` (… × width of the stream)."""
        hidden = block.get_submodule(self.norms[1])(hidden)
        for path in self.mlp:
            hidden = block.get_submodule(path)(hidden)
        return hidden

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Paths inside a block of the linears that read the same input, in the order they run."""
        shared = {"key": "query", "value": "query", "up": "gate"}
        groups: dict[str, list[str]] = {}
        for path, role in self.roles.items():
            first = shared.get(role, role)
            groups.setdefault(first if first in self.roles.values() else role, []).append(path)
        return tuple(tuple(paths) for paths in groups.values())

    def inputs_shared(self, inside: Collection[str]) -> list[tuple[str, ...]]:
        """Linears at the paths `inside` a block by shared input, in running order; factors stand alone."""
        shared: list[tuple[str, ...]] = []
        for group in self.groups:
            whole = tuple(path for path in group if path in inside)
            shared += [whole] if whole else []
            shared += [(path,) for parent in group for path in inside if path.startswith(f"{parent}.")]
        return shared


LLAMA_LIKE = Layout(
    blocks="model.layers",
    embedding="model.embed_tokens",
    final_norm="model.norm",
    head="lm_head",
    attention="self_attn",
    mlp=("mlp",),
    norms=("input_layernorm", "post_attention_layernorm"),
    roles={
        "self_attn.q_proj": "query",
        "self_attn.k_proj": "key",
        "self_attn.v_proj": "value",
        "self_attn.o_proj": "output",
        "mlp.gate_proj": "gate",
        "mlp.up_proj": "up",
        "mlp.down_proj": "down",
    },
    heads_by_block=True,
)
OPT = Layout(
    blocks="model.decoder.layers",
    embedding="model.decoder.embed_tokens",
    final_norm="model.decoder.final_layer_norm",
    head="lm_head",
    attention="self_attn",
    mlp=("fc1", "activation_fn", "fc2"),
    norms=("self_attn_layer_norm", "final_layer_norm"),
    positions="model.decoder.embed_positions",
    roles={
        "self_attn.q_proj": "query",
        "self_attn.k_proj": "key",
        "self_attn.v_proj": "value",
        "self_attn.out_proj": "output",
        "fc1": "up",
        "fc2": "down",
    },
)
GPT_NEOX = Layout(
    blocks="gpt_neox.layers",
    embedding="gpt_neox.embed_in",
    final_norm="gpt_neox.final_layer_norm",
    head="lm_head",
    attention="attention",
    mlp=("mlp",),
    norms=("input_layernorm", "post_attention_layernorm"),
    roles={
        "attention.query_key_value": "query_key_value",
        "attention.dense": "output",
        "mlp.dense_h_to_4h": "up",
        "mlp.dense_4h_to_h": "down",
    },
)
LAYOUTS: dict[str, Layout] = {
    "llama": LLAMA_LIKE,
    "mistral": LLAMA_LIKE,
    "qwen2": LLAMA_LIKE,
    "qwen3": LLAMA_LIKE,
    "opt": OPT,
    "gpt_neox": GPT_NEOX,
}


def layout_of(config: PretrainedConfig) -> Layout:
    """The layout of a model family.

    Raises:
        InputError: the family is not supported; the message names those that are.
    """
    layout = LAYOUTS.get(config.model_type)
    if layout is None:
        raise InputError(
            f"model family '{config.model_type}' is not supported."
            f"{nearest(config.model_type, LAYOUTS)}  (Supported: {', '.join(LAYOUTS)}.)"
        )
    return layout
