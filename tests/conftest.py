"""Fixtures every test may use. Tiny random models only; nothing here reaches the network."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

# Before transformers and datasets are imported: no test may depend on the hub or leave files behind.
_CACHE = tempfile.TemporaryDirectory(prefix="weighin-tests-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_CACHE"] = _CACHE.name
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# One thread, in the commands that tests start as well: tests side by side would wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402
from transformers import PreTrainedModel, PreTrainedTokenizerFast  # noqa: E402
from transformers.utils import logging as transformers_logging  # noqa: E402

from suite.conformance import tiny  # noqa: E402
from suite.data import DATA_DIR_VARIABLE, data_directory  # noqa: E402

torch.set_num_threads(1)
transformers_logging.disable_progress_bar()
settings.register_profile(
    "weighin", deadline=None, max_examples=30, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("weighin")


@pytest.fixture(params=tiny.FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Each of the supported families in turn."""
    name: str = request.param
    return name


@pytest.fixture
def model(family: str) -> PreTrainedModel:
    """A fresh tiny model of each family, in float32 with fixed weights."""
    return tiny.build(family)


@pytest.fixture
def llama() -> PreTrainedModel:
    """A fresh tiny Llama with grouped-query attention and tied embeddings."""
    return tiny.build("llama")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, plus BOS and EOS."""
    return tiny.byte_tokenizer()


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Make an optional package look as if it were not installed."""
    found = importlib.util.find_spec

    def hide(package: str) -> None:
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *rest: None if name == package else found(name, *rest)
        )

    return hide


@pytest.fixture(scope="session")
def folder_of(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast
) -> Callable[[str], Path]:
    """Gives the folder of a saved tiny model and tokenizer, by family; saved once per session."""
    saved: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in saved:
            saved[family] = tmp_path_factory.mktemp("models") / family
            tiny.build(family).save_pretrained(saved[family])
            tokenizer.save_pretrained(saved[family])
        return saved[family]

    return folder


@pytest.fixture
def tiny_folder(folder_of: Callable[[str], Path], family: str) -> Path:
    """The saved tiny model of each family, beside its tokenizer. Read only."""
    return folder_of(family)


@pytest.fixture
def data_folder() -> Path:
    """The data directory named by the environment; skips the test without one."""
    folder = data_directory()
    if folder is None:
        pytest.skip(f"{DATA_DIR_VARIABLE} is not set")
    return folder
