"""What a checkpoint must hold before it is measured; each audit names the offence.

These run on every cell and again in the conformance kit. A plug-in's code runs in the measuring
process, so nothing here stops one that is written to deceive these very functions.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from suite import checkpoint, data, kernels
from suite.errors import CellFailed
from suite.evaluate import harness
from suite.measure.census import hidden_memory, holder
from suite.measure.ledger import Entry, total_disk, total_params
from suite.models.anatomy import Anatomy
from suite.packed_layers import PackedMatrix
from suite.sparse_layers import SparseMatrix
from suite.specs import Budget, Protocol

STRUCTURAL_FIELDS = frozenset(
    (
        *("num_hidden_layers", "layer_types", "max_window_layers", "hidden_size", "intermediate_size"),
        *("ffn_dim", "head_dim", "num_attention_heads", "num_key_value_heads", "word_embed_proj_dim"),
        *("tie_word_embeddings", "attention_bias", "mlp_bias", "qkv_bias", "enable_bias"),
        "quantization_config",
    )
)
"""Config fields that a change of structure may change."""

_BOOKKEEPING = frozenset(("transformers_version", "_name_or_path", "dtype", "torch_dtype", "architectures"))
_LARGEST_ARGUMENTS = 4096
_WORD_SHARE = 0.005


def resident_tolerance(entries: Sequence[Entry]) -> int:
    """Bytes that may live beside a real model's ledger: 5 % of it, but no less than 1 MB."""
    return max(10**6, sum(entry.resident for entry in entries) // 20)


def checkpoint_bytes(entries: Sequence[Entry], folder: Path) -> None:
    """The files store what the reloaded model holds, and nothing but shapes beside it.

    Raises:
        CellFailed: ledger and files differ, or the surgery list carries data.
    """
    counted, stored = total_disk(entries), checkpoint.weight_bytes(folder)
    if counted != stored:
        raise CellFailed(
            f"the ledger counts {counted:,} bytes but the checkpoint stores {stored:,}: something is saved"
            " that the reloaded model does not hold, or held without being saved"
        )
    config = json.loads((folder / "config.json").read_text())
    surgery = (config.get("quantization_config") or {}).get("surgery", {})
    for path, entry in surgery.items():
        size = len(json.dumps(entry.get("arguments")))
        if size > _LARGEST_ARGUMENTS:
            raise CellFailed(
                f"{path}: its constructor arguments are {size:,} bytes in config.json, which no ledger"
                " counts; weights and indices belong in tensors"
            )


def within_budget(budget: Budget, dense: Anatomy, entries: Sequence[Entry]) -> None:
    """The reloaded checkpoint is at or under the target.

    Raises:
        CellFailed: it is above.
    """
    if budget.metric == "none":
        return
    target = budget.target(dense.size(budget.metric))
    achieved = total_params(entries) if budget.metric == "params" else total_disk(entries)
    if achieved > target:
        raise CellFailed(f"over budget: {achieved:,} {budget.metric} achieved, {target:,} allowed")


def as_planned(planned: Anatomy, entries: Sequence[Entry]) -> None:
    """The reloaded checkpoint has the sizes that the plan predicted.

    Raises:
        CellFailed: parameters or bytes differ.
    """
    for metric, achieved in (("params", total_params(entries)), ("bytes", total_disk(entries))):
        if achieved != planned.size(metric):
            raise CellFailed(
                f"not as planned: the plan says {planned.size(metric):,} {metric},"
                f" the reloaded checkpoint has {achieved:,}"
            )


def counted_honestly(model: nn.Module, dense_dtype: torch.dtype) -> None:
    """Every number stored is counted as the weights it stands for.

    Raises:
        CellFailed: a packed matrix is not of the size it claims, the index of a sparse one says more than
            where its values stand, or wide integers hold many weights each.
    """
    total = hidden = 0
    worst = (0, "")
    for path, module in model.named_modules():
        if isinstance(module, PackedMatrix):
            _audit_packed(path, module)
            continue
        if isinstance(module, SparseMatrix):
            _audit_sparse(path, module)
        for name, tensor in _own(module):
            if isinstance(module, SparseMatrix) and name == "index":
                continue
            total += tensor.numel()
            allowed = 4 if tensor.is_floating_point() else dense_dtype.itemsize
            if tensor.itemsize > allowed:
                words = tensor.numel() * tensor.itemsize // dense_dtype.itemsize - tensor.numel()
                hidden += words
                worst = max(worst, (words, f"{path}.{name} ({str(tensor.dtype).removeprefix('torch.')})"))
    if hidden > _WORD_SHARE * total:
        raise CellFailed(
            f"{worst[1]} stores more than {dense_dtype.itemsize} bytes for every parameter it counts as:"
            " weights packed into wider words are under-counted; use suite.packed_layers.PackedMatrix"
        )


def finite_tensors(model: nn.Module) -> None:
    """No tensor of the model holds NaN or infinity, in rows that no probe may reach either.

    Raises:
        CellFailed: with the tensor and the first such row.
    """
    for path, module in model.named_modules():
        for name, tensor in _own(module):
            if not tensor.is_floating_point() and not tensor.is_complex():
                continue
            finite = torch.isfinite(tensor.float() if tensor.itemsize == 1 else tensor)
            if not finite.all():
                bad = (~finite).reshape(len(tensor) if tensor.ndim else 1, -1).any(1).nonzero().flatten()
                full = f"{path}.{name}" if path else name
                raise CellFailed(
                    f"{full} holds NaN or infinity in {len(bad)} rows, the first is row {bad[0]}"
                )


def same_logits(model: PreTrainedModel, probe: Path) -> None:
    """The reloaded model gives the logits that were kept before saving, bit for bit.

    Raises:
        CellFailed: they differ, or are not finite.
    """
    ids, before = checkpoint.load_probe(probe)
    after = logits_of(model, ids).cpu()
    if not torch.isfinite(after).all():
        raise CellFailed("the reloaded checkpoint gives NaN or infinite logits")
    if not torch.equal(before, after):
        gap = float((before.float() - after.float()).abs().max())
        raise CellFailed(
            f"the reloaded checkpoint's logits differ from the compressed model's by up to {gap:.3g}"
        )


def same_config(dense: PretrainedConfig, location: str, model: PreTrainedModel) -> None:
    """Beside the structure, the config and the generation settings are the dense model's.

    Raises:
        CellFailed: with the field, its dense value and the one found.
    """
    ignored = STRUCTURAL_FIELDS | _BOOKKEEPING
    _audit_fields("config", _fields(dense, ignored), _fields(model.config, ignored))
    try:
        generation = GenerationConfig.from_pretrained(location)
    except OSError:
        generation = GenerationConfig.from_model_config(dense)
    found = model.generation_config or GenerationConfig.from_model_config(model.config)
    ignored = _BOOKKEEPING | {"_from_model_config"}
    _audit_fields("generation setting", _fields(generation, ignored), _fields(found, ignored))


def same_tokenizer(dense: PreTrainedTokenizerBase, saved: PreTrainedTokenizerBase) -> None:
    """The tokenizer beside the checkpoint is the dense model's.

    Raises:
        CellFailed: with the part that was changed.
    """
    before, after = _tokenizer_parts(dense), _tokenizer_parts(saved)
    for part, value in before.items():
        if after[part] != value:
            raise CellFailed(f"the tokenizer was changed: its {part} differs from the dense model's")


def no_hidden_memory(model: PreTrainedModel, entries: Sequence[Entry], dense: int, tolerance: int) -> None:
    """After use, the process holds what the ledger says, up to `tolerance` bytes.

    `dense` is what the dense model itself keeps in memory without storing it (rotary frequencies).

    Raises:
        CellFailed: with the largest thing beyond the ledger and where it hangs.
    """
    disk, resident = total_disk(entries), sum(entry.resident for entry in entries)
    if resident - disk > dense + tolerance:
        worst = max(entries, key=lambda entry: entry.resident - entry.disk)
        raise CellFailed(
            f"resident memory is {resident / disk:.2f} × what the checkpoint stores: {worst.path} keeps"
            f" {worst.resident - worst.disk:,} bytes in a non-persistent buffer"
        )
    exercise(model)
    hidden = hidden_memory(model)
    extra = sum(item.bytes for item in hidden)
    if extra > tolerance:
        more = f" and {len(hidden) - 1} more" if len(hidden) > 1 else ""
        raise CellFailed(
            f"resident memory is {(resident + extra) / resident:.2f} × the ledger:"
            f" {holder(model, hidden[0].objects)}"
            f" ({hidden[0].what}, {hidden[0].bytes:,} bytes{more})"
        )


@torch.inference_mode()
def exercise(model: PreTrainedModel) -> None:
    """Use the model once in each way that a lazily made copy could wait for."""
    ids = torch.arange(8, device=model.device).reshape(2, 4)
    model(ids, use_cache=False)
    cached: Any = model(ids[:1], use_cache=True)
    model(ids[:1, :1], past_key_values=cached.past_key_values, use_cache=True)


@torch.inference_mode()
def logits_of(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits (batch × length × vocabulary) without a cache, by the reference kernels.

    So that logits compared bit for bit tell of the weights, and not of which kernel was the faster.
    """
    with kernels.reference():
        logits: Tensor = model(ids.to(model.device), use_cache=False).logits
    return logits


def evaluation_paths(data_folder: Path | None) -> list[Path]:
    """Files and folders that hold what models are scored on."""
    import datasets
    from huggingface_hub import constants

    paths = [harness.EMBEDDED, Path(datasets.config.HF_DATASETS_CACHE)]
    paths += Path(constants.HF_HUB_CACHE).glob("datasets--*")
    if data_folder is not None:
        files = [file for splits in harness.DATA_FILES.values() for file in splits.values()]
        paths += [data_folder / file for file in (*files, *data.HELD_OUT_FILES)]
    return paths


def evaluation_texts(protocol: Protocol) -> set[str]:
    """Names of the texts that perplexity is measured on."""
    return {*data.HELD_OUT, protocol.perplexity.source}


def _own(module: nn.Module) -> list[tuple[str, Tensor]]:
    own = [*module._parameters.items(), *module._buffers.items()]
    return [(name, tensor) for name, tensor in own if tensor is not None]


def _audit_packed(path: str, module: PackedMatrix) -> None:
    if type(module).logical_parameters is not PackedMatrix.logical_parameters:
        raise CellFailed(
            f"{path}: {type(module).__name__} counts its own parameters (logical_parameters);"
            " only the suite counts"
        )
    honest = PackedMatrix(
        module.rows, module.columns, module.bits, module.group, module.symmetric, module.grid
    )
    for name, tensor in _own(module):
        expected = honest._buffers.get(name)
        if expected is None:
            fits = tensor.numel() <= module.rows + module.columns
        else:
            fits = tensor.shape == expected.shape and tensor.dtype == expected.dtype
        if not fits:
            shape = "×".join(map(str, tensor.shape))
            raise CellFailed(
                f"{path}.{name} ({shape} {str(tensor.dtype).removeprefix('torch.')})"
                f" does not fit a matrix of {module.rows}×{module.columns} at {module.bits} bits:"
                " it would be under-counted"
            )


def _audit_sparse(path: str, module: SparseMatrix) -> None:
    """The index, which counts as no parameter, says where the values stand and nothing else."""
    with torch.device("meta"):
        honest = SparseMatrix(module.rows, module.columns, module.nonzeros, module.index_format)
    index = module.index
    fits = (index.shape, index.dtype) == (honest.index.shape, honest.index.dtype)
    if fits:
        # Not the module's own reading of it, which a subclass could change.
        places = SparseMatrix.places(module)
        fits = int(places.sum()) == module.kept.numel() == module.nonzeros
        fits = fits and torch.equal(SparseMatrix.index_of(places, module.index_format), index)
    if not fits:
        raise CellFailed(
            f"{path}.index is not the places of {module.kept.numel():,} kept values in a matrix of"
            f" {module.rows}×{module.columns}: what it holds would be under-counted"
        )


def _fields(config: Any, ignored: frozenset[str]) -> dict[str, Any]:
    return {k: v for k, v in config.to_dict().items() if k not in ignored and v is not None}


def _audit_fields(kind: str, before: dict[str, Any], after: dict[str, Any]) -> None:
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            raise CellFailed(
                f"the {kind} '{key}' was changed from {_shown(before.get(key))} to {_shown(after.get(key))};"
                " only structure may change"
            )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def _tokenizer_parts(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    parts: dict[str, Any] = {
        "vocabulary": tokenizer.get_vocab(),
        "special tokens": tokenizer.special_tokens_map,
        "chat template": getattr(tokenizer, "chat_template", None),
        "text processing": None,
    }
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        parts["text processing"] = {k: v for k, v in content.items() if k not in ("truncation", "padding")}
    return parts
