"""Perplexity with every convention stated."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from suite import data
from suite.calibration import token_ids, tokens_digest
from suite.errors import InputError
from suite.rebuilding import rebuilt_once
from suite.records import Perplexity
from suite.specs import PerplexitySpec

BATCH_SIZE = 4


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    spec: PerplexitySpec,
    folder: Path | None = None,
    batch_size: int = BATCH_SIZE,
) -> Perplexity:
    """Perplexity over non-overlapping windows of the text, the mean taken over tokens.

    Raises:
        InputError: the text is shorter than one window, or a BOS is asked for that does not exist.
    """
    ids = token_ids(tokenizer, data.text(spec.source, folder))
    windows = ids[: len(ids) // spec.window * spec.window].reshape(-1, spec.window)[: spec.windows]
    if not len(windows):
        raise InputError(f"'{spec.source}' holds {len(ids)} tokens, less than one window of {spec.window}.")
    if spec.bos:
        if tokenizer.bos_token_id is None:
            raise InputError("the protocol asks for a BOS token, but this tokenizer has none.")
        bos = torch.full((len(windows), 1), tokenizer.bos_token_id)
        windows = torch.cat([bos, windows], dim=1)
    with rebuilt_once():
        nlls = torch.cat([window_nlls(model, batch) for batch in windows.split(batch_size)])
    scored = windows.shape[0] * (windows.shape[1] - 1)
    mean = float(nlls.sum()) / scored
    return Perplexity(
        perplexity=math.inf if mean > 700 else math.exp(mean),
        nll_per_token=mean,
        tokens=scored,
        window=spec.window,
        stride=spec.window,
        bos=spec.bos,
        source=spec.source,
        tokens_digest=tokens_digest(windows),
        window_nlls=tuple(nlls.tolist()),
    )


@torch.inference_mode()
def window_nlls(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Summed negative log-likelihood (float64, one per row) of tokens 1.. of each row of `ids`."""
    ids = ids.to(model.device)
    logits = model(ids, use_cache=False).logits[:, :-1]
    # Row by row: over a transposed batch of 49,152 logits, torch was off by 7e-5 nats a token, and slower.
    nlls = [
        functional.cross_entropy(row.float(), targets, reduction="none").double().sum()
        for row, targets in zip(logits, ids[:, 1:], strict=True)
    ]
    return torch.stack(nlls).cpu()
