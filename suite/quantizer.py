"""How transformers reads a compressed checkpoint: once `suite` is imported, by plain `from_pretrained`.

The modules of the surgery list are rebuilt on the meta device before the weights load.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from suite.layers import ModuleSpec

QUANT_METHOD = "weighin"


@register_quantization_config(QUANT_METHOD)
class SurgeryConfig(QuantizationConfigMixin):
    """The `quantization_config` of a compressed checkpoint."""

    def __init__(self, surgery: dict[str, Any] | None = None, **_: Any):
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        self.surgery = surgery or {}

    def specs(self) -> dict[str, ModuleSpec]:
        """The surgery list, validated."""
        return {path: ModuleSpec.model_validate(entry) for path, entry in self.surgery.items()}


@register_quantizer(QUANT_METHOD)
class SurgeryQuantizer(HfQuantizer):
    """Rebuilds the modules of a compressed checkpoint before its weights load."""

    quantization_config: SurgeryConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        from suite.checkpoint import perform  # imported with `suite`, it would be in its own way

        perform(model, self.quantization_config.specs())
        return model

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True
