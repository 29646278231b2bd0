"""Where channels can be scaled between what writes and what reads them, the model staying as it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from suite.models.anatomy import Anatomy


@dataclass(frozen=True)
class ScalingSite:
    """A writer, and all linears that read its channels; paths inside a block.

    Dividing the writer's channels and multiplying the readers' columns by the same positive numbers
    changes no output.
    """

    writer: str
    readers: tuple[str, ...]


def scaling_sites(anatomy: Anatomy, block: nn.Module) -> Iterator[ScalingSite]:
    """The sites of a block in the order they run, possible or not: see `obstacle`.

    Norm and what reads it; values and the output projection; up and down projection. Left out are
    norms that stand after attention and MLP, values fused with queries and keys, and an MLP whose
    activation minds a scale (all but ReLU, where there is no gate).
    """
    layout = anatomy.layout
    path_of = {role: path for path, role in layout.roles.items()}
    by_first_role = {layout.roles[group[0]]: group for group in layout.groups}
    if anatomy.pre_norm:
        yield ScalingSite(layout.norms[0], layout.groups[0])
    if "value" in path_of:
        yield ScalingSite(path_of["value"], (path_of["output"],))
    if anatomy.pre_norm:
        yield ScalingSite(layout.norms[1], by_first_role["gate" if "gate" in path_of else "up"])
    if "gate" in path_of or any(isinstance(module, nn.ReLU) for module in block.modules()):
        yield ScalingSite(path_of["up"], (path_of["down"],))


def obstacle(site: ScalingSite, block: nn.Module) -> str | None:
    """Why the scale of a site cannot be moved, or None: short, for a record."""
    readers = [block.get_submodule(path) for path in site.readers]
    if not all(isinstance(reader, nn.Linear) for reader in readers):
        return "readers are factorised"
    writer, width = block.get_submodule(site.writer), cast(nn.Linear, readers[0]).in_features
    if isinstance(writer, nn.Linear):
        return None if writer.out_features == width else "values are shared by several heads"
    if not isinstance(getattr(writer, "weight", None), Tensor):
        return "the writer has no scale of its own"
    return None


@torch.no_grad()
def divide_channels(writer: nn.Module, scale: Tensor) -> None:
    """Divide what a norm or linear writes by `scale` (channels), computed in float64, in place."""
    for name in ("weight", "bias"):
        tensor = getattr(writer, name, None)
        if tensor is not None:
            divisor = scale.double().reshape(-1, *[1] * (tensor.ndim - 1))
            tensor.copy_(tensor.double() / divisor)
