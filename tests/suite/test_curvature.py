"""The curvature that methods weigh errors by is that of the model's own loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from suite import curvature
from suite.conformance import tiny
from suite.curvature import loss_at_the_end, loss_gradients
from suite.models.anatomy import anatomy_of
from suite.models.layouts import layout_of
from suite.streaming import stream

# Llama's norms compute in float32 whatever the model's precision.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
TOKENS = tiny.token_ids(3, 10, seed=5)


@pytest.fixture(params=tiny.FAMILIES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny.build(request.param, dtype=torch.float64)


def summed_loss(model: PreTrainedModel) -> Tensor:
    loss: Tensor = model(TOKENS, labels=TOKENS, use_cache=False).loss * TOKENS[:, 1:].numel()
    return loss


def autograd(model: PreTrainedModel, paths: list[str]) -> dict[str, Tensor]:
    """Gradients of the summed loss at the outputs of these modules, by torch alone."""
    outputs: dict[str, Tensor] = {}

    def keep(path: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            value.retain_grad()
            outputs[path] = value

        return hook

    hooks = [model.get_submodule(path).register_forward_hook(keep(path)) for path in paths]
    summed_loss(model).backward()
    for hook in hooks:
        hook.remove()
    model.zero_grad()
    return {path: value.grad for path, value in outputs.items() if value.grad is not None}


def test_gradients_between_blocks_are_those_of_the_whole_model(model: PreTrainedModel) -> None:
    blocks = layout_of(model.config).blocks
    found = loss_gradients(model, TOKENS, lambda block, moments: None)
    expected = autograd(model, [f"{blocks}.{index}" for index in range(len(found))])
    for index, gradient in enumerate(found):
        torch.testing.assert_close(torch.cat(gradient), expected[f"{blocks}.{index}"], **CLOSE)


def test_logits_in_parts_give_the_same_gradients(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = loss_gradients(model, TOKENS, lambda block, moments: None)
    monkeypatch.setattr(curvature, "CHUNK", 4)
    parts = loss_gradients(model, TOKENS, lambda block, moments: None)
    for first, second in zip(whole, parts, strict=True):
        torch.testing.assert_close(torch.cat(first), torch.cat(second), **CLOSE)


def test_moments_are_those_of_the_gradients_at_every_linears_output(model: PreTrainedModel) -> None:
    found: dict[str, Tensor] = {}
    order: list[int] = []

    def see(block: Any, moments: dict[str, Tensor]) -> None:
        order.append(block.index)
        found.update({f"{block.path}.{path}": moment for path, moment in moments.items()})

    loss_gradients(model, TOKENS, see)
    assert order == [3, 2, 1, 0]
    paths = [line.path for line in anatomy_of(model).linears]
    for path, gradient in autograd(model, paths).items():
        flat = gradient.reshape(-1, gradient.shape[-1])
        torch.testing.assert_close(found[path], flat.T @ flat, **CLOSE)


def test_the_loss_after_the_last_block_is_the_models_loss(model: PreTrainedModel) -> None:
    for block in stream(model, TOKENS, batch_size=2):
        leaving = block.inputs
    expected = float(summed_loss(model).detach()) / TOKENS[:, 1:].numel()
    assert loss_at_the_end(model, TOKENS, leaving) == pytest.approx(expected)


def test_the_model_is_left_without_gradients_or_hooks(model: PreTrainedModel) -> None:
    before = tiny.logits_of(model)
    loss_gradients(model, TOKENS, lambda block, moments: None)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(tiny.logits_of(model), before)
