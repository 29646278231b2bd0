"""Streaming gives every block what the model itself gives it."""

import itertools

import pytest
import torch
from torch import nn

from suite.conformance import tiny
from suite.errors import CellFailed
from suite.models.anatomy import anatomy_of
from suite.models.layouts import layout_of
from suite.streaming import second_moment, stream

EVERY = [*tiny.FAMILIES, "mistral", "qwen3", "opt-350m-like"]
TOKENS = tiny.token_ids(5, 12, seed=4)


@pytest.mark.parametrize("family", EVERY)
def test_blocks_see_what_the_model_gives_them(family: str) -> None:
    model = tiny.build(family)
    expected: list[torch.Tensor] = []
    blocks = model.get_submodule(layout_of(model.config).blocks)
    hooks = [
        block.register_forward_pre_hook(lambda _, args: expected.append(args[0]))
        for block in blocks.children()
    ]
    tiny.logits_of(model, TOKENS)
    for hook in hooks:
        hook.remove()
    for block, hidden in zip(stream(model, TOKENS, batch_size=2), expected, strict=True):
        torch.testing.assert_close(torch.cat(block.inputs), hidden)


@pytest.mark.parametrize("family", EVERY)
def test_second_moments_are_those_of_a_linears_input(family: str) -> None:
    model = tiny.build(family, dtype=torch.float64)
    layout = layout_of(model.config)
    for block in stream(model, TOKENS, batch_size=2):
        for group in layout.groups:
            seen: list[torch.Tensor] = []
            hook = block.module.get_submodule(group[0]).register_forward_pre_hook(
                lambda _, args, seen=seen: seen.append(args[0].flatten(0, -2))
            )
            for hidden, arguments in zip(block.inputs, block.arguments, strict=True):
                block.module(hidden, **arguments)
            hook.remove()
            x = torch.cat(seen)
            for path in group:
                torch.testing.assert_close(block.second_moment(path), x.T @ x)
        every = [path for group in layout.groups for path in group]
        for path, moment in block.second_moments(every).items():
            assert torch.equal(moment, block.second_moment(path))


@pytest.mark.parametrize("family", EVERY)
def test_one_pass_observes_and_advances(family: str) -> None:
    model = tiny.build(family)
    layout = layout_of(model.config)
    paths = [group[0] for group in layout.groups]
    calls: list[int] = []
    apart, together = (stream(model, TOKENS, batch_size=2) for _ in range(2))
    for first, second in zip(apart, together, strict=True):
        expected = first.input_statistics(paths)
        first.advance()
        hook = second.module.register_forward_hook(lambda *_: calls.append(1))
        found = second.input_statistics(paths, advance=True)
        hook.remove()
        for path in paths:
            assert torch.equal(found[path].moment, expected[path].moment)
            assert torch.equal(found[path].size, expected[path].size)
        for ours, theirs in zip(second.inputs, first.inputs, strict=True):
            assert torch.equal(ours, theirs)
        assert second.advanced
    assert len(calls) == 3 * anatomy_of(model).n_blocks


@pytest.mark.parametrize("family", EVERY)
def test_settled_linears_run_once_a_batch_and_give_the_same(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, remembering = tiny.build(family), tiny.build(family)
    groups = layout_of(plain.config).groups
    run: list[nn.Module] = []
    own = nn.Linear.forward

    def forward(self: nn.Linear, value: torch.Tensor) -> torch.Tensor:
        run.append(self)
        return own(self, value)

    monkeypatch.setattr(nn.Linear, "forward", forward)
    for first, second in zip(*(stream(m, TOKENS, batch_size=2) for m in (plain, remembering)), strict=True):
        linears = [second.module.get_submodule(path) for group in groups for path in group]
        run.clear()
        for group in groups:
            expected, found = first.second_moment(group[0]), second.second_moment(group[0])
            assert torch.equal(found, expected)
            for path, block in itertools.product(group, (first, second)):
                with torch.no_grad():
                    block.module.get_submodule(path).weight.mul_(0.5)
            second.settle(group)
        for block in (first, second):
            block.advance()
        assert all(map(torch.equal, second.inputs, first.inputs))
        assert [run.count(linear) for linear in linears] == [3] * len(linears)


def test_what_is_observed_inside_a_settled_module_is_run_for_it() -> None:
    for block in stream(tiny.build("llama"), TOKENS, batch_size=2):
        block.settle(["self_attn", "mlp.gate_proj"])
        expected = block.second_moment("self_attn.o_proj")
        block.second_moment("mlp.down_proj")
        assert torch.equal(block.second_moment("self_attn.o_proj"), expected)


def test_with_nothing_to_observe_a_block_advances_all_the_same() -> None:
    model = tiny.build("llama")
    for first, second in zip(stream(model, TOKENS), stream(model, TOKENS), strict=True):
        first.advance()
        assert second.second_moments([], advance=True) == {}
        assert second.advanced
        assert all(map(torch.equal, second.inputs, first.inputs))


def test_a_path_that_is_never_met_leaves_the_inputs_alone() -> None:
    for block in stream(tiny.build("llama"), TOKENS):
        before = list(block.inputs)
        block.module.add_module("idle", torch.nn.Identity())
        block.observe({"idle": lambda _: None})
        assert all(ours is theirs for ours, theirs in zip(block.inputs, before, strict=True))


def test_a_changed_block_changes_what_comes_after_it() -> None:
    """Guards against activations of the dense model being kept."""
    moments: list[dict[int, torch.Tensor]] = []
    for change in (False, True):
        model = tiny.build("llama")
        found = {}
        for block in stream(model, TOKENS):
            found[block.index] = block.second_moment("self_attn.q_proj")
            if change and block.index == 1:
                with torch.no_grad():
                    block.module.get_submodule("mlp.down_proj").weight.zero_()
        moments.append(found)
    for index in range(anatomy_of(model).n_blocks):
        assert torch.equal(moments[0][index], moments[1][index]) == (index <= 1)


def test_a_body_may_compute_the_outputs_itself() -> None:
    model = tiny.build("llama")
    calls: list[int] = []
    for index, block in enumerate(model.model.layers):
        block.mlp.register_forward_hook(lambda *_, index=index: calls.append(index))
    for block in stream(model, TOKENS):
        if block.index == 1:
            block.inputs[:] = [torch.zeros_like(hidden) for hidden in block.inputs]
            block.advanced = True
        elif block.index == 2:
            assert not any(hidden.any() for hidden in block.inputs)
    assert calls == [0, 2, 3]


def test_the_model_is_left_as_it_was() -> None:
    model = tiny.build("llama")
    before = tiny.logits_of(model)
    for _ in stream(model, TOKENS):
        pass
    assert torch.equal(before, tiny.logits_of(model))


def test_a_forward_that_stands_in_for_a_blocks_own_is_put_back() -> None:
    model = tiny.build("llama")
    block = model.model.layers[1]
    stand_in = block.forward = lambda hidden_states, **_: 2 * hidden_states
    list(stream(model, TOKENS))
    assert block.forward is stand_in
    assert "forward" not in vars(model.model.layers[0])


def test_a_block_whose_values_overflow_is_named() -> None:
    model = tiny.build("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] = torch.inf
    with pytest.raises(
        CellFailed, match=r"model\.layers\.2 gives values that are not finite .* torch\.float32"
    ):
        list(stream(model, TOKENS))


def test_groups_share_inputs_and_come_in_order() -> None:
    assert layout_of(tiny.config_of("llama")).groups == (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    )
    assert layout_of(tiny.config_of("opt")).groups[2:] == (("fc1",), ("fc2",))
    assert len(layout_of(tiny.config_of("gpt-neox")).groups) == 4


@pytest.mark.parametrize("features", [1, 3, 4, 7, 64])
def test_a_second_moment_is_that_of_all_features_in_float64(features: int) -> None:
    x = torch.randn(50, features)
    moment = second_moment(x)
    assert moment.dtype == torch.float64
    torch.testing.assert_close(moment, x.double().T @ x.double(), rtol=1e-5, atol=1e-5)
    assert torch.allclose(second_moment(x.double()), x.double().T @ x.double(), rtol=1e-13, atol=1e-13)
