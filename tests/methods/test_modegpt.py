"""MoDeGPT: narrower MLPs whose down projection rebuilds the channels that went."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedModel

from methods.modegpt import influence_widths, leverage_scores, nystrom
from suite.conformance import tiny
from suite.errors import ImpossibleBudget, InputError
from suite.measure.ledger import ledger, total_params
from suite.models.anatomy import Anatomy, anatomy_of
from suite.recipe import Recipe
from suite.specs import Budget
from suite.streaming import stream

TOKENS = tiny.calibration_sample().tokens


def sample(seed: int = 0, tokens: int = 60) -> tuple[Tensor, Tensor]:
    """A down projection (6 × 10) and activations (tokens × 10) that depend on each other."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 10, dtype=torch.float64, generator=generator)
    inner = torch.randn(tokens, 5, dtype=torch.float64, generator=generator)
    mixing = torch.randn(5, 10, dtype=torch.float64, generator=generator)
    noise = torch.randn(tokens, 10, dtype=torch.float64, generator=generator)
    return weight, inner @ mixing + 0.3 * noise


def widths_of(model: nn.Module, anatomy: Anatomy) -> list[int]:
    down = next(path for path, role in anatomy.layout.roles.items() if role == "down")
    blocks: Any = model.get_submodule(anatomy.layout.blocks)
    return [block.get_submodule(down).in_features for block in blocks]


def test_all_channels_are_the_dense_model(model: PreTrainedModel) -> None:
    before = tiny.logits_of(model)
    assert not tiny.compress(model, "modegpt(share=1)").stages[0].modules
    assert torch.equal(tiny.logits_of(model), before)


def test_keeping_all_channels_gives_the_weight_back_for_any_moment() -> None:
    weight, z = sample(tokens=3)
    assert torch.equal(nystrom(weight, z.T @ z, torch.arange(10)), weight)


@given(st.integers(0, 10**6), st.integers(1, 9))
def test_the_fit_is_the_least_squares_one_and_beats_dropping_channels(seed: int, kept: int) -> None:
    weight, z = sample(seed)
    channels = torch.randperm(10, generator=torch.Generator().manual_seed(seed))[:kept].sort().values
    fitted = nystrom(weight, z.T @ z, channels)
    best = torch.linalg.lstsq(z[:, channels], z @ weight.T).solution.T
    torch.testing.assert_close(fitted, best, rtol=1e-2, atol=1e-3)
    error = (z @ weight.T - z[:, channels] @ fitted.T).square().sum()
    dropped = (z @ weight.T - z[:, channels] @ weight[:, channels].T).square().sum()
    assert error <= dropped * (1 + 1e-9)


def test_the_fit_is_the_papers_formula() -> None:
    weight, z = sample()
    c, channels = z.T @ z, torch.tensor([0, 3, 4, 7])
    paper = weight @ c[:, channels] @ torch.linalg.inv(c[channels][:, channels])
    torch.testing.assert_close(nystrom(weight, c, channels), paper, rtol=1e-4, atol=1e-5)


def test_leverage_scores_are_those_of_the_formula() -> None:
    _, z = sample()
    c = z.T @ z
    level = 0.1 * c.diagonal().mean()
    paper = (c @ torch.linalg.inv(c + level * torch.eye(10))).diagonal()
    torch.testing.assert_close(leverage_scores(c, 0.1), paper)
    assert ((leverage_scores(c, 0.1) >= 0) & (leverage_scores(c, 0.1) <= 1)).all()


def test_a_channel_that_others_tell_scores_lower_than_one_of_its_own() -> None:
    _, z = sample()
    z = torch.randn(60, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z = torch.cat([z, z[:, :1]], 1)  # channel 3 is channel 0 again
    scores = leverage_scores(z.T @ z, 0.01)
    assert scores[0] == pytest.approx(float(scores[3]))
    assert max(scores[0], scores[3]) < min(scores[1], scores[2])


def test_channels_without_activity_are_the_first_to_go() -> None:
    _, z = sample()
    z[:, [2, 5]] = 0
    assert leverage_scores(z.T @ z, 0.01).argsort()[:2].sort().values.tolist() == [2, 5]
    assert torch.equal(leverage_scores(torch.zeros(4, 4), 0.01), torch.zeros(4, dtype=torch.float64))


def test_only_the_mlps_change(model: PreTrainedModel, family: str) -> None:
    dense = tiny.build(family)
    plan = tiny.compress(model, "modegpt(share=0.5)").stages[0]
    roles = {line.path: line.role for line in anatomy_of(dense).linears}
    assert {roles[path] for path in plan.modules} <= {"gate", "up", "down"}
    for name, tensor in dense.state_dict().items():
        if name.rpartition(".")[0] not in plan.modules:
            assert torch.equal(model.state_dict()[name], tensor)


def test_rows_that_stay_are_the_dense_ones_and_down_is_fitted_to_dense_inputs(
    model: PreTrainedModel, family: str
) -> None:
    dense = tiny.build(family)
    paths = {role: path for path, role in anatomy_of(dense).layout.roles.items()}
    plan = tiny.compress(model, "modegpt(allocation=uniform,share=0.5)").stages[0]
    for block in stream(dense, TOKENS):
        moment = block.second_moment(paths["down"])
        up, narrow = (m.get_submodule(f"{block.path}.{paths['up']}") for m in (dense, model))
        rows = [int((up.weight == row).all(1).nonzero()[0]) for row in narrow.weight]
        assert rows == sorted(rows)
        width = plan.modules[f"{block.path}.{paths['down']}"].arguments["in_features"]
        assert len(rows) == width
        scores = leverage_scores(moment, 0.01)
        assert sorted(scores.topk(width).indices.tolist()) == rows
        down, fitted = (m.get_submodule(f"{block.path}.{paths['down']}") for m in (dense, model))
        expected = nystrom(down.weight, moment, torch.tensor(rows))
        torch.testing.assert_close(fitted.weight.double(), expected, rtol=1e-3, atol=1e-4)
        for linear, cut in ((up, narrow), (down, fitted)):
            assert (linear.bias is None) == (cut.bias is None)
        if down.bias is not None:
            assert torch.equal(down.bias, fitted.bias)
            assert torch.equal(up.bias[rows], narrow.bias)


def test_silent_channels_go_without_a_trace(family: str) -> None:
    model = tiny.build(family)
    paths = {role: path for path, role in anatomy_of(model).layout.roles.items()}
    blocks: Any = model.get_submodule(anatomy_of(model).layout.blocks)
    with torch.no_grad():
        for block in blocks:
            up = block.get_submodule(paths["up"])
            up.weight[::2] = 0
            if up.bias is not None:
                up.bias[::2] = 0
    before = tiny.logits_of(model, TOKENS)
    tiny.compress(model, "modegpt(allocation=uniform,share=0.5)")
    torch.testing.assert_close(tiny.logits_of(model, TOKENS), before, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("budget", ["params=0.85", "bytes=0.8"])
def test_budgets_are_used_to_a_percent(family: str, budget: str) -> None:
    model = tiny.build(family)
    dense, parsed = anatomy_of(model), Budget.parse(budget)
    target = parsed.target(dense.size(parsed.metric))
    plan = tiny.compress(model, "modegpt", budget)
    assert 0.99 * target <= plan.final.size(parsed.metric) <= target
    assert total_params(ledger(model)) == plan.final.params


@torch.no_grad()
def test_blocks_of_less_influence_lose_more(family: str) -> None:
    model = tiny.build(family)
    plan = tiny.compress(model, "modegpt(share=0.6,smoothing=0.3)").stages[0]
    influence, widths = plan.notes["block_influence"], plan.notes["widths"]
    assert widths == widths_of(model, anatomy_of(model))
    by_influence = sorted(range(len(widths)), key=lambda block: influence[block])
    assert [widths[block] for block in by_influence] == sorted(widths)


@given(
    st.lists(st.floats(0, 2), min_size=1, max_size=8),
    st.floats(0, 1),
    st.sampled_from([1e-6, 0.01, 0.1, 1.0, 100.0]),
)
def test_widths_sum_to_the_total_whatever_the_influence(
    influence: list[float], share: float, smoothing: float
) -> None:
    full = [20] * len(influence)
    total = max(len(full), round(share * sum(full)))
    widths = influence_widths(influence, full, total, smoothing)
    assert sum(widths) == total
    assert all(1 <= width <= 20 for width in widths)
    order = sorted(range(len(full)), key=lambda block: influence[block])
    assert all(widths[a] <= widths[b] + 1 for a, b in pairwise(order))


def test_much_smoothing_is_the_uniform_allocation() -> None:
    assert influence_widths([0.0, 0.5, 1.0], [20] * 3, 30, 1e6) == [10, 10, 10]


def test_without_influence_all_blocks_keep_the_same_share(model: PreTrainedModel) -> None:
    tiny.compress(model, "modegpt(allocation=uniform,share=0.5)")
    assert len(set(widths_of(model, anatomy_of(model)))) == 1


def test_factorised_mlps_are_refused(llama: PreTrainedModel) -> None:
    with pytest.raises(InputError, match="narrows whole MLPs"):
        tiny.compress(llama, "svd(share=0.5)+modegpt")


@pytest.mark.parametrize("layout", ["official", "tie-preserving"])
def test_influence_is_not_measured_on_streams_of_several_bases(llama: PreTrainedModel, layout: str) -> None:
    sliced = f"slicegpt(layout={layout},width=40)"
    with pytest.raises(InputError, match=r"give allocation=uniform.*This order works: modegpt\+slicegpt"):
        tiny.compress(llama, f"{sliced}+modegpt")
    tiny.compress(llama, f"{sliced}+modegpt(allocation=uniform,share=0.5)")
    assert len(set(widths_of(llama, anatomy_of(llama)))) == 1


def test_attention_limits_the_budget(llama: PreTrainedModel) -> None:
    with pytest.raises(ImpossibleBudget, match="attention stays as it is"):
        Recipe.parse("modegpt").plan(anatomy_of(llama), Budget.parse("params=0.2"))
