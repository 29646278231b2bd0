"""bfloat16 on processors that have no instructions for it.

There, torch multiplies bfloat16 matrices in a plain loop: on two AVX2 cores a 135M model ran 5 times
slower than in float32, and trained 20 times slower. `widened` multiplies, and attends, in float32 and
rounds the result, which is what such instructions do as well: they, too, sum in float32 and round once.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

FEWEST_ROWS = 3
"""Below, widening the other matrix costs more than it saves (measured, for 576×192 to 11,008×4,096)."""

WIDENED_AT_ONCE = 1 << 20
"""Weights widened at a time: larger tensors get fresh memory from the system for each product."""


@functools.cache
def native(device: str) -> bool:
    """Whether a device multiplies bfloat16 matrices by instructions of its own."""
    return not device.startswith("cpu") or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def widens(x: Tensor) -> bool:
    """Whether products of `x` (… × columns) with matrices are those of `widened`, in float32."""
    rows = x.numel() // max(1, x.shape[-1])
    return x.dtype is torch.bfloat16 and rows >= FEWEST_ROWS and not native(x.device.type)


@contextmanager
def widened(device: str) -> Iterator[None]:
    """Multiply bfloat16 matrices in float32 inside the `with`, in this process, where that is faster.

    Does nothing on a device with instructions for it. Not reentrant.
    """
    if native(device):
        yield
        return
    own = functional.scaled_dot_product_attention
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that these are its own operators
        for name in ("mm", "addmm", "bmm"):
            library.impl(name, _product(getattr(torch.ops.aten, name).out), "CPU", allow_override=True)
    try:
        # Here and not among the operators: attention differentiates itself, in the dtype it is given.
        functional.scaled_dot_product_attention = _attention(own)
        yield
    finally:
        functional.scaled_dot_product_attention = own
        library._destroy()


def _product(out_of: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The product of the last two arguments; `out_of` is torch's own, into a given tensor."""

    def product(*operands: Tensor, **scales: Any) -> Tensor:
        left, right = operands[-2:]
        shape = (*left.shape[:-1], right.shape[-1])
        if left.dtype is not torch.bfloat16 or left.shape[-2] < FEWEST_ROWS:
            return out_of(*operands, **scales, out=left.new_empty(shape))
        wide, result = left.float(), left.new_empty(shape)
        columns = max(1, WIDENED_AT_ONCE // max(1, right.shape[-2])) if right.ndim == 2 else shape[-1]
        added = [operand.expand(shape).split(columns, -1) for operand in operands[:-2]]
        for *terms, part, into in zip(
            *added, right.split(columns, -1), result.split(columns, -1), strict=True
        ):
            widened = (*(term.float() for term in terms), wide, part.float())
            into.copy_(out_of(*widened, **scales, out=wide.new_empty(into.shape)))
        return result

    return product


def _attention(own: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Attention of bfloat16 queries, keys and values by torch's `own` in float32."""

    def attention(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        if query.dtype is not torch.bfloat16:
            return own(query, key, value, attn_mask, *args, **kwargs)
        if attn_mask is not None and attn_mask.is_floating_point():
            attn_mask = attn_mask.float()
        return own(query.float(), key.float(), value.float(), attn_mask, *args, **kwargs).to(query.dtype)

    return attention
