"""Rebuilt weights are kept where that is asked for, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from suite.kernels import FEW_ROWS
from suite.packed_layers import PackedLinear
from suite.rebuilding import rebuilt_once
from suite.sparse_layers import SparseLinear

MANY_ROWS = torch.randn(FEW_ROWS + 1, 64, generator=torch.Generator().manual_seed(0))


def layer(kind: str) -> tuple[nn.Module, str]:
    """A layer that rebuilds its weight, and the name of the method that does it."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 48)
    if kind == "packed":
        return PackedLinear.from_linear(linear, 4, 32, True), "dequantize"
    return SparseLinear.from_weight(linear.weight.detach(), linear.weight.detach() > 0, linear), "dense"


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch, kind: str) -> list[int]:
    """How often the layers of `kind` have rebuilt a weight, as the list's length."""
    module, name = layer(kind)
    calls: list[int] = []
    real = getattr(type(module), name)

    def counted(*arguments: object) -> Tensor:
        calls.append(1)
        built: Tensor = real(*arguments)
        return built

    monkeypatch.setattr(type(module), name, counted)
    return calls


@pytest.mark.parametrize("kind", ["packed", "sparse"])
class TestRebuiltOnce:
    def test_numbers_are_the_same_and_the_weight_is_built_once(self, kind: str, count: list[int]) -> None:
        module, _ = layer(kind)
        with torch.no_grad():
            expected = module(MANY_ROWS)
            with rebuilt_once(), rebuilt_once():
                assert all(torch.equal(module(MANY_ROWS), expected) for _ in range(3))
            assert len(count) == 2
            module(MANY_ROWS)
        assert len(count) == 3

    def test_few_rows_are_multiplied_with_the_kept_weight_too(self, kind: str, count: list[int]) -> None:
        module, _ = layer(kind)
        with torch.no_grad(), rebuilt_once():
            many, few = module(MANY_ROWS), module(MANY_ROWS[:3])
        torch.testing.assert_close(few, many[:3])
        assert len(count) == 1

    def test_each_layer_has_a_weight_of_its_own(self, kind: str, count: list[int]) -> None:
        module, other = layer(kind)[0], layer(kind)[0]
        with torch.no_grad(), rebuilt_once():
            first = module(MANY_ROWS)
            for tensor in (*other.parameters(), *other.buffers()):
                if tensor.is_floating_point():
                    tensor.mul_(2)
            assert torch.allclose(other(MANY_ROWS), 2 * first, atol=1e-4)

    def test_what_does_not_fit_is_built_again(self, kind: str, count: list[int]) -> None:
        module, _ = layer(kind)
        with torch.no_grad(), rebuilt_once(room=64 * 48 * 4 - 1):
            module(MANY_ROWS)
            module(MANY_ROWS)
        assert len(count) == 2

    def test_training_rebuilds(self, kind: str, count: list[int]) -> None:
        module, _ = layer(kind)
        with rebuilt_once():
            module(MANY_ROWS).sum().backward()
            module(MANY_ROWS).sum().backward()
        assert len(count) == 2
