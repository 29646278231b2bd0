"""One token sample per protocol, drawn once and handed identically to every method."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from suite import data
from suite.errors import InputError
from suite.specs import CalibrationSpec, HealingSpec

HELD_OUT_SEQUENCES = 4
_TRAINING_STREAM = 1 << 20


@dataclass(frozen=True)
class Training:
    """Text that every healed or distilled model is trained on: the same tokens in the same order."""

    tokens: Tensor
    """count × length, int64."""
    held_out: Tensor
    """A few more sequences of the same text, never trained on, to follow the loss with."""
    batch: int
    """Sequences in one optimizer step."""
    digest: str
    """SHA-256 of tokens and held-out tokens."""
    teacher: Callable[[], PreTrainedModel]
    """Loads the dense model, in evaluation mode and without gradients."""
    progress: Callable[[str, int, int], None] = lambda what, done, total: None


@dataclass(frozen=True)
class Calibration:
    """What a method may learn from: `tokens` (count × length, int64), their SHA-256, and training text."""

    tokens: Tensor
    digest: str
    training: Training | None = None
    """Given to methods that need "training"."""


def draw(
    spec: CalibrationSpec, tokenizer: PreTrainedTokenizerBase, seed: int = 0, folder: Path | None = None
) -> Calibration:
    """Cut a text into windows of `length` tokens and draw `count` of them under `seed`.

    Raises:
        InputError: the text is too short for that many windows.
    """
    tokens = _windows(spec, spec.count, tokenizer, seed, folder)
    return Calibration(tokens, tokens_digest(tokens))


def draw_training(
    spec: HealingSpec,
    tokenizer: PreTrainedTokenizerBase,
    teacher: Callable[[], PreTrainedModel],
    seed: int = 0,
    folder: Path | None = None,
) -> Training:
    """Draw `count` training sequences and a few held-out ones, each window at most once.

    Raises:
        InputError: the text is too short for that many windows.
    """
    # Another draw than that of the calibration, which may be of the same text.
    windows = _windows(spec, spec.count + HELD_OUT_SEQUENCES, tokenizer, seed + _TRAINING_STREAM, folder)
    tokens, held_out = windows[: spec.count], windows[spec.count :]
    return Training(tokens, held_out, spec.batch, tokens_digest(windows), teacher)


def draw_held_back(
    spec: CalibrationSpec,
    healing: HealingSpec | None,
    count: int,
    tokenizer: PreTrainedTokenizerBase,
    seed: int = 0,
    folder: Path | None = None,
) -> Tensor:
    """Draw `count` sequences of the calibration's text that overlap neither it nor the training text.

    Raises:
        InputError: the text is too short for that many more windows.
    """
    ids = token_ids(tokenizer, data.text(spec.source, folder))
    used = torch.zeros(len(ids), dtype=torch.bool)
    for window in _order(len(ids) // spec.length, seed)[: spec.count].tolist():
        used[window * spec.length : (window + 1) * spec.length] = True
    if healing is not None and healing.source == spec.source:
        drawn = _order(len(ids) // healing.length, seed + _TRAINING_STREAM)
        for window in drawn[: healing.count + HELD_OUT_SEQUENCES].tolist():
            used[window * healing.length : (window + 1) * healing.length] = True
    cut = len(ids) // spec.length * spec.length
    windows, taken = ids[:cut].reshape(-1, spec.length), used[:cut].reshape(-1, spec.length).any(1)
    free = windows[~taken]
    if len(free) < count:
        raise InputError(
            f"'{spec.source}' holds only {len(free)} sequences of {spec.length} tokens beside what methods"
            f" learn from, {count} are to be held back. Hold fewer back, or calibrate on another text."
        )
    return free[_order(len(free), seed + 2 * _TRAINING_STREAM)[:count]].contiguous()


def _order(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def _windows(
    spec: CalibrationSpec, count: int, tokenizer: PreTrainedTokenizerBase, seed: int, folder: Path | None
) -> Tensor:
    ids = token_ids(tokenizer, data.text(spec.source, folder))
    windows = ids[: len(ids) // spec.length * spec.length].reshape(-1, spec.length)
    if len(windows) < count:
        most = max(len(windows) - (count - spec.count), 0)
        raise InputError(
            f"{spec}: '{spec.source}' holds only {len(windows)} sequences of {spec.length} tokens with this"
            f" tokenizer, {count} are needed. Ask for at most {spec.source}:{most}x{spec.length}."
        )
    return windows[_order(len(windows), seed)[:count]].contiguous()


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """The whole text tokenised at once, without special tokens (int64, one dimension)."""
    encoded = tokenizer(text, add_special_tokens=False, verbose=False)
    return torch.tensor(encoded["input_ids"], dtype=torch.int64)


def tokens_digest(tokens: Tensor) -> str:
    """SHA-256 of token ids, independent of platform."""
    return hashlib.sha256(tokens.to(torch.int64).numpy().astype("<i8").tobytes()).hexdigest()
