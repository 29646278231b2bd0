"""Every path to a product with packed weights gives what dequantizing gives."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedModel

from suite import kernels, numba_kernels
from suite.conformance import tiny
from suite.grids import Grid
from suite.packed_layers import PackedLinear
from suite.packing import codes_in_unit
from suite.run import audit
from suite.run.environment import conditions

DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
SIZES, TOKENS, SEEDS = st.integers(1, 90), st.integers(1, 5), st.integers(0, 999)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _measured_anew() -> Iterator[None]:
    kernels.forget()
    yield
    kernels.forget()


def packed(
    rows: int, columns: int, bits: int, group: int, symmetric: bool, dtype: torch.dtype, seed: int = 0
) -> PackedLinear:
    linear = nn.Linear(columns, rows, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(rows, columns, generator=generator))
        linear.bias.copy_(torch.randn(rows, generator=generator))
    return PackedLinear.from_linear(linear, bits, group, symmetric)


def activations(tokens: int, columns: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    batch = 1 if tokens == 1 else 2
    return torch.randn(batch, tokens, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_every_path_agrees(matrix: PackedLinear, x: Tensor, allowed: float) -> set[str]:
    # The size of the terms, not of a sum that may cancel, is what rounding is relative to.
    wide = matrix.dequantize(torch.float32)
    terms = x.float().abs() @ wide.abs().t()
    bias = None if matrix.bias is None else matrix.bias.detach()
    exact = kernels.dequantize(x.float(), matrix, None if bias is None else bias.float())
    usable = kernels.paths(matrix, x.dtype, CPU)
    with torch.no_grad():
        for name, path in usable.items():
            got = path(x, matrix, bias)
            assert got.dtype == x.dtype
            assert got.shape == exact.shape
            size = terms if bias is None else terms + bias.float().abs()
            assert ((got.float() - exact).abs() <= allowed * size + 1e-7).all(), name
    return set(usable)


FORMATS = pytest.mark.parametrize(
    ("bits", "group", "columns", "symmetric", "grid"),
    [
        (8, 576, 576, True, "uniform"),
        (8, 64, 576, False, "uniform"),
        (4, 64, 576, True, "uniform"),
        (4, 32, 96, False, "uniform"),
        (4, 64, 576, True, "normal-float"),
        (4, 64, 576, False, "float-zero"),
        (3, 64, 576, True, "uniform"),
        (3, 32, 96, False, "uniform"),
        (2, 16, 64, False, "uniform"),
        (3, 32, 70, False, "uniform"),  # the last group is shorter, and no unit of codes is whole
    ],
)


@FORMATS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 3])
def test_every_format_has_a_kernel_on_a_processor(
    bits: int, group: int, columns: int, symmetric: bool, grid: Grid, dtype: torch.dtype, tokens: int
) -> None:
    matrix = of_format(bits, group, columns, symmetric, grid)
    allowed = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
    names = assert_every_path_agrees(matrix, activations(tokens, columns, dtype), allowed)
    assert (kernels.COMPILED in names) == (columns != 70)


@given(
    SIZES,
    st.integers(1, 6),
    st.integers(1, 6),
    st.sampled_from([2, 3, 4, 8]),
    TOKENS,
    st.booleans(),
    st.booleans(),
    SEEDS,
)
def test_groups_of_any_number_of_units_are_multiplied(
    rows: int, groups: int, units: int, bits: int, tokens: int, symmetric: bool, biased: bool, seed: int
) -> None:
    group = units * codes_in_unit(bits)
    matrix = packed(rows, groups * group, bits, group, symmetric, torch.float32, seed)
    matrix.bias = matrix.bias if biased else None
    names = assert_every_path_agrees(matrix, activations(tokens, groups * group, torch.float32, seed), 1e-5)
    assert kernels.COMPILED in names


@FORMATS
@given(SEEDS, st.sampled_from([torch.float16, torch.bfloat16]), st.booleans())
def test_sums_are_rounded_to_the_dtype_of_activations_as_torch_does(
    bits: int, group: int, columns: int, symmetric: bool, grid: Grid, seed: int, dtype: torch.dtype, no: bool
) -> None:
    matrix = of_format(bits, group, columns, symmetric, grid)
    if not numba_kernels.can_multiply(matrix):
        return
    x = activations(1, columns, dtype, seed)
    x[..., 3] = float("nan") if no else x[..., 3]
    bias = torch.randn(193).to(dtype)
    wide = numba_kernels.product(x.float(), matrix, bias)
    found = numba_kernels.product(x, matrix, bias)
    torch.testing.assert_close(found, wide.to(dtype), rtol=0, atol=0, equal_nan=True)


@FORMATS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_and_zeros_of_another_dtype_are_read_as_well(
    bits: int, group: int, columns: int, symmetric: bool, grid: Grid, dtype: torch.dtype
) -> None:
    matrix = of_format(bits, group, columns, symmetric, grid)
    matrix.scales = matrix.scales.to(dtype)
    if grid == "float-zero":
        matrix.zeros = matrix.zeros.to(dtype)
    assert_every_path_agrees(matrix, activations(1, columns, torch.float32), 1e-5)


def test_scales_at_the_ends_of_float16_are_read_as_they_are() -> None:
    matrix, x = packed(6, 64, 4, 32, True, torch.float32), activations(1, 64, torch.float32)
    ends = torch.tensor([0.0, -0.0, 2.0**-24, -(2.0**-15), 65504.0, float("inf")])
    matrix.scales.copy_(ends.unsqueeze(-1))
    with torch.no_grad():
        found, expected = (
            path(x, matrix, None)[0, 0] for path in kernels.paths(matrix, x.dtype, CPU).values()
        )
    torch.testing.assert_close(found[:5], expected[:5], rtol=1e-5, atol=0)
    assert not found[5].isfinite()


def test_what_does_not_fit_a_kernel_or_lies_elsewhere_is_refused() -> None:
    matrix = packed(10, 64, 8, 64, True, torch.float32)
    for product in (numba_kernels.product, numba_kernels.integer_product):
        with pytest.raises(RuntimeError, match="128 features meet a matrix of 64 columns"):
            product(torch.ones(1, 128), matrix)
        with pytest.raises(RuntimeError, match="this is meta"):
            product(torch.ones(1, 64), copy.deepcopy(matrix).to("meta"))


@pytest.mark.parametrize("threads", [1, 2, 64])
def test_the_kernel_takes_as_many_threads_as_torch_or_as_there_are(threads: int) -> None:
    before = torch.get_num_threads()
    matrix, x = packed(70, 64, 4, 32, True, torch.float32), activations(1, 64, torch.float32)
    try:
        torch.set_num_threads(threads)
        got = numba_kernels.product(x, matrix, matrix.bias)
        assert numba.get_num_threads() == min(threads, numba.config.NUMBA_NUM_THREADS)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(got, numba_kernels.product(x, matrix, matrix.bias), rtol=0, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("tokens", [1, 3])
@FORMATS
def test_what_is_no_number_stays_none(
    bits: int, group: int, columns: int, symmetric: bool, grid: Grid, tokens: int, value: float
) -> None:
    matrix = of_format(bits, group, columns, symmetric, grid)
    x = activations(tokens, columns, torch.float32)[0]
    x[-1, 5] = value
    with torch.no_grad():
        for path in kernels.paths(matrix, x.dtype, CPU).values():
            found = path(x, matrix, None)
            assert not found[-1].isfinite().any()
            assert found[:-1].isfinite().all()


def test_the_first_kernel_of_a_process_leaves_torch_its_number_of_threads() -> None:
    script = """
import torch
torch.set_num_threads(1)
from suite import numba_kernels
from suite.packed_layers import PackedLinear
numba_kernels.product(torch.ones(1, 64), PackedLinear(64, 64, 4, 32), None)
print(torch.get_num_threads())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1"]


@pytest.mark.slow
def test_a_second_process_compiles_nothing(tmp_path: Path) -> None:
    script = """
import torch
from torch import nn
from suite import numba_kernels
from suite.packed_layers import PackedLinear
from suite.sparse_layers import SparseLinear
matrix, sparse, x = PackedLinear(64, 9, 2, 32), SparseLinear(64, 9, 3), torch.ones(1, 64)
with torch.no_grad():
    numba_kernels.product(x, matrix)
    numba_kernels.integer_product(x, PackedLinear(64, 9, 8, 64))
    numba_kernels.sparse_product(x, sparse)
    numba_kernels.dense(sparse)
    numba_kernels.dequantize(matrix, torch.float32, matrix.packed, matrix.scales, None)
used = [numba_kernels._kernel(2, False), numba_kernels._rebuilding_kernel(2, False, 0),
        numba_kernels._sum_integers, numba_kernels._multiply_sparse, numba_kernels._make_dense]
print([sum(kernel.stats.cache_misses.values()) for kernel in used])
"""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", script]
    first, second = (
        subprocess.run(command, env=environment, capture_output=True, text=True, check=True) for _ in range(2)
    )
    assert first.stdout.strip() == "[1, 1, 1, 1, 1]"
    assert second.stdout.strip() == "[0, 0, 0, 0, 0]"


def test_where_no_folder_can_be_written_kernels_are_compiled_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("numba.core.caching.CacheImpl._locator_classes", [])
    numba_kernels._kernel.cache_clear()
    matrix, x = packed(9, 64, 2, 32, True, torch.float32), activations(1, 64, torch.float32)
    try:
        assert kernels.COMPILED in assert_every_path_agrees(matrix, x, 1e-5)
    finally:
        numba_kernels._kernel.cache_clear()


@pytest.mark.parametrize(
    ("bits", "columns", "group", "symmetric", "dtype"),
    [
        (4, 21, 8, True, torch.float32),  # the last group is shorter
        (4, 21, 21, True, torch.float32),  # odd
        (4, 24, 12, True, torch.float32),  # a group ends inside a unit
        (4, 24, 8, True, torch.float64),
    ],
)
def test_other_formats_are_dequantized(
    bits: int, columns: int, group: int, symmetric: bool, dtype: torch.dtype
) -> None:
    matrix = packed(10, columns, bits, group, symmetric, dtype)
    assert set(kernels.paths(matrix, dtype, CPU)) == {kernels.REFERENCE}
    with torch.no_grad():
        matrix(torch.randn(1, columns, dtype=dtype))
    assert kernels.chosen() == {}


@FORMATS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [slice(None), slice(3, 70), torch.tensor([5, 5, 192, 0])])
def test_a_processor_rebuilds_the_same_weights_with_a_kernel_as_without(
    bits: int,
    group: int,
    columns: int,
    symmetric: bool,
    grid: Grid,
    dtype: torch.dtype,
    rows: Tensor | slice,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    matrix = of_format(bits, group, columns, symmetric, grid)
    matrix.scales[7, 0], matrix.scales[8, -1] = float("nan"), float("inf")
    assert kernels.rebuilders(matrix, 4, dtype) is None  # so few weights are rebuilt by torch
    expected = matrix.dequantize(dtype, rows)
    monkeypatch.setattr(numba_kernels, "_LEAST_REBUILT", 1)
    assert (kernels.rebuilders(matrix, 4, dtype) is numba_kernels) == (columns != 70)
    found = matrix.dequantize(dtype, rows)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@given(st.integers(1, 4), st.integers(1, 4), st.sampled_from([2, 3, 4, 8]), DTYPES, st.booleans(), SEEDS)
def test_groups_of_any_number_of_units_are_rebuilt(
    groups: int, units: int, bits: int, dtype: torch.dtype, symmetric: bool, seed: int
) -> None:
    group = units * codes_in_unit(bits)
    matrix = packed(9, groups * group, bits, group, symmetric, dtype, seed)
    zeros = None if symmetric else matrix.zeros
    found = numba_kernels.dequantize(matrix, dtype, matrix.packed, matrix.scales, zeros)
    assert torch.equal(found, matrix.dequantize(dtype))


@pytest.mark.parametrize(("bits", "group", "columns"), [(4, 32, 64), (3, 64, 70), (8, 64, 64)])
def test_a_matrix_is_rebuilt_in_parts(
    bits: int, group: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix, x = packed(192, columns, bits, group, True, torch.float32), activations(3, columns, torch.float32)
    whole = kernels.dequantize(x, matrix, matrix.bias)
    sizes: list[int] = []
    real = type(matrix).dequantize

    def dequantize(self: PackedLinear, *arguments: Any) -> Tensor:
        values = real(self, *arguments)
        sizes.append(len(values))
        return values

    monkeypatch.setattr(PackedLinear, "dequantize", dequantize)
    monkeypatch.setattr(kernels, "_AT_ONCE", 128 * columns + 1)
    torch.testing.assert_close(kernels.dequantize(x, matrix, matrix.bias), whole)
    assert sizes == [128, 64]


@pytest.mark.parametrize(("bits", "group"), [(8, 576), (4, 64), (3, 64)])
def test_the_last_positions_of_a_batch_lie_apart_and_are_multiplied_all_the_same(
    bits: int, group: int
) -> None:
    matrix = packed(192, 576, bits, group, True, torch.bfloat16)
    last = activations(5, 576, torch.bfloat16)[:, -1:]
    assert not last.reshape(-1, 576).is_contiguous()
    assert_every_path_agrees(matrix, last, 2e-2)


def of_format(bits: int, group: int, columns: int, symmetric: bool, grid: Grid) -> PackedLinear:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        matrix = PackedLinear(columns, 193, bits, group, symmetric, grid=grid)
        if grid == "float-zero":
            codes = torch.randint(0, 1 << bits, (193, columns), generator=generator)
            scales = torch.rand(matrix.scales.shape, generator=generator) + 0.5
            matrix.store_(codes, scales, 7 + torch.rand(scales.shape, generator=generator))
        else:
            matrix.quantize_(torch.randn(193, columns, generator=generator))
    return matrix


@pytest.mark.gpu
@FORMATS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_rebuilds_the_same_weights(
    bits: int, group: int, columns: int, symmetric: bool, grid: Grid, dtype: torch.dtype
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    matrix = of_format(bits, group, columns, symmetric, grid)
    expected, some = matrix.dequantize(dtype), torch.tensor([7, 0, 192, 7])
    on_gpu = copy.deepcopy(matrix).cuda()
    assert kernels.fused(on_gpu.packed.device) is not None
    assert torch.equal(on_gpu.dequantize(dtype).cpu(), expected)
    assert torch.equal(on_gpu.dequantize(dtype, some.cuda()).cpu(), expected[some])


@pytest.mark.gpu
@FORMATS
@pytest.mark.parametrize("tokens", [1, 2, 3, 16, 17, 64])
def test_every_path_of_a_gpu_agrees(
    bits: int, group: int, columns: int, symmetric: bool, grid: Grid, tokens: int
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    matrix = of_format(bits, group, columns, symmetric, grid).cuda()
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(1)).bfloat16().cuda()
    exact = x.float() @ matrix.dequantize(torch.bfloat16).float().t()
    usable = kernels.paths(matrix, x.dtype, x.device)
    assert (kernels.FUSED in usable) == (columns != 70)
    with torch.no_grad():
        for name, path in usable.items():
            gap = (path(x, matrix, None).float() - exact).norm() / exact.norm()
            assert gap < 6e-3, name


@pytest.mark.gpu
def test_a_recorded_graph_takes_the_paths_that_were_measured() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    matrix = packed(192, 576, 4, 64, True, torch.bfloat16).cuda()
    x = activations(1, 576, torch.bfloat16)[:1].cuda()
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode():
        expected = matrix(x)
        with torch.cuda.graph(graph):
            found = matrix(x)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(found, expected)
        kernels.forget()
        with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
            matrix(x)
        assert kernels.chosen() == {}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, float]], None]:
    """Says how many seconds each path seems to take."""

    def set_to(seconds: dict[str, float]) -> None:
        def measured(calls: dict[str, Callable[[Tensor], Tensor]], probe: Tensor) -> str:
            by_call = {id(call): seconds[name] for name, call in calls.items()}
            monkeypatch.setattr(kernels, "_seconds", lambda call, probe: by_call[id(call)])
            return real(calls, probe)

        monkeypatch.setattr(kernels, "_measure", measured)

    real = kernels._measure
    return set_to


SLOW_REFERENCE = {"dequantize": 1.0, "numba": 0.5}
SLIGHTLY_FASTER = {"dequantize": 1.0, "numba": 0.9}


def test_the_fastest_path_is_taken_and_can_be_told(clock: Callable[[dict[str, float]], None]) -> None:
    clock(SLOW_REFERENCE)
    matrix, x = packed(10, 20, 8, 20, True, torch.float32), activations(1, 20, torch.float32)
    with torch.no_grad():
        got = matrix(x)
        assert torch.equal(got, numba_kernels.product(x, matrix, matrix.bias))
    assert kernels.chosen() == {"8 bits, channel, symmetric, 10×20, float32, cpu, up to 1 rows": "numba"}
    assert conditions("cpu", 1, "float32")["kernels"] == kernels.chosen()


def test_a_small_gain_does_not_decide(clock: Callable[[dict[str, float]], None]) -> None:
    clock(SLIGHTLY_FASTER)
    matrix = packed(10, 20, 8, 20, True, torch.float32)
    with torch.no_grad():
        matrix(activations(1, 20, torch.float32))
    assert set(kernels.chosen().values()) == {kernels.REFERENCE}


def test_each_number_of_rows_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []
    monkeypatch.setattr(kernels, "_measure", lambda calls, probe: measured.append(len(probe)) or "dequantize")
    matrix = packed(10, 20, 8, 20, True, torch.float32)
    with torch.no_grad():
        for rows in (1, 2, 4, 3, 1, 16, 5, 17, 64, 65, 200):
            matrix(torch.randn(rows, 20))
    assert measured == [1, 4, 16, 64]


def test_a_path_that_is_wrong_is_never_taken(
    monkeypatch: pytest.MonkeyPatch, clock: Callable[[dict[str, float]], None]
) -> None:
    clock({"dequantize": 1.0, "numba": 0.0001})

    def wrong(x: Tensor, matrix: PackedLinear, bias: Tensor | None) -> Tensor:
        return 1.05 * kernels.dequantize(x, matrix, bias)

    monkeypatch.setattr(numba_kernels, "product", wrong)
    matrix, x = packed(10, 20, 8, 20, True, torch.float32), activations(1, 20, torch.float32)
    with torch.no_grad():
        assert torch.equal(matrix(x), kernels.dequantize(x, matrix, matrix.bias))


def test_the_reference_is_kept_to_where_it_is_asked_for_or_gradients_are(
    clock: Callable[[dict[str, float]], None],
) -> None:
    clock(SLOW_REFERENCE)
    matrix, x = packed(10, 20, 8, 20, True, torch.float32), activations(1, 20, torch.float32)
    with torch.no_grad(), kernels.reference():
        assert torch.equal(matrix(x), kernels.dequantize(x, matrix, matrix.bias))
    assert matrix(x.requires_grad_()).requires_grad
    assert matrix.to("meta")(x.to("meta")).shape == (1, 1, 10)
    assert kernels.chosen() == {}


def test_logits_for_the_audit_and_compression_are_made_by_the_reference(
    llama: PreTrainedModel, clock: Callable[[dict[str, float]], None]
) -> None:
    clock(SLOW_REFERENCE)
    tiny.compress(llama, "rtn-int8")
    ids = tiny.token_ids(1, 2)
    audit.logits_of(llama, ids)
    assert kernels.chosen() == {}
    tiny.logits_of(llama, ids)
    assert set(kernels.chosen().values()) == {"numba"}


@given(SIZES, SIZES, st.integers(1, 3000), DTYPES, SEEDS)
def test_integer_products_are_the_same_to_the_bit(
    tokens: int, rows: int, columns: int, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Nearly all of one sign, so that sums pass what float32 holds exactly.
    x = torch.randint(100, 128, (tokens, columns), generator=generator)
    x[:, 0] = 127  # so that they are rounded to themselves
    matrix = PackedLinear(columns, rows, 8, columns)
    matrix.packed.copy_(torch.randint(0, 30, (rows, columns), generator=generator))
    matrix.scales.copy_(torch.rand(rows, 1, generator=generator))
    sums = x @ kernels.signed_codes(matrix).long().t()
    expected = sums.float() * matrix.scales.float().squeeze(-1)
    with torch.no_grad():
        assert torch.equal(kernels.integer_product(x.to(dtype), matrix), expected)
        with kernels.reference():
            assert torch.equal(kernels.integer_product(x.to(dtype), matrix), expected)
    x = torch.randn(tokens, columns, generator=generator).to(dtype)
    found = [product(x) for product in integer_products(matrix)]
    assert all(torch.equal(one, found[0]) for one in found)


def integer_products(matrix: PackedLinear) -> list[Callable[[Tensor], Tensor]]:
    return [
        lambda x: numba_kernels.integer_product(x, matrix),
        kernels._scaled(kernels.float_product, matrix),
        kernels._scaled(kernels.torch_int, matrix),
    ]


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_integer_product_makes_a_number_of_what_is_none(tokens: int, value: float) -> None:
    matrix = PackedLinear.from_linear(nn.Linear(40, 9), 8, 40, True)
    x = activations(tokens, 40, torch.float32)[0]
    x[-1, 5] = value
    for product in integer_products(matrix):
        found = product(x)
        assert found[:-1].isfinite().all()
        assert not found[-1].isfinite().any()


def test_tokens_of_zeros_stay_zero_in_every_integer_product() -> None:
    matrix = PackedLinear.from_linear(nn.Linear(40, 9), 8, 40, True)
    for product in integer_products(matrix):
        assert torch.equal(product(torch.zeros(2, 40)), torch.zeros(2, 9))


def test_a_faster_integer_product_of_torch_is_taken_where_it_is_exact(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels, "_has_integer_product", lambda x, matrix: True)
    times = iter([1.0, 0.1])
    monkeypatch.setattr(kernels, "_seconds", lambda call, probe: next(times))
    matrix, x = PackedLinear(21, 7, 8, 21), activations(1, 21, torch.float32)[0]
    matrix.packed.random_(0, 256)
    matrix.scales.fill_(0.5)
    with torch.no_grad():
        found = kernels.integer_product(x, matrix)
    assert torch.equal(found, kernels._scaled(kernels.torch_int, matrix)(x))
    assert list(kernels.chosen().values()) == ["torch int"]
