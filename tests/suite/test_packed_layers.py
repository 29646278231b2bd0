"""Packed integers: what rounding costs, how many bytes they take, and the layers made of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from suite.errors import InputError
from suite.grids import round_to_nearest
from suite.measure.ledger import ledger, total_disk, total_params
from suite.packed_layers import PackedEmbedding, PackedLinear, PackedMatrix, TiedHead
from suite.packing import unpack

BITS = st.sampled_from([2, 3, 4, 8])
ROWS, COLUMNS, GROUPS = st.integers(1, 6), st.integers(1, 40), st.integers(1, 48)
SEEDS = st.integers(0, 999)


def weights(rows: int, columns: int, seed: int, offset: float = 0.0) -> Tensor:
    return offset + torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def matrix(
    rows: int, columns: int, bits: int, group: int, symmetric: bool, weight: Tensor | None = None
) -> PackedMatrix:
    made = PackedMatrix(rows, columns, bits, group, symmetric)
    if weight is not None:
        made.quantize_(weight)
    return made


@given(BITS, ROWS, COLUMNS, GROUPS, st.booleans(), SEEDS, st.sampled_from([0.0, 3.0, -3.0]))
def test_an_unclipped_weight_moves_by_at_most_half_a_step(
    bits: int, rows: int, columns: int, group: int, symmetric: bool, seed: int, offset: float
) -> None:
    weight = weights(rows, columns, seed, offset)
    made = matrix(rows, columns, bits, group, symmetric, weight)
    codes = unpack(made.packed, bits, columns)
    unclipped = (codes > 0) & (codes < (1 << bits) - 1)
    step = made.scales.float().repeat_interleave(made.group, 1)[:, :columns]
    error = (made.dequantize(torch.float32) - weight).abs()
    assert (error <= step * 0.5001)[unclipped].all()
    assert (error <= step * 1.02).all()  # at the ends the zero point and the scale are rounded as well


@given(BITS, ROWS, COLUMNS, GROUPS, SEEDS)
def test_a_symmetric_grid_keeps_zeros_and_signs(
    bits: int, rows: int, columns: int, group: int, seed: int
) -> None:
    weight = weights(rows, columns, seed)
    weight[:, ::3] = 0
    got = matrix(rows, columns, bits, group, True, weight).dequantize(torch.float32)
    assert (got[:, ::3] == 0).all()
    assert (got * weight >= 0).all()


@given(BITS, ROWS, COLUMNS, GROUPS, SEEDS)
def test_an_asymmetric_grid_keeps_zeros_too(
    bits: int, rows: int, columns: int, group: int, seed: int
) -> None:
    weight = weights(rows, columns, seed, offset=0.7)
    weight[:, ::3] = 0
    assert (matrix(rows, columns, bits, group, False, weight).dequantize(torch.float32)[:, ::3] == 0).all()


@given(BITS, ROWS, COLUMNS, GROUPS, SEEDS, st.sampled_from([1e-6, 1e-3, 1.0, 50.0]))
def test_a_symmetric_grid_rounds_its_own_output_to_itself(
    bits: int, rows: int, columns: int, group: int, seed: int, scale: float
) -> None:
    once = matrix(rows, columns, bits, group, True, scale * weights(rows, columns, seed))
    twice = matrix(rows, columns, bits, group, True, once.dequantize(torch.float32))
    assert torch.equal(once.dequantize(torch.float32), twice.dequantize(torch.float32))


@given(BITS, ROWS, COLUMNS, SEEDS)
def test_an_asymmetric_grid_that_is_used_from_end_to_end_rounds_its_output_to_itself(
    bits: int, rows: int, columns: int, seed: int
) -> None:
    weight = weights(rows, columns, seed)
    codes, _, _ = round_to_nearest(weight, bits, columns, False)
    assume((codes.amin(1) == 0).all() and (codes.amax(1) == (1 << bits) - 1).all())
    once = matrix(rows, columns, bits, columns, False, weight)
    twice = matrix(rows, columns, bits, columns, False, once.dequantize(torch.float32))
    assert torch.equal(once.dequantize(torch.float32), twice.dequantize(torch.float32))


@given(BITS, ROWS, COLUMNS, GROUPS, st.booleans())
def test_a_matrix_of_zeros_stays_zero(
    bits: int, rows: int, columns: int, group: int, symmetric: bool
) -> None:
    made = matrix(rows, columns, bits, group, symmetric, torch.zeros(rows, columns))
    assert torch.equal(made.dequantize(torch.float32), torch.zeros(rows, columns))


@pytest.mark.parametrize("symmetric", [False, True])
def test_every_further_bit_about_halves_the_error(symmetric: bool) -> None:
    weight = weights(64, 64, 0)
    rounded = {bits: matrix(64, 64, bits, 16, symmetric, weight) for bits in (2, 3, 4, 8)}
    error = {bits: float((m.dequantize(torch.float32) - weight).norm()) for bits, m in rounded.items()}
    assert error[2] > 2 * error[3] > 4 * error[4] > 40 * error[8]


@given(BITS, ROWS, COLUMNS, GROUPS, st.booleans(), st.booleans())
def test_the_bytes_on_disk_follow_the_formula(
    bits: int, rows: int, columns: int, group: int, symmetric: bool, bias: bool
) -> None:
    linear = nn.Linear(columns, rows, bias=bias)
    packed = PackedLinear.from_linear(linear, bits, group, symmetric)
    groups = math.ceil(columns / min(group, columns))
    expected = rows * math.ceil(columns * bits / 8) + 2 * rows * groups + 4 * rows * bias
    if not symmetric:
        expected += rows * math.ceil(groups * bits / 8)
    entries = ledger(packed)
    assert total_disk(entries) == expected
    assert total_params(entries) == rows * columns + rows * bias


def test_only_widths_that_can_be_packed_are_accepted() -> None:
    with pytest.raises(InputError, match=r"5 bits cannot be packed; use 2, 3, 4 or 8"):
        PackedMatrix(2, 2, 5, 2, True)


@pytest.mark.parametrize(
    ("bits", "symmetric", "grid", "message"),
    [
        (4, True, "hexagonal", "there is no grid 'hexagonal'; use uniform"),
        (3, True, "normal-float", "has 4 bits"),
        (4, False, "normal-float", "is symmetric"),
        (4, True, "float-zero", "cannot be symmetric"),
    ],
)
def test_grids_that_do_not_fit_are_refused(bits: int, symmetric: bool, grid: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        PackedMatrix(2, 2, bits, 2, symmetric, grid)


def test_float_zeros_are_stored_and_used_as_they_are() -> None:
    made = PackedMatrix(1, 3, 4, 2, False, "float-zero")
    made.store_(torch.tensor([[1, 2, 3]]), torch.tensor([[2.0, 4.0]]), torch.tensor([[0.5, 1.25]]))
    assert made.dequantize(torch.float32).tolist() == [[1.0, 3.0, 7.0]]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_packed_linear_computes_with_its_rounded_weights_and_its_own_bias(
    bias: bool, symmetric: bool
) -> None:
    linear = nn.Linear(21, 10, bias=bias)
    packed = PackedLinear.from_linear(linear, 4, 8, symmetric)
    x = weights(3, 21, 1)
    expected = nn.functional.linear(x, packed.dequantize(torch.float32), linear.bias)
    assert torch.equal(packed(x), expected)
    assert (packed(x) - linear(x)).abs().max() < 0.3
    if bias:
        assert packed.bias is not None
        assert torch.equal(packed.bias, linear.bias)


@given(BITS, st.integers(1, 20), GROUPS, st.booleans(), SEEDS)
def test_a_packed_embedding_looks_up_rows_of_its_table(
    bits: int, width: int, group: int, symmetric: bool, seed: int
) -> None:
    embedding = nn.Embedding(13, width)
    packed = PackedEmbedding.from_embedding(embedding, bits, group, symmetric)
    ids = torch.randint(0, 13, (2, 5), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(packed(ids), packed.dequantize(torch.float32)[ids])


def test_a_packed_embedding_answers_in_the_dtype_of_the_table_it_replaced() -> None:
    embedding = nn.Embedding(5, 8, dtype=torch.bfloat16)
    assert PackedEmbedding.from_embedding(embedding, 8, 8, True)(torch.tensor([1])).dtype == torch.bfloat16


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_packed_embedding_looks_up_no_rows(bits: int, symmetric: bool) -> None:
    packed = PackedEmbedding.from_embedding(nn.Embedding(9, 20, dtype=torch.bfloat16), bits, 8, symmetric)
    found = packed(torch.zeros(1, 0, dtype=torch.int64))
    assert (found.shape, found.dtype) == ((1, 0, 20), torch.bfloat16)


def test_a_packed_embedding_follows_the_dtype_of_its_model() -> None:
    embedding = PackedEmbedding.from_embedding(nn.Embedding(9, 16, dtype=torch.bfloat16), 8, 16, True)
    ids = torch.tensor([[1, 2]])
    assert embedding(ids).dtype == torch.bfloat16
    assert embedding.float()(ids).dtype == torch.float32
    assert nn.Sequential(embedding).to(torch.bfloat16)(ids).dtype == torch.bfloat16


def test_a_tied_head_multiplies_by_the_packed_table_and_owns_nothing() -> None:
    model = nn.Module()
    model.table = PackedEmbedding.from_embedding(nn.Embedding(7, 6), 4, 3, True)
    model.head = TiedHead("table")
    model.head.bind(model)
    x = weights(2, 6, 0)
    assert torch.equal(model.head(x), x @ model.table.dequantize(torch.float32).T)
    assert not model.head.state_dict()
    assert [path for path, _ in model.named_modules()] == ["", "table", "head"]
