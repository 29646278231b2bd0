"""One token sample per protocol, drawn once and handed identically to every method."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from suite import data
from suite.errors import InputError
from suite.specs import CalibrationSpec


@dataclass(frozen=True)
class Calibration:
    """`tokens` (count × length, int64) and their SHA-256."""

    tokens: Tensor
    digest: str


def draw(
    spec: CalibrationSpec, tokenizer: PreTrainedTokenizerBase, seed: int = 0, folder: Path | None = None
) -> Calibration:
    """Cut a text into windows of `length` tokens and draw `count` of them under `seed`.

    Raises:
        InputError: the text is too short for that many windows.
    """
    ids = token_ids(tokenizer, data.text(spec.source, folder))
    windows = ids[: len(ids) // spec.length * spec.length].reshape(-1, spec.length)
    if len(windows) < spec.count:
        raise InputError(
            f"calibration {spec}: '{spec.source}' holds only {len(windows)} sequences of {spec.length}"
            f" tokens with this tokenizer. Ask for at most {spec.source}:{len(windows)}x{spec.length}."
        )
    generator = torch.Generator().manual_seed(seed)
    tokens = windows[torch.randperm(len(windows), generator=generator)[: spec.count]].contiguous()
    return Calibration(tokens, tokens_digest(tokens))


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """The whole text tokenised at once, without special tokens (int64, one dimension)."""
    encoded = tokenizer(text, add_special_tokens=False, verbose=False)
    return torch.tensor(encoded["input_ids"], dtype=torch.int64)


def tokens_digest(tokens: Tensor) -> str:
    """SHA-256 of token ids, independent of platform."""
    return hashlib.sha256(tokens.to(torch.int64).numpy().astype("<i8").tobytes()).hexdigest()
