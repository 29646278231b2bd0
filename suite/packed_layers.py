"""Layers whose weights are packed integers: a linear, an embedding, and the head that is tied to one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Self, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from suite import kernels
from suite.errors import InputError
from suite.grids import NORMAL_FLOAT, Grid, round_to_nearest, to_normal_float
from suite.layers import default_dtype, module_type
from suite.packing import pack, unpack, unpack_as


class PackedMatrix(nn.Module):
    """A (rows × columns) matrix as packed integers with one scale (and zero point) per group.

    A group is `group` consecutive columns of one row; the last group of a row may be shorter.
    Value = scale · (code − zero); symmetric grids have the fixed zero `2^(bits−1)`, others a packed
    one of `bits` bits, or, on the grid "float-zero", a float16 one. On the grid "normal-float" (4
    bits, symmetric) the code picks one of the 16 NF4 values, which the scale multiplies.
    Scales are float16: bfloat16 would cost precision, float32 twice the bytes.
    """

    packed: Tensor
    scales: Tensor
    zeros: Tensor

    def __init__(
        self, rows: int, columns: int, bits: int, group: int, symmetric: bool, grid: Grid = "uniform"
    ):
        super().__init__()
        if bits not in (2, 3, 4, 8):
            raise InputError(f"{bits} bits cannot be packed; use 2, 3, 4 or 8.")
        if grid not in get_args(Grid):
            raise InputError(f"there is no grid '{grid}'; use {', '.join(get_args(Grid))}.")
        if grid == "normal-float" and not (bits == 4 and symmetric):
            raise InputError("the grid 'normal-float' is symmetric and has 4 bits.")
        if grid == "float-zero" and symmetric:
            raise InputError("the grid 'float-zero' has zeros of its own: it cannot be symmetric.")
        self.rows, self.columns, self.bits = rows, columns, bits
        self.group, self.symmetric, self.grid = min(group, columns), symmetric, grid
        groups = math.ceil(columns / self.group)
        width = math.ceil(columns * bits / 8)
        self.levels = self._levels()
        """What each code stands for, before scale and stored zero."""
        self.form = self._form()
        """All of the matrix that decides how fast a path is."""
        self.register_buffer("packed", torch.zeros(rows, width, dtype=torch.uint8))
        self.register_buffer("scales", torch.zeros(rows, groups, dtype=torch.float16))
        if grid == "float-zero":
            self.register_buffer("zeros", torch.zeros(rows, groups, dtype=torch.float16))
        elif not symmetric:
            zero_width = math.ceil(groups * bits / 8)
            self.register_buffer("zeros", torch.zeros(rows, zero_width, dtype=torch.uint8))

    @property
    def logical_parameters(self) -> int:
        """Weights represented, whatever their width: packing leaves the parameter count alone."""
        return self.rows * self.columns

    def _levels(self) -> tuple[float, ...]:
        if self.grid == "normal-float":
            return NORMAL_FLOAT
        fixed_zero = 1 << (self.bits - 1) if self.symmetric else 0
        return tuple(float(code - fixed_zero) for code in range(1 << self.bits))

    def _form(self) -> str:
        zeros = "symmetric" if self.symmetric else "asymmetric"
        group = "channel" if self.group == self.columns else f"group {self.group}"
        grid = "" if self.grid == "uniform" else f"{self.grid}, "
        return f"{self.bits} bits, {grid}{group}, {zeros}, {self.rows}×{self.columns}"

    def _grid_argument(self) -> dict[str, Any]:
        # Left out where it is the default, so that specs from before there were others stay equal.
        return {} if self.grid == "uniform" else {"grid": self.grid}

    @torch.no_grad()
    def quantize_(self, weight: Tensor) -> None:
        """Round `weight` (rows × columns) to the nearest grid point (RTN) and store it."""
        if self.grid == "normal-float":
            self.store_(*to_normal_float(weight, self.group))
        else:
            self.store_(*round_to_nearest(weight, self.bits, self.group, self.symmetric))

    @torch.no_grad()
    def store_(self, codes: Tensor, scales: Tensor, zeros: Tensor | None = None) -> None:
        """Store whole-numbered codes (rows × columns), scales and zeros (rows × groups) as they are."""
        self.packed.copy_(pack(codes.to(torch.uint8), self.bits))
        self.scales.copy_(scales)
        if self.grid == "float-zero":
            self.zeros.copy_(cast(Tensor, zeros))
        elif not self.symmetric:
            self.zeros.copy_(pack(cast(Tensor, zeros).to(torch.uint8), self.bits))

    def dequantize(self, dtype: torch.dtype, rows: Tensor | slice = slice(None)) -> Tensor:
        """The matrix (or the chosen rows of it) in `dtype`."""
        packed, scales = self.packed[rows], self.scales[rows]
        if len(packed) == 0:  # torch reshapes no rows
            return torch.empty(0, self.columns, dtype=dtype, device=packed.device)
        rebuilders = kernels.rebuilders(self, len(packed), dtype)
        if rebuilders is not None:
            zeros = None if self.symmetric else self.zeros[rows]
            rebuilt: Tensor = rebuilders.dequantize(self, dtype, packed, scales, zeros)
            return rebuilt
        values = unpack_as(packed, self.bits, self.columns, self.levels, dtype)
        groups = scales.shape[1]
        # Ragged last group: compute on a padded copy, cut afterwards.
        padding = groups * self.group - self.columns
        values = functional.pad(values, (0, padding)) if padding else values
        values = values.reshape(-1, groups, self.group)
        if not self.symmetric:
            values = values - self.stored_zeros(rows).to(dtype).unsqueeze(-1)
        return self._ungrouped(values * scales.to(dtype).unsqueeze(-1))

    def stored_zeros(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """The zero points of an asymmetric matrix, or of the chosen rows of it (n × groups)."""
        zeros = self.zeros[rows]
        return zeros if self.grid == "float-zero" else unpack(zeros, self.bits, self.scales.shape[1])

    def _ungrouped(self, values: Tensor) -> Tensor:
        return values.reshape(len(values), -1)[:, : self.columns]


@module_type("packed_linear")
class PackedLinear(PackedMatrix):
    """A linear layer with packed weights, dequantized for the length of each call or read as they are."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        group: int,
        symmetric: bool = True,
        bias: bool = False,
        grid: Grid = "uniform",
    ):
        super().__init__(out_features, in_features, bits, group, symmetric, grid)
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    @classmethod
    def from_linear(cls, linear: nn.Linear, bits: int, group: int, symmetric: bool) -> PackedLinear:
        """Round the weights of `linear`; its bias is kept as it is."""
        with torch.device(linear.weight.device), default_dtype(linear.weight.dtype):
            module = cls(
                linear.in_features, linear.out_features, bits, group, symmetric, linear.bias is not None
            )
        module.quantize_(linear.weight)
        module.bias = linear.bias
        return module

    def arguments(self) -> dict[str, Any]:
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bits": self.bits,
            "group": self.group,
            "symmetric": self.symmetric,
            "bias": self.bias is not None,
            **self._grid_argument(),
        }

    def forward(self, x: Tensor) -> Tensor:
        return kernels.linear(x, self, self.bias)


@module_type("packed_embedding")
class PackedEmbedding(PackedMatrix):
    """An embedding table with packed rows; only the rows looked up are dequantized."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        bits: int,
        group: int,
        symmetric: bool = True,
        grid: Grid = "uniform",
    ):
        super().__init__(num_embeddings, embedding_dim, bits, group, symmetric, grid)
        self.output_dtype = torch.get_default_dtype()

    @classmethod
    def from_embedding(
        cls, embedding: nn.Embedding, bits: int, group: int, symmetric: bool
    ) -> PackedEmbedding:
        """Round the rows of `embedding`."""
        with torch.device(embedding.weight.device), default_dtype(embedding.weight.dtype):
            module = cls(embedding.num_embeddings, embedding.embedding_dim, bits, group, symmetric)
        module.quantize_(embedding.weight)
        return module

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        applied: Self = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # The dtype that lookups answer in follows the model's, as that of a dense table would.
        self.output_dtype = fn(torch.empty(0, dtype=self.output_dtype)).dtype
        return applied

    def arguments(self) -> dict[str, Any]:
        return {
            "num_embeddings": self.rows,
            "embedding_dim": self.columns,
            "bits": self.bits,
            "group": self.group,
            "symmetric": self.symmetric,
            **self._grid_argument(),
        }

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.dequantize(self.output_dtype, ids.reshape(-1))
        return rows.reshape(*ids.shape, self.columns)


@module_type("tied_head")
class TiedHead(nn.Module):
    """An output head that reads the packed embedding's table: no tensors of its own."""

    def __init__(self, source: str):
        super().__init__()
        self.source = source
        self._table: list[PackedMatrix] = []  # a list hides the module from state_dict()

    def bind(self, model: nn.Module) -> None:
        """Point at the embedding; called once all modules are in place.

        Raises:
            InputError: what stands there is not packed.
        """
        table = model.get_submodule(self.source)
        if not isinstance(table, PackedMatrix):
            raise InputError(f"'{self.source}' is not a packed embedding, which a tied head reads.")
        self._table = [table]

    @property
    def table(self) -> PackedMatrix:
        """What it reads, once bound."""
        return self._table[0]

    def arguments(self) -> dict[str, Any]:
        return {"source": self.source}

    def forward(self, x: Tensor) -> Tensor:
        return kernels.linear(x, self.table)
