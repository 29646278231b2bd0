"""Tiny models of every supported family, and what checks and tests do with them again and again."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from suite.calibration import Calibration, Training, tokens_digest
from suite.models.anatomy import Anatomy, anatomy_of
from suite.recipe import Recipe, RecipePlan
from suite.specs import Budget

VOCAB, BLOCKS, POSITIONS = 300, 4, 512
_SPECIAL = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 257}
_LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 112,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "tie_word_embeddings": True,
    **_SPECIAL,
}
_QWEN3 = {**_LLAMA, "head_dim": 16}
_OPT = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "word_embed_proj_dim": 48,
    "ffn_dim": 144,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
    **_SPECIAL,
}
_NEOX = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 144,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
    "rotary_pct": 0.5,
    **_SPECIAL,
}

CONFIGS: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, _LLAMA),
    "llama-untied": (LlamaConfig, {**_LLAMA, "tie_word_embeddings": False}),
    "qwen2": (Qwen2Config, _LLAMA),
    "opt": (OPTConfig, _OPT),
    "gpt-neox": (GPTNeoXConfig, _NEOX),
    # Variants that a few tests look at.
    "mistral": (MistralConfig, {**_LLAMA, "tie_word_embeddings": False}),
    "qwen3": (Qwen3Config, _QWEN3),
    "opt-350m-like": (OPTConfig, {**_OPT, "word_embed_proj_dim": 32, "do_layer_norm_before": False}),
}
FAMILIES = ["llama", "llama-untied", "qwen2", "opt", "gpt-neox"]


def config_of(family: str, **changes: Any) -> PretrainedConfig:
    """A fresh config of the family."""
    cls, fields = CONFIGS[family]
    return cls(**{**fields, **changes})


def build(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model with random weights, biases and norms included, the same for the same arguments."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config_of(family, **changes), dtype=dtype)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                offset = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                parameter.copy_(offset + 0.08 * torch.randn(parameter.shape))
        model.eval()
    return model


def on_meta(family: str) -> PreTrainedModel:
    """A model of the family without weights."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config_of(family), dtype=torch.float32)
    return model


@functools.cache
def anatomy(family: str) -> Anatomy:
    """The shapes of a dense tiny model."""
    return anatomy_of(on_meta(family))


def compress(model: PreTrainedModel, recipe: str, budget: str = "none", seed: int = 0) -> RecipePlan:
    """Plan and perform a recipe on `model`, in place."""
    parsed = Recipe.parse(recipe)
    plan = parsed.plan(anatomy_of(model), Budget.parse(budget), seed)
    teacher = copy.deepcopy(model).requires_grad_(False)
    sample = calibration_sample(lambda: teacher)
    return parsed.compress(model, plan, sample, dense=lambda: copy.deepcopy(teacher).requires_grad_(True))


def calibration_sample(teacher: Callable[[], PreTrainedModel] | None = None) -> Calibration:
    """A few random sequences, and others to train on when there is a teacher."""
    tokens = token_ids(4, 16)
    return Calibration(tokens, tokens_digest(tokens), training_sample(teacher) if teacher else None)


def training_sample(teacher: Callable[[], PreTrainedModel]) -> Training:
    """Eight random sequences in four steps, and two held out."""
    tokens, held_out = token_ids(8, 16, seed=1), token_ids(2, 16, seed=2)
    digest = tokens_digest(torch.cat([tokens, held_out]))
    return Training(tokens, held_out, 2, digest, teacher)


def token_ids(batch: int = 2, length: int = 12, seed: int = 0) -> Tensor:
    """Random tokens that are not special ones."""
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def logits_of(model: PreTrainedModel, ids: Tensor | None = None) -> Tensor:
    """Logits on a few tokens, which follow the model to its device."""
    ids = (token_ids() if ids is None else ids).to(model.device)
    logits: Tensor = model(ids, use_cache=False).logits
    return logits


def greedy(model: PreTrainedModel, *, use_cache: bool, new: int = 6) -> Tensor:
    """Greedy generation of `new` tokens after a fixed prompt of one sequence."""
    prompt = token_ids(1, 7, seed=3).to(model.device)
    generator: Any = model
    out: Tensor = generator.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        use_cache=use_cache,
    )
    return out


@contextmanager
def skipping(model: PreTrainedModel, blocks: set[int]) -> Iterator[None]:
    """Let the blocks pass their input on unchanged inside the `with`."""

    def identity(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    layers = model.get_submodule(anatomy_of(model).layout.blocks)
    chosen = [layer for index, layer in enumerate(layers.children()) if index in blocks]
    hooks = [layer.register_forward_hook(identity, with_kwargs=True) for layer in chosen]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def unique_params(model: nn.Module) -> int:
    """Parameters counted by torch itself, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, ids in the order of the alphabet, then BOS and EOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)
