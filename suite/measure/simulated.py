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
from suite.packed_layers import PackedMatrix, TiedHead
from suite.sparse_layers import SparseLinear


def simulated_share(
    model: PreTrainedModel, entries: tuple[Entry, ...], layout: Layout, rows: int, head_rows: int
) -> float:
    """Share of the parameters of linears, a packed head among them, in modules that imitate.

    Those are packed and sparse ones, and any with a truthy attribute `simulated`. They do not count
    whose products of so many `rows` (the head's: of `head_rows`) took a kernel so far.
    """

    def imitates(module: nn.Module) -> bool:
        if isinstance(module, PackedMatrix | SparseLinear):
            dtype = torch.int8 if isinstance(module, DynamicInt8Linear) else model.dtype
            return kernels.rebuilds(module, rows, dtype, model.device)
        return bool(getattr(module, "simulated", False))

    marked = [path for path, module in model.named_modules() if imitates(module)]
    inside = re.compile("(?:" + "|".join(map(re.escape, marked)) + r")(?:\.|$)")
    imitating = tuple(entry for entry in entries if marked and inside.match(entry.path))
    simulated, total = decoder_params(imitating, layout), decoder_params(entries, layout)
    head = model.get_submodule(layout.head)
    table = head.table if isinstance(head, TiedHead) else head
    if isinstance(table, PackedMatrix):
        total += table.logical_parameters
        if kernels.rebuilds(table, head_rows, model.dtype, model.device):
            simulated += table.logical_parameters
    return simulated / max(total, 1)
