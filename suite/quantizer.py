"""How transformers reads a compressed checkpoint: once `suite` is imported, by plain `from_pretrained`.

The modules of the surgery list are rebuilt on the meta device before the weights load.
"""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from suite.errors import InputError
from suite.layers import ModuleSpec
from suite.specs import explain

QUANT_METHOD = "weighin"


@register_quantization_config(QUANT_METHOD)
class SurgeryConfig(QuantizationConfigMixin):
    """The `quantization_config` of a compressed checkpoint."""

    def __init__(self, surgery: dict[str, Any] | None = None, **_: Any):
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        self.surgery = surgery

    def specs(self) -> dict[str, ModuleSpec]:
        """The surgery list, validated.

        Raises:
            InputError: it is none, or an entry is not a module type with arguments.
        """
        if not isinstance(self.surgery, dict) or not self.surgery:
            raise InputError("no surgery list is there, which maps paths to module types and arguments.")
        specs = {}
        for path, entry in self.surgery.items():
            try:
                specs[path] = ModuleSpec.model_validate(entry)
            except ValidationError as error:
                raise InputError(f"the surgery list, at '{path}': {explain(error, ModuleSpec)}") from None
        return specs


@register_quantizer(QUANT_METHOD)
class SurgeryQuantizer(HfQuantizer):
    """Rebuilds the modules of a compressed checkpoint before its weights load."""

    quantization_config: SurgeryConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        from suite.checkpoint import perform  # imported with `suite`, it would be in its own way

        try:
            perform(model, self.quantization_config.specs())
        except InputError as error:
            raise InputError(f"'{model.name_or_path}/config.json': {error}") from None
        return model

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True
