"""Linear layers of which only the kept weights are stored, beside an index of where they stand.

The kept values are the parameters, so what was pruned stays zero by construction, in training too.
The index costs bytes but holds no parameters; `suite.run.audit` checks that it is nothing but an index.
"""

from __future__ import annotations

import functools
import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import _calculate_meta_reordering_scatter_offsets

from suite import kernels, numba_kernels
from suite.errors import InputError
from suite.layers import default_dtype, module_type
from suite.packing import IndexFormat, pack, places_by_byte


@functools.cache
def _cutlass_order(rows: int, words: int, device: torch.device) -> Tensor:
    order: Tensor = _calculate_meta_reordering_scatter_offsets(rows, words, torch.int16, device)
    return order


class SparseMatrix(nn.Module):
    """A (rows × columns) matrix as its `kept` weights and an `index` (uint8) of their places.

    Index "bitmap": one bit a weight, rows padded to bytes; `kept` is flat, row by row. Index "2:4":
    two values in every four consecutive columns, each with its 2-bit position, the lower one first;
    `kept` is rows × columns/2. Both take one bit a weight: at half the weights in a 16-bit dtype,
    9 bits a weight altogether.

    Raises:
        InputError: more values than weights, or 2:4 for columns that are not a multiple of four.
    """

    kept: nn.Parameter
    index: Tensor

    def __init__(self, rows: int, columns: int, nonzeros: int, index_format: IndexFormat):
        super().__init__()
        if not 0 <= nonzeros <= rows * columns:
            raise InputError(f"a matrix of {rows}×{columns} cannot keep {nonzeros} weights.")
        self.rows, self.columns, self.nonzeros, self.index_format = rows, columns, nonzeros, index_format
        if index_format == "2:4":
            if columns % 4 or 2 * nonzeros != rows * columns:
                raise InputError(
                    f"2:4 keeps two of every four columns; {nonzeros} of {rows}×{columns} are not that."
                )
            self.kept = nn.Parameter(torch.zeros(rows, columns // 2))
        else:
            self.kept = nn.Parameter(torch.zeros(nonzeros))
        self.register_buffer("index", torch.zeros(rows, math.ceil(columns / 8), dtype=torch.uint8))

    def places(self) -> Tensor:
        """Which weights are kept (rows × columns, bool), read off the index."""
        table = places_by_byte(self.index_format, self.index.device)
        places = table.index_select(0, self.index.int().reshape(-1)).view(torch.bool)
        return places.reshape(self.rows, -1)[:, : self.columns]

    @staticmethod
    def index_of(places: Tensor, index_format: IndexFormat) -> Tensor:
        """The index that says `places` (rows × columns, bool); in 2:4 every four columns hold two."""
        if index_format == "bitmap":
            return pack(places.to(torch.uint8), 1)
        rows, columns = places.shape
        # A stable sort by "not kept" brings the positions of the kept ones to the front, in order.
        order = (~places.reshape(rows, -1, 4)).to(torch.uint8).sort(dim=-1, stable=True).indices
        return pack(order[..., :2].reshape(rows, columns // 2).to(torch.uint8), 2)

    @torch.no_grad()
    def store_(self, weight: Tensor, places: Tensor) -> None:
        """Keep `weight` (rows × columns) at `places` (bool), of which there are as many as values.

        Raises:
            InputError: there are not as many, or not two in every four columns under 2:4.
        """
        fits = int(places.sum()) == self.nonzeros
        if fits and self.index_format == "2:4":
            fits = bool((places.reshape(self.rows, -1, 4).sum(-1) == 2).all())
        if not fits:
            raise InputError(
                f"{int(places.sum())} places do not fit {self.nonzeros} values and the index"
                f" '{self.index_format}'."
            )
        self.kept.copy_(weight[places].reshape(self.kept.shape))
        self.index.copy_(self.index_of(places, self.index_format))

    def dense(self) -> Tensor:
        """The matrix with its zeros, rows × columns, in the dtype of the values."""
        if kernels.without_gradients(self.kept) and numba_kernels.can_make_dense(self):
            return numba_kernels.dense(self)
        empty = torch.zeros(self.rows, self.columns, dtype=self.kept.dtype, device=self.kept.device)
        return empty.masked_scatter(self.places(), self.kept)


@module_type("sparse_linear")
class SparseLinear(SparseMatrix):
    """A linear layer that stores its kept weights and a bitmap.

    It is made dense for the length of each call where no kernel is faster (`suite.kernels`).
    """

    def __init__(self, in_features: int, out_features: int, nonzeros: int, bias: bool = False):
        self._build(in_features, out_features, nonzeros, "bitmap", bias)

    def _build(
        self, in_features: int, out_features: int, nonzeros: int, index_format: IndexFormat, bias: bool
    ) -> None:
        SparseMatrix.__init__(self, out_features, in_features, nonzeros, index_format)
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    @classmethod
    def from_weight(cls, weight: Tensor, places: Tensor, like: nn.Linear) -> SparseLinear:
        """Keep `weight` (out × in) at `places` (bool), with the bias and dtype of `like`."""
        arguments = {"in_features": like.in_features, "out_features": like.out_features}
        if cls is SparseLinear:
            arguments["nonzeros"] = int(places.sum())
        with torch.device(weight.device), default_dtype(like.weight.dtype):
            module = cls(**arguments, bias=like.bias is not None)
        module.store_(weight, places)
        module.bias = like.bias
        return module

    def arguments(self) -> dict[str, Any]:
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "nonzeros": self.nonzeros,
            "bias": self.bias is not None,
        }

    @property
    def form(self) -> str:
        """What of the matrix decides which path is fast."""
        return f"{self.index_format}, {self.rows}×{self.columns}"

    @property
    def has_kernel(self) -> bool:
        """Whether torch multiplies it by instructions for such matrices."""
        return False

    def forward(self, x: Tensor) -> Tensor:
        return kernels.sparse_linear(x, self, self.bias)


@module_type("semi_structured_linear")
class SemiStructuredLinear(SparseLinear):
    """A linear layer with two weights kept in every four consecutive inputs (2:4)."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        self._build(in_features, out_features, out_features * in_features // 2, "2:4", bias)

    @property
    def has_kernel(self) -> bool:
        """Whether torch multiplies 2:4 matrices of this shape, dtype and device by instructions for them.

        Its CUTLASS product refuses every compute capability but 8.x.
        """
        if self.kept.dtype not in (torch.float16, torch.bfloat16) or self.kept.device.type != "cuda":
            return False
        whole = self.rows % 32 == 0 and self.columns % 64 == 0
        return whole and torch.cuda.get_device_capability(self.kept.device)[0] == 8

    def in_torch_format(self) -> Tensor:
        """The matrix as torch's 2:4 tensor, which shares the values; the places are copied in its order.

        Words of the index are torch's too, but in the order that a CUTLASS product reads them in.
        """
        words = self.index.view(torch.int16)
        order = _cutlass_order(*words.shape, words.device)
        placed = torch.empty_like(words).flatten().scatter_(0, order, words.flatten()).reshape(words.shape)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a prototype, says torch
            return SparseSemiStructuredTensorCUTLASS(
                torch.Size((self.rows, self.columns)), self.kept.detach(), placed, None, None, None
            )

    def arguments(self) -> dict[str, Any]:
        return {key: value for key, value in super().arguments().items() if key != "nonzeros"}
