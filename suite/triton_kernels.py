"""Triton kernels for packed weights on a GPU, where torch has none for most formats.

They read the bytes as `suite.packing.pack` lays them out. Rebuilt weights equal those of
`PackedMatrix.dequantize` elsewhere bit for bit; products round where its products do, and sum in float32.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from suite.packing import codes_in_unit

if TYPE_CHECKING:
    from suite.packed_layers import PackedMatrix

ROW_SHAPE = (4, 256, 4)
"""Rows of the matrix and units of columns that a program takes at a time, and its warps; for one token."""
ROWS_SHAPE = (32, 64, 4)
"""The same for more tokens."""

_FIXED_ZERO, _PACKED_ZEROS, _FLOAT_ZEROS = 0, 1, 2


@triton.jit
def _nothing_kernel(out):
    tl.store(out, 0)


def try_out(device: torch.device) -> None:
    """Build a kernel that does nothing; raises whatever Triton raises where it cannot."""
    with torch.cuda.device(device):
        _nothing_kernel[(1,)](torch.zeros(1, device=device))


@triton.jit
def _code(line, place, inside, width, BITS: tl.constexpr):
    """The codes (int32) at `place` of lines of `width` bytes."""
    at = place * BITS // 8
    word = tl.load(line + at, mask=inside, other=0).to(tl.int32)
    if 8 % BITS != 0:
        word |= tl.load(line + at + 1, mask=inside & (at + 1 < width), other=0).to(tl.int32) << 8
    return (word >> (place * BITS % 8)) & ((1 << BITS) - 1)


@triton.jit
def _zero(
    zeros,
    row,
    group,
    inside,
    groups,
    zero_width,
    dtype: tl.constexpr,
    BITS: tl.constexpr,
    ZEROS: tl.constexpr,
):
    """What is subtracted from the codes of a group (float32, as rounded to `dtype`)."""
    if ZEROS == 0:
        zero = (group * 0 + (1 << (BITS - 1))).to(tl.float32)
    elif ZEROS == 1:
        zero = _code(zeros + row * zero_width, group, inside, zero_width, BITS).to(tl.float32)
    else:
        zero = tl.load(zeros + row * groups + group, mask=inside, other=0).to(dtype).to(tl.float32)
    return zero


@triton.jit
def _steps(code, levels, zero, dtype: tl.constexpr, LEVELS: tl.constexpr):
    """How many scales a code stands for (float32, as rounded to `dtype`)."""
    steps = tl.load(levels + code) if LEVELS else code.to(tl.float32) - zero
    return steps.to(dtype).to(tl.float32)


@triton.jit
def _dequantize_kernel(
    out,
    packed,
    scales,
    zeros,
    levels,
    columns,
    width,
    groups,
    zero_width,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    ZEROS: tl.constexpr,
    LEVELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dtype: tl.constexpr = out.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    group = column // GROUP
    code = _code(packed + row * width, column, inside, width, BITS)
    zero = _zero(zeros, row, group, inside, groups, zero_width, dtype, BITS, ZEROS)
    scale = tl.load(scales + row * groups + group, mask=inside, other=0).to(dtype).to(tl.float32)
    value = _steps(code, levels, zero, dtype, LEVELS) * scale
    tl.store(out + row * columns + column, value.to(dtype), mask=inside)


@triton.jit
def _word(packed, row, unit, units, inside, BITS: tl.constexpr):
    """A unit of codes as one number: four bytes, or the three that eight codes of 3 bits fill."""
    if BITS == 3:
        at = packed + (row * units + unit) * 3
        first = tl.load(at, mask=inside, other=0).to(tl.int32)
        second = tl.load(at + 1, mask=inside, other=0).to(tl.int32)
        third = tl.load(at + 2, mask=inside, other=0).to(tl.int32)
        word = first | second << 8 | third << 16
    else:
        word = tl.load(packed + row * units + unit, mask=inside, other=0)
    return word


@triton.jit
def _row_kernel(
    out,
    x,
    packed,
    scales,
    zeros,
    levels,
    rows,
    units,
    groups,
    zero_width,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    CODES: tl.constexpr,
    ZEROS: tl.constexpr,
    LEVELS: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
):
    """One row of activations: each program sums over the columns of a few rows of the matrix."""
    dtype: tl.constexpr = out.dtype.element_ty
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    total = tl.zeros((ROWS, UNITS), tl.float32)
    for start in range(0, units, UNITS):
        unit = start + tl.arange(0, UNITS)[None, :]
        inside = (row < rows) & (unit < units)
        word = _word(packed, row, unit, units, inside, BITS)
        group = unit * CODES // GROUP
        zero = _zero(zeros, row, group, inside, groups, zero_width, dtype, BITS, ZEROS)
        scale = tl.load(scales + row * groups + group, mask=inside, other=0).to(dtype).to(tl.float32)
        part = tl.zeros((ROWS, UNITS), tl.float32)
        for place in tl.static_range(CODES):
            code = (word >> (BITS * place)) & ((1 << BITS) - 1)
            value = tl.load(x + unit * CODES + place, mask=unit < units, other=0).to(tl.float32)
            part += _steps(code, levels, zero, dtype, LEVELS) * value
        total += part * scale
    at = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tl.store(out + at, tl.sum(total, 1).to(dtype), mask=at < rows)


@triton.jit
def _rows_kernel(
    out,
    x,
    packed,
    scales,
    zeros,
    levels,
    tokens,
    rows,
    units,
    groups,
    zero_width,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    CODES: tl.constexpr,
    ZEROS: tl.constexpr,
    LEVELS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
):
    """A few rows of activations, given as codes in a unit × tokens × units: matrix instructions."""
    dtype: tl.constexpr = out.dtype.element_ty
    token = tl.arange(0, TOKENS)[:, None]
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[None, :]
    total = tl.zeros((TOKENS, ROWS), tl.float32)
    for start in range(0, units, UNITS):
        unit = start + tl.arange(0, UNITS)
        of_weights, of_tokens = unit[:, None], unit[None, :]
        inside = (row < rows) & (of_weights < units)
        word = _word(packed, row, of_weights, units, inside, BITS)
        group = of_weights * CODES // GROUP
        zero = _zero(zeros, row, group, inside, groups, zero_width, dtype, BITS, ZEROS)
        scale = tl.load(scales + row * groups + group, mask=inside, other=0).to(dtype).to(tl.float32)
        for place in tl.static_range(CODES):
            code = (word >> (BITS * place)) & ((1 << BITS) - 1)
            weight = (_steps(code, levels, zero, dtype, LEVELS) * scale).to(dtype)
            at = x + (place * tokens + token) * units + of_tokens
            value = tl.load(at, mask=(token < tokens) & (of_tokens < units), other=0)
            total = tl.dot(value, weight, total)
    tl.store(out + token * rows + row, total.to(dtype), mask=(token < tokens) & (row < rows))


def dequantize(
    matrix: PackedMatrix, dtype: torch.dtype, packed: Tensor, scales: Tensor, zeros: Tensor | None
) -> Tensor:
    """Rows of `matrix` in `dtype` (n × columns), given by what it packs for them; see `PackedMatrix`."""
    out = torch.empty(len(packed), matrix.columns, dtype=dtype, device=packed.device)
    if out.numel() == 0:
        return out
    zeros = packed if zeros is None else zeros
    grid = (len(out), triton.cdiv(matrix.columns, 1024))
    with torch.cuda.device_of(packed):
        _dequantize_kernel[grid](
            out,
            packed.contiguous(),
            scales.contiguous(),
            zeros.contiguous(),
            _levels(matrix.levels, packed.device),
            matrix.columns,
            packed.shape[1],
            scales.shape[1],
            zeros.shape[1],
            GROUP=matrix.group,
            BITS=matrix.bits,
            ZEROS=_kind_of_zeros(matrix),
            LEVELS=matrix.grid == "normal-float",
            BLOCK=1024,
        )
    return out


def can_multiply(matrix: PackedMatrix) -> bool:
    """Whether `product` takes the matrix: lines of whole units, each inside of one group."""
    codes = codes_in_unit(matrix.bits)
    return matrix.columns % codes == 0 and matrix.group % codes == 0


def product(x: Tensor, matrix: PackedMatrix) -> Tensor:
    """`x @ Wᵀ` (tokens × rows) for contiguous bfloat16 `x` (tokens × columns), 64 tokens at most."""
    tokens, rows = len(x), matrix.rows
    out = torch.empty(tokens, rows, dtype=x.dtype, device=x.device)
    codes = codes_in_unit(matrix.bits)
    units = matrix.columns // codes
    packed = matrix.packed if matrix.bits == 3 else matrix.packed.view(torch.int32)
    zeros = matrix.packed if matrix.symmetric else matrix.zeros
    pointers = (packed, matrix.scales, zeros, _levels(matrix.levels, x.device))
    sizes = (rows, units, matrix.scales.shape[1], zeros.shape[1])
    fixed: dict[str, Any] = {
        "GROUP": matrix.group,
        "BITS": matrix.bits,
        "CODES": codes,
        "ZEROS": _kind_of_zeros(matrix),
        "LEVELS": matrix.grid == "normal-float",
    }
    with torch.cuda.device_of(x):
        if tokens == 1:
            grid = (triton.cdiv(rows, ROW_SHAPE[0]),)
            _row_kernel[grid](
                out,
                x,
                *pointers,
                *sizes,
                **fixed,
                ROWS=ROW_SHAPE[0],
                UNITS=ROW_SHAPE[1],
                num_warps=ROW_SHAPE[2],
            )
        else:
            by_place = x.reshape(tokens, units, codes).permute(2, 0, 1).contiguous()
            grid = (triton.cdiv(rows, ROWS_SHAPE[0]),)
            _rows_kernel[grid](
                out,
                by_place,
                *pointers,
                tokens,
                *sizes,
                **fixed,
                TOKENS=max(16, triton.next_power_of_2(tokens)),
                ROWS=ROWS_SHAPE[0],
                UNITS=ROWS_SHAPE[1],
                num_warps=ROWS_SHAPE[2],
            )
    return out


def _kind_of_zeros(matrix: PackedMatrix) -> int:
    if matrix.symmetric:
        return _FIXED_ZERO
    return _FLOAT_ZEROS if matrix.grid == "float-zero" else _PACKED_ZEROS


@functools.lru_cache(maxsize=64)
def _levels(levels: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(levels, device=device)
