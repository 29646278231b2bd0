"""Dense weights that packed and sparse layers rebuild for each call, kept while batch follows batch.

Scoring multiplies the same weights with hundreds of batches, calibration with some. What is kept is
memory that the format does not take, so neither speed nor memory of inference is measured meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from suite.packed_layers import PackedMatrix
    from suite.sparse_layers import SparseMatrix

KEPT_BYTES = 1 << 30


@dataclass
class _Kept:
    room: int
    weights: dict[tuple[nn.Module, torch.dtype], Tensor] = field(default_factory=dict)


_kept: _Kept | None = None


@contextmanager
def rebuilt_once(room: int = KEPT_BYTES) -> Iterator[None]:
    """Keep up to `room` bytes of rebuilt weights inside the `with`, in which no weight may change.

    The products are the same, only sooner. Layers that no longer fit are rebuilt as ever.
    """
    global _kept
    outer = _kept
    _kept = outer or _Kept(room)
    try:
        yield
    finally:
        _kept = outer


def kept_weight(
    module: PackedMatrix | SparseMatrix, dtype: torch.dtype, build: Callable[[], Tensor]
) -> Tensor | None:
    """The dense weight of `module` that `build` gives, or gave before; None where none is kept."""
    if _kept is None or torch.is_grad_enabled():
        return None
    if (module, dtype) not in _kept.weights:
        size = module.rows * module.columns * dtype.itemsize
        if size > _kept.room:
            return None
        _kept.room -= size
        _kept.weights[module, dtype] = build()
    return _kept.weights[module, dtype]
