"""Numba kernels for packed and pruned weights on a processor, where torch has none for most formats.

They read the bytes as a checkpoint holds them. Products make a row of the matrix dense at most: codes
become numbers in registers. Matrices that are rebuilt whole equal torch's bit for bit. Compiled once per
format and processor, and kept on disk beside this file. Of what a kernel calls, Numba notices a change
only if it stands in the same file: that is why all are in this one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numba
import numpy as np
import torch
from numba import carray, float32, int16, int32, int64, njit, prange, types, uint16, uint32, uint64
from numba.extending import intrinsic
from torch import Tensor

from suite.grids import NORMAL_FLOAT
from suite.packing import IndexFormat, codes_in_unit, places_by_byte, unpack

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

_FLOAT32, _FLOAT16, _BFLOAT16, _PACKED, _NOT_STORED = range(5)
_STORED_AS = {
    torch.float32: _FLOAT32,
    torch.float16: _FLOAT16,
    torch.bfloat16: _BFLOAT16,
    torch.uint8: _PACKED,
}

_SMALLEST = np.float32(np.finfo(np.float32).tiny)
_OF_FLOAT16 = np.float32(2.0**112)

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


def product(x: Tensor, matrix: PackedMatrix, bias: Tensor | None = None) -> Tensor:
    """`x @ Wᵀ + bias` (… × rows, in the dtype of `x`) for `x` (… × columns), summed in float32.

    scale · (code − zero) · x is summed as scale · code · x less scale · zero times the sum of x in a group.
    """
    x, packed, scales = x.contiguous(), matrix.packed, matrix.scales
    zeros = None if matrix.symmetric else matrix.zeros
    out = _result(x, matrix, x.dtype)
    _use_threads_of_torch()
    sizes = x.numel() // matrix.columns, matrix.rows, matrix.columns, scales.shape[1]
    kernel = _kernel(matrix.bits, matrix.grid == "normal-float")
    kernel(*sizes, _address(packed), *_stored(out, x, scales, zeros, bias))
    return out.to(x.dtype)


def _result(x: Tensor, matrix: PackedMatrix | SparseMatrix, dtype: torch.dtype) -> Tensor:
    """What a kernel writes to. A float16 has fewer exponents as well, so torch makes them of float32."""
    if x.shape[-1] != matrix.columns:
        raise RuntimeError(
            f"activations of {x.shape[-1]} features meet a matrix of {matrix.columns} columns."
        )
    written = torch.float32 if dtype == torch.float16 else dtype
    return torch.empty(*x.shape[:-1], matrix.rows, dtype=written)


def _address(tensor: Tensor) -> int:
    """Where a tensor starts in memory.

    Kernels get addresses: for a small matrix, making arrays of tensors takes longer than the product.
    """
    if not (tensor.is_cpu and tensor.is_contiguous()):
        raise RuntimeError(f"kernels of a processor read its own memory, in order; this is {tensor.device}.")
    return tensor.data_ptr()


def _stored(*tensors: Tensor | None) -> list[int]:
    """The address of each tensor and what its numbers are, one after the other."""
    stored: list[int] = []
    for tensor in tensors:
        stored += (0, _NOT_STORED) if tensor is None else (_address(tensor), _STORED_AS[tensor.dtype])
    return stored


def _factors(bits: int, normal_float: bool) -> Any:
    """What makes the number in each place of a unit its code (codes).

    Codes are masked where they are, which saves shifts, but for the one that would be a sign.
    """
    places = range(codes_in_unit(bits))
    shifted = [normal_float or bits * (place + 1) == 32 for place in places]
    return np.array([1.0 if shifted[place] else 0.5 ** (bits * place) for place in places], np.float32)


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


def integer_product(x: Tensor, matrix: PackedMatrix) -> Tensor:
    """The product of `suite.kernels.integer_product`, to the bit: from `x` (tokens × columns) to float32."""
    x = (x if x.dtype in _BITS_LESS else x.float()).contiguous()
    packed, scales = matrix.packed, matrix.scales
    out = _result(x, matrix, torch.float32)
    _use_threads_of_torch()
    sizes = len(x), matrix.rows, matrix.columns
    _sum_integers(*sizes, _address(packed), _address(out), *_stored(x, scales))
    return out


def can_read(matrix: SparseMatrix) -> bool:
    """Whether `sparse_product` takes the matrix: places have 16 bits, and no byte of 2:4 is half empty."""
    whole = matrix.index_format == "bitmap" or matrix.columns % 8 == 0
    return whole and matrix.columns <= 1 << 16 and matrix.kept.dtype in _BITS_LESS


def sparse_product(x: Tensor, matrix: SparseMatrix, bias: Tensor | None = None) -> Tensor:
    """`x @ Wᵀ + bias` (… × rows, in the dtype of `x`) for `x` (… × columns), summed in float32."""
    x, kept = x.contiguous(), matrix.kept
    out = _result(x, matrix, x.dtype)
    _use_threads_of_torch()
    sizes = x.numel() // matrix.columns, matrix.rows, matrix.columns, kept.numel()
    _multiply_sparse(*sizes, *_index_of(matrix), *_stored(out, x, kept, bias))
    return out.to(x.dtype)


def can_make_dense(matrix: SparseMatrix) -> bool:
    """Whether `dense` takes the matrix, and is worth it."""
    return matrix.rows * matrix.columns >= _LEAST_REBUILT and can_read(matrix)


def dense(matrix: SparseMatrix) -> Tensor:
    """The matrix with its zeros (rows × columns), in the dtype of its values; without gradients."""
    kept = matrix.kept.detach().flatten()
    out = torch.empty(matrix.rows, matrix.columns, dtype=kept.dtype)
    bits = torch.uint32 if kept.itemsize == 4 else torch.uint16
    _use_threads_of_torch()
    _make_dense(out.view(bits).numpy(), kept.view(bits).numpy(), *_index_of(matrix))
    return out


def _index_of(matrix: SparseMatrix) -> tuple[Any, ...]:
    """Where the index starts in memory, kept weights per row where all have as many, and its tables."""
    per_row = matrix.columns // 2 if matrix.index_format == "2:4" else 0
    return _address(matrix.index), per_row, *_bytes_of(matrix.index_format)


@functools.cache
def _bytes_of(index_format: IndexFormat) -> tuple[Any, Any]:
    """Of each byte of an index, which of eight weights it keeps and how many.

    The first are eight places of 16 bits, the kept ones in front, seen as two numbers (256 × 2).
    """
    kept = places_by_byte(index_format, torch.device("cpu")).view(torch.uint8).reshape(256, 8)
    places = kept.argsort(dim=1, descending=True, stable=True).short()
    return places.view(torch.uint64).numpy().copy(), kept.sum(1).numpy().copy()


def _use_threads_of_torch() -> None:
    threads = torch.get_num_threads()
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    if torch.get_num_threads() != threads:  # Numba starts as many as there are, for all that share its OpenMP
        torch.set_num_threads(threads)


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


@intrinsic
def _pointer(context: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), generate


@intrinsic
def _write(context: Any, address: Any, place: Any, value: Any) -> Any:
    """Numba drops what is written to an array that nothing reads, such as one of an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, place, value = arguments
        start = builder.inttoptr(address, value.type.as_pointer())
        builder.store(value, builder.gep(start, [place]), align=1)
        return context.get_dummy_value()

    return types.void(address, types.int64, value), generate


@njit(inline="always")
def _array(address: Any, shape: Any, dtype: Any) -> Any:
    """What a tensor holds at an address."""
    return carray(_pointer(address), shape, dtype)


@njit
def _load(into: Any, address: Any, start: Any, stored_as: Any) -> None:
    """Stored numbers from place `start` on as float32, or zeros where none are stored.

    Numba has no numbers of 16 bits, so their bits are read.
    """
    if stored_as == _NOT_STORED:
        for place in range(len(into)):
            into[place] = 0
        return
    if stored_as == _FLOAT32:
        numbers = _array(address, start + len(into), np.float32)[start:]
        for place in range(len(into)):
            into[place] = numbers[place]
        return
    halves = _array(address, start + len(into), np.uint16)[start:]
    if stored_as == _BFLOAT16:
        for place in range(len(into)):
            into[place] = np.uint32(uint32(halves[place]) << uint32(16)).view(np.float32)
        return
    for place in range(len(into)):
        bits = uint32(halves[place])
        shifted = uint32((bits & uint32(0x7FFF)) << uint32(13))
        # Exponents count from 15 and not from 127, which a factor makes good, also for subnormal numbers.
        size = np.float32(np.uint32(shifted).view(np.float32) * _OF_FLOAT16).view(np.uint32)
        endless = uint32(shifted | uint32(0x7F800000))  # or no number
        size = endless if shifted >= uint32(0x0F800000) else size
        into[place] = np.uint32(size | uint32((bits & uint32(0x8000)) << uint32(16))).view(np.float32)


@njit
def _unpack(into: Any, address: Any, first: Any, bits: Any) -> None:
    """The packed integers (rows × groups) of the lines from the `first` on as float32."""
    width = (into.shape[1] * bits + 7) // 8
    packed = _array(address, (first + len(into), width), np.uint8)
    for row in range(len(into)):
        line = packed[first + row]
        for group in range(into.shape[1]):
            byte = group * bits >> 3
            word = uint32(line[byte])
            if byte + 1 < width:
                word |= uint32(line[byte + 1]) << uint32(8)
            into[row, group] = float32(int32((word >> uint32(group * bits & 7)) & uint32((1 << bits) - 1)))


@njit(inline="always")
def _store(address: Any, place: Any, stored_as: Any, value: Any) -> None:
    """Write a float32 as it is, or as bfloat16."""
    if stored_as == _FLOAT32:
        _write(address, place, float32(value))
    else:
        bits = _rounded(value, 16) if value == value else np.float32(value).view(np.uint32) | uint32(0x400000)
        _write(address, place, uint16(bits >> uint32(16)))


@njit
def _round_to_integers(into: Any, line: Any) -> Any:
    """The numbers of a token as integers of 8 bits, and their scale; see `suite.kernels.per_token`."""
    largest = uint32(0)  # as bits, which order positive numbers and put what is none on top
    for column in range(len(line)):
        largest = max(largest, uint32(np.float32(line[column]).view(np.uint32) & uint32(0x7FFFFFFF)))
    scale = float32(np.uint32(largest).view(np.float32) / float32(127))
    scale = _SMALLEST if scale < _SMALLEST else scale
    for column in range(len(line)):
        into[column] = int16(np.rint(float32(line[column] / scale)))
    return scale


@_compiled_as_it_stands
def _sum_integers(
    tokens: Any,
    rows: Any,
    columns: Any,
    packed_at: Any,
    out: Any,
    x: Any,
    x_as: Any,
    scales: Any,
    scales_as: Any,
) -> None:
    packed = _array(packed_at, (rows, columns), np.uint8)
    numbers, integers = np.empty((tokens, columns), np.float32), np.empty((tokens, columns), np.int16)
    by_token = np.empty(tokens, np.float32)
    _load(numbers.ravel(), x, 0, x_as)
    for token in range(tokens):
        by_token[token] = _round_to_integers(integers[token], numbers[token])
    for part in prange((rows + _ROWS_AT_ONCE - 1) // _ROWS_AT_ONCE):
        first = part * _ROWS_AT_ONCE
        here = min(rows - first, _ROWS_AT_ONCE)
        by_row = np.empty(here, np.float32)
        _load(by_row, scales, first, scales_as)
        if tokens == 1:  # nothing is shared, so nothing is kept
            for row in range(here):
                line, values, total = packed[first + row], integers[0], int32(0)
                for column in range(columns):
                    weight = int16(int16(line[column]) - int16(128))
                    total = int32(total + int32(weight) * int32(values[column]))
                _write(out, first + row, float32(float32(total) * by_token[0] * by_row[row]))
            continue
        signed = np.empty((_ROWS_AT_ONCE, columns), np.int16)
        for row in range(here):
            line, into = packed[first + row], signed[row]
            for column in range(columns):
                into[column] = int16(int16(line[column]) - int16(128))
        sums = np.empty(_ROWS_TOGETHER, np.int32)
        for token in range(tokens):
            values = integers[token]
            for row in range(0, here, _ROWS_TOGETHER):
                one, two, three, four = signed[row], signed[row + 1], signed[row + 2], signed[row + 3]
                a = b = c = d = int32(0)
                for column in range(columns):
                    value = int32(values[column])
                    a = int32(a + int32(one[column]) * value)
                    b = int32(b + int32(two[column]) * value)
                    c = int32(c + int32(three[column]) * value)
                    d = int32(d + int32(four[column]) * value)
                sums[0], sums[1], sums[2], sums[3] = a, b, c, d
                for beside in range(min(_ROWS_TOGETHER, here - row)):
                    total = float32(float32(sums[beside]) * by_token[token] * by_row[row + beside])
                    _write(out, token * rows + first + row + beside, total)


@njit(fastmath=_ANY_ORDER)
def _arrange(values: Any, sums: Any, x: Any, token: Any, x_as: Any, factors: Any) -> None:
    """The activations of a token: in the order of the codes, and the sum of each group."""
    line = np.empty(values.size, np.float32)
    _load(line, x, token * len(line), x_as)
    group_size = len(line) // len(sums)
    for group in range(len(sums)):
        total = float32(0)
        for column in range(group * group_size, (group + 1) * group_size):
            total += line[column]
        sums[group] = total
    codes, units = values.shape
    for place in range(codes):
        for unit in range(units):
            values[place, unit] = line[codes * unit + place] * factors[place]


@functools.cache
def _kernel(bits: int, normal_float: bool) -> Any:
    """The compiled product; `bits` and what follows from them are constants to the compiler.

    No compiled function may be among those constants: Numba would find what is on disk in no other process.
    """
    codes = codes_in_unit(bits)
    costly = bits == 3 or normal_float  # to read a code, so that several tokens share what was read
    fixed_zero = np.float32(0 if normal_float else 1 << (bits - 1))
    factors = _factors(bits, normal_float)

    @_compiled
    def fill(
        tokens: Any,
        rows: Any,
        columns: Any,
        groups: Any,
        packed_at: Any,
        out: Any,
        out_as: Any,
        x: Any,
        x_as: Any,
        scales: Any,
        scales_as: Any,
        zeros: Any,
        zeros_as: Any,
        bias: Any,
        bias_as: Any,
    ) -> None:
        units = columns // codes
        width = units // groups
        if bits == 3:
            packed = _array(packed_at, (rows, 3 * units), np.uint8)
        else:
            packed = _array(packed_at, (rows, units), np.uint32)
        values = np.empty((tokens, codes, units), np.float32)
        sums = np.empty((tokens, groups), np.float32)
        for token in range(tokens):
            _arrange(values[token], sums[token], x, token, x_as, factors)
        for part in prange((rows + _ROWS_AT_ONCE - 1) // _ROWS_AT_ONCE):
            first = part * _ROWS_AT_ONCE
            here = min(rows - first, _ROWS_AT_ONCE)
            by_group = np.empty((here, groups), np.float32)
            _load(by_group.ravel(), scales, first * groups, scales_as)
            zero = np.empty((here, groups), np.float32)
            if zeros_as == _NOT_STORED:
                for row in range(here):
                    for group in range(groups):
                        zero[row, group] = fixed_zero
            elif zeros_as == _PACKED:
                _unpack(zero, zeros, first, bits)
            else:
                _load(zero.ravel(), zeros, first * groups, zeros_as)
            added = np.empty(here, np.float32)
            _load(added, bias, first, bias_as)
            scale = np.empty(units, np.float32)
            offset = np.empty(groups, np.float32)
            rebuilt = np.empty((codes, units), np.float32)
            for row in range(here):
                for group in range(groups):
                    offset[group] = by_group[row, group] * zero[row, group]
                    start = uint64(group * width)
                    for unit in range(width):
                        scale[start + uint64(unit)] = by_group[row, group]
                line = packed[first + row]
                if tokens > 1 and costly:
                    for unit in range(units):
                        word = _word(line, unit, bits)
                        for place in range(codes):
                            rebuilt[place, unit] = _step(word, place, bits, normal_float) * scale[unit]
                for token in range(tokens):
                    total = added[row]
                    for group in range(groups):
                        total -= offset[group] * sums[token, group]
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
                    _store(out, token * rows + first + row, out_as, total)

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
def _start(starts: Any, index: Any, per_row: Any, counts: Any) -> None:
    """Where the kept weights of each row start, and end (rows + 1)."""
    for row in prange(len(index)):
        total = per_row
        if per_row == 0:
            for byte in range(index.shape[1]):
                total += counts[index[row, byte]]
        starts[row + 1] = total
    starts[0] = 0
    for row in range(len(index)):
        starts[row + 1] += starts[row]


@njit
def _place(into: Any, line: Any, of_bytes: Any, counts: Any) -> None:
    """Write the columns (16 bits) of a row's kept weights; what stands after them is void."""
    at = int64(into.ctypes.data)
    for byte in range(len(line)):
        here = uint64(8 * byte * 0x0001000100010001)  # to four places at once
        _write(at, 0, uint64(of_bytes[line[byte], 0] + here))
        _write(at, 1, uint64(of_bytes[line[byte], 1] + here))
        at += 2 * int64(counts[line[byte]])


@_compiled
def _make_dense(out: Any, kept: Any, index_at: Any, per_row: Any, of_bytes: Any, counts: Any) -> None:
    rows, columns = out.shape
    width = (columns + 7) // 8
    index = _array(index_at, (rows, width), np.uint8)
    starts = np.empty(rows + 1, np.int64)
    _start(starts, index, per_row, counts)
    for part in prange((rows + _ROWS_AT_ONCE - 1) // _ROWS_AT_ONCE):
        places = np.empty(8 * width + 8, np.uint16)
        for row in range(part * _ROWS_AT_ONCE, min(rows, (part + 1) * _ROWS_AT_ONCE)):
            _place(places, index[row], of_bytes, counts)
            into, values = out[row], kept[starts[row] : starts[row + 1]]
            for column in range(columns):
                into[column] = 0
            for nonzero in range(len(values)):
                if places[nonzero] < columns:  # in a damaged index more may be
                    into[places[nonzero]] = values[nonzero]


@_compiled
def _multiply_sparse(
    tokens: Any,
    rows: Any,
    columns: Any,
    nonzeros: Any,
    index_at: Any,
    per_row: Any,
    of_bytes: Any,
    counts: Any,
    out: Any,
    out_as: Any,
    x: Any,
    x_as: Any,
    kept: Any,
    kept_as: Any,
    bias: Any,
    bias_as: Any,
) -> None:
    width = (columns + 7) // 8
    index = _array(index_at, (rows, width), np.uint8)
    starts = np.empty(rows + 1, np.int64)
    _start(starts, index, per_row, counts)
    # As wide as its bits, so that a damaged index leads nowhere else.
    numbers = np.empty((tokens, 8 * width), np.float32)
    for token in range(tokens):
        _load(numbers[token, :columns], x, token * columns, x_as)
        for column in range(columns, 8 * width):
            numbers[token, column] = 0
    nothing = float32(0)
    for column in range(columns):  # infinity times a pruned weight is no number
        nothing += numbers[0, column] * float32(0)
    for part in prange((rows + _ROWS_AT_ONCE - 1) // _ROWS_AT_ONCE):
        first = part * _ROWS_AT_ONCE
        here = min(rows - first, _ROWS_AT_ONCE)
        added = np.empty(here, np.float32)
        _load(added, bias, first, bias_as)
        places = np.empty(8 * width + 8, np.uint16)
        values, weights = np.empty(8 * width, np.float32), np.empty(8 * width, np.float32)
        for row in range(here):
            _place(places, index[first + row], of_bytes, counts)
            found = max(0, min(starts[first + row + 1], nonzeros) - starts[first + row])
            _load(values[:found], kept, starts[first + row], kept_as)
            if tokens == 1:
                total, mine = added[row] + nothing, numbers[0]
                for nonzero in range(found):
                    total += values[nonzero] * mine[places[nonzero]]
                _store(out, first + row, out_as, total)
                continue
            for column in range(8 * width):
                weights[column] = 0
            for nonzero in range(found):
                weights[places[nonzero]] = values[nonzero]
            for token in range(tokens):
                total, mine = added[row], numbers[token]
                for column in range(columns):
                    total += weights[column] * mine[column]
                _store(out, token * rows + first + row, out_as, total)
