"""Numba kernels for packed and pruned weights on a processor, where torch has none for most formats.

They read the bytes as a checkpoint holds them. Products make a row of the matrix dense at most: codes
become numbers in registers. Matrices that are rebuilt whole equal torch's bit for bit. Compiled once per
format and processor, and kept on disk beside this file.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numba
import numpy as np
import torch
from numba import float32, int16, int32, njit, prange, uint16, uint32, uint64
from torch import Tensor

from suite.grids import NORMAL_FLOAT
from suite.packing import IndexFormat, codes_in_unit, pack, places_by_byte, unpack

if TYPE_CHECKING:
    from suite.packed_layers import PackedMatrix
    from suite.sparse_layers import SparseMatrix

_ROWS_AT_ONCE = 32
"""Rows that a thread takes at a time, and shares a buffer among."""

_ROWS_TOGETHER = 4
"""Rows of a matrix of integers that are summed side by side, to share what is read of a token."""

_LEAST_REBUILT = 1 << 16
"""Weights from which on a kernel rebuilds them: for fewer, loading it takes longer than torch does."""

_BITS_LESS = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}
"""Bits that a number of each dtype has less behind its point than one of float32."""

_NORMAL_FLOAT = np.array(NORMAL_FLOAT, np.float32)

_ANY_ORDER = {"reassoc", "contract", "nsz"}
"""What sums may be rounded by; NaN and infinity stay what they are."""


def _compiled(function: Callable[..., None], fastmath: set[str] | bool = _ANY_ORDER) -> Any:
    """Numba's decorator for what runs on several threads, kept on disk where a folder can be written."""
    try:
        return njit(function, parallel=True, fastmath=fastmath, cache=True)
    except RuntimeError:  # there is no such folder, so every process compiles anew
        return njit(function, parallel=True, fastmath=fastmath)


_compiled_as_it_stands = functools.partial(_compiled, fastmath=False)


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


def can_rebuild(matrix: PackedMatrix, rows: int, dtype: torch.dtype) -> bool:
    """Whether `dequantize` takes so many rows of the matrix, and is worth it."""
    worth = rows * matrix.columns >= _LEAST_REBUILT
    return worth and dtype in _BITS_LESS and can_multiply(matrix)


def dequantize(
    matrix: PackedMatrix, dtype: torch.dtype, packed: Tensor, scales: Tensor, zeros: Tensor | None
) -> Tensor:
    """Rows of `matrix` in `dtype` (n × columns), given by what it packs for them; see `PackedMatrix`."""
    scales = scales.to(dtype).float()
    if zeros is None:
        zeros = torch.full_like(scales, 1 << (matrix.bits - 1))
    elif matrix.grid == "float-zero":
        zeros = zeros.to(dtype).float()
    else:
        zeros = unpack(zeros, matrix.bits, scales.shape[1]).float()
    packed = packed.contiguous() if matrix.bits == 3 else packed.contiguous().view(torch.uint32)
    levels = torch.tensor(matrix.levels, dtype=dtype).float()
    # A float16 has fewer exponents as well, so torch makes them of float32 in the end.
    out = torch.empty(len(packed), matrix.columns, dtype=dtype if dtype == torch.bfloat16 else torch.float32)
    bits = out.view(torch.uint16) if dtype == torch.bfloat16 else out
    _use_threads_of_torch()
    kernel = _rebuilding_kernel(matrix.bits, matrix.grid == "normal-float", _BITS_LESS[dtype])
    kernel(*(array.numpy() for array in (bits, packed, scales, zeros, levels)))
    return out.to(dtype)


def integer_product(x: Tensor, packed: Tensor) -> Tensor:
    """`x @ (packed − 128)ᵀ` (int32, tokens × rows) of int8 `x` and uint8 `packed` (rows × columns), exact."""
    out = torch.empty(len(x), math.ceil(len(packed) / _ROWS_TOGETHER) * _ROWS_TOGETHER, dtype=torch.int32)
    _use_threads_of_torch()
    _sum_integers(out.numpy(), x.short().contiguous().numpy(), packed.numpy())
    return out[:, : len(packed)]


def can_read(matrix: SparseMatrix) -> bool:
    """Whether `sparse_product` takes the matrix: it can be made dense, and is not of float16."""
    return _is_whole(matrix) and matrix.kept.dtype != torch.float16


def _is_whole(matrix: SparseMatrix) -> bool:
    """Whether a kernel reads the matrix: no byte of a 2:4 index is half empty."""
    whole = matrix.index_format == "bitmap" or matrix.columns % 8 == 0
    return whole and matrix.nonzeros > 0 and matrix.kept.dtype in _BITS_LESS


def sparse_product(x: Tensor, matrix: SparseMatrix) -> Tensor:
    """`x @ Wᵀ` (tokens × rows) for `x` (tokens × columns), in float32 and summed in it."""
    out = torch.empty(len(x), matrix.rows)
    _use_threads_of_torch()
    _sparse_kernel(matrix.kept.dtype == torch.float32)(out.numpy(), x.float().numpy(), *_read(matrix))
    return out


def can_make_dense(matrix: SparseMatrix) -> bool:
    """Whether `dense` takes the matrix, and is worth it."""
    return matrix.rows * matrix.columns >= _LEAST_REBUILT and _is_whole(matrix)


def dense(matrix: SparseMatrix) -> Tensor:
    """The matrix with its zeros (rows × columns), in the dtype of its values; without gradients."""
    out = torch.empty(matrix.rows, matrix.columns, dtype=matrix.kept.dtype)
    _use_threads_of_torch()
    _make_dense(_as_bits(out), *_read(matrix))
    return out


def _read(matrix: SparseMatrix) -> tuple[Any, ...]:
    """What kernels read of a sparse matrix: its values as bits, where each row starts, index, and tables."""
    kept = _as_bits(matrix.kept.detach().flatten())
    bitmaps, counts = _bytes_of(matrix.index_format)
    index = matrix.index.numpy()
    of_rows = np.empty(matrix.rows, np.int64)
    _count(of_rows, index, counts)
    return kept, of_rows.cumsum() - of_rows, index, bitmaps


def _as_bits(values: Tensor) -> Any:
    return values.view(torch.uint32 if values.itemsize == 4 else torch.uint16).numpy()


@functools.cache
def _bytes_of(index_format: IndexFormat) -> tuple[Any, Any]:
    """What each byte of an index says of eight weights: which it keeps, as bits, and how many (256 each)."""
    kept = places_by_byte(index_format, torch.device("cpu")).view(torch.uint8).reshape(256, 8)
    return pack(kept, 1).flatten().numpy(), kept.sum(1, dtype=torch.uint8).numpy()


def _use_threads_of_torch() -> None:
    threads = torch.get_num_threads()
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    if torch.get_num_threads() != threads:  # Numba starts as many as there are, for all that share its OpenMP
        torch.set_num_threads(threads)


@_compiled
def _sum_integers(out: Any, x: Any, packed: Any) -> None:
    rows, columns = packed.shape
    for part in prange((rows + _ROWS_AT_ONCE - 1) // _ROWS_AT_ONCE):
        first = part * _ROWS_AT_ONCE
        here = min(rows - first, _ROWS_AT_ONCE)
        if len(x) == 1:  # nothing is shared, so nothing is kept
            for row in range(here):
                line, values, total = packed[first + row], x[0], int32(0)
                for column in range(columns):
                    weight = int16(int16(line[column]) - int16(128))
                    total = int32(total + int32(weight) * int32(values[column]))
                out[0, first + row] = total
            continue
        signed = np.zeros((_ROWS_AT_ONCE, columns), np.int16)
        for row in range(here):
            line, into = packed[first + row], signed[row]
            for column in range(columns):
                into[column] = int16(int16(line[column]) - int16(128))
        for token in range(len(x)):
            values = x[token]
            for row in range(0, here, _ROWS_TOGETHER):
                one, two, three, four = signed[row], signed[row + 1], signed[row + 2], signed[row + 3]
                a = b = c = d = int32(0)
                for column in range(columns):
                    value = int32(values[column])
                    a = int32(a + int32(one[column]) * value)
                    b = int32(b + int32(two[column]) * value)
                    c = int32(c + int32(three[column]) * value)
                    d = int32(d + int32(four[column]) * value)
                out[token, first + row] = a
                out[token, first + row + 1] = b
                out[token, first + row + 2] = c
                out[token, first + row + 3] = d


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
                for group in range(groups):
                    start = uint64(group * width)
                    for unit in range(width):
                        scale[start + uint64(unit)] = scales[row, group]
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


@njit(inline="always")
def _rounded(value: Any, less: Any) -> Any:
    """The bits (uint32) of a float32 rounded to so many `less`, to the even one of two."""
    bits = np.float32(value).view(np.uint32)
    odd = uint32(uint32(bits >> uint32(less)) & uint32(1))
    return uint32(uint32(bits + uint32((1 << (less - 1)) - 1) + odd) & uint32(-1 << less & 0xFFFFFFFF))


@functools.cache
def _rebuilding_kernel(bits: int, normal_float: bool, less: int) -> Any:
    """The compiled kernel that makes matrices whole, of numbers with so many bits `less` than float32.

    They are written as the bits of bfloat16 where they have 16 less, else as float32; a product is
    rounded in bfloat16 alone.
    """
    codes = codes_in_unit(bits)
    mask = (1 << bits) - 1

    @_compiled_as_it_stands
    def fill(out: Any, packed: Any, scales: Any, zeros: Any, levels: Any) -> None:
        rows, groups = scales.shape
        columns = out.shape[1]
        group_size = columns // groups
        for part in prange((rows + _ROWS_AT_ONCE - 1) // _ROWS_AT_ONCE):
            steps = np.empty(columns, np.float32)
            for row in range(part * _ROWS_AT_ONCE, min(rows, (part + 1) * _ROWS_AT_ONCE)):
                line, into = packed[row], out[row]
                for unit in range(columns // codes):
                    word = _word(line, unit, bits)
                    for place in range(codes):
                        code = uint32(uint32(word >> uint32(bits * place)) & uint32(mask))
                        steps[codes * unit + place] = levels[code] if normal_float else float32(int32(code))
                for group in range(groups):
                    scale, zero = scales[row, group], zeros[row, group]
                    start = uint64(group * group_size)  # without a sign: no check for places below 0
                    for column in range(group_size):
                        at = start + uint64(column)
                        value = steps[at] if normal_float else steps[at] - zero
                        if less:
                            value = np.uint32(_rounded(value, less)).view(np.float32)
                        if less == 16:
                            into[at] = uint16(_rounded(value * scale, less) >> uint32(16))
                        else:
                            into[at] = value * scale

    return fill


@_compiled
def _count(of_rows: Any, index: Any, counts: Any) -> None:
    """Kept weights of each row."""
    for row in prange(len(of_rows)):
        total = 0
        for byte in range(index.shape[1]):
            total += counts[index[row, byte]]
        of_rows[row] = total


@njit(inline="always")
def _spread(into: Any, kept: Any, start: Any, line: Any, bitmaps: Any, shift: Any) -> None:
    """Write a row with its zeros (uint32): weights kept from `start` on, where its line of the index says."""
    at, last = uint64(start), uint64(len(kept) - 1)  # without a sign: no check for places below 0
    for byte in range(len(line)):
        bitmap = uint32(bitmaps[line[byte]])
        for place in range(8):
            is_kept = (bitmap >> uint32(place)) & uint32(1)
            value = uint32(kept[min(at, last)]) << uint32(shift)
            into[8 * byte + place] = value if is_kept else uint32(0)
            at += uint64(is_kept)


@_compiled
def _make_dense(out: Any, kept: Any, starts: Any, index: Any, bitmaps: Any) -> None:
    rows, columns = out.shape
    for part in prange((rows + _ROWS_AT_ONCE - 1) // _ROWS_AT_ONCE):
        bits = np.empty(8 * index.shape[1], np.uint32)
        for row in range(part * _ROWS_AT_ONCE, min(rows, (part + 1) * _ROWS_AT_ONCE)):
            _spread(bits, kept, starts[row], index[row], bitmaps, 0)
            into = out[row]
            for column in range(columns):
                into[column] = bits[column]


@functools.cache
def _sparse_kernel(wide: bool) -> Any:
    """The compiled product with weights given by their bits, the upper half of float32's if not `wide`."""
    shift = 0 if wide else 16

    @_compiled
    def fill(out: Any, x: Any, kept: Any, starts: Any, index: Any, bitmaps: Any) -> None:
        rows, width = index.shape
        tokens, columns = x.shape
        for part in prange((rows + _ROWS_AT_ONCE - 1) // _ROWS_AT_ONCE):
            bits = np.empty(8 * width, np.uint32)
            weights = bits.view(np.float32)
            for row in range(part * _ROWS_AT_ONCE, min(rows, (part + 1) * _ROWS_AT_ONCE)):
                _spread(bits, kept, starts[row], index[row], bitmaps, shift)
                for token in range(tokens):
                    total = float32(0)
                    for column in range(columns):
                        total += weights[column] * x[token, column]
                    out[token, row] = total

    return fill
