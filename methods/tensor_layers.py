"""Linear layers stored as tensor networks."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from suite.layers import default_dtype, module_type
from suite.tensors import Mpo, Network, Tucker


class TensorLinear(nn.Module):
    """`y = W (scale · x) + bias`, with W the matrix that `cores` stand for.

    A call with few rows contracts x with the cores one after the other; one with many first builds W,
    for the length of the call. `factored_rows` is where the second begins to need fewer
    multiplications (None: never).
    """

    form: ClassVar[type[Network]]
    type_name: ClassVar[str]

    def __init__(
        self,
        rows: Sequence[int],
        columns: Sequence[int],
        bonds: Sequence[int],
        bias: bool = False,
        scaled: bool = False,
    ):
        super().__init__()
        self.network = self.form(tuple(rows), tuple(columns))
        self.bonds = tuple(bonds)
        self.cores = nn.ParameterList(torch.zeros(shape) for shape in self.network.core_shapes(self.bonds))
        self.factored_rows = self.rows_to_factor(self.network, self.bonds)
        self.scale = nn.Parameter(torch.ones(self.in_features)) if scaled else None
        self.bias = nn.Parameter(torch.zeros(self.out_features)) if bias else None

    @property
    def in_features(self) -> int:
        """Length of an input vector."""
        return self.network.shape[1]

    @property
    def out_features(self) -> int:
        """Length of an output vector."""
        return self.network.shape[0]

    @classmethod
    def from_cores(
        cls, network: Network, cores: Sequence[Tensor], like: nn.Linear, scale: Tensor | None = None
    ) -> TensorLinear:
        """Build from cores and input scale, stored in the dtype of `like`, with its bias."""
        bonds = [cores[core].shape[leg] for core, leg in _bond_legs(network)]
        with torch.device(like.weight.device), default_dtype(like.weight.dtype):
            module = cls(network.rows, network.columns, bonds, like.bias is not None, scale is not None)
        with torch.no_grad():
            for stored, core in zip(module.cores, cores, strict=True):
                stored.copy_(core)
            if module.scale is not None and scale is not None:
                module.scale.copy_(scale)
            if module.bias is not None:
                module.bias.copy_(like.bias)
        return module

    def arguments(self) -> dict[str, Any]:
        return {
            "rows": self.network.rows,
            "columns": self.network.columns,
            "bonds": self.bonds,
            "bias": self.bias is not None,
            "scaled": self.scale is not None,
        }

    @staticmethod
    @abstractmethod
    def factored_cost(network: Network, bonds: Sequence[int]) -> int:
        """Multiplications for one row when x is contracted with the cores."""

    @staticmethod
    @abstractmethod
    def building_cost(network: Network, bonds: Sequence[int]) -> int:
        """Multiplications to build W."""

    @abstractmethod
    def factored(self, x: Tensor) -> Tensor:
        """W x for rows of x, without building W."""

    @classmethod
    def rows_to_factor(cls, network: Network, bonds: Sequence[int]) -> int | None:
        """The largest number of rows for which contracting x is no dearer than building W; None: any."""
        dearer = cls.factored_cost(network, bonds) - math.prod(network.shape)
        return None if dearer <= 0 else cls.building_cost(network, bonds) // dearer

    def matrix(self) -> Tensor:
        """W in the dtype of the cores; more than two cores are contracted in at least float32."""
        cores = list(self.cores)
        dtype = cores[0].dtype
        if len(cores) > 2 and dtype.itemsize < 4:
            cores = [core.float() for core in cores]
        return self.network.contract(cores).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // x.shape[-1]
        if self.scale is not None:
            x = x * self.scale
        if self.factored_rows is not None and rows > self.factored_rows:
            return functional.linear(x, self.matrix(), self.bias)
        y = self.factored(x.reshape(rows, -1)).reshape(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


def _bond_legs(network: Network) -> list[tuple[int, int]]:
    return [network.legs(bond)[0] for bond in range(len(network.full_bonds))]


@module_type("mpo_linear")
class MpoLinear(TensorLinear):
    """A linear layer as a matrix product operator."""

    form = Mpo

    @staticmethod
    def building_cost(network: Network, bonds: Sequence[int]) -> int:
        total, done = 0, 1
        for k, shape in enumerate(network.core_shapes(bonds)):
            total += done * math.prod(shape) if k else 0
            done *= shape[1] * shape[2]
        return total

    @staticmethod
    def factored_cost(network: Network, bonds: Sequence[int]) -> int:
        shapes = network.core_shapes(bonds)
        return min(_sweep_cost(shapes), _sweep_cost(_turned(shapes)))

    def factored(self, x: Tensor) -> Tensor:
        """Site by site, from the end from which it takes fewer multiplications."""
        shapes = [tuple(core.shape) for core in self.cores]
        backwards = _sweep_cost(_turned(shapes)) < _sweep_cost(shapes)
        cores = [core.permute(3, 1, 2, 0) for core in reversed(self.cores)] if backwards else list(self.cores)
        if backwards:
            x = _reversed(x, self.network.columns)
        count, done = x.shape[0], 1
        state = x.reshape(count, 1, 1, -1)  # row of x, rows done, bond, columns to do
        for core in cores:
            bond, m, n, right = core.shape
            state = state.reshape(count, done, bond, n, -1).movedim(4, 2)
            todo = state.shape[2]
            state = state.reshape(-1, bond * n) @ core.transpose(1, 2).reshape(bond * n, m * right)
            state = state.reshape(count, done, todo, m, right).permute(0, 1, 3, 4, 2)
            done *= m
            state = state.reshape(count, done, right, todo)
        y = state.reshape(count, -1)
        return _reversed(y, self.network.rows[::-1]) if backwards else y


def _turned(shapes: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Core shapes as they are met from the other end."""
    return [(right, m, n, left) for left, m, n, right in reversed(shapes)]


def _sweep_cost(shapes: Sequence[tuple[int, ...]]) -> int:
    """Multiplications per row of x when cores of these shapes are met in this order."""
    total, done, todo = 0, 1, math.prod(shape[2] for shape in shapes)
    for bond, m, n, right in shapes:
        total += done * todo * bond * m * right
        done, todo = done * m, todo // n
    return total


def _reversed(x: Tensor, factors: Sequence[int]) -> Tensor:
    """Rows of x (count × Π factors) with the order of the factors turned round."""
    legs = range(len(factors), 0, -1)
    return x.reshape(-1, *factors).permute(0, *legs).reshape(x.shape)


@module_type("tucker_linear")
class TuckerLinear(TensorLinear):
    """A linear layer in Tucker form."""

    form = Tucker

    @staticmethod
    def building_cost(network: Network, bonds: Sequence[int]) -> int:
        shape, total = list(bonds), 0
        for leg, dimension in enumerate(network.rows + network.columns):
            total += math.prod(shape) * dimension
            shape[leg] = dimension
        return total

    @staticmethod
    def factored_cost(network: Network, bonds: Sequence[int]) -> int:
        (m1, m2), (n1, n2), (r1, r2, r3, r4) = network.rows, network.columns, bonds
        return n1 * n2 * r3 + r3 * n2 * r4 + r3 * r4 * r1 * r2 + r1 * r2 * m1 + m1 * r2 * m2

    def factored(self, x: Tensor) -> Tensor:
        core, f1, f2, f3, f4 = self.cores
        _, _, r3, r4 = core.shape
        x = x.reshape(-1, *self.network.columns)
        x = (x.transpose(1, 2) @ f3).transpose(1, 2) @ f4
        y = x.reshape(-1, r3 * r4) @ core.reshape(-1, r3 * r4).T
        y = y.reshape(-1, *core.shape[:2])
        result: Tensor = f1 @ y @ f2.T
        return result.reshape(y.shape[0], -1)
