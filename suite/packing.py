"""Integers of a few bits, packed into bytes and read back."""

from __future__ import annotations

import functools
import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

IndexFormat = Literal["bitmap", "2:4"]
"""How an index says which weights are kept: by a bit for each, or by two 2-bit places of every four."""


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack unsigned `bits`-wide integers (uint8, rows × n) into bytes (rows × ceil(n·bits/8)).

    Bit k of code j is bit (j·bits + k) of its row, least significant first, for every width.
    """
    if bits == 8:
        return codes.contiguous()
    rows, n = codes.shape
    padded = functional.pad(codes, (0, -n % 8)).reshape(rows, -1, 8)
    shifts = torch.arange(bits, dtype=torch.uint8, device=codes.device)
    stream = ((padded.unsqueeze(-1) >> shifts) & 1).reshape(rows, -1, 8)
    weights = torch.tensor([1 << k for k in range(8)], dtype=torch.uint8, device=codes.device)
    packed = (stream * weights).sum(-1, dtype=torch.uint8)
    return packed[:, : math.ceil(n * bits / 8)].contiguous()


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """Inverse of `pack`: uint8 codes (rows × n)."""
    if bits == 8:
        return packed
    rows = packed.shape[0]
    if 8 % bits == 0:
        # A shift by a number is several times as fast as one by a tensor of shifts.
        codes = torch.stack([(packed >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)], -1)
        return codes.reshape(rows, -1)[:, :n]
    # Eight codes fill `bits` bytes, here read as one number.
    words = functional.pad(packed, (0, -packed.shape[1] % bits)).reshape(rows, -1, bits).int()
    places = torch.arange(0, 8 * bits, 8, dtype=torch.int32, device=packed.device)
    shifts = torch.arange(0, 8 * bits, bits, dtype=torch.int32, device=packed.device)
    codes = ((words << places).sum(-1, keepdim=True, dtype=torch.int32) >> shifts) & ((1 << bits) - 1)
    return codes.to(torch.uint8).reshape(rows, -1)[:, :n]


def codes_in_unit(bits: int) -> int:
    """Codes that kernels read as one number: those of four bytes, or of three where codes have 3 bits."""
    return 8 if bits == 3 else 32 // bits


_CODES = {2: 4, 3: 4, 4: 2}
"""Codes that one look into a table gives, by bits: those of a byte, or of the 12 bits that four of 3 fill."""
_WORDS = {4: torch.int32, 8: torch.int64}


def unpack_as(packed: Tensor, bits: int, n: int, levels: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """What the packed codes stand for: `levels[code]` in `dtype` (rows × n).

    Where a table can hold several codes at once, the matrix is read and written once. Other widths
    have levels one apart, which takes no table.
    """
    size = torch.empty((), dtype=dtype).element_size() * _CODES.get(bits, 0)
    if size in _WORDS:
        words = packed.int() if bits != 3 else _twelve_bits(packed)
        values = _table(bits, levels, dtype, packed.device).index_select(0, words.reshape(-1)).view(dtype)
        return values.reshape(len(packed), -1)[:, :n]
    codes = unpack(packed, bits, n)
    if levels[-1] - levels[0] == len(levels) - 1:
        return codes.to(dtype) + levels[0]
    return torch.tensor(levels, dtype=dtype, device=packed.device)[codes.int()]


def _twelve_bits(packed: Tensor) -> Tensor:
    """Bytes (rows × width) as numbers of 12 bits (int32), two of every three bytes."""
    threes = functional.pad(packed, (0, -packed.shape[1] % 3)).int().unflatten(1, (-1, 3))
    first, middle, last = threes.unbind(-1)
    return torch.stack((first | (middle & 15) << 8, middle >> 4 | last << 4), -1)


@functools.lru_cache(maxsize=64)
def _table(bits: int, levels: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """For each word of several codes their levels, side by side, seen as one integer."""
    count = _CODES[bits]
    word = torch.arange(1 << bits * count).unsqueeze(-1)
    codes = (word >> torch.arange(0, bits * count, bits)) & ((1 << bits) - 1)
    values = torch.tensor(levels, dtype=dtype)[codes]
    return values.view(_WORDS[values.element_size() * count]).flatten().to(device)


@functools.cache
def places_by_byte(index_format: IndexFormat, device: torch.device) -> Tensor:
    """For each byte of an index which of eight weights it keeps, as eight bools seen as one integer."""
    byte = torch.arange(256, dtype=torch.uint8, device="cpu").unsqueeze(-1)
    if index_format == "bitmap":
        places = unpack(byte, 1, 8).bool()
    else:
        positions = unpack(byte, 2, 4).reshape(256, 2, 2, 1)
        places = (positions == torch.arange(4, dtype=torch.uint8, device="cpu")).any(-2).reshape(256, 8)
    return places.view(torch.int64).flatten().to(device)
