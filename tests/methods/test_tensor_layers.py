"""Linear layers stored as tensor networks: both ways to run them agree, and both train."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from methods.tensor_layers import MpoLinear, TensorLinear, TuckerLinear
from suite.layers import spec_of
from suite.tensors import Mpo, Network, Tucker

NETWORKS = [
    Mpo((12, 2), (3, 12)),
    Mpo((2, 12), (12, 3)),
    Mpo((6, 4), (4, 9)),
    Mpo((2, 3, 4), (6, 3, 2)),
    Mpo((4, 2, 3), (2, 6, 3)),
    Tucker((6, 4), (4, 9)),
]


def layer_of(network: Network, bias: bool = True, scaled: bool = False, part: float = 0.5) -> TensorLinear:
    torch.manual_seed(0)
    m, n = network.shape
    linear = nn.Linear(n, m, bias)
    bonds = [max(1, int(part * bond)) for bond in network.full_bonds]
    cls = TuckerLinear if isinstance(network, Tucker) else MpoLinear
    scale = torch.rand(n) + 0.5 if scaled else None
    return cls.from_cores(network, network.decompose(linear.weight.detach(), bonds), linear, scale)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("network", NETWORKS)
def test_factored_and_materialised_calls_agree(network: Network, scaled: bool) -> None:
    layer = layer_of(network, scaled=scaled)
    x = torch.randn(3, 5, network.shape[1])
    answers = []
    for layer.factored_rows in (None, 0):
        answers.append(layer(x))
    torch.testing.assert_close(answers[0], answers[1], rtol=1e-5, atol=1e-5)
    assert not torch.equal(answers[0], answers[1])  # two ways indeed


@pytest.mark.parametrize("factored_rows", [None, 0])
@pytest.mark.parametrize("network", NETWORKS)
def test_gradients_reach_every_core(network: Network, factored_rows: int | None) -> None:
    layer = layer_of(network, scaled=True)
    layer.factored_rows = factored_rows
    layer(torch.randn(7, network.shape[1])).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all()
        assert parameter.grad.abs().sum() > 0


@pytest.mark.parametrize("network", NETWORKS)
def test_the_cost_formulas_count_what_is_multiplied(network: Network) -> None:
    layer = layer_of(network, bias=False)

    def multiplications(run: object) -> int:
        with FlopCounterMode(display=False) as counter:
            assert callable(run)
            run()
        return counter.get_total_flops() // 2

    x = torch.randn(1, network.shape[1])
    assert multiplications(lambda: layer.factored(x)) == type(layer).factored_cost(network, layer.bonds)
    assert multiplications(layer.matrix) == type(layer).building_cost(network, layer.bonds)


@pytest.mark.parametrize("network", NETWORKS)
def test_the_cheaper_way_is_taken(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of(network, bias=False)
    dense = math.prod(network.shape)
    kind = type(layer)
    built: list[int] = []
    matrix = layer.matrix
    monkeypatch.setattr(layer, "matrix", lambda: (built.append(1), matrix())[1])
    for rows in (1, 5, 50, 5000):
        built.clear()
        layer(torch.randn(rows, network.shape[1]))
        factored = rows * kind.factored_cost(network, layer.bonds)
        building = kind.building_cost(network, layer.bonds) + rows * dense
        assert bool(built) == (building < factored)


@pytest.mark.parametrize("network", NETWORKS)
def test_nothing_but_cores_bias_and_scale_is_held(network: Network) -> None:
    layer = layer_of(network, scaled=True)
    m, n = network.shape
    layer(torch.randn(9999, n))
    held = sum(tensor.numel() for tensor in layer.state_dict().values())
    assert held == network.parameters(layer.bonds) + m + n
    assert not [value for value in vars(layer).values() if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize("network", NETWORKS)
def test_the_skeleton_rebuilt_from_its_arguments_holds_the_same_state(network: Network) -> None:
    layer = layer_of(network, scaled=True)
    spec = spec_of(layer)
    assert spec is not None
    rebuilt = spec.build(torch.float32, "cpu")
    rebuilt.load_state_dict(layer.state_dict())
    x = torch.randn(4, network.shape[1])
    assert torch.equal(rebuilt(x), layer(x))


@pytest.mark.parametrize("network", [n for n in NETWORKS if len(n.full_bonds) > 1])
def test_half_precision_cores_are_contracted_in_single(network: Network) -> None:
    layer = layer_of(network).to(torch.bfloat16)
    exact = network.contract([core.double() for core in layer.cores])
    assert torch.equal(layer.matrix(), exact.float().to(torch.bfloat16)) or float(
        (layer.matrix().double() - exact).abs().max()
    ) <= 2**-8 * float(exact.abs().max())
    assert layer.matrix().dtype == torch.bfloat16
