"""Where the parameters and bytes of a model are, module by module.

One function serves planning (on the meta device), records and `weighin inspect`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from suite.packed_layers import PackedMatrix
from suite.sparse_layers import SparseMatrix


@dataclass(frozen=True)
class Entry:
    """What one module owns itself (its children have entries of their own).

    `params` counts logical weights (packed integers count as the weights they stand for; scales, zeros
    and the index of a sparse matrix are not parameters), `disk` the bytes of tensors that a checkpoint
    stores, `resident` the bytes held in memory after loading, `nominal` the bits of the format in bytes
    (no padding).
    """

    path: str
    type: str
    params: int
    disk: int
    resident: int
    nominal: float

    def at(self, path: str) -> Entry:
        """The same entry under another path."""
        return replace(self, path=path)


def ledger(model: nn.Module) -> tuple[Entry, ...]:
    """Entries of all modules that own tensors; a storage shared by several counts once."""
    seen: set[object] = set()
    entries = []
    for path, module in model.named_modules():
        stored = {name for name, _ in _own_tensors(module) if name not in module._non_persistent_buffers_set}
        disk = resident = params = 0
        nominal = 0.0
        for name, tensor in _own_tensors(module):
            key = _storage_key(tensor)
            if key in seen:
                continue
            seen.add(key)
            size = tensor.numel() * tensor.element_size()
            resident += size
            if name not in stored:
                continue
            disk += size
            if isinstance(module, SparseMatrix) and name == "index":
                nominal += module.rows * module.columns / 8
            elif isinstance(module, PackedMatrix) and name == "packed":
                params += module.logical_parameters
                nominal += module.logical_parameters * module.bits / 8
            else:
                nominal += size
                params += 0 if isinstance(module, PackedMatrix) and name != "bias" else tensor.numel()
        if resident:
            entries.append(Entry(path, type(module).__name__, params, disk, resident, nominal))
    return tuple(entries)


def total_params(entries: Iterable[Entry]) -> int:
    """Unique logical parameters."""
    return sum(entry.params for entry in entries)


def total_disk(entries: Iterable[Entry]) -> int:
    """Bytes of the tensors in the checkpoint, without file headers."""
    return sum(entry.disk for entry in entries)


def _own_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    own = [*module._parameters.items(), *module._buffers.items()]
    return [(name, tensor) for name, tensor in own if tensor is not None]


def _storage_key(tensor: Tensor) -> object:
    if tensor.device.type == "meta":
        return id(tensor)
    storage = tensor.untyped_storage()
    return (tensor.device, storage.data_ptr(), tensor.storage_offset(), tuple(tensor.shape))


def tensor_bytes(paths: Iterable[Path]) -> int:
    """Bytes of tensor data in safetensors files, headers left out."""
    total = 0
    for path in paths:
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
            file.seek(0, 2)
            total += file.tell() - 8 - header
    return total
