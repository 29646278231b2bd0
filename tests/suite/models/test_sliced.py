"""The modules of a sliced model compute what they say, and wrapping keeps what is inside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from suite import checkpoint
from suite.conformance import tiny
from suite.layers import ModuleSpec, replace, spec_of
from suite.models.anatomy import anatomy_of
from suite.models.layouts import layout_of
from suite.models.sliced import (
    ExpandingNorm,
    ResizedEmbedding,
    ResizedPositions,
    SlicedBlock,
    UnscaledNorm,
    normalise,
)

SIZE = 48
X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def block_spec(family: str, entrance: int | None = None) -> ModuleSpec:
    between = None if family == "gpt-neox" else SIZE
    arguments = {
        "family": tiny.config_of(family).model_type,
        "entering": SIZE,
        "between": between,
        "leaving": SIZE,
        "entrance": entrance,
        "attention_skip": between is not None,
        "mlp_skip": True,
    }
    return ModuleSpec(type="sliced_block", arguments=arguments)


def wrap(model: PreTrainedModel, index: int, matrix: Tensor) -> SlicedBlock:
    """Put a sliced block around block `index`, its skip matrices all `matrix`."""
    family = "gpt-neox" if model.config.model_type == "gpt_neox" else model.config.model_type
    block = block_spec(family).build(torch.float32, "cpu")
    assert isinstance(block, SlicedBlock)
    block.load_state_dict(dict.fromkeys(block.state_dict(), matrix))
    replace(model, f"{layout_of(model.config).blocks}.{index}", block)
    return block


def test_the_norm_divides_by_the_dense_width() -> None:
    expected = X / (X.square().sum(-1, keepdim=True) / 20 + 0.1).sqrt()
    torch.testing.assert_close(UnscaledNorm(20, 0.1)(X), expected)


def test_a_cut_vector_is_normed_like_the_whole_one_it_came_from() -> None:
    padded = torch.cat([X, torch.zeros(2, 5, 12, dtype=X.dtype)], dim=-1)
    torch.testing.assert_close(normalise(X, 20, 0.1), normalise(padded, 20, 0.1)[..., :8])


def test_half_precision_is_normed_in_single_precision() -> None:
    found = normalise(X.bfloat16(), 8, 1e-5)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, normalise(X.bfloat16().float(), 8, 1e-5).bfloat16())


@pytest.mark.parametrize("bias", [True, False])
def test_the_expanding_norm_goes_back_to_the_dense_coordinates_and_then_scales(bias: bool) -> None:
    norm = ExpandingNorm(8, 20, 0.1, bias).double()
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    expected = normalise(X, 20, 0.1) @ norm.expand.weight.T * norm.weight
    torch.testing.assert_close(norm(X), expected + norm.bias if bias else expected)


def test_positions_are_looked_up_past_the_offset() -> None:
    table = ResizedPositions(10, 3, offset=2)
    ids = torch.tensor([[0, 4]])
    assert torch.equal(table(torch.ones(1, 2), 0, position_ids=ids), table.weight[ids + 2])


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "gpt-neox"])
def test_a_block_with_identity_skips_is_the_block_it_wraps(family: str) -> None:
    model = tiny.build(family)
    dense = tiny.logits_of(model)
    for index in range(tiny.BLOCKS):
        wrap(model, index, torch.eye(SIZE))
    torch.testing.assert_close(tiny.logits_of(model), dense)
    assert torch.equal(tiny.greedy(model, use_cache=True), tiny.greedy(tiny.build(family), use_cache=True))


def test_every_addition_passes_the_stream_through_its_skip_matrix(llama: PreTrainedModel) -> None:
    """With branches that add nothing, a block is the product of its two matrices."""
    matrix = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(1)) / 7
    block = wrap(llama, 0, matrix)
    with torch.no_grad():
        for path in ("self_attn.o_proj", "mlp.down_proj"):
            block.get_submodule(path).weight.zero_()
    seen: list[Tensor] = []
    block.register_forward_hook(lambda _, args, output: seen.extend((args[0], output)))
    tiny.logits_of(llama)
    torch.testing.assert_close(seen[1], seen[0] @ matrix.T @ matrix.T)


def test_an_entrance_projects_the_stream_first(llama: PreTrainedModel) -> None:
    dense = tiny.logits_of(llama)
    block = block_spec("llama", entrance=SIZE).build(torch.float32, "cpu")
    block.load_state_dict(dict.fromkeys(block.state_dict(), torch.eye(SIZE)))
    replace(llama, "model.layers.0", block)
    torch.testing.assert_close(tiny.logits_of(llama), dense)
    with torch.no_grad():
        block.get_submodule("entrance").weight.zero_()
    assert not torch.allclose(tiny.logits_of(llama), dense)


def test_what_is_inside_a_wrapped_block_keeps_its_path_and_its_weights(model: PreTrainedModel) -> None:
    before = dict(model.named_parameters())
    wrap(model, 1, torch.eye(SIZE))
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    added = {name.rsplit(".", 2)[1] for name in after.keys() - before.keys()}
    assert added == {"mlp_skip"} | ({"attention_skip"} if model.config.model_type != "gpt_neox" else set())


def test_a_plan_that_wraps_counts_what_is_inside_once(family: str) -> None:
    dense, model = tiny.anatomy(family), tiny.build(family)
    if family == "llama-untied":
        family = "llama"
    path = f"{dense.layout.blocks}.1"
    planned = dense.after(modules={path: block_spec(family)})
    wrap(model, 1, torch.eye(SIZE))
    found = anatomy_of(model)
    assert {e.path: e for e in planned.entries} == {e.path: e for e in found.entries}
    assert planned.linears == dense.linears
    assert planned.decoder_params > dense.decoder_params


def test_a_wrapped_block_is_reloaded_around_the_models_own(model: PreTrainedModel, tmp_path: Path) -> None:
    wrap(model, 2, torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(2)) / 7)
    checkpoint.save(model, None, tmp_path)
    again: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(tiny.logits_of(again), tiny.logits_of(model))
    assert checkpoint.surgery_of(again) == checkpoint.surgery_of(model)


def test_gradient_checkpointing_gives_the_same_gradients(llama: PreTrainedModel) -> None:
    wrap(llama, 1, torch.eye(SIZE))
    gradients: list[Tensor] = []
    ids: Any = tiny.token_ids()
    for checkpointing in (False, True):
        llama.train()
        if checkpointing:
            llama.gradient_checkpointing_enable()
        llama.zero_grad()
        llama(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append(llama.get_submodule("model.layers.1.mlp_skip").weight.grad.clone())
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize(
    "module",
    [
        UnscaledNorm(48, 1e-5),
        ExpandingNorm(8, 20, 1e-6, bias=True),
        ResizedEmbedding(9, 4),
        ResizedPositions(9, 4, 2),
        SlicedBlock("llama", 8, 7, 6, entrance=20),
        SlicedBlock("gpt_neox", 8, None, 6, attention_skip=False),
    ],
    ids=lambda module: type(module).__name__,
)
def test_a_spec_rebuilds_an_equal_skeleton(module: nn.Module) -> None:
    spec = spec_of(module)
    assert spec is not None
    rebuilt = ModuleSpec.model_validate_json(spec.model_dump_json()).build(torch.float32)
    assert spec_of(rebuilt) == spec
    shapes = {name: tensor.shape for name, tensor in rebuilt.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in module.state_dict().items()}
    assert spec.wraps == isinstance(module, SlicedBlock)
