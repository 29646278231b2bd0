"""Reduced-order modelling: projections of outputs, inputs from the reduced prefix, ranks by loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from suite.calibration import Calibration
from suite.conformance import tiny
from suite.errors import ImpossibleBudget, InputError
from suite.layers import LowRankLinear
from suite.linalg import principal_outputs
from suite.measure.ledger import ledger, total_disk, total_params
from suite.models.anatomy import anatomy_of
from suite.models.layouts import layout_of
from suite.recipe import Recipe
from suite.specs import Budget
from suite.streaming import stream

TOKENS = tiny.calibration_sample().tokens
PAPER = "rom(allocation=uniform,metric=outputs)"
SHAPES = [(12, 7), (7, 12), (9, 9)]


@pytest.fixture(params=tiny.FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def sample(m: int, n: int, tokens: int = 40) -> tuple[Tensor, Tensor]:
    """A weight (m × n) and inputs (tokens × n) of uneven directions."""
    generator = torch.Generator().manual_seed(m * n)
    weight = torch.randn(m, n, dtype=torch.float64, generator=generator)
    mixing = torch.randn(n, n, dtype=torch.float64, generator=generator)
    return weight, torch.randn(tokens, n, dtype=torch.float64, generator=generator) @ mixing


def positive(size: int) -> Tensor:
    root = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    return root @ root.T + 0.1 * torch.eye(size, dtype=torch.float64)


def reduced(weight: Tensor, moment: Tensor, rank: int, metric: Tensor | None = None) -> Tensor:
    found = principal_outputs(weight, moment, metric)
    return found.expand[:, :rank] @ found.reduce[:rank] @ weight


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_full_rank_leaves_the_outputs_alone(m: int, n: int) -> None:
    weight, x = sample(m, n)
    torch.testing.assert_close(x @ reduced(weight, x.T @ x, min(m, n)).T, x @ weight.T)


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_directions_are_orthonormal_and_the_projector_idempotent(m: int, n: int) -> None:
    weight, x = sample(m, n)
    found = principal_outputs(weight, x.T @ x)
    v = found.expand[:, :4]
    torch.testing.assert_close(v.T @ v, torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close((v @ v.T) @ (v @ v.T), v @ v.T)
    torch.testing.assert_close(found.reduce, found.expand.T)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_the_loss_is_the_sum_of_the_discarded_eigenvalues(m: int, n: int, weighted: bool) -> None:
    weight, x = sample(m, n)
    metric = positive(m) if weighted else torch.eye(m, dtype=torch.float64)
    values = principal_outputs(weight, x.T @ x, metric if weighted else None).values
    losses = []
    for rank in range(1, min(m, n) + 1):
        error = (weight - reduced(weight, x.T @ x, rank, metric if weighted else None)) @ x.T
        losses.append(float((metric @ error @ error.T).trace()))
        assert losses[-1] == pytest.approx(float(values[rank:].sum()), rel=1e-9, abs=1e-8)
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_it_equals_the_whitened_svd(m: int, n: int, rank: int) -> None:
    """SVD-LLM (arXiv 2403.07378): truncate W·S with S·Sᵀ = C, then undo S."""
    weight, x = sample(m, n)
    s = torch.linalg.cholesky(x.T @ x)
    u, values, v = torch.linalg.svd(weight @ s, full_matrices=False)
    whitened = (u[:, :rank] * values[:rank]) @ v[:rank] @ torch.linalg.inv(s)
    torch.testing.assert_close(reduced(weight, x.T @ x, rank), whitened, rtol=1e-8, atol=1e-8)


@given(st.integers(0, 10**6), st.integers(1, 5))
def test_no_other_matrix_of_the_rank_does_better_in_the_metric(seed: int, rank: int) -> None:
    weight, x = sample(8, 6)
    metric = positive(8)
    best = reduced(weight, x.T @ x, rank, metric)
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(8, rank, dtype=torch.float64, generator=generator)
    right = torch.randn(rank, 6, dtype=torch.float64, generator=generator)

    def loss(matrix: Tensor) -> float:
        error = (weight - matrix) @ x.T
        return float((metric @ error @ error.T).trace())

    assert loss(best) <= loss(left @ right) + 1e-9
    u, values, v = torch.linalg.svd(best + 0.05 * left @ right, full_matrices=False)
    assert loss(best) <= loss((u[:, :rank] * values[:rank]) @ v[:rank]) + 1e-9


def test_shares_of_one_leave_the_logits_alone(family: str) -> None:
    model = tiny.build(family)
    before = tiny.logits_of(model)
    tiny.compress(model, "rom(share=1)")
    assert torch.equal(tiny.logits_of(model), before)


def test_on_few_tokens_a_reduction_of_enough_rank_changes_nothing(family: str) -> None:
    """With no more tokens than the least rank, the outputs on them span no more directions."""
    model = tiny.build(family, dtype=torch.float64)
    tokens = tiny.token_ids(1, 6, seed=3)
    before = tiny.logits_of(model, tokens)
    recipe = Recipe.parse("rom(share=0.8,allocation=uniform,metric=outputs)")
    plan = recipe.plan(anatomy_of(model), Budget.parse("none"))
    recipe.compress(model, plan, Calibration(tokens, ""))
    assert any(isinstance(module, LowRankLinear) for module in model.modules())
    torch.testing.assert_close(tiny.logits_of(model, tokens), before, rtol=1e-4, atol=1e-5)


def test_every_linear_sees_what_the_reduced_prefix_gives_it(family: str) -> None:
    """Rebuilt from the reduced model alone: V·Vᵀ·W for the second moment of its own inputs."""
    model, dense = tiny.build(family, dtype=torch.float64), tiny.build(family, dtype=torch.float64)
    plan = tiny.compress(model, PAPER, "params=0.8").stages[0]
    groups = layout_of(model.config).groups
    seen = 0
    for block in stream(model, TOKENS, batch_size=8):
        for path in (path for group in groups for path in group):
            module = block.module.get_submodule(path)
            if not isinstance(module, LowRankLinear):
                continue
            weight = dense.get_submodule(f"{block.path}.{path}").weight.detach()
            expected = reduced(weight, block.second_moment(path), module.first.out_features)
            found = (module.second.weight @ module.first.weight).detach()
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
            seen += 1
    assert seen == len(plan.modules) > 0


def test_inputs_after_a_reduced_block_are_not_the_dense_ones() -> None:
    model, dense = tiny.build("llama", dtype=torch.float64), tiny.build("llama", dtype=torch.float64)
    tiny.compress(model, PAPER, "params=0.7")
    moments = [
        {block.index: block.second_moment("self_attn.q_proj") for block in stream(each, TOKENS)}
        for each in (model, dense)
    ]
    assert torch.equal(moments[0][0], moments[1][0])
    assert all(not torch.allclose(moments[0][index], moments[1][index]) for index in (1, 2, 3))


@pytest.mark.parametrize("blocks", [1, 2])
def test_blocks_outside_the_range_are_left_alone_bit_for_bit(family: str, blocks: int) -> None:
    model, dense = tiny.build(family), tiny.build(family)
    tiny.compress(model, f"rom(allocation=modules,blocks={blocks},share=0.5)")
    prefix = layout_of(model.config).blocks
    for index in range(4 - blocks):
        for name, value in dense.get_submodule(f"{prefix}.{index}").state_dict().items():
            assert torch.equal(model.get_submodule(f"{prefix}.{index}").state_dict()[name], value)
    last = model.get_submodule(f"{prefix}.3")
    assert any(isinstance(module, LowRankLinear) for module in last.modules())


ALLOCATIONS = ["water-filled", "searched", "modules", "uniform"]


@pytest.mark.parametrize("budget", ["params=0.8", "bytes=0.7", "params=0.95"])
@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_the_plan_carried_out_is_the_model_there_is(family: str, allocation: str, budget: str) -> None:
    model = tiny.build(family)
    target = Budget.parse(budget).target(anatomy_of(model).size(Budget.parse(budget).metric))
    plan = tiny.compress(model, f"rom(allocation={allocation})", budget)
    entries = ledger(model)
    assert (total_params(entries), total_disk(entries)) == (plan.final.params, plan.final.bytes)
    assert 0.99 * target <= plan.final.size(Budget.parse(budget).metric) <= target


@given(share=st.floats(0.5, 1.0), metric=st.sampled_from(["params", "bytes"]))
def test_a_plan_comes_close_under_its_budget(share: float, metric: Any) -> None:
    dense = tiny.anatomy("llama")
    target = int(share * dense.size(metric))
    size = Recipe.parse("rom").plan(dense, Budget(metric=metric, value=share)).final.size(metric)
    assert 0.99 * target <= size <= target


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("metric", ["loss", "outputs"])
def test_every_allocation_goes_with_every_metric(allocation: str, metric: str) -> None:
    model = tiny.build("llama")
    tiny.compress(model, f"rom(allocation={allocation},metric={metric})", "params=0.8")
    assert torch.isfinite(tiny.logits_of(model)).all()


def test_a_search_tells_its_trials_and_takes_the_best() -> None:
    model = tiny.build("llama")
    notes = tiny.compress(model, "rom(allocation=searched)", "params=0.8").stages[0].notes
    trials = notes["held_out_loss"]
    assert len(trials) == 3
    assert trials[notes["chosen"]] == min(trials.values())


def test_modules_of_equal_share_are_tried_by_depth() -> None:
    notes = tiny.compress(tiny.build("llama"), "rom(allocation=modules)", "params=0.8").stages[0].notes
    assert notes["chosen"] in notes["held_out_loss"]
    assert all(name.startswith("last ") for name in notes["held_out_loss"])


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_centred_directions_keep_the_mean_output(family: str) -> None:
    model, dense = tiny.build(family, dtype=torch.float64), tiny.build(family, dtype=torch.float64)
    tiny.compress(model, "rom(centred=true,allocation=uniform,metric=outputs)", "params=0.7")
    path = layout_of(model.config).groups[0][0]
    inputs: list[Tensor] = []
    for block in stream(dense, TOKENS, batch_size=8):
        if block.index == 0:
            block.observe({path: lambda x: inputs.append(x.clone())})
    x = torch.cat(inputs)
    prefix = layout_of(model.config).blocks
    old, new = (each.get_submodule(f"{prefix}.0.{path}") for each in (dense, model))
    assert isinstance(new, LowRankLinear)
    assert isinstance(old, nn.Linear)
    with torch.no_grad():
        torch.testing.assert_close(new(x).mean(0), old(x).mean(0), rtol=1e-5, atol=1e-6)
        assert not torch.allclose(new(x), old(x))


def test_it_stacks_under_a_quantizer(family: str) -> None:
    model = tiny.build(family)
    share = 0.26 if family == "opt" else 0.15  # the table of positions stays as it is
    target = share * anatomy_of(model).bytes
    plan = tiny.compress(model, "rom+rtn-int4(group=16)", f"bytes={share}")
    assert plan.final.bytes <= target
    assert total_disk(ledger(model)) == plan.final.bytes


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("rom(blocks=2)", "blocks=2 needs allocation=modules"),
        ("rom(allocation=modules,blocks=9)", "this model has 4 blocks"),
        ("rom(share=0)", "share"),
        ("rom(allocation=best)", "water-filled"),
    ],
)
def test_bad_knobs_are_refused(recipe: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Recipe.parse(recipe).plan(tiny.anatomy("llama"), Budget.parse("params=0.8"))


def test_a_budget_that_a_few_blocks_cannot_meet_says_so() -> None:
    with pytest.raises(ImpossibleBudget, match="only the last 1 blocks may change"):
        Recipe.parse("rom(allocation=modules,blocks=1)").plan(
            tiny.anatomy("llama"), Budget.parse("params=0.5")
        )
