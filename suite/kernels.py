"""Products of activations with packed integers or kept weights, each by the fastest path measured here.

The reference path makes the matrix dense and multiplies. For a few rows, as in decoding, others can be
faster, and which one depends on the processor: they are timed once per format, shape, dtype, device
and number of rows. A path that does not agree with the reference is never taken. Nothing is stored
twice: every path reads the packed tensors that the checkpoint holds.
A CUDA graph is recorded of the paths that were measured before it; the reference is taken for others.

Paths differ in rounding. Where numbers must repeat bit for bit (compressing, and comparing a reload
with what was saved), `reference()` keeps to the dequantizing path, so weights are compared and not
kernels. It is also the path of training, of torch.compile, of tensors without data and of more than
`FEW_ROWS` rows, where dequantizing costs little beside the product; and where rebuilt weights are kept
(`suite.rebuilding`), so that what is scored does not hang on which kernel was the faster.
"""

from __future__ import annotations

import functools
import importlib.util
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from torch.nn import functional

from suite import numba_kernels
from suite.bfloat16 import widens
from suite.rebuilding import kept_weight

if TYPE_CHECKING:
    from suite.packed_layers import PackedMatrix
    from suite.sparse_layers import SemiStructuredLinear, SparseLinear

FEW_ROWS = 64
"""Above, the reference path is taken unmeasured."""

REFERENCE = "dequantize"
COMPILED = "numba"
FUSED = "triton"
FLOATS = "float"
INTEGERS = "torch int"
SPARSE = "torch 2:4"
_BUCKETS = (1, 4, 16, FEW_ROWS)
_MANY_ROWS = 256
"""Stands for all numbers of rows above, for products that have other paths there too."""
_REPEATS = 3
_CALLS = {"cpu": 1, "cuda": 20}
"""Calls between two looks at the clock: a GPU works them off while the next ones are being launched."""
_MUST_GAIN = 0.8
"""A path replaces another when it takes at most this share of its time: noise must not decide."""

_EXACT_COLUMNS = 1024
"""Sums of so many products of two 8-bit integers stay below 2²⁴, so float32 holds them exactly."""

_SMALLEST = torch.finfo(torch.float32).tiny

_AT_ONCE = 1 << 20
"""Weights that a processor rebuilds at a time: larger tensors get fresh memory from the system each time."""

_LEAST_ROWS = 32
"""Of a CUDA product of integers; torch refuses 16 and fewer."""

Path = Callable[[Tensor, "PackedMatrix", Tensor | None], Tensor]
SparsePath = Callable[[Tensor, "SparseLinear", Tensor | None], Tensor]
Product = Callable[[Tensor], Tensor]
Key = tuple[str, torch.dtype, torch.device, int]
"""Format and shape, dtype of what is multiplied and its device, and the most rows of activations."""
_chosen: dict[Key, str] = {}
_forced = 0


def linear(x: Tensor, matrix: PackedMatrix, bias: Tensor | None = None) -> Tensor:
    """`x @ Wᵀ + bias` (… × rows of the matrix) for `x` (… × its columns), in the dtype of `x`."""
    kept = kept_weight(matrix, x.dtype, lambda: matrix.dequantize(x.dtype))
    if kept is not None:
        return functional.linear(x, kept, bias)
    rows = x.numel() // max(x.shape[-1], 1)
    if not _free_to_choose(x) or not 0 < rows <= FEW_ROWS:
        return dequantize(x, matrix, bias)
    key = _key(matrix.form, rows, x)
    if key in _chosen:
        return _PATHS[_chosen[key]](x, matrix, bias)
    usable = paths(matrix, x.dtype, x.device)
    if len(usable) == 1 or _recorded(x):
        return dequantize(x, matrix, bias)

    def timed(path: Path) -> Product:
        return lambda probe: path(probe, matrix, bias)

    name = _chosen[key] = _fastest({name: timed(path) for name, path in usable.items()}, x)
    return usable[name](x, matrix, bias)


def sparse_linear(x: Tensor, layer: SparseLinear, bias: Tensor | None) -> Tensor:
    """`x @ Wᵀ + bias` for a matrix of which some weights are kept; 2:4 has a path for many rows too."""
    kept = kept_weight(layer, layer.kept.dtype, layer.dense)
    if kept is not None:
        return functional.linear(x, kept, bias)
    rows = x.numel() // x.shape[-1]
    if rows and _free_to_choose(x):
        usable = sparse_paths(layer, rows)
        key = _key(layer.form, rows, x)
        if usable and key not in _chosen and not _recorded(x):
            dense: dict[str, SparsePath] = {REFERENCE: made_dense}
            timed = {name: _with(path, layer, bias) for name, path in (dense | usable).items()}
            _chosen[key] = _fastest(timed, x)
        if _chosen.get(key, REFERENCE) in usable:
            return usable[_chosen[key]](x, layer, bias)
    return made_dense(x, layer, bias)


def sparse_paths(layer: SparseLinear, rows: int) -> dict[str, SparsePath]:
    """The paths that multiply so many rows of activations with `layer` without making it dense."""
    if layer.has_kernel:
        return {SPARSE: torch_sparse}
    on_processor = layer.kept.device.type == "cpu" and rows <= FEW_ROWS
    return {COMPILED: numba_kernels.sparse_product} if on_processor and numba_kernels.can_read(layer) else {}


def _with(path: SparsePath, layer: SparseLinear, bias: Tensor | None) -> Product:
    return lambda probe: path(probe, layer, bias)


def made_dense(x: Tensor, layer: SparseLinear, bias: Tensor | None) -> Tensor:
    """The reference: the matrix with its zeros, for the length of the call."""
    return functional.linear(x, layer.dense(), bias)


def torch_sparse(x: Tensor, layer: SparseLinear, bias: Tensor | None) -> Tensor:
    """By torch's instructions for 2:4."""
    return functional.linear(x, cast("SemiStructuredLinear", layer).in_torch_format(), bias)


def rebuilds(
    matrix: PackedMatrix | SparseLinear, rows: int, dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether products of so many rows make the matrix dense: those that took no kernel in this process."""
    return _chosen.get((matrix.form, dtype, device, _bucket(rows)), REFERENCE) in (REFERENCE, FLOATS)


def paths(matrix: PackedMatrix, dtype: torch.dtype, device: torch.device) -> dict[str, Path]:
    """The paths that can multiply activations of this dtype with `matrix`, the reference first."""
    usable: dict[str, Path] = {REFERENCE: dequantize}
    if device.type == "cuda":
        kernels = fused(device) if dtype == torch.bfloat16 else None
        return usable | {FUSED: triton_product} if kernels and kernels.can_multiply(matrix) else usable
    # Sums are float32, in which float64 would lose precision.
    if dtype in (torch.float32, torch.float16, torch.bfloat16) and numba_kernels.can_multiply(matrix):
        usable[COMPILED] = numba_kernels.product
    return usable


def dequantize(x: Tensor, matrix: PackedMatrix, bias: Tensor | None) -> Tensor:
    """The reference: the matrix in the dtype of `x`, for the length of the call or in parts of that."""
    rows = max(1, _AT_ONCE // matrix.columns)
    if rows >= matrix.rows or x.device.type != "cpu":
        return functional.linear(x, matrix.dequantize(x.dtype), bias)
    dtype = x.dtype
    if widens(x):  # once, and not for every part
        x, bias = x.float(), None if bias is None else bias.float()
    products = []
    for start in range(0, matrix.rows, rows):
        part = slice(start, start + rows)
        weight = matrix.dequantize(dtype, part).to(x.dtype)
        products.append(functional.linear(x, weight, None if bias is None else bias[part]).to(dtype))
    return torch.cat(products, -1)


def triton_product(x: Tensor, matrix: PackedMatrix, bias: Tensor | None) -> Tensor:
    """For every format on a GPU, our own kernels: weights are rebuilt in registers, on their way."""
    from suite import triton_kernels

    rows = x.reshape(-1, x.shape[-1]).contiguous()  # the last positions of a batch lie apart
    product = triton_kernels.product(rows, matrix).reshape(*x.shape[:-1], matrix.rows)
    return (product if bias is None else product.float() + bias.float()).to(x.dtype)


_PATHS: dict[str, Path] = {
    REFERENCE: dequantize,
    COMPILED: numba_kernels.product,
    FUSED: triton_product,
}


def integer_product(x: Tensor, matrix: PackedMatrix) -> Tensor:
    """`x @ Wᵀ` (float32, tokens × rows) of an 8-bit matrix, with each token of `x` rounded to 8 bits.

    Sums of integers are exact, then scaled in float32: every path gives the same bits.
    """
    products: dict[str, Product] = {FLOATS: _scaled(float_product, matrix)}
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        floats = products if len(x) > FEW_ROWS else {}
        products = {COMPILED: lambda probe: numba_kernels.integer_product(probe, matrix), **floats}
    first = next(iter(products))
    key = (matrix.form, torch.int8, x.device, _bucket(len(x)))
    if not _free_to_choose(x) or (key not in _chosen and _recorded(x)):
        return products[first](x)
    if _has_integer_product(x, matrix):
        products[INTEGERS] = _scaled(torch_int, matrix)
    if key not in _chosen:
        _chosen[key] = _fastest(products, x)
    return products[_chosen[key]](x)


def _scaled(product: Callable[[Tensor, Tensor], Tensor], matrix: PackedMatrix) -> Product:
    """The product with an 8-bit matrix that one of integers makes."""

    def scaled(x: Tensor) -> Tensor:
        codes, scales = per_token(x)
        return product(codes, signed_codes(matrix)).float() * scales * matrix.scales.float().squeeze(-1)

    return scaled


def per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (int8, tokens × features) and scales (float32, tokens × 1) of `x` (tokens × features).

    Symmetric: scale = max|x| / 127 and code = round(x / scale), so codes are within ±127.
    """
    wide = x.float()
    scales = (wide.abs().amax(-1, keepdim=True) / 127).clamp(min=_SMALLEST)
    return (wide / scales).round().to(torch.int8), scales


def signed_codes(matrix: PackedMatrix) -> Tensor:
    """The codes of a symmetric 8-bit matrix less their zero point of 128 (int8, rows × columns)."""
    return (matrix.packed ^ 0x80).view(torch.int8)


def torch_int(left: Tensor, right: Tensor) -> Tensor:
    """`left @ rightᵀ` of int8 matrices by torch; a GPU takes no fewer than 17 rows, so zeros fill them up."""
    missing = max(0, _LEAST_ROWS - len(left)) if left.device.type == "cuda" else 0
    rows = functional.pad(left, (0, 0, 0, missing)) if missing else left
    return torch._int_mm(rows, right.t())[: len(left)]


def float_product(left: Tensor, right: Tensor) -> Tensor:
    """The same by float32 multiplications, a slice of the columns at a time."""
    wide, total = left.float(), torch.zeros(len(left), len(right), dtype=torch.int32, device=left.device)
    rows = len(right) if left.device.type == "cuda" else max(1, _AT_ONCE // left.shape[1])
    for some, into in zip(right.split(rows), total.split(rows, -1), strict=True):
        for start in range(0, left.shape[1], _EXACT_COLUMNS):
            part = slice(start, start + _EXACT_COLUMNS)
            into += (wide[:, part] @ some[:, part].float().t()).to(torch.int32)
    return total


@contextmanager
def reference() -> Iterator[None]:
    """Keep to the dequantizing path inside the `with`, so that results repeat bit for bit."""
    global _forced
    _forced += 1
    try:
        yield
    finally:
        _forced -= 1


def chosen() -> dict[str, str]:
    """The paths taken so far in this process: format, shape, dtype, device and rows -> path."""
    named = {
        f"{form}, {str(dtype).removeprefix('torch.')}, {device}, {_described(most)}": path
        for (form, dtype, device, most), path in _chosen.items()
    }
    return dict(sorted(named.items()))


def forget() -> None:
    """Measure again from here on."""
    _chosen.clear()


def _free_to_choose(x: Tensor) -> bool:
    """Whether rounding may differ from the reference here."""
    if _forced or torch.is_grad_enabled() or x.device.type not in ("cpu", "cuda"):
        return False
    return not torch.compiler.is_compiling()


def rebuilders(matrix: PackedMatrix, rows: int, dtype: torch.dtype) -> ModuleType | None:
    """The module of kernels that rebuild so many rows of `matrix` as torch does, only sooner; else None."""
    if matrix.packed.device.type == "cuda":
        return fused(matrix.packed.device)
    here = without_gradients(matrix.packed) and numba_kernels.can_rebuild(matrix, rows, dtype)
    return numba_kernels if here else None


def without_gradients(tensor: Tensor) -> bool:
    """Whether a kernel on a processor can read the tensor, and autograd and torch.compile need not see it."""
    wanted = torch.is_grad_enabled() and tensor.requires_grad
    return tensor.device.type == "cpu" and not wanted and not torch.compiler.is_compiling()


@functools.cache
def fused(device: torch.device) -> ModuleType | None:
    """The module of Triton kernels where it can build them for the device, else None."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    if torch.cuda.get_device_capability(device) < (8, 0):  # no bfloat16 there
        return None
    from suite import triton_kernels

    try:
        triton_kernels.try_out(device)
    except Exception as error:  # a compiler or a driver may fail in any way
        warnings.warn(
            f"packed weights are slower than they could be: Triton builds no kernels ({error})", stacklevel=2
        )
        return None
    return triton_kernels


def _has_integer_product(x: Tensor, matrix: PackedMatrix) -> bool:
    """Whether torch has an integer product for these shapes that is exact and not a plain loop."""
    if x.device.type == "cuda":
        return matrix.columns % 8 == 0 and matrix.rows % 8 == 0
    # Without VNNI instructions, products are summed in 16 bits or one by one.
    vnni = getattr(torch.cpu, "_is_vnni_supported", lambda: False)
    return x.device.type == "cpu" and bool(vnni())


def _recorded(x: Tensor) -> bool:
    """Whether a CUDA graph is being recorded, in which no time passes."""
    return x.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _fastest(calls: Mapping[str, Product], x: Tensor) -> str:
    """The name of the path that is fastest for inputs like `x`."""
    bucket = _bucket(x.numel() // x.shape[-1])
    probe = torch.arange(bucket * x.shape[-1], device=x.device).cos().reshape(bucket, -1)
    return _measure(calls, probe.to(x.dtype))


def _bucket(rows: int) -> int:
    return next((most for most in _BUCKETS if rows <= most), _MANY_ROWS)


def _described(most: int) -> str:
    return f"up to {most} rows" if most <= FEW_ROWS else f"over {FEW_ROWS} rows"


def _key(form: str, rows: int, x: Tensor) -> Key:
    return form, x.dtype, x.device, _bucket(rows)


def _measure(calls: Mapping[str, Product], probe: Tensor) -> str:
    """The fastest of `calls` (the reference first) among those that agree with the reference."""
    names = list(calls)
    expected = calls[names[0]](probe)
    best, least = names[0], _seconds(calls[names[0]], probe)
    for name in names[1:]:
        if agrees(calls[name](probe), expected) and (
            (taken := _seconds(calls[name], probe)) <= _MUST_GAIN * least
        ):
            best, least = name, taken
    return best


def agrees(found: Tensor, expected: Tensor) -> bool:
    """Whether two products are equal up to the rounding of their dtype (integers: exactly)."""
    if not expected.is_floating_point():
        return torch.equal(found, expected)
    allowed = max(4 * torch.finfo(expected.dtype).eps, 1e-5)
    gap = (found.float() - expected.float()).norm()
    return bool(gap <= allowed * expected.float().norm())


def _seconds(call: Product, probe: Tensor) -> float:
    """What a call takes, the shortest of a few times; the first of all was made by the caller."""
    taken, calls = [], _CALLS[probe.device.type]
    for _ in range(_REPEATS):
        _wait(probe.device)
        start = time.perf_counter()
        for _ in range(calls):
            call(probe)
        _wait(probe.device)
        taken.append((time.perf_counter() - start) / calls)
    return min(taken)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
