"""Compressed checkpoints: the dense config plus a surgery list, in safetensors.

The surgery list (module path -> registered type and arguments) is stored as `quantization_config`
in `config.json`, where `suite.quantizer` finds it.
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from suite.errors import InputError
from suite.layers import ModuleSpec, replace, spec_of
from suite.measure.ledger import tensor_bytes
from suite.models import sliced as sliced  # registers its module types
from suite.models.load import first_line, forget_quantization, read_weights
from suite.quantizer import SurgeryConfig


def surgery_of(model: nn.Module) -> dict[str, ModuleSpec]:
    """The registered modules in a model, outer ones before the ones inside them."""
    found = {path: spec_of(module) for path, module in model.named_modules()}
    return {path: spec for path, spec in found.items() if spec is not None}


def perform(model: PreTrainedModel, surgery: dict[str, ModuleSpec]) -> None:
    """Put skeletons of the listed modules into a model whose weights are not loaded yet.

    Raises:
        InputError: a type is unknown, its arguments build no module, or the model lacks a path.
    """
    for path, spec in surgery.items():
        try:
            module = spec.build(model.dtype)
        except Exception as error:  # constructors may fail in any way on what a damaged file holds
            raise _misfit(path, spec, error) from None
        try:
            replace(model, path, module)
        except (AttributeError, ValueError):
            raise InputError(f"the surgery list names '{path}', which this model lacks.") from None
    for path, spec in surgery.items():
        try:
            bind = getattr(model.get_submodule(path), "bind", None)
            if callable(bind):
                bind(model)
        except Exception as error:
            raise _misfit(path, spec, error) from None


def _misfit(path: str, spec: ModuleSpec, error: Exception) -> InputError:
    reason = error if isinstance(error, InputError) else first_line(error)
    return InputError(f"the surgery list's '{spec.type}' at '{path}' cannot be built: {reason}")


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    """Write a checkpoint that `reload` and plain `from_pretrained` read back bit for bit."""
    surgery = surgery_of(model)
    forget_quantization(model)
    if surgery:
        entries = {path: spec.model_dump(mode="json") for path, spec in surgery.items()}
        model.config.quantization_config = SurgeryConfig(surgery=entries)
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def reload(folder: Path, device: str = "cpu") -> PreTrainedModel:
    """Load a checkpoint in its own dtype, in evaluation mode.

    Raises:
        InputError: its weights are missing or unreadable, or its surgery list is damaged.
    """
    return read_weights(str(folder), str(folder), device, "auto")


def weight_bytes(folder: Path) -> int:
    """Bytes of tensor data in the checkpoint's safetensors files, headers left out."""
    return tensor_bytes(sorted(folder.glob("*.safetensors")))


def save_probe(file: Path, ids: Tensor, logits: Tensor) -> None:
    """Keep the compressed model's logits on a few tokens, to be met again after the reload."""
    save_file({"ids": ids.cpu(), "logits": logits.cpu().contiguous()}, file)


def load_probe(file: Path) -> tuple[Tensor, Tensor]:
    """The token ids and logits that `save_probe` kept."""
    tensors = load_file(file)
    return tensors["ids"], tensors["logits"]
