"""Whitened SVD: the best factors for the inputs, from dense statistics, and the update along the prefix."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedModel

from methods.low_rank import TruncatedSvd
from methods.whitened import refitted, whitened_svd, whitening_root
from suite.conformance import tiny
from suite.errors import CellFailed
from suite.layers import LowRankLinear
from suite.linalg import principal_outputs, truncated_svd
from suite.models.anatomy import anatomy_of
from suite.recipe import Recipe
from suite.specs import Budget
from suite.streaming import BlockOnStream, stream

SHAPES = [(12, 7), (7, 12), (9, 9)]
TOKENS = tiny.calibration_sample().tokens


def sample(m: int, n: int, tokens: int = 40, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight (m × n) and the second moment (n × n) of inputs of uneven directions."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(m, n, dtype=torch.float64, generator=generator)
    inputs = torch.randn(tokens, n, dtype=torch.float64, generator=generator)
    inputs = inputs @ torch.randn(n, n, dtype=torch.float64, generator=generator)
    return weight, inputs.T @ inputs


def loss(weight: Tensor, other: Tensor, moment: Tensor) -> float:
    return float(((weight - other) @ moment @ (weight - other).T).trace())


def merged(module: nn.Module) -> Tensor:
    assert isinstance(module, LowRankLinear)
    return (module.second.weight.double() @ module.first.weight.double()).detach()


def moments(model: PreTrainedModel) -> dict[str, Tensor]:
    """Second moment of the inputs of every linear of a dense model."""
    found = {}
    lines = anatomy_of(model).linears
    for block in stream(model, TOKENS):
        for line in lines:
            if line.block == block.index:
                found[line.path] = block.second_moment(line.path.removeprefix(f"{block.path}."))
    return found


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_full_rank_is_exact(m: int, n: int) -> None:
    weight, moment = sample(m, n)
    left, right = whitened_svd(weight, moment, min(m, n))
    torch.testing.assert_close(left @ right, weight, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_it_equals_uncentred_reduced_order_modelling(m: int, n: int, rank: int) -> None:
    weight, moment = sample(m, n)
    left, right = whitened_svd(weight, moment, rank)
    found = principal_outputs(weight, moment)
    projected = found.expand[:, :rank] @ found.reduce[:rank] @ weight
    torch.testing.assert_close(left @ right, projected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_the_loss_is_the_sum_of_the_squared_singular_values_left_out(m: int, n: int) -> None:
    weight, moment = sample(m, n)
    values = torch.linalg.svdvals(weight @ whitening_root(moment)).square()
    for rank in range(1, min(m, n) + 1):
        left, right = whitened_svd(weight, moment, rank)
        expected = float(values[rank:].sum())
        assert loss(weight, left @ right, moment) == pytest.approx(expected, rel=1e-8, abs=1e-8)


def test_white_inputs_give_the_plain_svd() -> None:
    weight, _ = sample(9, 6)
    left, right = whitened_svd(weight, torch.eye(6), 3)
    plain = truncated_svd(weight, 3)
    torch.testing.assert_close(left @ right, plain[0] @ plain[1])


@given(st.integers(0, 10**6), st.integers(1, 5))
def test_no_scaled_or_plain_svd_of_the_rank_does_better(seed: int, rank: int) -> None:
    weight, moment = sample(8, 6, seed=seed)
    scale = moment.diagonal().pow(0.25)
    scaled = truncated_svd(weight * scale, rank)
    left, right = whitened_svd(weight, moment, rank)
    best = loss(weight, left @ right, moment)
    assert best <= loss(weight, scaled[0] @ scaled[1] / scale, moment) * (1 + 1e-9)
    plain = truncated_svd(weight, rank)
    assert best <= loss(weight, plain[0] @ plain[1], moment) * (1 + 1e-9)


def test_two_roots_of_the_moment_give_the_same_factors() -> None:
    """The symmetric eigen-root of SVD-LLM V2 (arXiv 2503.12340) instead of the Cholesky factor."""
    weight, moment = sample(8, 6)
    values, vectors = torch.linalg.eigh(moment)
    root = vectors * values.sqrt()
    left, right = truncated_svd(weight @ root, 3)
    expected = left @ right @ (vectors / values.sqrt()).T
    found = whitened_svd(weight, moment, 3)
    torch.testing.assert_close(found[0] @ found[1], expected, rtol=1e-8, atol=1e-8)


def test_fewer_tokens_than_features_leave_finite_factors() -> None:
    weight, moment = sample(8, 12, tokens=5)
    left, right = whitened_svd(weight, moment, 5)
    assert left.isfinite().all()
    assert loss(weight, left @ right, moment) < 1e-6 * loss(weight, torch.zeros_like(weight), moment)
    assert (left @ right).norm() < 10 * weight.norm()


def test_inputs_that_are_never_anything_but_zero_are_taken_as_white() -> None:
    assert torch.equal(whitening_root(torch.zeros(3, 3)), torch.eye(3, dtype=torch.float64))


def test_a_moment_that_overflowed_is_named() -> None:
    with pytest.raises(CellFailed, match="activations overflow"):
        whitening_root(torch.full((2, 2), torch.inf))


def test_a_refit_is_the_least_squares_solution() -> None:
    weight, moment = sample(8, 6)
    left, right = whitened_svd(weight, torch.eye(6), 3)
    best = refitted(weight, left, right, moment)
    # The normal equations: the error is orthogonal to the reduced inputs.
    torch.testing.assert_close((weight - best @ right) @ moment @ right.T, torch.zeros(8, 3).double())
    assert loss(weight, best @ right, moment) < loss(weight, left @ right, moment)


def test_a_refit_on_the_inputs_it_was_made_for_changes_nothing() -> None:
    weight, moment = sample(8, 6)
    left, right = whitened_svd(weight, moment, 3)
    torch.testing.assert_close(refitted(weight, left, right, moment), left)


def test_all_statistics_come_from_the_dense_model(model: PreTrainedModel, family: str) -> None:
    dense = moments(tiny.build(family))
    plan = tiny.compress(model, "svd-llm(share=0.5)").stages[0]
    weights = tiny.build(family)
    for path, spec in plan.modules.items():
        weight = weights.get_submodule(path).weight.double()
        left, right = whitened_svd(weight, dense[path], spec.arguments["rank"])
        torch.testing.assert_close(merged(model.get_submodule(path)), left @ right, rtol=1e-3, atol=1e-4)


def test_the_plan_is_that_of_the_plain_svd(model: PreTrainedModel) -> None:
    assert issubclass(Recipe.parse("svd-llm").stages[0].__class__, TruncatedSvd)
    anatomy, budget = anatomy_of(model), Budget.parse("params=0.75")
    plans = [Recipe.parse(name).plan(anatomy, budget).stages[0].modules for name in ("svd-llm", "svd")]
    assert plans[0] == plans[1]


def test_the_update_fits_the_inputs_of_the_compressed_prefix(family: str) -> None:
    """Every second factor solves the normal equations on the inputs it meets in the compressed model."""
    model, weights = tiny.build(family, torch.float64), tiny.build(family, torch.float64)
    tiny.compress(model, "svd-llm(share=0.4,update=true)")
    met: dict[str, Tensor] = {}

    def see(block: BlockOnStream) -> None:
        for path, module in block.module.named_modules():
            if isinstance(module, LowRankLinear):
                met[f"{block.path}.{path}"] = block.second_moment(path)

    for block in stream(model, TOKENS):
        see(block)
    for path, moment in met.items():
        module = model.get_submodule(path)
        error = weights.get_submodule(path).weight.double() - merged(module)
        right = module.first.weight.double()
        gradient = (error @ moment @ right.T).norm()
        assert gradient < 1e-6 * (merged(module) @ moment @ right.T).norm()


def test_the_update_only_moves_second_factors_and_not_those_of_the_first_inputs() -> None:
    plain, updated = tiny.build("llama"), tiny.build("llama")
    tiny.compress(plain, "svd-llm(share=0.4)")
    tiny.compress(updated, "svd-llm(share=0.4,update=true)")
    for path, module in plain.named_modules():
        if isinstance(module, LowRankLinear):
            other = updated.get_submodule(path)
            assert torch.equal(module.first.weight, other.first.weight)
            first = path.startswith("model.layers.0.self_attn") and "o_proj" not in path
            assert torch.allclose(module.second.weight, other.second.weight, atol=1e-5) == first


def test_whitening_keeps_outputs_closer_than_the_plain_svd(model: PreTrainedModel, family: str) -> None:
    dense = tiny.build(family)
    before, gaps = tiny.logits_of(dense, TOKENS), []
    for recipe in ("svd(share=0.5)", "svd-llm(share=0.5)"):
        compressed = tiny.build(family)
        tiny.compress(compressed, recipe)
        gaps.append(float((tiny.logits_of(compressed, TOKENS) - before).norm()))
    assert gaps[1] < gaps[0]
