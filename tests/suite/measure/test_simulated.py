"""The share of a model that rebuilds dense weights for each call."""

from __future__ import annotations

import pytest
import torch

from suite import kernels
from suite.conformance import tiny
from suite.measure.ledger import ledger
from suite.measure.simulated import simulated_share
from suite.models.anatomy import anatomy_of, decoder_params
from suite.models.layouts import layout_of


def share(model: tiny.PreTrainedModel) -> float:
    return simulated_share(model, ledger(model), layout_of(model.config), 64, 64)


def test_a_dense_or_factorised_model_simulates_nothing(family: str) -> None:
    model = tiny.build(family)
    assert share(model) == 0
    tiny.compress(model, "svd(share=0.5)")
    assert share(model) == 0


@pytest.mark.parametrize(
    "recipe", ["svd(share=0.5)+rtn-int4(embedding=8)", "magnitude(pattern=2:4)", "magnitude(sparsity=0.5)"]
)
def test_every_linear_that_rebuilds_its_weight_counts(family: str, recipe: str) -> None:
    model = tiny.build(family)
    tiny.compress(model, recipe)
    kernels.forget()
    biases = 1 - share(model)
    assert 0 <= biases < 0.05


@pytest.mark.parametrize(("path", "expected"), [(kernels.REFERENCE, 1), (kernels.COMPILED, 0)])
@pytest.mark.parametrize("recipe", ["rtn-int8", "magnitude(sparsity=0.5)"])
def test_linears_do_not_count_for_rows_that_a_kernel_takes(
    recipe: str, path: str, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.build("llama")
    tiny.compress(model, recipe)
    entries, layout = ledger(model), layout_of(model.config)
    kernels.forget()
    assert simulated_share(model, entries, layout, 1, 1) == 1
    monkeypatch.setattr(kernels, "_measure", lambda calls, probe: path)
    tiny.logits_of(model, tiny.token_ids(1, 1))
    assert simulated_share(model, entries, layout, 1, 1) == expected
    assert simulated_share(model, entries, layout, 64, 64) == 1
    kernels.forget()


@pytest.mark.parametrize("tokens", [1, 9])
def test_a_product_of_integers_is_none_of_rebuilt_weights(tokens: int) -> None:
    model = tiny.build("llama")
    tiny.compress(model, "int8-dynamic")
    entries, layout = ledger(model), layout_of(model.config)
    kernels.forget()
    assert simulated_share(model, entries, layout, tokens, tokens) == 1
    tiny.logits_of(model, tiny.token_ids(1, tokens))
    assert simulated_share(model, entries, layout, tokens, tokens) == 0
    kernels.forget()


@pytest.mark.parametrize("path", [kernels.REFERENCE, kernels.COMPILED])
def test_a_packed_head_counts_as_its_own_rows_are_multiplied(
    family: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.build(family)
    tiny.compress(model, "rtn-int8(embedding=8)")
    entries, layout = ledger(model), layout_of(model.config)
    blocks = decoder_params(entries, layout)
    head = model.config.vocab_size * model.config.hidden_size
    kernels.forget()
    monkeypatch.setattr(kernels, "_measure", lambda calls, probe: path)
    head_of = model.get_submodule(layout.head)
    with torch.inference_mode():
        head_of(torch.zeros(1, 1, model.config.hidden_size))
    expected = 1 if path == kernels.REFERENCE else blocks / (blocks + head)
    assert simulated_share(model, entries, layout, 64, 1) == pytest.approx(expected, abs=0.05)
    assert simulated_share(model, entries, layout, 64, 64) == pytest.approx(1, abs=0.05)
    kernels.forget()


def test_a_part_counts_by_its_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build("llama")
    lines = anatomy_of(model).linears
    chosen = model.get_submodule(lines[0].path)
    monkeypatch.setattr(chosen, "simulated", True, raising=False)
    weights = [line.out_features * line.in_features for line in lines]
    assert share(model) == pytest.approx(weights[0] / sum(weights))
