"""The share of a model that rebuilds dense weights for each call."""

from __future__ import annotations

import pytest

from suite import kernels
from suite.conformance import tiny
from suite.measure.ledger import ledger
from suite.measure.simulated import simulated_share
from suite.models.anatomy import anatomy_of
from suite.models.layouts import layout_of


def share(model: tiny.PreTrainedModel) -> float:
    return simulated_share(model, ledger(model), layout_of(model.config), rows=64)


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
    assert simulated_share(model, entries, layout, rows=1) == 1
    monkeypatch.setattr(kernels, "_measure", lambda calls, probe: path)
    tiny.logits_of(model, tiny.token_ids(1, 1))
    assert simulated_share(model, entries, layout, rows=1) == expected
    assert simulated_share(model, entries, layout, rows=64) == 1
    kernels.forget()


@pytest.mark.parametrize("tokens", [1, 9])
def test_a_product_of_integers_is_none_of_rebuilt_weights(tokens: int) -> None:
    model = tiny.build("llama")
    tiny.compress(model, "int8-dynamic")
    entries, layout = ledger(model), layout_of(model.config)
    kernels.forget()
    assert simulated_share(model, entries, layout, rows=tokens) == 1
    tiny.logits_of(model, tiny.token_ids(1, tokens))
    assert simulated_share(model, entries, layout, rows=tokens) == 0
    kernels.forget()


def test_a_part_counts_by_its_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build("llama")
    lines = anatomy_of(model).linears
    chosen = model.get_submodule(lines[0].path)
    monkeypatch.setattr(chosen, "simulated", True, raising=False)
    weights = [line.out_features * line.in_features for line in lines]
    assert share(model) == pytest.approx(weights[0] / sum(weights))
