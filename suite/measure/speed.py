"""Throughput of prefill, decode and training, on the shapes the protocol names."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from suite.records import Throughput
from suite.specs import SpeedSpec

Prompted = tuple[DynamicCache, Tensor]
"""The key-value cache of a prompt and the logits after it."""


def prefill_step(model: PreTrainedModel, spec: SpeedSpec) -> tuple[Callable[[], None], int]:
    """A forward pass over batch × length prompt tokens (logits of the last position), and their number."""
    ids = _random_ids(model, spec.prefill_batch, spec.prefill_length)

    def step() -> None:
        with torch.inference_mode():
            model(ids, use_cache=False, logits_to_keep=1)

    return step, ids.numel()


def decode_step(
    model: PreTrainedModel, spec: SpeedSpec
) -> tuple[Callable[[], Prompted], Callable[[Prompted], None], int]:
    """Reading the prompt (batch 1), greedy generation of `decode_tokens` after it, and their number."""
    prompt = _random_ids(model, 1, spec.decode_prompt)

    @torch.inference_mode()
    def read() -> Prompted:
        cache = DynamicCache(config=model.config)
        return cache, model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).logits

    @torch.inference_mode()
    def generate(prompted: Prompted) -> None:
        cache, logits = prompted
        for _ in range(spec.decode_tokens):
            token = logits[:, -1:].argmax(-1)
            logits = model(token, past_key_values=cache, use_cache=True).logits

    return read, generate, spec.decode_tokens


def prefill(model: PreTrainedModel, spec: SpeedSpec) -> Throughput:
    """Throughput of `prefill_step`."""
    step, tokens = prefill_step(model, spec)
    return _measure(model, step, tokens, spec.prefill_batch, spec.prefill_length, spec.repeats)


def decode(model: PreTrainedModel, spec: SpeedSpec) -> Throughput:
    """Throughput of `decode_step` with a key-value cache, the prompt not timed."""
    read, generate, tokens = decode_step(model, spec)
    rates = []
    for repeat in range(spec.repeats + 1):
        prompted = read()
        synchronize(model)
        start = time.perf_counter()
        generate(prompted)
        synchronize(model)
        if repeat:  # the first one is the warm-up
            rates.append(tokens / (time.perf_counter() - start))
    return Throughput(
        tokens_per_s=statistics.median(rates), repeats=tuple(rates), batch=1, length=spec.decode_prompt
    )


def training(model: PreTrainedModel, spec: SpeedSpec) -> Throughput:
    """Forward, backward and an AdamW step on all floating-point parameters."""
    ids = _random_ids(model, spec.train_batch, spec.train_length)
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=1e-6)
    model.train()

    def step() -> None:
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    try:
        return _measure(
            model, step, ids.numel(), spec.train_batch, spec.train_length, max(3, spec.repeats // 2)
        )
    finally:
        model.eval()


def _measure(
    model: PreTrainedModel, step: Callable[[], None], tokens: int, batch: int, length: int, repeats: int
) -> Throughput:
    step()  # warm-up: allocations and lazy initialisation
    rates = []
    for _ in range(repeats):
        synchronize(model)
        start = time.perf_counter()
        step()
        synchronize(model)
        rates.append(tokens / (time.perf_counter() - start))
    return Throughput(tokens_per_s=statistics.median(rates), repeats=tuple(rates), batch=batch, length=length)


def _random_ids(model: PreTrainedModel, batch: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (batch, length), generator=generator)
    return ids.to(model.device)


def synchronize(model: PreTrainedModel) -> None:
    """Wait until the device has done what it was given."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
