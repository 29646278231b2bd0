"""LLM-Pruner and the MoPE-style score: what is coupled, what importance is, and what goes."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from methods.structured_pruning import (
    LlmPruner,
    Part,
    _loss,
    _loss_at_exits,
    least_pruning_error,
    masked,
    pruning_errors,
    taylor,
)
from suite.conformance import tiny
from suite.errors import ImpossibleBudget, InputError
from suite.models.anatomy import anatomy_of
from suite.models.layouts import layout_of
from suite.recipe import Recipe
from suite.specs import Budget

IMPORTANCES = pytest.mark.parametrize("importance", ["taylor", "exits", "mope"])
TOKENS = tiny.token_ids(4, 16)


def parts_of(model: PreTrainedModel, **knobs: object) -> dict[str, Part]:
    method = LlmPruner(LlmPruner.Config.model_validate(knobs))
    return method._parts(anatomy_of(model), "params")


def widths(model: PreTrainedModel) -> list[int]:
    return [line.in_features for line in anatomy_of(model).linears if line.role == "down"]


@IMPORTANCES
@pytest.mark.parametrize("attention", [False, True])
def test_the_pruned_model_is_the_dense_one_with_the_same_structures_masked(
    importance: str, attention: bool, family: str
) -> None:
    if attention and family in ("opt", "gpt-neox"):
        pytest.skip("attention of this family has as many heads in every block")
    dense, model = tiny.build(family), tiny.build(family)
    knobs = f"importance={importance}, attention={str(attention).lower()}"
    tiny.compress(model, f"llm-pruner(share=0.6, {knobs})")
    parts = parts_of(dense, attention=attention)
    gone = {}
    for name, part in parts.items():
        line, (_, size) = next(item for item in part.cut.items() if item[1][0] == "in")
        before, after = dense.get_submodule(line.path).weight, model.get_submodule(line.path).weight
        pieces = [piece.contiguous() for piece in after.split(size, 1)]
        stays = [any(torch.equal(piece, kept) for kept in pieces) for piece in before.split(size, dim=1)]
        assert sum(stays) == len(pieces)
        gone[name] = torch.tensor([not stay for stay in stays]).nonzero().flatten()
    assert any(len(structures) for structures in gone.values())
    with masked(dense, parts, gone):
        expected = tiny.logits_of(dense)
    torch.testing.assert_close(tiny.logits_of(model), expected, rtol=1e-5, atol=1e-5)


def test_importance_is_the_derivative_by_a_factor_on_each_row_and_column(model: PreTrainedModel) -> None:
    """Σ g·w is what the loss changes by, at first order, when a row is scaled: here checked by autograd."""
    model = model.double()
    parts = parts_of(model)
    name, part = next(iter(parts.items()))
    scores = taylor(model, parts, TOKENS, _loss)[name]
    expected = torch.zeros(part.count, dtype=torch.float64)
    for line, (side, _) in part.cut.items():
        scale = torch.ones(part.count, dtype=torch.float64, requires_grad=True)
        weight = model.get_submodule(line.path).weight.detach()
        scaled = weight * (scale[:, None] if side == "out" else scale)
        output = torch.func.functional_call(
            model, {f"{line.path}.weight": scaled}, (), {"input_ids": TOKENS, "labels": TOKENS}
        )
        expected += torch.autograd.grad(output.loss, scale)[0].abs()
    torch.testing.assert_close(scores, expected, rtol=1e-6, atol=1e-12)


def mean_of_truncated_losses(model: PreTrainedModel) -> Tensor:
    """Over all depths: the loss of the model whose deeper blocks were taken out."""
    blocks = model.get_submodule(layout_of(model.config).blocks)
    assert isinstance(blocks, nn.ModuleList)
    whole, losses = list(blocks), []
    for depth in range(1, len(whole) + 1):
        del blocks[:]
        blocks.extend(whole[:depth])
        losses.append(model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss)
    return torch.stack(losses).mean()


def test_an_exit_is_the_model_that_ends_there(model: PreTrainedModel) -> None:
    found = _loss_at_exits(model, TOKENS)
    torch.testing.assert_close(found, mean_of_truncated_losses(model), rtol=1e-5, atol=1e-6)


def test_importance_at_exits_is_by_the_gradient_of_all_exits(model: PreTrainedModel) -> None:
    parts = parts_of(model)
    name, part = next(iter(parts.items()))
    line = next(line for line, (side, _) in part.cut.items() if side == "in")
    scores = taylor(model, {name: Part(part.count, part.each, {line: ("in", 1)})}, TOKENS, _loss_at_exits)
    weight = model.get_parameter(f"{line.path}.weight")
    gradient = torch.autograd.grad(mean_of_truncated_losses(model), weight)[0]
    expected = (gradient * weight).double().sum(0).abs()
    torch.testing.assert_close(scores[name], expected, rtol=1e-3, atol=1e-6)


def test_gradients_are_left_as_they_were(llama: PreTrainedModel) -> None:
    frozen = llama.get_submodule("model.layers.1.mlp.up_proj").weight
    frozen.requires_grad_(False)
    before = [parameter.requires_grad for parameter in llama.parameters()]
    taylor(llama, parts_of(llama), TOKENS, _loss)
    assert [parameter.requires_grad for parameter in llama.parameters()] == before
    assert all(parameter.grad is None for parameter in llama.parameters())


@pytest.mark.parametrize("attention", [False, True])
def test_a_channel_that_does_nothing_is_unimportant_and_has_no_pruning_error(attention: bool) -> None:
    model = tiny.build("llama")
    parts = parts_of(model, attention=attention)
    with torch.no_grad():
        model.get_submodule("model.layers.2.mlp.down_proj").weight[:, 5] = 0
        model.get_submodule("model.layers.2.self_attn.o_proj").weight[:, 24:] = 0
    idle = {"2.mlp": 5} | ({"2.attention": 1} if attention else {})
    gone = {name: torch.zeros(0, dtype=torch.int64) for name in parts}
    scores = taylor(model, parts, TOKENS, _loss)
    with masked(model, parts, gone):
        groups = [(name, torch.tensor([index])) for name, index in idle.items()]
        assert pruning_errors(model, gone, groups, TOKENS) == [0.0] * len(groups)
        assert pruning_errors(model, gone, [("1.mlp", torch.zeros(0, dtype=torch.int64))], TOKENS) == [0.0]
        assert pruning_errors(model, gone, [("1.mlp", torch.arange(50))], TOKENS) != [0.0]
    for name, index in idle.items():
        assert scores[name][index] == 0 == scores[name].min()


@IMPORTANCES
def test_blocks_at_the_ends_are_left_alone(importance: str) -> None:
    model = tiny.build("llama")
    tiny.compress(model, f"llm-pruner(importance={importance}, first=1, last=1)", "params=0.85")
    assert widths(model)[0] == widths(model)[3] == 112
    assert max(widths(model)[1:3]) < 112


@pytest.mark.parametrize(
    ("depth", "ends"), [(32, (4, 2)), (30, (4, 2)), (80, (4, 2)), (12, (2, 1)), (4, (0, 0))]
)
def test_by_default_fewer_blocks_are_left_alone_in_shallow_models(depth: int, ends: tuple[int, int]) -> None:
    model = tiny.build("llama", num_hidden_layers=depth)
    blocks = [int(name.partition(".")[0]) for name in parts_of(model)]
    assert blocks == list(range(ends[0], depth - ends[1]))


@IMPORTANCES
@pytest.mark.parametrize("budget", ["params=0.9", "params=0.75", "bytes=0.8"])
@pytest.mark.parametrize("attention", [False, True])
def test_budgets_are_used_up(importance: str, budget: str, attention: bool) -> None:
    model = tiny.build("llama")
    dense, parsed = anatomy_of(model), Budget.parse(budget)
    knobs = f"importance={importance}, attention={str(attention).lower()}"
    plan = tiny.compress(model, f"llm-pruner({knobs})", budget)
    after = anatomy_of(model)
    assert (after.params, after.bytes) == (plan.final.params, plan.final.bytes)
    target = parsed.target(dense.size(parsed.metric))
    slack = 0.99 if not attention else 0.96  # a head is 3 % of this model
    assert slack * target < after.size(parsed.metric) <= target
    assert tiny.logits_of(model).isfinite().all()
    assert torch.equal(tiny.greedy(model, use_cache=True), tiny.greedy(model, use_cache=False))


def test_by_taylor_all_blocks_keep_the_same_share() -> None:
    model = tiny.build("llama")
    tiny.compress(model, "llm-pruner(share=0.8)")
    assert widths(model) == [int(0.8 * 112)] * 4


def test_by_pruning_error_blocks_that_do_little_lose_most() -> None:
    model = tiny.build("llama")
    with torch.no_grad():
        idle = model.get_submodule("model.layers.2.mlp.down_proj").weight
        idle.mul_(1e-3).requires_grad_(False)
    # Learnt by heart, so that taking away what is used costs.
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p is not idle), lr=3e-3)
    for _ in range(60):
        _loss(model, TOKENS).backward()
        optimizer.step()
        optimizer.zero_grad()
    parts = parts_of(model)
    each = parts["0.mlp"].each
    kept = least_pruning_error(model, parts, taylor(model, parts, TOKENS, _loss), TOKENS, 90 * each)
    counts = {name: len(stay) for name, stay in kept.items()}
    assert sum(counts.values()) == 4 * 112 - 90
    assert counts["2.mlp"] == min(counts.values()) < 112 // 2
    assert all((stay.diff() > 0).all() for stay in kept.values())


def test_pruning_errors_choose_better_than_chance_and_never_beat_the_best_pair() -> None:
    """Removing one of a few groups: the greedy choice is the one of least loss, found here by trying all."""
    model = tiny.build("llama", num_hidden_layers=1, intermediate_size=8)
    parts = parts_of(model)
    ((name, part),) = parts.items()
    scores = taylor(model, parts, TOKENS, _loss)
    kept = least_pruning_error(model, parts, scores, TOKENS, part.each)[name]

    def loss_without(gone: list[int]) -> float:
        with torch.no_grad(), masked(model, parts, {name: torch.tensor(gone)}):
            return float(_loss(model, TOKENS))

    candidates = scores[name].argsort()[:-1].tolist()
    losses = {index: loss_without([index]) for index in candidates}
    (gone,) = set(range(8)) - set(kept.tolist())
    assert gone == min(losses, key=losses.__getitem__)
    pair = least_pruning_error(model, parts, scores, TOKENS, 2 * part.each)[name]
    chosen = loss_without(sorted(set(range(8)) - set(pair.tolist())))
    every = sorted(loss_without(list(two)) for two in itertools.combinations(candidates, 2))
    assert every[0] <= chosen <= every[len(every) // 2]


def test_what_cannot_be_pruned_is_refused() -> None:
    for family in ("opt", "gpt-neox"):
        with pytest.raises(InputError, match="leave attention out"):
            tiny.compress(tiny.build(family), "llm-pruner(attention=true)", "params=0.8")
    with pytest.raises(InputError, match="leaves none of 4 blocks"):
        tiny.compress(tiny.build("llama"), "llm-pruner(first=3, last=1)", "params=0.9")
    with pytest.raises(InputError, match="factorised them"):
        tiny.compress(tiny.build("llama"), "svd(share=0.5)+llm-pruner(share=0.5)")
    with pytest.raises(ImpossibleBudget, match="blocks at the ends are left alone"):
        tiny.compress(tiny.build("llama"), "llm-pruner(first=2, last=1)", "params=0.6")


@IMPORTANCES
def test_half_precision_models_can_be_pruned(importance: str, family: str) -> None:
    model = tiny.build(family, torch.bfloat16)
    tiny.compress(model, f"llm-pruner(importance={importance})", "params=0.8")
    assert tiny.logits_of(model).dtype == torch.bfloat16
    assert tiny.logits_of(model).isfinite().all()


def test_heads_go_with_all_their_queries() -> None:
    model = tiny.build("qwen3")
    before: dict[str, Tensor] = {k: v.clone() for k, v in model.state_dict().items()}
    tiny.compress(model, "llm-pruner(attention=true, share=0.5)")
    for block in range(tiny.BLOCKS):
        path = f"model.layers.{block}.self_attn"
        key = model.get_submodule(f"{path}.k_proj").weight
        query = model.get_submodule(f"{path}.q_proj").weight
        assert (key.shape[0], query.shape[0]) == (16, 32)
        stays = [torch.equal(key, piece) for piece in before[f"{path}.k_proj.weight"].split(16)].index(True)
        assert torch.equal(query, before[f"{path}.q_proj.weight"].split(32)[stays])


def test_pruned_models_are_quantized_and_healed_like_any_other() -> None:
    model = tiny.build("llama")
    recipe, budget = "llm-pruner(importance=mope)+rtn-int8", "bytes=0.3"
    plan = Recipe.parse(recipe).plan(anatomy_of(model), Budget.parse(budget))
    done = tiny.compress(model, recipe, budget)
    assert anatomy_of(model).bytes == done.final.bytes <= plan.final.bytes


def test_exits_are_not_read_from_streams_of_several_bases(llama: PreTrainedModel) -> None:
    with pytest.raises(InputError, match="streams in bases of their own"):
        tiny.compress(llama, "slicegpt(width=40)+llm-pruner(importance=exits,share=0.5)")
    tiny.compress(llama, "slicegpt(width=40)+llm-pruner(share=0.5)")
