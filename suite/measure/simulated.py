"""Which part of a model only imitates its format: dense weights are rebuilt for each call.

Such a module saves bytes at rest, but its speed is that of the imitation, not of the format. A packed
linear may have a path of its own for the few rows of decoding, and imitate for the many of prefill.
"""

from __future__ import annotations

import re

import torch
from torch import nn
from transformers import PreTrainedModel

from suite import kernels
from suite.dynamic_layers import DynamicInt8Linear
from suite.measure.ledger import Entry
from suite.models.anatomy import decoder_params
from suite.models.layouts import Layout
from suite.packed_layers import PackedMatrix
from suite.sparse_layers import SparseLinear


def simulated_share(model: PreTrainedModel, entries: tuple[Entry, ...], layout: Layout, rows: int) -> float:
    """Share of the parameters of the blocks' linears in modules with a truthy attribute `simulated`.

    Linears do not count whose products of so many `rows` took a kernel so far.
    """

    def imitates(module: nn.Module) -> bool:
        if isinstance(module, PackedMatrix | SparseLinear):
            dtype = torch.int8 if isinstance(module, DynamicInt8Linear) else model.dtype
            return kernels.rebuilds(module, rows, dtype, model.device)
        return bool(getattr(module, "simulated", False))

    marked = [path for path, module in model.named_modules() if imitates(module)]
    if not marked:
        return 0.0
    inside = re.compile("(?:" + "|".join(map(re.escape, marked)) + r")(?:\.|$)")
    simulated = tuple(entry for entry in entries if inside.match(entry.path))
    return decoder_params(simulated, layout) / max(decoder_params(entries, layout), 1)
