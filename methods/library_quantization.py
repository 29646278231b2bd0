"""8-bit weights as torchao and bitsandbytes round them, stored in the suite's packed linear.

The libraries decide codes and scales; saving, reloading and multiplying are the suite's, so that sizes
are counted and speeds measured as for every other method. Scales are stored as float16.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from methods.activation_quantization import ChannelConfig
from methods.quantization import RtnConfig, RtnInt8, linear_at, packed_like
from suite.calibration import Calibration
from suite.errors import InputError, require
from suite.layers import ModuleSpec, replace
from suite.method import Plan, Target, register
from suite.models.anatomy import Anatomy
from suite.packed_layers import PackedMatrix


class LibraryInt8(RtnInt8):
    """8 bits per output channel, rounded by a library; embedding and head by the suite."""

    library: ClassVar[str]
    Config: ClassVar[type[RtnConfig]] = ChannelConfig

    def plan(self, anatomy: Anatomy, target: Target | None, seed: int) -> Plan:
        require(self.library, self.name)
        return super().plan(anatomy, target, seed)

    def pack_linears(
        self, model: PreTrainedModel, specs: dict[str, ModuleSpec], calibration: Calibration | None
    ) -> dict[str, Any]:
        for path, spec in specs.items():
            linear = linear_at(model, path)
            packed = packed_like(linear, spec)
            store(packed, *self.quantize(linear.weight.detach()))
            replace(model, path, packed)
        return {}

    @staticmethod
    @abstractmethod
    def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
        """The library's codes (int8, out × in) and scales (out) of `weight` (out × in)."""


@torch.no_grad()
def store(packed: PackedMatrix, codes: Tensor, scales: Tensor) -> None:
    """Put signed codes (int8, out × in) and scales (out) into a symmetric 8-bit matrix.

    Raises:
        InputError: a scale is above what float16 holds.
    """
    halved = scales.reshape(-1, 1).half()
    if not torch.isfinite(halved).all():
        raise InputError("a scale is above 65504, the largest that float16 holds.")
    packed.packed.copy_(codes.view(torch.uint8) ^ 0x80)
    packed.scales.copy_(halved)


@register
class TorchaoInt8(LibraryInt8):
    """torchao's int8 weight-only quantization, one scale per output channel.

    Its scale is max|w| / 127.5 where `rtn-int8` has max|w| / 127: the grid's last point of the negative
    side, −128, is used, and the largest weights are clipped by half a step.
    """

    name = "torchao-int8"
    source = "torchao, Int8WeightOnlyConfig (github.com/pytorch/ao)"
    library = "torchao"

    @staticmethod
    def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        quantize_(linear, Int8WeightOnlyConfig())
        quantized: Any = linear.weight
        if hasattr(quantized, "qdata"):
            return quantized.qdata, quantized.scale
        codes, scales, _ = quantized.tensor_impl.get_plain()  # up to torchao 0.14
        return codes, scales


@register
class BitsandbytesInt8(LibraryInt8):
    """bitsandbytes' row-wise rounding of weights to 8 bits (the weights of LLM.int8()).

    The scheme of `rtn-int8`, from weights rounded to float16 first as the library does: the same scale
    max|w| / 127 and, but for a few ties and what float16 rounds, the same codes. Activations stay as
    they are; `llm-int8` quantizes them too.
    """

    name = "bitsandbytes-int8"
    source = "bitsandbytes, int8_vectorwise_quant (github.com/bitsandbytes-foundation/bitsandbytes)"
    library = "bitsandbytes"

    @staticmethod
    def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
        from bitsandbytes.functional import int8_vectorwise_quant

        codes, largest, _ = int8_vectorwise_quant(weight.half().contiguous())
        return codes, largest / 127
