"""Packed integers, read back as codes and as what they stand for."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from suite.grids import NORMAL_FLOAT
from suite.packing import pack, unpack, unpack_as

BITS = st.sampled_from([2, 3, 4, 8])
ROWS, COLUMNS, SEEDS = st.integers(1, 6), st.integers(1, 40), st.integers(0, 999)
DTYPES = st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64])


def random_codes(bits: int, rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)


@given(BITS, ROWS, COLUMNS, SEEDS)
def test_packing_loses_nothing(bits: int, rows: int, columns: int, seed: int) -> None:
    codes = random_codes(bits, rows, columns, seed)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, math.ceil(columns * bits / 8))
    assert torch.equal(unpack(packed, bits, columns), codes)


def test_the_bits_of_a_row_follow_each_other_least_significant_first() -> None:
    assert pack(torch.tensor([[0b0001, 0b1000]], dtype=torch.uint8), 4).tolist() == [[0b1000_0001]]
    assert pack(torch.tensor([[0b001, 0b110, 0b111]], dtype=torch.uint8), 3).tolist() == [[0b11_110_001, 1]]


@given(BITS, ROWS, COLUMNS, SEEDS, DTYPES, st.booleans())
def test_codes_are_read_as_their_levels(
    bits: int, rows: int, columns: int, seed: int, dtype: torch.dtype, centred: bool
) -> None:
    codes = random_codes(bits, rows, columns, seed)
    zero = 1 << (bits - 1) if centred else 0
    levels = tuple(float(code - zero) for code in range(1 << bits))
    assert torch.equal(unpack_as(pack(codes, bits), bits, columns, levels, dtype), codes.to(dtype) - zero)


@given(ROWS, COLUMNS, SEEDS, DTYPES)
def test_levels_need_not_be_even(rows: int, columns: int, seed: int, dtype: torch.dtype) -> None:
    codes = random_codes(4, rows, columns, seed)
    expected = torch.tensor(NORMAL_FLOAT, dtype=dtype)[codes.int()]
    assert torch.equal(unpack_as(pack(codes, 4), 4, columns, NORMAL_FLOAT, dtype), expected)
