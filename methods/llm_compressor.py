"""GPTQ as llm-compressor carries it out, stored in the suite's packed linear.

The library decides codes, scales and zeros on the calibration tokens that every method gets; saving,
reloading and multiplying are the suite's, so that sizes are counted and speeds measured as for others.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from methods.quantization import Quantizer, UniformConfig, linear_at, packed_like
from suite.calibration import Calibration
from suite.errors import require
from suite.layers import ModuleSpec, replace
from suite.method import Plan, Target, register
from suite.models.anatomy import Anatomy

_NOT_INVERTED = re.compile(r"Hessian inversion failed for (\d+)/\d+ modules")


class LlmCompressorGptq(Quantizer[UniformConfig]):
    """`oneshot` with a `GPTQModifier` at the library's defaults; embedding and head by the suite.

    Columns go in order of activation on grids fixed beforehand. The library wants groups that divide a
    linear's inputs: where `group` does not, the next smaller size that does is taken, down to its half,
    and otherwise the whole row; the notes of a plan count such linears. They count, too, those that it
    rounded to nearest because their second moment could not be inverted.

    Raises:
        MissingExtra: llm-compressor is not installed.
    """

    source = "llm-compressor, GPTQModifier (github.com/vllm-project/llm-compressor)"
    needs = frozenset({"calibration"})
    library: ClassVar[str] = "llmcompressor"
    Config = UniformConfig

    def plan(self, anatomy: Anatomy, target: Target | None, seed: int) -> Plan:
        require(self.library, self.name)
        plan = super().plan(anatomy, target, seed)
        asked = [super(LlmCompressorGptq, self).format(self.bits, x.in_features) for x in anatomy.linears]
        taken = [self.format(self.bits, x.in_features) for x in anatomy.linears]
        others = sum(first != second for first, second in zip(asked, taken, strict=True))
        return plan.model_copy(update={"notes": {"linears_with_another_group": others}}) if others else plan

    def format(self, bits: int, columns: int) -> dict[str, Any]:
        asked = super().format(bits, columns)
        group = asked["group"]
        legal = (size for size in range(group, group // 2 - 1, -1) if columns % size == 0)
        return asked | {"group": next(legal, columns)}

    def pack_linears(
        self, model: PreTrainedModel, specs: dict[str, ModuleSpec], calibration: Calibration | None
    ) -> dict[str, Any]:
        assert calibration is not None
        nearest = quantize(model, specs, calibration.tokens)
        for path, spec in specs.items():
            linear = linear_at(model, path)
            module = packed_like(linear, spec)
            module.store_(*rounded(linear, module.bits, module.group))
            replace(model, path, module)
        return {"rounded_to_nearest": nearest} if nearest else {}


def quantize(model: PreTrainedModel, specs: dict[str, ModuleSpec], tokens: Tensor) -> int:
    """Let the library round the linears at the paths of `specs`, for `tokens` (sequences × length).

    Rounded weights, scales and zeros are left on the linears. Returns how many of them the library
    says it rounded to nearest, as their second moment could not be inverted.
    """
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor import oneshot
    from llmcompressor.logger import logger
    from llmcompressor.modifiers.gptq import GPTQModifier

    schemes = {}
    for group in {spec.arguments["group"] for spec in specs.values()}:
        members = [path for path, spec in specs.items() if spec.arguments["group"] == group]
        first = specs[members[0]].arguments
        weights = QuantizationArgs(
            num_bits=first["bits"],
            type="int",
            symmetric=first["symmetric"],
            strategy="group",
            group_size=group,
        )
        schemes[f"groups of {group}"] = QuantizationScheme(targets=members, weights=weights)
    samples = cast(Any, [{"input_ids": row} for row in tokens])
    logged: list[str] = []
    sink = logger.add(logged.append, level="WARNING", format="{message}")  # it tells nowhere else
    try:
        oneshot(
            model=model,
            processor=cast(Any, object()),  # the tokens are given: there is nothing to process
            dataset=DataLoader(samples, batch_size=1),
            recipe=GPTQModifier(config_groups=schemes),
            num_calibration_samples=len(tokens),
        )
    finally:
        logger.remove(sink)
    vars(model).pop("save_pretrained", None)  # the library's own, for its own format
    return sum(int(found[1]) for message in logged if (found := _NOT_INVERTED.match(message)))


@torch.no_grad()
def rounded(linear: nn.Linear, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (m × n), scales and zeros (m × groups), unsigned, of a linear that the library has rounded."""
    half, scales = 1 << (bits - 1), cast(Tensor, linear.weight_scale).float()
    zeros = cast(Tensor, getattr(linear, "weight_zero_point", torch.zeros_like(scales))).float()
    steps = linear.weight.float().unflatten(1, (-1, group)) / scales.unsqueeze(-1)
    codes = (steps + zeros.unsqueeze(-1)).round() + half
    return codes.clamp(0, 2 * half - 1).flatten(1), scales, zeros + half


@register
class LlmCompressorGptqInt4(LlmCompressorGptq):
    """llm-compressor's GPTQ, 4 bits, groups of 64 columns unless `group` is given."""

    name = "llm-compressor-gptq-int4"
    bits = 4


@register
class LlmCompressorGptqInt3(LlmCompressorGptq):
    """llm-compressor's GPTQ, 3 bits, groups of 64 columns unless `group` is given."""

    name = "llm-compressor-gptq-int3"
    bits = 3
