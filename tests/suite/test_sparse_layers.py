"""Sparse linears: what they store, what they count, and that zeros stay zero."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from suite import kernels, numba_kernels
from suite.errors import CellFailed, InputError
from suite.layers import spec_of
from suite.measure.ledger import ledger, total_disk, total_params
from suite.run import audit
from suite.sparse_layers import SemiStructuredLinear, SparseLinear, SparseMatrix


def random_places(rows: int, columns: int, nonzeros: int, seed: int = 0) -> Tensor:
    order = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(seed))
    return (order < nonzeros).reshape(rows, columns)


def two_of_four(rows: int, columns: int) -> Tensor:
    order = torch.rand(rows, columns // 4, 4, generator=torch.Generator().manual_seed(0)).argsort(-1)
    return (order < 2).reshape(rows, columns)


def made(linear: nn.Linear, kind: type[SparseLinear]) -> tuple[SparseLinear, Tensor]:
    """A sparse linear with half the weights of `linear`, and their places."""
    m, n = linear.weight.shape
    places = random_places(m, n, m * n // 2) if kind is SparseLinear else two_of_four(m, n)
    return kind.from_weight(linear.weight.detach(), places, linear), places


KINDS = pytest.mark.parametrize("kind", [SparseLinear, SemiStructuredLinear])


@given(rows=st.integers(1, 9), columns=st.integers(1, 35), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_any_places_come_back_from_the_bitmap(rows: int, columns: int, share: float, seed: int) -> None:
    nonzeros = int(share * rows * columns)
    places = random_places(rows, columns, nonzeros, seed)
    weight = torch.randn(rows, columns)
    matrix = SparseMatrix(rows, columns, nonzeros, "bitmap")
    matrix.store_(weight, places)
    assert torch.equal(matrix.places(), places)
    assert torch.equal(matrix.dense(), weight * places)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        found = numba_kernels.dense(copy.deepcopy(matrix).to(dtype))
        assert torch.equal(found, (weight * places).to(dtype))


def test_every_pair_of_positions_comes_back_from_two_of_four() -> None:
    pairs = torch.tensor([[i in (a, b) for i in range(4)] for a in range(4) for b in range(a + 1, 4)])
    places = torch.cat([pairs, pairs.flip(0), pairs.roll(1, 0)], 1)
    weight = torch.randn(places.shape)
    matrix = SparseMatrix(*places.shape, int(places.sum()), "2:4")
    matrix.store_(weight, places)
    assert torch.equal(matrix.places(), places)
    assert torch.equal(matrix.dense(), weight * places)


@KINDS
@pytest.mark.parametrize("bias", [False, True])
def test_it_computes_what_the_dense_linear_with_zeros_does(kind: type[SparseLinear], bias: bool) -> None:
    linear = nn.Linear(24, 10, bias=bias)
    sparse, places = made(linear, kind)
    x = torch.randn(3, 24)
    with torch.no_grad():
        linear.weight.mul_(places)
    assert torch.equal(sparse(x), linear(x))


@KINDS
def test_half_the_weights_take_nine_bits_a_weight_in_sixteen_bit_dtypes(kind: type[SparseLinear]) -> None:
    sparse, _ = made(nn.Linear(64, 16, bias=False, dtype=torch.bfloat16), kind)
    entries = ledger(sparse)
    assert total_params(entries) == 64 * 16 // 2
    assert total_disk(entries) == 64 * 16 * 9 // 8 == sum(entry.nominal for entry in entries)


@KINDS
def test_a_skeleton_of_its_arguments_takes_its_state(kind: type[SparseLinear]) -> None:
    sparse, _ = made(nn.Linear(24, 10), kind)
    spec = spec_of(sparse)
    assert spec is not None
    again = spec.build(torch.float32, "cpu")
    again.load_state_dict(sparse.state_dict())
    assert torch.equal(again.dense(), sparse.dense())
    assert [e.disk for e in ledger(spec.build(torch.float32))] == [e.disk for e in ledger(sparse)]


@KINDS
def test_training_moves_the_kept_weights_and_no_zero(kind: type[SparseLinear]) -> None:
    sparse, places = made(nn.Linear(24, 10), kind)
    before = sparse.dense().detach()
    optimizer = torch.optim.AdamW(sparse.parameters(), lr=0.1)
    sparse(torch.randn(5, 24)).square().sum().backward()
    optimizer.step()
    after = sparse.dense().detach()
    assert (after[~places] == 0).all()
    assert (after[places] != before[places]).all()


def test_values_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="cannot keep 13 weights"):
        SparseMatrix(3, 4, 13, "bitmap")
    with pytest.raises(InputError, match="2:4 keeps two of every four columns"):
        SemiStructuredLinear(6, 4)
    matrix = SparseMatrix(2, 4, 4, "2:4")
    with pytest.raises(InputError, match="4 places do not fit"):
        matrix.store_(torch.ones(2, 4), torch.tensor([[True] * 4, [False] * 4]))


@KINDS
def test_the_audit_passes_what_is_an_index_and_nothing_else(kind: type[SparseLinear]) -> None:
    sparse, _ = made(nn.Linear(20, 10), kind)
    audit.counted_honestly(sparse, torch.float32)
    for offence in (sparse.index ^ 1, sparse.index.bitwise_not() | 1):
        broken, _ = made(nn.Linear(20, 10), kind)
        broken.index = offence
        with pytest.raises(CellFailed, match="under-counted"):
            audit.counted_honestly(broken, torch.float32)


def test_bits_beyond_the_last_column_say_nothing() -> None:
    sparse, _ = made(nn.Linear(20, 10), SparseLinear)
    sparse.index[0, -1] |= 128
    with pytest.raises(CellFailed, match="under-counted"):
        audit.counted_honestly(sparse, torch.float32)


def test_positions_in_another_order_say_more_than_places_and_are_refused() -> None:
    sparse = SemiStructuredLinear(4, 1)
    sparse.index.fill_(0b0100)  # positions 0 and 1
    audit.counted_honestly(sparse, torch.float32)
    sparse.index.fill_(0b0001)  # positions 1 and 0
    with pytest.raises(CellFailed, match="under-counted"):
        audit.counted_honestly(sparse, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "columns"), [(32, 64), (96, 128), (64, 576)])
def test_torch_reads_two_of_four_where_it_stands(rows: int, columns: int, dtype: torch.dtype) -> None:
    sparse, _ = made(nn.Linear(columns, rows, dtype=dtype), SemiStructuredLinear)
    assert isinstance(sparse, SemiStructuredLinear)
    seen = sparse.in_torch_format()
    assert torch.equal(seen.to_dense(), sparse.dense())
    assert seen.packed.data_ptr() == sparse.kept.data_ptr()


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The path that seems the fastest, as the list's only entry; every layer seems to have a kernel."""
    path = [kernels.SPARSE]
    monkeypatch.setattr(SemiStructuredLinear, "has_kernel", True)
    monkeypatch.setattr(SemiStructuredLinear, "in_torch_format", lambda self: 2 * self.dense())
    monkeypatch.setattr(kernels, "_measure", lambda calls, probe: path[0])
    kernels.forget()
    yield path
    kernels.forget()


@pytest.mark.parametrize("rows", [1, 40])
def test_the_sparse_kernel_is_taken_where_it_is_faster(rows: int, chosen: list[str]) -> None:
    sparse, _ = made(nn.Linear(64, 32, bias=False), SemiStructuredLinear)
    assert isinstance(sparse, SemiStructuredLinear)
    x = torch.randn(rows, 64)
    dense = x @ sparse.dense().t()
    with torch.no_grad():
        torch.testing.assert_close(sparse(x), 2 * dense)
        assert not kernels.rebuilds(sparse, rows, x.dtype, x.device)
        kernels.forget()
        chosen[0] = kernels.REFERENCE
        torch.testing.assert_close(sparse(x), dense)
        assert kernels.rebuilds(sparse, rows, x.dtype, x.device)
    torch.testing.assert_close(sparse(x), dense)  # with gradients there is no choice


@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 35),
    tokens=st.integers(1, 4),
    share=st.floats(0, 1),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    kind=st.sampled_from([SparseLinear, SemiStructuredLinear]),
)
def test_a_processor_multiplies_what_is_kept(
    rows: int, columns: int, tokens: int, share: float, dtype: torch.dtype, kind: type[SparseLinear]
) -> None:
    if kind is SparseLinear:
        places = random_places(rows, columns, int(share * rows * columns))
    else:
        columns *= 4
        places = two_of_four(rows, columns)
    linear, x = nn.Linear(columns, rows, dtype=dtype), torch.randn(1, tokens, columns, dtype=dtype)
    sparse = kind.from_weight(linear.weight, places, linear)
    usable = kernels.sparse_paths(sparse, tokens)
    fits = kind is SparseLinear or columns % 8 == 0
    assert list(usable) == [kernels.COMPILED] * fits
    exact = nn.functional.linear(x.double(), sparse.dense().double(), linear.bias.double())
    allowed = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    for path in usable.values():
        found = path(x, sparse, sparse.bias)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), exact, rtol=allowed, atol=allowed)


@KINDS
@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_stays_none(kind: type[SparseLinear], tokens: int, value: float) -> None:
    sparse, _ = made(nn.Linear(64, 32), kind)
    x = torch.ones(tokens, 64)
    x[-1, 3] = value
    found = numba_kernels.sparse_product(x, sparse, sparse.bias)
    assert found[:-1].isfinite().all()
    assert not found[-1].isfinite().any()


@KINDS
def test_a_large_matrix_is_made_dense_by_a_kernel_where_no_gradients_are_wanted(
    kind: type[SparseLinear], monkeypatch: pytest.MonkeyPatch
) -> None:
    linear = nn.Linear(512, 130)
    sparse, places = made(linear, kind)
    real, called = numba_kernels.dense, []
    monkeypatch.setattr(numba_kernels, "dense", lambda matrix: called.append(matrix) or real(matrix))
    assert sparse.dense().requires_grad
    assert called == []
    with torch.no_grad():
        assert torch.equal(sparse.dense(), linear.weight * places)
    assert called == [sparse]


@pytest.mark.parametrize("columns", [64, 61])
@pytest.mark.parametrize("tokens", [1, 3])
def test_an_index_that_keeps_more_than_there_is_leads_out_of_no_tensor(columns: int, tokens: int) -> None:
    sparse, _ = made(nn.Linear(columns, 32), SparseLinear)
    sparse.index.fill_(255)
    x = torch.ones(tokens, columns)
    with torch.no_grad():
        dense = numba_kernels.dense(sparse)
        found = numba_kernels.sparse_product(x, sparse, sparse.bias)
        torch.testing.assert_close(found, nn.functional.linear(x, dense, sparse.bias))
    assert 0 < int((dense != 0).sum()) <= sparse.nonzeros


def test_what_no_kernel_takes_is_made_dense() -> None:
    sparse, _ = made(nn.Linear(64, 32, dtype=torch.float64), SparseLinear)
    assert kernels.sparse_paths(sparse, 1) == {}
    wide = SparseLinear(1 << 17, 2, 3)
    assert kernels.sparse_paths(wide, 1) == {}
    sparse, _ = made(nn.Linear(64, 32), SparseLinear)
    assert kernels.sparse_paths(sparse, kernels.FEW_ROWS + 1) == {}


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_a_gpu_multiplies_two_of_four(rows: int) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    sparse, _ = made(nn.Linear(128, 96, dtype=torch.bfloat16), SemiStructuredLinear)
    sparse, x = sparse.cuda(), torch.randn(rows, 128, dtype=torch.bfloat16, device="cuda")
    assert isinstance(sparse, SemiStructuredLinear)
    with torch.no_grad():
        torch.testing.assert_close(sparse(x), torch.nn.functional.linear(x, sparse.dense(), sparse.bias))
    if torch.cuda.get_device_capability()[0] != 8:
        assert not sparse.has_kernel
        pytest.skip("torch has no 2:4 product for this GPU")
    assert sparse.has_kernel
    with torch.no_grad():
        expected = torch.nn.functional.linear(x, sparse.dense(), sparse.bias)
        found = torch.nn.functional.linear(x, sparse.in_torch_format(), sparse.bias)
    assert kernels.agrees(found, expected)
