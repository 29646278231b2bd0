"""The one token sample that every method of a protocol gets."""

from __future__ import annotations

import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from suite import data
from suite.calibration import HELD_OUT_SEQUENCES, draw, draw_training, token_ids, tokens_digest
from suite.errors import InputError
from suite.specs import CalibrationSpec, HealingSpec

SPEC = CalibrationSpec(source="toy", count=5, length=16)


@pytest.fixture(autouse=True)
def _toy_text(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(f"{number:04d}" for number in range(100))  # 400 bytes: 25 windows of 16 tokens
    monkeypatch.setitem(data.TEXTS, "toy", lambda folder: text)


def test_a_sample_holds_as_many_windows_of_the_text_as_asked(tokenizer: PreTrainedTokenizerFast) -> None:
    sample = draw(SPEC, tokenizer)
    windows = token_ids(tokenizer, data.text("toy")).reshape(25, 16).tolist()
    assert sample.tokens.shape == (5, 16)
    assert sample.tokens.dtype == torch.int64
    drawn = [windows.index(row) for row in sample.tokens.tolist()]
    assert len(set(drawn)) == 5


def test_a_sample_is_the_same_under_the_same_seed(tokenizer: PreTrainedTokenizerFast) -> None:
    first, second = draw(SPEC, tokenizer, seed=7), draw(SPEC, tokenizer, seed=7)
    assert torch.equal(first.tokens, second.tokens)
    assert first.digest == second.digest


def test_another_seed_draws_another_sample(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len({draw(SPEC, tokenizer, seed=seed).digest for seed in range(8)}) == 8


def test_a_sample_does_not_depend_on_the_state_of_the_global_generator(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = draw(SPEC, tokenizer)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert draw(SPEC, tokenizer).digest == first.digest


def test_a_text_that_is_too_short_is_refused_with_what_it_holds(tokenizer: PreTrainedTokenizerFast) -> None:
    spec = SPEC.model_copy(update={"count": 26})
    with pytest.raises(InputError) as caught:
        draw(spec, tokenizer)
    assert "'toy' holds only 25 sequences of 16 tokens" in str(caught.value)
    assert "Ask for at most toy:25x16" in str(caught.value)
    assert len(draw(SPEC.model_copy(update={"count": 25}), tokenizer).tokens) == 25


def test_tokens_carry_no_special_ones(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = token_ids(tokenizer, "abc</s>"[:3])
    assert tokenizer.decode(ids) == "abc"
    assert len(ids) == 3


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=20))
def test_the_digest_is_that_of_the_ids_as_little_endian_integers(ids: list[int]) -> None:
    expected = hashlib.sha256(b"".join(value.to_bytes(8, "little") for value in ids)).hexdigest()
    assert tokens_digest(torch.tensor(ids)) == expected
    assert tokens_digest(torch.tensor([[value, 0] for value in ids])[:, 0]) == expected


def test_the_text_that_ships_with_python_fills_the_embedded_protocol(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    sample = draw(CalibrationSpec(source="pydoc", count=64, length=512), tokenizer)
    assert sample.tokens.shape == (64, 512)


def test_training_text_is_another_draw_of_the_same_text(tokenizer: PreTrainedTokenizerFast) -> None:
    spec = HealingSpec(source="toy", count=5, length=16, batch=2)
    training = draw_training(spec, tokenizer, lambda: pytest.fail("the teacher is loaded when asked for"))
    assert training.tokens.shape == (5, 16)
    assert training.held_out.shape == (HELD_OUT_SEQUENCES, 16)
    every = [tuple(row) for row in torch.cat([training.tokens, training.held_out]).tolist()]
    assert len(set(every)) == len(every)
    assert not torch.equal(training.tokens, draw(SPEC, tokenizer).tokens)
    again = draw_training(spec, tokenizer, training.teacher)
    assert torch.equal(again.tokens, training.tokens)
    assert again.digest == training.digest == tokens_digest(torch.cat([training.tokens, training.held_out]))


def test_training_text_that_is_too_short_says_what_there_is(tokenizer: PreTrainedTokenizerFast) -> None:
    spec = HealingSpec(source="toy", count=22, length=16)
    with pytest.raises(
        InputError, match=r"holds only 25 sequences .* 26 are needed\. Ask for at most toy:21x16"
    ):
        draw_training(spec, tokenizer, lambda: pytest.fail("no teacher is needed"))


def test_training_text_is_another_under_another_seed(tokenizer: PreTrainedTokenizerFast) -> None:
    spec = HealingSpec(source="toy", count=5, length=16)
    drawn = [
        draw_training(spec, tokenizer, lambda: pytest.fail("no teacher is needed"), seed) for seed in range(8)
    ]
    assert len({training.digest for training in drawn}) == 8
