"""Numba kernels for packed and pruned weights on a processor, where torch has none for most formats.

They read the bytes as a checkpoint holds them and make a row of the matrix dense at most: codes become
numbers in registers. Compiled once per format and processor, and kept on disk beside this file.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numba
import numpy as np
import torch
from numba import float32, int32, njit, prange, uint32, uint64
from torch import Tensor

from suite.grids import NORMAL_FLOAT
from suite.packing import codes_in_unit

if TYPE_CHECKING:
    from suite.packed_layers import PackedMatrix
    from suite.sparse_layers import SparseMatrix

_ROWS_AT_ONCE = 32
"""Rows that a thread takes at a time, and shares a buffer among."""

_SPREAD = 8
"""Scales are spread over units so many at a time: a count known to the compiler makes one vector of them."""

_NORMAL_FLOAT = np.array(NORMAL_FLOAT, np.float32)


_ANY_ORDER = {"reassoc", "contract", "nsz"}
"""What sums may be rounded by; NaN and infinity stay what they are."""


def _compiled(function: Callable[..., None]) -> Any:
    """Numba's decorator for what runs on several threads, kept on disk where a folder can be written."""
    try:
        return njit(function, parallel=True, fastmath=_ANY_ORDER, cache=True)
    except RuntimeError:  # there is no such folder, so every process compiles anew
        return njit(function, parallel=True, fastmath=_ANY_ORDER)


def can_multiply(matrix: PackedMatrix) -> bool:
    """Whether `product` takes the matrix: lines of whole groups, each of whole units."""
    return matrix.columns % matrix.group == 0 and matrix.group % codes_in_unit(matrix.bits) == 0


def product(x: Tensor, matrix: PackedMatrix) -> Tensor:
    """`x @ Wᵀ` (tokens × rows) for `x` (tokens × columns), in float32 and summed in it.

    scale · (code − zero) · x is summed as scale · code · x less scale · zero times the sum of x in a group.
    """
    tokens, codes = len(x), codes_in_unit(matrix.bits)
    normal_float = matrix.grid == "normal-float"
    x, scales = x.float(), matrix.scales.float()
    offsets = scales if matrix.symmetric else scales * matrix.stored_zeros().float()
    fixed = 0 if normal_float else 1 << (matrix.bits - 1)
    sums = x.reshape(tokens, -1, matrix.group).sum(-1) * (fixed if matrix.symmetric else 1)
    values = (x.reshape(tokens, -1, codes).transpose(1, 2) * _factors(matrix.bits, normal_float)).contiguous()
    packed = matrix.packed if matrix.bits == 3 else matrix.packed.view(torch.uint32)
    out = torch.empty(tokens, matrix.rows)
    _use_threads_of_torch()
    arrays = (array.numpy() for array in (out, values, sums, packed, scales, offsets))
    _kernel(matrix.bits, normal_float)(*arrays)
    return out


@functools.cache
def _factors(bits: int, normal_float: bool) -> Tensor:
    """What makes the number in each place of a unit its code (codes × 1).

    Codes are masked where they are, which saves shifts, but for the one that would be a sign.
    """
    places = range(codes_in_unit(bits))
    shifted = [normal_float or bits * (place + 1) == 32 for place in places]
    return torch.tensor([1.0 if shifted[place] else 0.5 ** (bits * place) for place in places]).unsqueeze(-1)


def integer_product(x: Tensor, packed: Tensor) -> Tensor:
    """`x @ (packed − 128)ᵀ` (int32, tokens × rows) of int8 `x` and uint8 `packed` (rows × columns), exact."""
    out = torch.empty(len(x), len(packed), dtype=torch.int32)
    _use_threads_of_torch()
    _sum_integers(out.numpy(), x.contiguous().numpy(), packed.numpy())
    return out - 128 * x.sum(-1, keepdim=True, dtype=torch.int32)


def can_multiply_sparse(matrix: SparseMatrix) -> bool:
    """Whether `sparse_product` takes the matrix: lines that leave no byte of a 2:4 index half empty."""
    whole = matrix.index_format == "bitmap" or matrix.columns % 8 == 0
    return whole and matrix.nonzeros > 0 and matrix.kept.dtype in (torch.float32, torch.bfloat16)


def sparse_product(x: Tensor, matrix: SparseMatrix) -> Tensor:
    """`x @ Wᵀ` (tokens × rows) for `x` (tokens × columns), in float32 and summed in it."""
    wide = matrix.kept.dtype == torch.float32
    kept = matrix.kept.detach().flatten().view(torch.uint32 if wide else torch.uint16).numpy()
    index, bitmaps = matrix.index.numpy(), matrix.bitmaps().numpy()
    out = torch.empty(len(x), matrix.rows)
    counts = np.empty(matrix.rows, np.int64)
    _use_threads_of_torch()
    _count(counts, index, bitmaps)
    _sparse_kernel(wide)(out.numpy(), x.float().numpy(), kept, counts.cumsum() - counts, index, bitmaps)
    return out


def _use_threads_of_torch() -> None:
    threads = torch.get_num_threads()
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    if torch.get_num_threads() != threads:  # Numba starts as many as there are, for all that share its OpenMP
        torch.set_num_threads(threads)


@_compiled
def _sum_integers(out: Any, x: Any, packed: Any) -> None:
    for row in prange(len(packed)):
        weights = packed[row]
        for token in range(len(x)):
            values = x[token]
            total = int32(0)
            for column in range(len(weights)):
                total = int32(total + int32(weights[column]) * int32(values[column]))
            out[token, row] = total


@njit(inline="always")
def _word(line: Any, unit: Any, bits: Any) -> Any:
    """The codes of a unit as one number (uint32)."""
    if bits == 3:
        at = 3 * unit
        word = uint32(line[at]) | uint32(line[at + 1]) << uint32(8)
        return uint32(word | uint32(line[at + 2]) << uint32(16))
    return uint32(line[unit])


@njit(inline="always")
def _step(word: Any, place: Any, bits: Any, normal_float: Any) -> Any:
    """What the code in a place stands for, or that over the place's factor (float32)."""
    mask = (1 << bits) - 1
    if normal_float:
        return _NORMAL_FLOAT[(word >> uint32(bits * place)) & uint32(mask)]
    if bits * (place + 1) == 32:
        return float32(int32(word >> uint32(bits * place)))
    return float32(int32(word & uint32(mask << bits * place)))


@functools.cache
def _kernel(bits: int, normal_float: bool) -> Any:
    """The compiled product; `bits` and what follows from them are constants to the compiler."""
    codes = codes_in_unit(bits)
    costly = bits == 3 or normal_float  # to read a code, so that several tokens share what was read

    @_compiled
    def fill(out: Any, values: Any, sums: Any, packed: Any, scales: Any, offsets: Any) -> None:
        rows, groups = scales.shape
        tokens, _, units = values.shape
        width = units // groups
        for part in prange((rows + _ROWS_AT_ONCE - 1) // _ROWS_AT_ONCE):
            scale = np.empty(units, np.float32)
            rebuilt = np.empty((codes, units), np.float32)
            for row in range(part * _ROWS_AT_ONCE, min(rows, (part + 1) * _ROWS_AT_ONCE)):
                if width % _SPREAD == 0:
                    for group in range(groups):
                        for start in range(group * width, (group + 1) * width, _SPREAD):
                            for place in range(_SPREAD):
                                scale[start + place] = scales[row, group]
                else:
                    for group in range(groups):
                        for unit in range(group * width, (group + 1) * width):
                            scale[unit] = scales[row, group]
                line = packed[row]
                if tokens > 1 and costly:
                    for unit in range(units):
                        word = _word(line, unit, bits)
                        for place in range(codes):
                            rebuilt[place, unit] = _step(word, place, bits, normal_float) * scale[unit]
                for token in range(tokens):
                    total = float32(0)
                    for group in range(groups):
                        total -= offsets[row, group] * sums[token, group]
                    mine = values[token]
                    if tokens > 1 and costly:
                        for place in range(codes):
                            for unit in range(units):
                                total += rebuilt[place, unit] * mine[place, unit]
                    else:
                        for unit in range(units):
                            word = _word(line, unit, bits)
                            summed = float32(0)
                            for place in range(codes):
                                summed += _step(word, place, bits, normal_float) * mine[place, unit]
                            total += scale[unit] * summed
                    out[token, row] = total

    return fill


@_compiled
def _count(counts: Any, index: Any, bitmaps: Any) -> None:
    """Kept weights of each row."""
    for row in prange(len(counts)):
        total = 0
        for byte in range(index.shape[1]):
            bitmap = uint32(bitmaps[index[row, byte]])
            for place in range(8):
                total += (bitmap >> uint32(place)) & uint32(1)
        counts[row] = total


@functools.cache
def _sparse_kernel(wide: bool) -> Any:
    """The compiled product with weights given by their bits, the upper half of float32's if not `wide`."""
    shift = 0 if wide else 16

    @_compiled
    def fill(out: Any, x: Any, kept: Any, starts: Any, index: Any, bitmaps: Any) -> None:
        rows, width = index.shape
        tokens, columns = x.shape
        last = uint64(len(kept) - 1)  # places without a sign spare the check for a negative one
        for part in prange((rows + _ROWS_AT_ONCE - 1) // _ROWS_AT_ONCE):
            bits = np.empty(8 * width, np.uint32)
            weights = bits.view(np.float32)
            for row in range(part * _ROWS_AT_ONCE, min(rows, (part + 1) * _ROWS_AT_ONCE)):
                at = uint64(starts[row])
                for byte in range(width):
                    bitmap = uint32(bitmaps[index[row, byte]])
                    for place in range(8):
                        is_kept = (bitmap >> uint32(place)) & uint32(1)
                        value = uint32(kept[min(at, last)]) << uint32(shift)
                        bits[8 * byte + place] = value if is_kept else uint32(0)
                        at += uint64(is_kept)
                for token in range(tokens):
                    total = float32(0)
                    for column in range(columns):
                        total += weights[column] * x[token, column]
                    out[token, row] = total

    return fill
