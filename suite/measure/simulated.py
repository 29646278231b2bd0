"""Which part of a model only imitates its format: dense weights are rebuilt for each call.

Such a module saves bytes at rest, but its speed is that of the imitation, not of the format.
"""

from __future__ import annotations

import re

from torch import nn

from suite.measure.ledger import Entry
from suite.models.anatomy import decoder_params
from suite.models.layouts import Layout


def simulated_share(model: nn.Module, entries: tuple[Entry, ...], layout: Layout) -> float:
    """Share of the parameters of the blocks' linears in modules with a truthy attribute `simulated`."""
    marked = [path for path, module in model.named_modules() if getattr(module, "simulated", False)]
    if not marked:
        return 0.0
    inside = re.compile("(?:" + "|".join(map(re.escape, marked)) + r")(?:\.|$)")
    simulated = tuple(entry for entry in entries if inside.match(entry.path))
    return decoder_params(simulated, layout) / max(decoder_params(entries, layout), 1)
