"""bfloat16 products in float32, on processors without instructions for them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional

from suite import bfloat16
from suite.conformance import tiny


@pytest.fixture
def widened(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(bfloat16, "native", lambda device: False)
    with bfloat16.widened("cpu"):
        yield


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.usefixtures("widened")
@pytest.mark.parametrize("at_once", [bfloat16.WIDENED_AT_ONCE, 5 * 48, 1])
def test_products_are_those_of_float32_rounded_once(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bfloat16, "WIDENED_AT_ONCE", at_once)
    rows, weight, bias = random(16, 48), random(32, 48), random(32)
    exact = functional.linear(rows.float(), weight.float(), bias.float())
    assert torch.equal(functional.linear(rows, weight, bias), exact.bfloat16())
    assert torch.equal(rows @ weight.T, (rows.float() @ weight.float().T).bfloat16())
    left, right = random(3, 16, 8), random(3, 8, 5)
    assert torch.equal(left @ right, (left.float() @ right.float()).bfloat16())
    scaled = torch.addmm(bias, rows, weight.T, beta=0.5, alpha=2)
    assert torch.equal(scaled, (0.5 * bias.float() + 2 * rows.float() @ weight.float().T).bfloat16())


@pytest.mark.usefixtures("widened")
@pytest.mark.parametrize("mask", [None, "choice", "bias"])
def test_attention_is_that_of_float32_rounded_once(mask: str | None) -> None:
    heads = [random(2, 3, 16 + more, 8) for more in (0, 4, 4)]
    bias = random(1, 1, 16, 20)
    given = {None: None, "choice": bias > 0, "bias": bias}[mask]
    wide = given.float() if mask == "bias" else given
    exact = functional.scaled_dot_product_attention(*[head.float() for head in heads], attn_mask=wide)
    assert torch.equal(functional.scaled_dot_product_attention(*heads, attn_mask=given), exact.bfloat16())


@pytest.mark.usefixtures("widened")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_dtypes_are_multiplied_as_ever(dtype: torch.dtype) -> None:
    rows, weight = random(16, 48, dtype=dtype), random(32, 48, dtype=dtype)
    assert (rows @ weight.T).dtype == dtype
    torch.testing.assert_close(rows @ weight.T, torch.einsum("ri,oi->ro", rows, weight))


@pytest.mark.usefixtures("widened")
def test_a_model_trains_through_them() -> None:
    model = tiny.build("llama", torch.bfloat16)
    ids = tiny.token_ids(2, 16)
    loss = model(ids, labels=ids).loss
    loss.backward()
    found = model.get_submodule("model.layers.0.mlp.up_proj").weight.grad
    wide = tiny.build("llama", torch.bfloat16).float()
    wide(ids, labels=ids).loss.backward()
    expected = wide.get_submodule("model.layers.0.mlp.up_proj").weight.grad
    assert torch.nn.functional.cosine_similarity(found.float().flatten(), expected.flatten(), 0) > 0.999


def test_torch_is_as_before_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, weight = random(16, 48), random(32, 48)
    before, attend = rows @ weight.T, functional.scaled_dot_product_attention
    monkeypatch.setattr(bfloat16, "native", lambda device: False)
    with pytest.raises(RuntimeError, match="stop"), bfloat16.widened("cpu"):
        raise RuntimeError("stop")
    assert torch.equal(rows @ weight.T, before)
    assert functional.scaled_dot_product_attention is attend


def test_an_accelerator_needs_no_help() -> None:
    assert bfloat16.native("cuda")
