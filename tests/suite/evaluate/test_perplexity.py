"""Perplexity against the definition, one token at a time."""

from __future__ import annotations

import math
from typing import cast

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutput

from suite import data
from suite.calibration import tokens_digest
from suite.conformance import tiny
from suite.errors import InputError
from suite.evaluate.perplexity import measure, window_nlls
from suite.specs import PerplexitySpec

TEXT = "The quick brown fox jumps over the lazy dog, 1234567890 times a day."  # 68 bytes


@pytest.fixture(autouse=True)
def _toy_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(data.TEXTS, "toy", lambda folder: TEXT)


def naive(model: PreTrainedModel, windows: list[list[int]]) -> list[float]:
    """Each window's negative log-likelihood: one forward pass for each of its tokens."""
    sums = []
    for window in windows:
        total = 0.0
        for position in range(1, len(window)):
            with torch.inference_mode():
                logits = model(torch.tensor([window[:position]])).logits[0, -1].double()
            total -= float(logits.log_softmax(-1)[window[position]])
        sums.append(total)
    return sums


def spec(**fields: object) -> PerplexitySpec:
    return PerplexitySpec.model_validate({"source": "toy", "window": 16, **fields})


def test_perplexity_equals_the_definition(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer(TEXT).input_ids
    expected = naive(model, [ids[0:16], ids[16:32], ids[32:48], ids[48:64]])
    got = measure(model, tokenizer, spec())
    assert got.window_nlls == pytest.approx(expected, rel=1e-5)
    assert got.tokens == 4 * 15
    assert got.nll_per_token == pytest.approx(sum(expected) / 60, rel=1e-5)
    assert got.perplexity == pytest.approx(math.exp(sum(expected) / 60), rel=1e-5)


def test_a_large_vocabulary_costs_no_accuracy() -> None:
    class Logits(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, ids: torch.Tensor, use_cache: bool) -> CausalLMOutput:
            generator = torch.Generator().manual_seed(0)
            return CausalLMOutput(logits=torch.randn(*ids.shape, 49152, generator=generator) * 3)

    model, ids = Logits(), torch.arange(128).reshape(2, 64)
    exact = model(ids, use_cache=False).logits[:, :-1].double().log_softmax(-1)
    expected = -exact.gather(-1, ids[:, 1:, None]).sum((1, 2))
    assert torch.allclose(window_nlls(cast(PreTrainedModel, model), ids), expected, rtol=1e-6)


def test_with_a_bos_every_token_of_the_text_is_scored(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    ids = tokenizer(TEXT).input_ids
    expected = naive(llama, [[256, *ids[0:16]], [256, *ids[16:32]]])
    got = measure(llama, tokenizer, spec(bos=True, windows=2))
    assert got.window_nlls == pytest.approx(expected, rel=1e-5)
    assert got.tokens == 2 * 16
    assert got.bos
    assert got.nll_per_token == pytest.approx(sum(expected) / 32, rel=1e-5)


@pytest.mark.parametrize(("asked", "found"), [(None, 4), (1, 1), (3, 3), (9, 4)])
def test_windows_do_not_overlap_and_the_rest_of_the_text_is_left_out(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, asked: int | None, found: int
) -> None:
    got = measure(llama, tokenizer, spec(windows=asked))
    assert len(got.window_nlls) == found
    assert (got.window, got.stride) == (16, 16)
    ids = torch.tensor(tokenizer(TEXT).input_ids)[: 16 * found].reshape(found, 16)
    assert got.tokens_digest == tokens_digest(ids)


def test_the_batch_size_makes_no_difference(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    one, three = (measure(llama, tokenizer, spec(), batch_size=size) for size in (1, 3))
    assert one.window_nlls == pytest.approx(three.window_nlls, rel=1e-6)


def test_a_text_shorter_than_a_window_is_refused(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(InputError, match="'toy' holds 68 tokens, less than one window of 69"):
        measure(llama, tokenizer, spec(window=69))


def test_a_bos_that_does_not_exist_is_refused(llama: PreTrainedModel) -> None:
    tokenizer = tiny.byte_tokenizer()
    tokenizer.bos_token = None
    with pytest.raises(InputError, match="this tokenizer has none"):
        measure(llama, tokenizer, spec(bos=True))


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    with torch.no_grad():
        llama.model.norm.weight.zero_()
    assert measure(llama, tokenizer, spec()).perplexity == pytest.approx(tiny.VOCAB, rel=1e-5)


def test_a_model_that_is_certain_and_wrong_has_infinite_perplexity(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    with torch.no_grad():
        llama.model.norm.weight.fill_(1e6)
    got = measure(llama, tokenizer, spec())
    assert got.perplexity == math.inf
    assert math.isfinite(got.nll_per_token)


def test_likelihoods_of_half_precision_logits_are_summed_in_full_precision() -> None:
    model = tiny.build("llama", torch.bfloat16)
    ids = tiny.token_ids(2, 200)
    logits = tiny.logits_of(model, ids)[:, :-1].double()
    expected = -logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).sum((1, 2))
    got = window_nlls(model, ids)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
