"""What a process holds in memory beside the tensors of a model's ledger, and where it hangs.

A dense copy kept in an attribute, a closure or a global is in no `state_dict`, so no ledger sees it.
Every tensor alive is counted by its storage, and every NumPy array and byte string by its own bytes.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import CellType, FrameType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_DEPTH = 6


@dataclass(frozen=True)
class Hidden:
    """Memory that the ledger does not count: its bytes, and the objects that it belongs to."""

    bytes: int
    objects: list[object]

    @property
    def what(self) -> str:
        """What it is: a tensor or array with its shape and dtype, or a byte string."""
        return _described(self.objects[0])


def hidden_memory(model: nn.Module, smallest: int = 1024) -> tuple[Hidden, ...]:
    """Storages of at least `smallest` bytes alive in this process and not in the model, largest first.

    Garbage is collected first, and machine code that Triton and Numba built is left out. A storage of the
    model that is larger than the tensors it holds is listed with what is beyond them. Tensors without
    data (meta) are left out. So is what was alive before `gc.freeze()`, and with it an array or byte
    string put into a container that was: the collector does not follow either. A tensor is found even
    there.
    """
    gc.collect()
    objects = _without_machine_code(gc.get_objects())
    counted = _counted(model)
    found: dict[int, tuple[int, list[object]]] = {}
    for tensor in (item for item in objects if issubclass(type(item), Tensor)):
        pointer, size = _storage(tensor)
        if pointer:
            found.setdefault(pointer, (size, []))[1].append(tensor)
    for array in _arrays(objects):
        pointer, size = _array_memory(array)
        if size >= smallest and pointer not in counted:
            found.setdefault(pointer, (size, []))[1].append(array)
    del objects
    excess = {
        pointer: size - counted.get(pointer, 0)
        for pointer, (size, _) in found.items()
        if size - counted.get(pointer, 0) >= smallest
    }
    ordered = sorted(excess, key=lambda pointer: -excess[pointer])
    return tuple(Hidden(excess[pointer], found[pointer][1]) for pointer in ordered)


def holder(model: nn.Module, targets: list[object]) -> str:
    """Where one of `targets` hangs: an attribute, a closure, a class or a module's global.

    Everything that the model and the loaded modules hold is walked, which takes seconds.
    """
    wanted = {id(target) for target in targets}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name not in ("_parameters", "_buffers", "_modules"):
                trail = _trail(value, wanted)
                if trail is not None:
                    return f"{path or 'the model'} keeps it in attribute '{name}'{trail}"
    for path, module in model.named_modules():
        for name in ("_parameters", "_buffers"):
            for key, tensor in vars(module)[name].items():
                if id(tensor) in wanted:
                    return f"{path}.{key} is a view of a larger storage"
    for cls in {type(module) for module in model.modules()}:
        for name, value in vars(cls).items():
            trail = _trail(value, wanted)
            if trail is not None:
                return f"class {cls.__name__} keeps it in attribute '{name}'{trail}"
    for module_name, python_module in reversed(sys.modules.copy().items()):  # plug-ins came last
        for name, value in list(getattr(python_module, "__dict__", {}).items()):
            trail = _trail(value, wanted, depth=3)
            if trail is not None:
                return f"module '{module_name}' keeps it in the global '{name}'{trail}"
    referrers = gc.get_referrers(*targets)
    kinds = {type(r).__name__ for r in referrers if not isinstance(r, FrameType) and r is not targets}
    return f"it is held by: {', '.join(sorted(kinds)) or 'code outside Python'}"


def _counted(model: nn.Module) -> dict[int, int]:
    """Bytes of each storage that the model's parameters and buffers account for."""
    counted: dict[int, int] = {}
    seen = set()
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            for plain in _plain(tensor):
                pointer, size = _storage(plain)
                key = (pointer, plain.storage_offset(), tuple(plain.shape))
                if key not in seen:
                    seen.add(key)
                    counted[pointer] = min(size, counted.get(pointer, 0) + plain.numel() * plain.itemsize)
    return counted


def _plain(tensor: Tensor | None) -> Iterator[Tensor]:
    """The ordinary tensors that a tensor subclass is made of, or the tensor itself."""
    if tensor is None:
        return
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _plain(getattr(tensor, name))
    else:
        yield tensor


def _storage(tensor: Tensor) -> tuple[int, int]:
    """Address and bytes of a tensor's storage; zeros for one without data of its own."""
    if tensor.device.type == "meta" or is_traceable_wrapper_subclass(tensor):
        return 0, 0
    try:
        storage = tensor.untyped_storage()
        return storage.data_ptr(), storage.nbytes()
    except (NotImplementedError, RuntimeError):  # sparse and other layouts without one storage
        return 0, 0


def _without_machine_code(objects: list[Any]) -> list[Any]:
    """All but what Triton and Numba compiled, as large as a small model's matrix, and Numba's own tables."""
    left_out: set[int] = set()
    if (triton := sys.modules.get("triton.compiler.compiler")) is not None:
        kernels = [item for item in objects if type(item) is triton.CompiledKernel]
        left_out |= {id(item) for kernel in kernels for item in (kernel, kernel.asm, vars(kernel))}
    if (numba := sys.modules.get("numba.core.codegen")) is not None:
        libraries = [item for item in objects if issubclass(type(item), numba.CodeLibrary)]
        left_out |= {id(item) for library in libraries for item in (library, vars(library))}
        left_out |= {id(vars(module)) for name, module in sys.modules.items() if name.startswith("numba.")}
    return [item for item in objects if id(item) not in left_out]


def _arrays(objects: list[object]) -> Iterator[Any]:
    """Arrays and byte strings, which the collector does not track, seen from what refers to them."""
    frontier: Iterable[object] = gc.get_referents(*objects)
    seen: set[int] = set()
    for _ in range(_DEPTH):
        inner: list[object] = []
        for item in frontier:
            kind = type(item)
            if kind in (bytes, bytearray) or issubclass(kind, np.ndarray):
                if id(item) not in seen:
                    seen.add(id(item))
                    yield item
            elif kind in (dict, tuple) and not gc.is_tracked(item) and id(item) not in seen:
                seen.add(id(item))
                inner.append(item)
        if not inner:
            return
        frontier = gc.get_referents(*inner)


def _array_memory(array: Any) -> tuple[int, int]:
    if isinstance(array, np.ndarray):
        while isinstance(array.base, np.ndarray):
            array = array.base
        return int(array.__array_interface__["data"][0]), int(array.nbytes)
    return id(array), len(array)


def _described(item: object) -> str:
    if isinstance(item, Tensor):
        return f"tensor {'×'.join(map(str, item.shape))} {str(item.dtype).removeprefix('torch.')}"
    if isinstance(item, np.ndarray):
        return f"array {'×'.join(map(str, item.shape))} {item.dtype}"
    return type(item).__name__


def _trail(value: object, wanted: set[int], depth: int = _DEPTH) -> str | None:
    """How `value` leads to one of the wanted objects; None when it does not."""
    seen: set[int] = set()
    frontier: list[tuple[object, str]] = [(value, "")]
    for _ in range(depth):
        inner: list[tuple[object, str]] = []
        for item, trail in frontier:
            if id(item) in wanted:
                return trail
            if id(item) not in seen:
                seen.add(id(item))
                inner += [(child, trail or note) for child, note in _children(item)]
        frontier = inner
    return None


def _children(item: object) -> list[tuple[object, str]]:
    if isinstance(item, FunctionType):
        inside = [*(item.__closure__ or ()), *(item.__defaults__ or ()), *vars(item).values()]
        note = f" (the closure of {item.__qualname__})"
        return [(child, note if isinstance(child, CellType) else "") for child in inside]
    if isinstance(item, MethodType):
        return [(item.__func__, "")]
    if isinstance(item, (nn.Module, ModuleType, type, FrameType, str, torch.dtype)):
        return []
    return [(child, "") for child in gc.get_referents(item)]
