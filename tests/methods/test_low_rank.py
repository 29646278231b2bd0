"""Plain singular value decomposition of the decoder's linears."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from suite.conformance import tiny
from suite.errors import ImpossibleBudget, InputError
from suite.layers import LowRankLinear
from suite.models.anatomy import LinearShape, anatomy_of
from suite.recipe import Recipe
from suite.shares import Allocation, LinearShare
from suite.specs import Budget

DOWN = "model.layers.1.mlp.down_proj"


def dense_weight(module: nn.Module) -> torch.Tensor:
    """The matrix a linear stands for, factorised or not."""
    if isinstance(module, LowRankLinear):
        return module.second.weight @ module.first.weight
    assert isinstance(module, nn.Linear)
    return module.weight


@torch.no_grad()
def weight_errors(family: str, share: float) -> dict[str, float]:
    dense, model = tiny.build(family), tiny.build(family)
    tiny.compress(model, f"svd(share={share})")
    return {
        line.path: float((dense_weight(model.get_submodule(line.path)) - linear.weight).square().sum())
        for line in anatomy_of(dense).linears
        if isinstance(linear := dense.get_submodule(line.path), nn.Linear)
    }


def test_the_whole_share_leaves_the_logits_alone(model: PreTrainedModel) -> None:
    before = tiny.logits_of(model)
    plan = tiny.compress(model, "svd(share=1)")
    assert not plan.stages[0].modules
    assert torch.equal(tiny.logits_of(model), before)


def test_the_error_of_every_linear_falls_with_the_share(family: str) -> None:
    errors = [weight_errors(family, share) for share in (0.1, 0.3, 0.5, 0.7, 0.9, 1)]
    for path in errors[0]:
        of_path = [error[path] for error in errors]
        assert of_path == sorted(of_path, reverse=True)
        assert of_path[0] > of_path[-1] == 0


def test_the_error_is_what_the_discarded_singular_values_hold(llama: PreTrainedModel) -> None:
    values = torch.linalg.svdvals(llama.get_submodule(DOWN).weight.detach().double())
    plan = tiny.compress(llama, "svd(share=0.5)")
    rank = plan.stages[0].modules[DOWN].arguments["rank"]
    assert rank == int(0.5 * 48 * 112 / (48 + 112))
    assert weight_errors("llama", 0.5)[DOWN] == pytest.approx(float(values[rank:].square().sum()), rel=1e-4)


def test_every_linear_of_the_decoder_is_factorised_and_nothing_else(model: PreTrainedModel) -> None:
    linears = {line.path for line in anatomy_of(model).linears}
    untouched = {
        name: tensor.clone()
        for name, tensor in model.state_dict().items()
        if name.rpartition(".")[0] not in linears
    }
    tiny.compress(model, "svd(share=0.4)")
    factorised = {path for path, module in model.named_modules() if isinstance(module, LowRankLinear)}
    assert factorised == linears
    for name, tensor in untouched.items():
        assert torch.equal(model.state_dict()[name], tensor)


@pytest.mark.parametrize("family", ["qwen2", "opt", "gpt-neox"])
def test_biases_are_kept_as_they_are(family: str) -> None:
    dense, model = tiny.build(family), tiny.build(family)
    biased = [line.path for line in anatomy_of(dense).linears if line.bias]
    assert biased
    tiny.compress(model, "svd(share=0.3)")
    for path in biased:
        assert torch.equal(model.get_submodule(path).second.bias, dense.get_submodule(path).bias)


def test_each_linear_keeps_the_same_share(family: str) -> None:
    model = tiny.build(family)
    plan = tiny.compress(model, "svd(share=0.5)")
    for spec in plan.stages[0].modules.values():
        m, n, rank = (spec.arguments[key] for key in ("out_features", "in_features", "rank"))
        assert rank * (m + n) <= 0.5 * m * n < (rank + 1) * (m + n)


def test_a_solved_budget_differs_by_no_more_than_a_rank_from_the_equal_share(family: str) -> None:
    model = tiny.build(family)
    plan = tiny.compress(model, "svd", "params=0.75").stages[0]
    for spec in plan.modules.values():
        m, n, rank = (spec.arguments[key] for key in ("out_features", "in_features", "rank"))
        # The share shown is rounded, so the rank below it may be meant.
        assert rank - int(plan.knobs["share"] * m * n / (m + n)) in (-1, 0, 1)
        assert rank * (m + n) <= m * n


def test_the_smallest_share_still_keeps_one_rank(llama: PreTrainedModel) -> None:
    plan = tiny.compress(llama, "svd(share=0)").stages[0]
    assert {spec.arguments["rank"] for spec in plan.modules.values()} == {1}
    assert tiny.logits_of(llama).isfinite().all()


def test_factors_are_smaller_than_the_matrix_or_it_stays_dense() -> None:
    """The queries (48 × 48) break even at rank 24, where the factors would be as large as they."""
    dense = tiny.anatomy("llama")
    for missing in range(100, 3000, 100):
        plan = Recipe.parse("svd").plan(dense, Budget.parse(f"params={dense.params - missing}")).stages[0]
        for spec in plan.modules.values():
            m, n, rank = (spec.arguments[key] for key in ("out_features", "in_features", "rank"))
            assert rank * (m + n) < m * n


def test_a_single_channel_stays_dense() -> None:
    plan = Recipe.parse("llm-pruner(share=0.001,first=0,last=0)+svd(share=0.5)").plan(
        tiny.anatomy("llama"), Budget.parse("none")
    )
    assert plan.stages[0].modules
    assert not any("mlp" in path for path in plan.stages[1].modules)


def test_weights_of_low_rank_are_reproduced(llama: PreTrainedModel) -> None:
    with torch.no_grad():
        for line in anatomy_of(llama).linears:
            weight = llama.get_submodule(line.path).weight
            weight.copy_(torch.randn(weight.shape[0], 2) @ torch.randn(2, weight.shape[1]) / 30)
    before = tiny.logits_of(llama)
    tiny.compress(llama, "svd(share=0.2)")
    torch.testing.assert_close(tiny.logits_of(llama), before, rtol=1e-3, atol=1e-4)


def test_factors_are_not_factorised_again(llama: PreTrainedModel) -> None:
    with pytest.raises(InputError, match="would factorise factors"):
        tiny.compress(llama, "svd(share=0.9)+svd(share=0.5)")


def allocation(folder: Path, family: str, share: Callable[[LinearShape], float]) -> Path:
    """An allocation file that gives every linear of a tiny model a share."""
    linears = {
        line.path: LinearShare(
            out_features=line.out_features, in_features=line.in_features, share=share(line)
        )
        for line in tiny.anatomy(family).linears
    }
    made = Allocation(
        model=family,
        model_digest="0",
        method="svd",
        profile="0",
        budget="none",
        predicted_increase=0,
        linears=linears,
    )
    file = folder / "allocation.json"
    file.write_text(made.model_dump_json())
    return file


def test_an_allocation_of_equal_shares_is_the_equal_share(
    model: PreTrainedModel, family: str, tmp_path: Path
) -> None:
    file = allocation(tmp_path, family, lambda line: 0.5)
    anatomy = anatomy_of(model)
    plans = [
        Recipe.parse(recipe).plan(anatomy, Budget.parse("none")).stages[0].modules
        for recipe in (f"svd(shares={file})", "svd(share=0.5)")
    ]
    assert plans[0] == plans[1]


def test_an_allocation_gives_every_linear_its_own_rank(family: str, tmp_path: Path) -> None:
    file = allocation(tmp_path, family, lambda line: 1.0 if line.block == 0 else 0.2 + 0.2 * line.block)
    model = tiny.build(family)
    tiny.compress(model, f"svd(shares={file})")
    for line in tiny.anatomy(family).linears:
        module = model.get_submodule(line.path)
        assert isinstance(module, LowRankLinear) == (line.block > 0)
        if isinstance(module, LowRankLinear):
            m, n = line.out_features, line.in_features
            assert module.first.out_features == int((0.2 + 0.2 * line.block) * m * n / (m + n))


def test_what_rounding_leaves_of_a_budget_buys_ranks(tmp_path: Path) -> None:
    file = allocation(tmp_path, "llama", lambda line: 1.0 if line.block == 0 else 0.6)
    model = tiny.build("llama")
    exact = Recipe.parse(f"svd(shares={file})").plan(anatomy_of(model), Budget.parse("none")).final.params
    room = Budget(metric="params", value=float(exact + 400))
    topped = Recipe.parse(f"svd(shares={file})").plan(anatomy_of(model), room).final.params
    assert exact < topped <= exact + 400


def test_shares_that_are_too_much_for_the_budget_are_refused(tmp_path: Path) -> None:
    file = allocation(tmp_path, "llama", lambda line: 0.9)
    with pytest.raises(ImpossibleBudget, match="the knobs given decide the size"):
        tiny.compress(tiny.build("llama"), f"svd(shares={file})", "params=0.6")


def test_share_and_shares_together_are_refused(tmp_path: Path) -> None:
    file = allocation(tmp_path, "llama", lambda line: 0.9)
    with pytest.raises(InputError, match="give share or shares, not both"):
        Recipe.parse(f"svd(share=0.5, shares={file})")
