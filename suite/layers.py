"""The modules a compressed checkpoint may hold beside ordinary ones, and how to rebuild each.

A module type is registered under a short name. Its constructor takes JSON-able arguments, and
`arguments()` gives them back, so that a checkpoint stores only `path -> (type, arguments)` and a
reload rebuilds the skeleton from them. Methods may register types of their own.

A type with a method `adopt(old)` wraps what stood at its path: it takes over `old`'s children under
their own names, so that everything inside keeps its path, and counts only what it adds as its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Protocol, cast

import torch
from pydantic import field_validator
from torch import Tensor, nn

from suite.registry import Registry
from suite.specs import Frozen


class SavedModule(Protocol):
    """What a registered module type must offer."""

    type_name: ClassVar[str]

    def arguments(self) -> dict[str, Any]:
        """JSON-able constructor arguments that rebuild this module's skeleton."""
        ...


class ModuleSpec(Frozen):
    """One entry of a surgery list: the registered type and its constructor arguments."""

    type: str
    arguments: dict[str, Any]

    @field_validator("arguments")
    @classmethod
    def _tuples(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        # JSON knows only lists; as tuples they can be hashed and equal those of a plan.
        return {key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()}

    def __hash__(self) -> int:
        return hash((self.type, tuple(sorted(self.arguments.items()))))

    @property
    def wraps(self) -> bool:
        """Whether the module keeps what is inside the one it replaces."""
        return hasattr(module_types.get(self.type), "adopt")

    def build(self, dtype: torch.dtype, device: str = "meta") -> nn.Module:
        """Construct the module, without weights when `device` is "meta"."""
        with torch.device(device), default_dtype(dtype):
            return module_types.get(self.type)(**self.arguments)


module_types: Registry[Callable[..., nn.Module]] = Registry("module type")


def module_type(name: str) -> Callable[[type], type]:
    """Class decorator: register an `nn.Module` with an `arguments()` method under `name`."""

    def register(cls: type) -> type:
        cls.type_name = name  # type: ignore[attr-defined]
        module_types.add(name, cls)
        return cls

    return register


def spec_of(module: nn.Module) -> ModuleSpec | None:
    """The surgery entry of a module, or None for an ordinary one."""
    name = getattr(type(module), "type_name", None)
    if name is None:
        return None
    return ModuleSpec(type=name, arguments=cast(SavedModule, module).arguments())


def replace(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at `path`, on the device of what stood there; a wrapping one adopts that."""
    old = model.get_submodule(path)
    reference = next(old.parameters(), None)
    if hasattr(module, "adopt"):
        cast(Any, module).adopt(old)
    if reference is not None and reference.device.type != "meta":
        module = module.to(reference.device)
    model.set_submodule(path, module.train(old.training))


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Create new floating-point tensors in `dtype` inside the block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@module_type("linear")
class ResizedLinear(nn.Linear):
    """An ordinary linear layer of another shape than the dense model's."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        super().__init__(in_features, out_features, bias)

    @classmethod
    def from_weight(cls, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> ResizedLinear:
        """Build from `weight` (out × in) and `bias` (out), stored as `dtype`."""
        with torch.device(weight.device), default_dtype(dtype):
            module = cls(weight.shape[1], weight.shape[0], bias is not None)
        with torch.no_grad():
            module.weight.copy_(weight)
            if bias is not None:
                module.bias.copy_(bias)
        return module

    def arguments(self) -> dict[str, Any]:
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias is not None,
        }


@module_type("low_rank")
class LowRankLinear(nn.Module):
    """`y = second(first(x)) + bias` with `first` (rank × in) and `second` (out × rank)."""

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = False):
        super().__init__()
        self.first = nn.Linear(in_features, rank, bias=False)
        self.second = nn.Linear(rank, out_features, bias=bias)

    @classmethod
    def from_factors(cls, left: Tensor, right: Tensor, like: nn.Linear) -> LowRankLinear:
        """Build from `left` (out × rank) and `right` (rank × in), with the bias and dtype of `like`."""
        rank, in_features = right.shape
        with default_dtype(like.weight.dtype):
            module = cls(in_features, left.shape[0], rank, bias=like.bias is not None)
        with torch.no_grad():
            module.first.weight.copy_(right)
            module.second.weight.copy_(left)
            if like.bias is not None:
                module.second.bias.copy_(like.bias)
        return module

    def arguments(self) -> dict[str, Any]:
        return {
            "in_features": self.first.in_features,
            "out_features": self.second.out_features,
            "rank": self.first.out_features,
            "bias": self.second.bias is not None,
        }

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.second(self.first(x)))
