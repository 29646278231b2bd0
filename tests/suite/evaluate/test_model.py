"""The suite's lm-eval model: the numbers of lm-eval's own, for every family and every kind of request."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from suite import checkpoint
from suite.conformance import tiny
from suite.errors import WeighinError
from suite.evaluate.model import WeighinLM

TOLERANCE = 1e-3
PAIRS = [
    ("Question: what is heavier than water?\nAnswer:", " iron"),
    ("Question: what is heavier than water?\nAnswer:", " wood, and then something"),
    ("Question: what is heavier than water?\nAnswer:", " iron"),
    ("Question: what floats?\nAnswer:", " i"),
    ("The trophy did not fit because the trophy", " was too big."),
    ("The trophy did not fit because the case", " was too big."),
    ("", "An empty context starts at the prefix token."),
    ("", "An empty context, twice."),
    ("Trailing space ", "moves to the continuation"),
    ("long " * 120, "cut from the left"),
]


def asked(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, pair, index) for index, pair in enumerate(arguments)]  # type: ignore[arg-type]


def assert_close(ours: list[tuple[float, bool]], theirs: list[tuple[float, bool]]) -> None:
    assert [a for a, _ in ours] == pytest.approx([a for a, _ in theirs], abs=TOLERANCE)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


RECIPES = [
    "dense",
    "svd(share=0.6)",
    "rtn-int4(embedding=4)",
    "layerchop(remove=1)",
    "svd(share=0.7)+rtn-int8",
]


@pytest.mark.parametrize("recipe", RECIPES)
def test_log_likelihoods_equal_those_of_the_hf_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, recipe: str
) -> None:
    tiny.compress(model, recipe)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=200)
    ours = WeighinLM(model, tokenizer=tokenizer, max_length=200)
    assert ours._packs
    requests = asked("loglikelihood", *PAIRS)
    assert_close(ours.loglikelihood(requests, True), theirs.loglikelihood(requests, True))


@pytest.mark.parametrize("family", ["mistral", "qwen3", "opt-350m-like"])
def test_variants_share_contexts_too(family: str, tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny.build(family)
    ours = WeighinLM(model, tokenizer=tokenizer)
    assert ours._packs
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    requests = asked("loglikelihood", *PAIRS)
    assert_close(ours.loglikelihood(requests, True), theirs.loglikelihood(requests, True))


def test_a_sliding_window_is_kept(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny.build("mistral", sliding_window=24)
    requests = asked("loglikelihood", *PAIRS)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    assert_close(
        WeighinLM(model, tokenizer=tokenizer).loglikelihood(requests, True),
        theirs.loglikelihood(requests, True),
    )


@pytest.mark.parametrize("tokens", [1, 64, 100_000])
def test_results_do_not_depend_on_the_batch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tokens: int
) -> None:
    requests = asked("loglikelihood", *PAIRS)
    usual = WeighinLM(model, tokenizer=tokenizer).loglikelihood(requests, True)
    other = WeighinLM(model, tokenizer=tokenizer, tokens_per_batch=tokens)
    assert_close(other.loglikelihood(requests, True), usual)
    alone = [other.loglikelihood([request], True)[0] for request in requests]
    assert_close(alone, usual)


def test_rolling_equals_the_hf_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    requests = asked("loglikelihood_rolling", ("A short text.",), ("A much longer text. " * 30,))
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=128)
    ours = WeighinLM(model, tokenizer=tokenizer, max_length=128)
    expected = theirs.loglikelihood_rolling(requests, True)
    assert ours.loglikelihood_rolling(requests, True) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("tokens", [1, 1000])
def test_generation_equals_the_hf_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("suite.evaluate.model._GENERATION_TOKENS", 1)
    short, long = {"until": ["x"], "max_gen_toks": 5}, {"until": ["x"], "max_gen_toks": 9}
    prompts = [("One prompt", long), ("Two, which is longer", short), ("3", short), ("Four!", long)]
    requests = asked("generate_until", *prompts)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    ours = WeighinLM(model, tokenizer=tokenizer, tokens_per_batch=tokens)
    assert ours.generate_until(requests, True) == theirs.generate_until(requests, True)


class Bigram(nn.Module):
    """Logits that depend on the current token alone, given back bare."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(300, 300)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids)


def test_a_plain_module_is_scored_and_generates(tokenizer: PreTrainedTokenizerFast) -> None:
    module = Bigram()
    ours = WeighinLM(module, tokenizer=tokenizer, max_length=64)
    ((score, _),) = ours.loglikelihood(asked("loglikelihood", ("ab", "cd")), True)
    b, c, d = tokenizer.encode("bcd")
    table = module.table.weight.detach().log_softmax(-1)
    assert score == pytest.approx(float(table[b, c] + table[c, d]), abs=1e-4)
    (text,) = ours.generate_until(asked("generate_until", ("ab", {"until": [], "max_gen_toks": 1})), True)
    assert text == tokenizer.decode([int(module.table.weight[b].argmax())])


def test_a_plain_module_must_say_how_long_its_input_may_be(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(WeighinError, match="max_length"):
        WeighinLM(Bigram(), tokenizer=tokenizer)


@pytest.mark.parametrize("broken", ["raises", "ignores"])
def test_a_model_that_takes_no_tree_mask_gets_plain_rows(
    llama: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    broken: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    forward = llama.model.forward

    def without_mask(input_ids: Tensor, attention_mask: Tensor | None = None, **arguments: Any) -> Any:
        if attention_mask is not None and broken == "raises":
            raise ValueError("only two dimensions")
        if broken == "ignores":
            arguments.pop("position_ids", None)
        return forward(input_ids, **arguments)

    monkeypatch.setattr(llama.model, "forward", without_mask)
    ours = WeighinLM(llama, tokenizer=tokenizer)
    assert not ours._packs
    assert "contexts are not shared" in caplog.text
    monkeypatch.undo()
    requests = asked("loglikelihood", *PAIRS)
    theirs = HFLM(pretrained=llama, tokenizer=tokenizer, batch_size=1)
    assert_close(ours.loglikelihood(requests, True), theirs.loglikelihood(requests, True))


def test_a_head_that_does_more_than_its_module_is_run_whole(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = llama.forward

    def scaled(*positional: Any, **arguments: Any) -> Any:
        output = forward(*positional, **arguments)
        output.logits = output.logits / 3
        return output

    monkeypatch.setattr(llama, "forward", scaled)
    ours = WeighinLM(llama, tokenizer=tokenizer)
    assert ours._head is None
    requests = asked("loglikelihood", *PAIRS)
    theirs = HFLM(pretrained=llama, tokenizer=tokenizer, batch_size=1)
    assert_close(ours.loglikelihood(requests, True), theirs.loglikelihood(requests, True))


def test_batches_shrink_when_memory_runs_out_and_start_anew_with_the_next_task(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = WeighinLM(llama, tokenizer=tokenizer, tokens_per_batch=10_000)
    requests = asked("loglikelihood", *PAIRS)
    expected = ours.loglikelihood(requests, True)
    hidden, sizes = ours._hidden, []

    def tight(table: Any) -> Tensor:
        sizes.append(len(table.ids))
        if len(table.ids) > 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate")
        return hidden(table)

    monkeypatch.setattr(ours, "_hidden", tight)
    assert_close(ours.loglikelihood(requests, True), expected)
    first = list(sizes)
    sizes.clear()
    ours.loglikelihood(requests, True)
    assert sizes == first
    assert first[0] > 2 >= first[-1]


def test_memory_that_does_not_suffice_for_one_row_is_an_error(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = WeighinLM(llama, tokenizer=tokenizer)

    def never(table: Any) -> Tensor:
        raise RuntimeError("CUDA out of memory. Tried to allocate")

    monkeypatch.setattr(ours, "_hidden", never)
    with pytest.raises(RuntimeError, match="out of memory"):
        ours.loglikelihood(asked("loglikelihood", PAIRS[0]), True)


def test_the_harness_finds_the_model_by_name_and_reads_a_compressed_checkpoint(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Any
) -> None:
    tiny.compress(llama, "svd(share=0.7)+rtn-int4")
    checkpoint.save(llama, tokenizer, tmp_path)
    found = get_model("weighin").create_from_arg_string(
        f"pretrained={tmp_path},tokens_per_batch=64", {"device": "cpu"}
    )
    assert isinstance(found, WeighinLM)
    assert found.tokens_per_batch == 64
    requests = asked("loglikelihood", *PAIRS[:3])
    direct = WeighinLM(llama, tokenizer=tokenizer)
    assert_close(found.loglikelihood(requests, True), direct.loglikelihood(requests, True))


@pytest.mark.gpu
def test_a_gpu_gives_the_same_numbers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    requests = asked("loglikelihood", *PAIRS)
    expected = WeighinLM(model, tokenizer=tokenizer).loglikelihood(requests, True)
    found = WeighinLM(model.to("cuda"), tokenizer=tokenizer).loglikelihood(requests, True)
    assert_close(found, expected)
