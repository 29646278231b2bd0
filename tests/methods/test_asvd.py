"""Activation-aware SVD: scaled by the inputs, ranks by the sensitivity of each linear."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from methods.asvd import proxy_losses, scaled_svd
from suite.conformance import tiny
from suite.errors import InputError
from suite.layers import LowRankLinear
from suite.linalg import truncated_svd
from suite.models.anatomy import anatomy_of
from suite.recipe import Recipe
from suite.specs import Budget
from suite.streaming import stream

TOKENS = tiny.calibration_sample().tokens


def merged(module: object) -> Tensor:
    assert isinstance(module, LowRankLinear)
    return (module.second.weight.double() @ module.first.weight.double()).detach()


def sample(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A weight (8 × 6), a scale (6) and the second moment (6 × 6) of uneven inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(8, 6, dtype=torch.float64, generator=generator)
    inputs = torch.randn(30, 6, dtype=torch.float64, generator=generator) * torch.arange(1, 7)
    return weight, inputs.abs().mean(0).sqrt(), inputs.T @ inputs


def test_full_rank_is_exact() -> None:
    weight, scale, moment = sample()
    left, right = scaled_svd(weight, scale, 6)
    torch.testing.assert_close(left @ right, weight)
    assert proxy_losses(weight, scale, moment, [6])[0] < 1e-12


@given(st.integers(0, 10**6), st.integers(1, 5))
def test_nothing_of_the_rank_is_closer_under_the_scale(seed: int, rank: int) -> None:
    weight, scale, _ = sample(seed)
    values = torch.linalg.svdvals(weight * scale)
    left, right = scaled_svd(weight, scale, rank)
    error = ((weight - left @ right) * scale).square().sum()
    torch.testing.assert_close(error, values[rank:].square().sum())


def test_the_proxy_is_the_share_of_the_outputs_energy_that_is_lost() -> None:
    weight, scale, _ = sample()
    inputs = torch.randn(20, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    left, right = scaled_svd(weight, scale, 2)
    lost = (inputs @ (weight - left @ right).T).square().sum() / (inputs @ weight.T).square().sum()
    assert proxy_losses(weight, scale, inputs.T @ inputs, [4, 2])[1] == pytest.approx(float(lost))


def test_without_a_power_it_is_the_plain_svd(family: str) -> None:
    scaled, plain = tiny.build(family), tiny.build(family)
    plan = tiny.compress(scaled, "asvd(alpha=0,allocation=uniform,share=0.5)").stages[0]
    assert plan == tiny.compress(plain, "svd(share=0.5)").stages[0]
    for path in plan.modules:
        expected = merged(plain.get_submodule(path))
        torch.testing.assert_close(merged(scaled.get_submodule(path)), expected, rtol=1e-4, atol=1e-6)


def test_columns_are_scaled_by_the_mean_absolute_input_of_the_dense_model(
    model: PreTrainedModel, family: str
) -> None:
    plan = tiny.compress(model, "asvd(allocation=uniform,share=0.4)").stages[0]
    dense = tiny.build(family)
    layout = anatomy_of(dense).layout
    path = next(path for path, role in layout.roles.items() if role == "down")
    for block in stream(dense, TOKENS):
        inputs: list[Tensor] = []
        block.observe({path: inputs.append})
        scale = torch.cat(inputs).double().abs().mean(0).sqrt() + 1e-6
        weight = dense.get_submodule(f"{block.path}.{path}").weight.detach().double()
        rank = plan.modules[f"{block.path}.{path}"].arguments["rank"]
        left, right = truncated_svd(weight * scale, rank)
        found = merged(model.get_submodule(f"{block.path}.{path}"))
        torch.testing.assert_close(found, left @ right / scale, rtol=1e-3, atol=1e-5)


def test_one_threshold_holds_for_every_linear(model: PreTrainedModel, family: str) -> None:
    """The share a linear keeps is the least under the threshold, but for the ranks topped up."""
    ratios = [0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    plan = tiny.compress(model, "asvd", "params=0.75").stages[0]
    dense = tiny.build(family)
    lines = anatomy_of(dense).linears
    surplus = 0
    for block in stream(dense, TOKENS):
        for line in (line for line in lines if line.block == block.index):
            inner = line.path.removeprefix(f"{block.path}.")
            inputs: list[Tensor] = []
            block.observe({inner: inputs.append})
            x = torch.cat(inputs).double()
            m, n = line.out_features, line.in_features
            ranks = [int(ratio * m * n / (m + n)) for ratio in ratios]
            weight = dense.get_submodule(line.path).weight
            scale = x.abs().mean(0).sqrt() + 1e-6
            losses = proxy_losses(weight, scale, block.second_moment(inner), ranks)
            fits = [
                rank for rank, loss in zip(ranks, losses, strict=True) if loss <= plan.notes["loss_threshold"]
            ]
            spec = plan.modules.get(line.path)
            assert (spec is None) == (not fits)
            if spec is not None:
                assert spec.arguments["rank"] >= min(fits)
                surplus += (spec.arguments["rank"] - min(fits)) * (m + n)
    # Less than what the next threshold would cost, a tenth of the largest linear.
    assert surplus <= max(line.out_features * line.in_features for line in lines) / 9


def test_the_search_stays_within_the_plan_and_uses_nearly_all_of_it(family: str) -> None:
    model = tiny.build(family)
    anatomy, budget = anatomy_of(model), Budget.parse("params=0.75")
    planned = Recipe.parse("asvd").plan(anatomy, budget).final.params
    carried_out = tiny.compress(model, "asvd", "params=0.75").final.params
    assert 0.99 * planned <= carried_out <= planned
    assert anatomy_of(model).params == carried_out


def test_the_search_gives_the_linears_different_shares_and_less_loss_than_equal_ones() -> None:
    dense = tiny.build("llama")
    # One block that needs all its directions among blocks that need few.
    with torch.no_grad():
        for line in anatomy_of(dense).linears:
            weight = dense.get_submodule(line.path).weight
            if line.block != 1:
                left, right = truncated_svd(weight, 6)
                weight.copy_(left @ right + 0.01 * weight)
    before, state = tiny.logits_of(dense, TOKENS), dense.state_dict()
    gaps = {}
    for allocation in ("searched", "uniform"):
        model = tiny.build("llama")
        model.load_state_dict(state)
        tiny.compress(model, f"asvd(allocation={allocation},share=0.5)")
        gaps[allocation] = float((tiny.logits_of(model, TOKENS) - before).norm())
    assert gaps["searched"] < 0.8 * gaps["uniform"]


def test_small_budgets_take_the_search_below_the_papers_least_share(llama: PreTrainedModel) -> None:
    plan = tiny.compress(llama, "asvd(share=0.05)").stages[0]
    assert min(spec.arguments["rank"] for spec in plan.modules.values()) <= 2
    assert tiny.logits_of(llama).isfinite().all()


def test_shares_and_allocation_together_are_refused(tmp_path: object) -> None:
    with pytest.raises(InputError, match="shares decides what allocation would"):
        Recipe.parse(f"asvd(shares={__file__},allocation=searched)")
