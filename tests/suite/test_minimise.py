"""The minimiser goes downhill only, and all the way."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from suite.minimise import lbfgs


def rosenbrock(point: list[Tensor]) -> Tensor:
    x, y = point
    return ((1 - x).square() + 100 * (y - x.square()).square()).sum()


def test_it_finds_the_bottom_of_a_curved_valley() -> None:
    start = [torch.full((3,), -1.2, dtype=torch.float64), torch.full((1, 3), 1.0, dtype=torch.float64)]
    found, values = lbfgs(rosenbrock, start, 200)
    assert [tuple(tensor.shape) for tensor in found] == [(3,), (1, 3)]
    torch.testing.assert_close(torch.cat([t.reshape(-1) for t in found]), torch.ones(6, dtype=torch.float64))
    assert values == sorted(values, reverse=True)


def test_it_stops_where_a_step_gains_too_little() -> None:
    start = [torch.full((3,), -1.2, dtype=torch.float64), torch.full((3,), 1.0, dtype=torch.float64)]
    _, values = lbfgs(rosenbrock, start, 200, tolerance=0.5)
    gains = [1 - after / before for before, after in itertools.pairwise(values)]
    assert len(values) < 20
    assert gains[-1] <= 0.5


def test_at_the_minimum_nothing_moves() -> None:
    found, values = lbfgs(rosenbrock, [torch.ones(2), torch.ones(2)], 10)
    assert values[0] == values[-1] == 0
    assert torch.equal(found[0], torch.ones(2))
    assert lbfgs(rosenbrock, [torch.zeros(2), torch.ones(2)], 0)[1] == [200 + 2]
