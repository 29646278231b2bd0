"""Modules that hold, count or compute something other than they say: each must be caught.

A plug-in like any other: every module type is registered here, so that checkpoints reload.
"""

import time

import torch
from torch import Tensor, nn
from torch.nn import functional

from suite.layers import ModuleSpec, module_type, replace
from suite.method import Method, MethodConfig, Plan, largest_fitting, register
from suite.packed_layers import PackedLinear
from suite.sparse_layers import SparseLinear

_DENSE: dict[int, Tensor] = {}


class Swap(Method):
    """Puts a module of one type in the place of every linear."""

    family, source = "cheat", "a test"
    Config = MethodConfig
    kind: type

    def arguments(self, line):
        return {
            "in_features": line.in_features,
            "out_features": line.out_features,
            "bits": 8,
            "group": line.in_features,
            "symmetric": True,
            "bias": line.bias,
        }

    def plan(self, anatomy, target, seed):
        plan = Plan(
            modules={
                line.path: ModuleSpec(type=self.kind.type_name, arguments=self.arguments(line))
                for line in anatomy.linears
            }
        )
        return plan if target is None else largest_fitting([plan], anatomy, target)

    def compress(self, model, plan, calibration):
        for path in plan.modules:
            replace(model, path, self.made(model.get_submodule(path)))

    def made(self, linear):
        return self.kind.from_linear(linear, 8, linear.in_features, True)


# Dense copies beside the packed weights


@module_type("cheat_attribute")
class InAttribute(PackedLinear):
    def forward(self, x):
        if not hasattr(self, "_orig"):
            self._orig = [self.dequantize(x.dtype)]
        return functional.linear(x, self._orig[0], self.bias)


@module_type("cheat_array")
class InArray(PackedLinear):
    def forward(self, x):
        if not hasattr(self, "_array"):
            self._array = self.dequantize(x.dtype).numpy().copy()
        return functional.linear(x, torch.from_numpy(self._array).to(x.dtype), self.bias)


@module_type("cheat_closure")
class InClosure(PackedLinear):
    def forward(self, x):
        dense, bias = self.dequantize(x.dtype), self.bias
        self.forward = lambda y: functional.linear(y, dense, bias)
        return self.forward(x)


@module_type("cheat_buffer")
class InBuffer(PackedLinear):
    def __init__(self, in_features, out_features, *others, **named):
        super().__init__(in_features, out_features, *others, **named)
        self.register_buffer("dense", torch.zeros(out_features, in_features), persistent=False)

    def forward(self, x):
        if not self.dense.any():
            self.dense.copy_(self.dequantize(self.dense.dtype))
        return functional.linear(x, self.dense, self.bias)


@module_type("cheat_global")
class InGlobal(PackedLinear):
    def forward(self, x):
        if id(self) not in _DENSE:
            _DENSE[id(self)] = self.dequantize(x.dtype)
        return functional.linear(x, _DENSE[id(self)], self.bias)


# Counting less than there is


@module_type("cheat_words")
class Words(nn.Module):
    """Two float32 weights in every int64, counted as one."""

    def __init__(self, in_features, out_features, bias):
        super().__init__()
        self.shape = (out_features, in_features)
        self.register_buffer("words", torch.zeros(out_features * in_features // 2, dtype=torch.int64))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    @classmethod
    def from_linear(cls, linear):
        module = cls(linear.in_features, linear.out_features, linear.bias is not None)
        module.words.copy_(linear.weight.detach().flatten().view(torch.int64))
        module.bias = linear.bias
        return module

    def arguments(self):
        return {"in_features": self.shape[1], "out_features": self.shape[0], "bias": self.bias is not None}

    def forward(self, x):
        return functional.linear(x, self.words.view(torch.float32).reshape(self.shape), self.bias)


@module_type("cheat_liar")
class Liar(PackedLinear):
    @property
    def logical_parameters(self):
        return self.rows * self.columns // 2


@module_type("cheat_stowaway")
class Stowaway(PackedLinear):
    """A packed matrix a fourth as wide as it should be, and the dense weights in a buffer beside it."""

    def __init__(self, in_features, out_features, bias):
        super().__init__(in_features // 4, out_features, 8, in_features, True, bias)
        self.width = in_features
        self.register_buffer("residual", torch.zeros(out_features, in_features))

    def arguments(self):
        return {"in_features": self.width, "out_features": self.rows, "bias": self.bias is not None}

    def forward(self, x):
        return functional.linear(x, self.residual, self.bias)


@module_type("cheat_index")
class InIndex(SparseLinear):
    """One kept value, and all weights in an index that counts as no parameter."""

    def __init__(self, in_features, out_features, bias):
        super().__init__(in_features, out_features, 1, bias)
        self.register_buffer("index", torch.zeros(out_features, 4 * in_features, dtype=torch.uint8))

    def arguments(self):
        return {"in_features": self.columns, "out_features": self.rows, "bias": self.bias is not None}

    def forward(self, x):
        return functional.linear(x, self.index.view(torch.float32), self.bias) + 0 * self.kept


@module_type("cheat_arguments")
class InArguments(nn.Module):
    """The weights as text in the surgery list."""

    def __init__(self, in_features, out_features, text="", bias=False):
        super().__init__()
        self.shape, self.text = (out_features, in_features), text
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def arguments(self):
        return {
            "in_features": self.shape[1],
            "out_features": self.shape[0],
            "text": self.text,
            "bias": self.bias is not None,
        }

    def forward(self, x):
        values = torch.frombuffer(bytearray(bytes.fromhex(self.text)), dtype=torch.float16)
        return functional.linear(x, values.reshape(self.shape).to(x.dtype), self.bias)


# Mathematics that does not hold


@module_type("cheat_state")
class Remembers(PackedLinear):
    def forward(self, x):
        y = super().forward(x)
        before = self.__dict__.get("_before", 0.0)
        self._before = float(y.detach().mean())
        return y + 0.1 * before


@module_type("cheat_future")
class SeesTheFuture(PackedLinear):
    def forward(self, x):
        return super().forward(x - 0.1 * x.mean(1, keepdim=True))


@module_type("cheat_sleep")
class Sleeps(PackedLinear):
    def forward(self, x):
        time.sleep(0.01)  # long beside a tiny forward, also on a busy machine
        return super().forward(x)


def _swap(label, kind, acts_on=("bytes",), **members):
    members = {"name": label, "kind": kind, "acts_on": frozenset(acts_on), **members}
    members["__module__"] = __name__
    return register(type(kind.__name__ + "Method", (Swap,), members))


_swap("dense-in-attribute", InAttribute)
_swap("dense-in-array", InArray)
_swap("dense-in-closure", InClosure)
_swap("dense-in-buffer", InBuffer)
_swap("dense-in-global", InGlobal)
_swap("keeps-state", Remembers)
_swap("sees-the-future", SeesTheFuture)
_swap("sleeps", Sleeps)
_swap("lying-count", Liar, ["params"])


class SwapShapes(Swap):
    """The same for types that need nothing but the shape."""

    def arguments(self, line):
        return {"in_features": line.in_features, "out_features": line.out_features, "bias": line.bias}


@register
class WideWords(SwapShapes):
    name, kind, acts_on = "wide-words", Words, frozenset({"params"})

    def made(self, linear):
        return Words.from_linear(linear)


@register
class StowawayMethod(SwapShapes):
    name, kind, acts_on = "stowaway", Stowaway, frozenset({"params"})

    def made(self, linear):
        module = Stowaway(linear.in_features, linear.out_features, linear.bias is not None)
        module.residual.copy_(linear.weight.detach())
        module.bias = linear.bias
        return module


@register
class IndexMethod(SwapShapes):
    name, kind, acts_on = "weights-in-index", InIndex, frozenset({"params"})

    def made(self, linear):
        module = InIndex(linear.in_features, linear.out_features, linear.bias is not None)
        module.index.copy_(linear.weight.detach().view(torch.uint8))
        module.bias = linear.bias
        return module


@register
class TextMethod(SwapShapes):
    name, kind, acts_on = "weights-in-arguments", InArguments, frozenset({"bytes"})

    def made(self, linear):
        text = linear.weight.detach().half().numpy().tobytes().hex()
        module = InArguments(linear.in_features, linear.out_features, text, linear.bias is not None)
        module.bias = linear.bias
        return module
