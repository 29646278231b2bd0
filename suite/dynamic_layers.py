"""Linear layers that multiply 8-bit integers: packed weights with activations quantized as they come.

Weights have one scale per output channel, activations one per token (symmetric, the largest magnitude
is 127). Products are summed exactly as integers and scaled once, in float32. Every token is treated by
itself, so a key-value cache changes nothing and no token sees a later one. Where gradients are wanted
they are those of the product with the dequantized weights, as if activations were not rounded.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from suite import kernels
from suite.layers import default_dtype, module_type
from suite.packed_layers import PackedLinear


@module_type("dynamic_int8_linear")
class DynamicInt8Linear(PackedLinear):
    """8-bit weights per output channel, 8-bit activations per token, an integer product."""

    type_name: ClassVar[str]

    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        super().__init__(in_features, out_features, 8, in_features, True, bias)

    @classmethod
    def holding(cls, linear: nn.Linear, **arguments: Any) -> Self:
        """The weights of `linear` rounded to nearest, and its bias as it is."""
        with torch.device(linear.weight.device), default_dtype(linear.weight.dtype):
            module = cls(linear.in_features, linear.out_features, linear.bias is not None, **arguments)
        module.quantize_(linear.weight)
        module.bias = linear.bias
        return module

    def arguments(self) -> dict[str, Any]:
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias is not None,
        }

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.in_features)
        product = self._product(flat.detach())
        if self.bias is not None:
            product = product + self.bias.detach().float()
        result = product.to(x.dtype)
        if torch.is_grad_enabled():
            smooth = functional.linear(flat, self.dequantize(x.dtype), self.bias)
            result = smooth + (result - smooth).detach()
        return result.reshape(*x.shape[:-1], self.out_features)

    def _product(self, x: Tensor) -> Tensor:
        """The product of `x` (tokens × in) with the weights: tokens × out, float32."""
        return kernels.integer_product(x, self)


@module_type("outlier_int8_linear")
class OutlierInt8Linear(DynamicInt8Linear):
    """The same, but activations of at least `threshold` are multiplied in floating point.

    Their weights are the dequantized integers: no second copy in floating point is kept. Which
    activations these are is decided token by token.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False, threshold: float = 6.0):
        super().__init__(in_features, out_features, bias)
        self.threshold = threshold

    def arguments(self) -> dict[str, Any]:
        return {**super().arguments(), "threshold": self.threshold}

    def _product(self, x: Tensor) -> Tensor:
        large = x.abs() >= self.threshold
        columns = large.any(0).nonzero().squeeze(-1)
        if len(columns) == 0:
            return super()._product(x)
        product = super()._product(x.masked_fill(large, 0))
        weight = (self.packed[:, columns].float() - 128) * self.scales.float()
        outliers = torch.where(large[:, columns], x[:, columns], 0).float()
        return product + outliers @ weight.t()
