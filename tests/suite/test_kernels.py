"""Every path to a product with packed weights gives what dequantizing gives."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedModel

from suite import kernels
from suite.conformance import tiny
from suite.grids import Grid
from suite.packed_layers import PackedEmbedding, PackedLinear
from suite.packing import tile_width
from suite.run import audit
from suite.run.environment import conditions

DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
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
    return torch.randn(2, tokens, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


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


@given(SIZES, SIZES, TOKENS, DTYPES, SEEDS)
def test_eight_bits_per_channel(rows: int, columns: int, tokens: int, dtype: torch.dtype, seed: int) -> None:
    matrix = packed(rows, columns, 8, columns, True, dtype, seed)
    allowed = 1e-5 if dtype == torch.float32 else 2e-2
    names = assert_every_path_agrees(matrix, activations(tokens, columns, dtype, seed), allowed)
    assert "scale the output" in names


@pytest.mark.parametrize(("rows", "columns"), [(32, 32), (64, 96), (96, 576)])
@pytest.mark.parametrize("tokens", [1, 3, 8])
def test_torch_has_a_kernel_for_eight_bits_in_whole_vectors(rows: int, columns: int, tokens: int) -> None:
    matrix = packed(rows, columns, 8, columns, True, torch.bfloat16)
    names = assert_every_path_agrees(matrix, activations(tokens, columns, torch.bfloat16), 2e-2)
    assert "torch int8" in names


@pytest.mark.parametrize(
    ("bits", "columns", "group", "symmetric", "dtype"),
    [
        (4, 24, 8, True, torch.bfloat16),
        (4, 21, 8, True, torch.float32),  # the last group is shorter
        (4, 21, 21, True, torch.float32),  # odd
        (3, 24, 8, True, torch.float32),
        (2, 24, 8, False, torch.bfloat16),
        (8, 24, 8, True, torch.float32),
        (8, 24, 24, False, torch.float32),
        (8, 24, 24, True, torch.float16),
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


def test_the_torch_kernel_is_kept_from_rows_that_end_inside_a_vector() -> None:
    for rows, columns in ((37, 32), (32, 21), (32, 48)):
        matrix = packed(rows, columns, 8, columns, True, torch.bfloat16)
        assert "torch int8" not in kernels.paths(matrix, torch.bfloat16, CPU)


@pytest.mark.parametrize(("bits", "group", "columns"), [(4, 32, 64), (3, 64, 70), (8, 64, 64)])
@pytest.mark.parametrize("tiled", [False, True])
def test_a_matrix_is_rebuilt_in_parts(
    bits: int, group: int, columns: int, tiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix, x = packed(192, columns, bits, group, True, torch.float32), activations(3, columns, torch.float32)
    if tiled and not matrix.can_be_tiled:
        pytest.skip("no tiles of this format here")
    matrix.lay_out_(tiled)
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


needs_tiles = pytest.mark.skipif(not tile_width(), reason="torch's 4-bit kernel has no known tiles here")


@needs_tiles
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns", "group"), [(64, 64, 32), (192, 576, 64), (128, 256, 128)])
def test_torch_has_a_kernel_for_four_bits_in_whole_tiles(
    rows: int, columns: int, group: int, dtype: torch.dtype, symmetric: bool
) -> None:
    matrix = packed(rows, columns, 4, group, symmetric, dtype)
    saved, values = matrix.state_dict()["packed"].clone(), matrix.dequantize(dtype)
    allowed = 1e-5 if dtype == torch.float32 else 2e-2
    for tokens in (1, 3, 8):
        names = assert_every_path_agrees(matrix, activations(tokens, columns, dtype), allowed)
        assert names == {kernels.REFERENCE, kernels.TILES}
    assert matrix.tiled
    assert not torch.equal(matrix.packed, saved)
    assert torch.equal(matrix.dequantize(dtype), values)
    assert torch.equal(matrix.state_dict()["packed"], saved)


@needs_tiles
@pytest.mark.parametrize(("bits", "group"), [(8, 576), (4, 64), (3, 64)])
def test_the_last_positions_of_a_batch_lie_apart_and_are_multiplied_all_the_same(
    bits: int, group: int
) -> None:
    matrix = packed(192, 576, bits, group, True, torch.bfloat16)
    last = activations(5, 576, torch.bfloat16)[:, -1:]
    assert not last.reshape(-1, 576).is_contiguous()
    assert_every_path_agrees(matrix, last, 2e-2)


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


def test_float_zeros_are_offsets_of_the_four_bit_kernel() -> None:
    with torch.no_grad():
        matrix = PackedLinear(64, 64, 4, 32, symmetric=False, grid="float-zero")
        codes = torch.randint(0, 16, (64, 64), generator=torch.Generator().manual_seed(0))
        matrix.store_(codes, torch.rand(64, 2) + 0.5, 7 + torch.rand(64, 2))
    assert kernels.TILES in assert_every_path_agrees(matrix, activations(3, 64, torch.float32), 1e-5)


@needs_tiles
def test_tiles_are_left_where_a_matrix_moves_or_is_filled_anew() -> None:
    matrix, other = (packed(64, 64, 4, 32, True, torch.float32, seed) for seed in (0, 1))
    before, anew = matrix.packed.clone(), other.packed.clone()
    matrix.lay_out_(tiled=True)
    assert torch.equal(matrix.to(torch.bfloat16).packed, before)
    matrix.lay_out_(tiled=True)
    matrix.load_state_dict(other.state_dict())
    assert not matrix.tiled
    assert torch.equal(matrix.packed, anew)
    matrix.lay_out_(tiled=True)
    matrix.store_(torch.zeros(64, 64), matrix.scales)
    assert not matrix.tiled
    assert not matrix.packed.any()


@needs_tiles
def test_a_table_in_tiles_is_still_looked_up() -> None:
    embedding = nn.Embedding(128, 64)
    table = PackedEmbedding.from_embedding(embedding, 4, 32, True)
    ids = torch.tensor([[0, 127, 31], [32, 5, 64]])
    before = table(ids)
    table.lay_out_(tiled=True)
    assert torch.equal(table(ids), before)


@pytest.mark.parametrize(
    ("rows", "columns", "group"), [(64, 72, 36), (96, 64, 32), (64, 80, 32), (64, 64, 16)]
)
def test_the_four_bit_kernel_is_kept_from_what_it_has_no_tiles_for(
    rows: int, columns: int, group: int
) -> None:
    matrix = packed(rows, columns, 4, group, True, torch.float32)
    assert set(kernels.paths(matrix, torch.float32, CPU)) == {kernels.REFERENCE}


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


SLOW_REFERENCE = {"dequantize": 1.0, "scale the output": 0.5}
SLIGHTLY_FASTER = {"dequantize": 1.0, "scale the output": 0.9}


def test_the_fastest_path_is_taken_and_can_be_told(clock: Callable[[dict[str, float]], None]) -> None:
    clock(SLOW_REFERENCE)
    matrix, x = packed(10, 21, 8, 21, True, torch.float32), activations(1, 21, torch.float32)[:1]
    with torch.no_grad():
        got = matrix(x)
        assert torch.equal(got, kernels.scale_output(x, matrix, matrix.bias))
    assert kernels.chosen() == {
        "8 bits, channel, symmetric, 10×21, float32, cpu, up to 1 rows": "scale the output"
    }
    assert conditions("cpu", 1, "float32")["kernels"] == kernels.chosen()


@needs_tiles
@pytest.mark.parametrize("gain", [True, False])
def test_a_matrix_lies_in_tiles_where_that_is_faster(
    clock: Callable[[dict[str, float]], None], gain: bool
) -> None:
    clock({"dequantize": 1.0, "torch int4": 0.5 if gain else 2.0})
    matrix = packed(64, 64, 4, 32, True, torch.float32)
    saved, x = matrix.packed.clone(), activations(1, 64, torch.float32)[:1]
    with torch.no_grad():
        got = matrix(x)
        assert matrix.tiled == gain
        assert torch.equal(matrix.packed, saved) != gain
        torch.testing.assert_close(got, kernels.dequantize(x, matrix, matrix.bias))


def test_a_small_gain_does_not_decide(clock: Callable[[dict[str, float]], None]) -> None:
    clock(SLIGHTLY_FASTER)
    matrix = packed(10, 21, 8, 21, True, torch.float32)
    with torch.no_grad():
        matrix(activations(1, 21, torch.float32))
    assert set(kernels.chosen().values()) == {kernels.REFERENCE}


def test_each_number_of_rows_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []
    monkeypatch.setattr(kernels, "_measure", lambda calls, probe: measured.append(len(probe)) or "dequantize")
    matrix = packed(10, 21, 8, 21, True, torch.float32)
    with torch.no_grad():
        for rows in (1, 2, 4, 3, 1, 16, 5, 17, 200):
            matrix(torch.randn(rows, 21))
    assert measured == [1, 4, 16]


def test_a_path_that_is_wrong_is_never_taken(
    monkeypatch: pytest.MonkeyPatch, clock: Callable[[dict[str, float]], None]
) -> None:
    clock({"dequantize": 1.0, "scale the output": 0.0001})

    def wrong(x: Tensor, matrix: PackedLinear, bias: Tensor | None) -> Tensor:
        return 1.05 * kernels.dequantize(x, matrix, bias)

    monkeypatch.setattr(kernels, "scale_output", wrong)
    matrix, x = packed(10, 21, 8, 21, True, torch.float32), activations(1, 21, torch.float32)
    with torch.no_grad():
        assert torch.equal(matrix(x), kernels.dequantize(x, matrix, matrix.bias))


def test_the_reference_is_kept_to_where_it_is_asked_for_or_gradients_are(
    clock: Callable[[dict[str, float]], None],
) -> None:
    clock(SLOW_REFERENCE)
    matrix, x = packed(10, 21, 8, 21, True, torch.float32), activations(1, 21, torch.float32)
    with torch.no_grad(), kernels.reference():
        assert torch.equal(matrix(x), kernels.dequantize(x, matrix, matrix.bias))
    assert matrix(x.requires_grad_()).requires_grad
    assert matrix.to("meta")(x.to("meta")).shape == (2, 1, 10)
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
    assert set(kernels.chosen().values()) == {"scale the output"}


@given(SIZES, SIZES, st.integers(1, 3000), SEEDS, st.sampled_from([1 << 20, 10 << 10]))
def test_integer_products_are_exact(left: int, right: int, columns: int, seed: int, at_once: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Nearly all of one sign, so that sums pass what float32 holds exactly.
    a = torch.randint(100, 128, (left, columns), generator=generator).to(torch.int8)
    b = torch.randint(-128, -99, (right, columns), generator=generator).to(torch.int8)
    expected = (a.long() @ b.long().t()).to(torch.int32)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_AT_ONCE", at_once)
        assert torch.equal(kernels.float_product(a, b), expected)
        assert torch.equal(kernels.integer_product(a, b), expected)


def test_a_faster_integer_product_of_torch_is_taken_where_it_is_exact(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels, "_has_integer_product", lambda left, right: True)
    times = iter([1.0, 0.1])
    monkeypatch.setattr(kernels, "_seconds", lambda call, probe: next(times))
    a, b = (torch.randint(-128, 128, (n, 21), dtype=torch.int8) for n in (3, 7))
    with torch.no_grad():
        assert torch.equal(kernels.integer_product(a, b), (a.int() @ b.int().t()))
    assert list(kernels.chosen().values()) == ["torch int"]
