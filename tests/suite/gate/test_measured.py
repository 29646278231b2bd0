"""The cache of a base is named by everything that could change one of its outcomes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from suite.conformance import tiny
from suite.evaluate.harness import EMBEDDED
from suite.gate import measured
from suite.gate.measured import Measured, cache_folder
from suite.models import load
from suite.specs import Protocol
from tests.suite.gate import examples
from tests.suite.gate.examples import save_checkpoint


@pytest.fixture
def protocol(tmp_path: Path) -> Protocol:
    (tmp_path / "tiny.yaml").write_text(examples.PROTOCOL_FILE)
    return Protocol.load(str(tmp_path / "tiny.yaml"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path / "model")


Key = Callable[..., Path]


@pytest.fixture
def key(folder: Path, protocol: Protocol) -> Key:
    def name(protocol: Protocol = protocol, limit: int | None = None) -> Path:
        return cache_folder(load.resolve(str(folder)), protocol, "cpu", limit, None)

    return name


def test_the_key_is_the_same_twice(key: Key) -> None:
    assert key() == key()


def test_weights_change_the_key(key: Key, folder: Path) -> None:
    before = key()
    save_checkpoint(folder, noise=0.01)
    assert key() != before


def test_the_tokenizer_alone_changes_the_key(key: Key, folder: Path) -> None:
    before = key()
    tokenizer: PreTrainedTokenizerFast = tiny.byte_tokenizer()
    tokenizer.add_tokens(["one more"])
    tokenizer.save_pretrained(folder)
    assert key() != before


@pytest.mark.parametrize("change", [{"tokens_per_batch": 1}, {"dtype": "bfloat16"}, {"name": "other"}])
def test_the_protocol_with_its_batches_and_dtype_changes_the_key(
    key: Key, protocol: Protocol, change: dict[str, Any]
) -> None:
    assert key(protocol.model_copy(update=change)) != key()


def test_the_limit_changes_the_key(key: Key) -> None:
    assert key(limit=5) != key()


def test_threads_change_the_key(key: Key, monkeypatch: pytest.MonkeyPatch) -> None:
    before = key()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    assert key() != before


def test_the_device_changes_the_key(key: Key, monkeypatch: pytest.MonkeyPatch) -> None:
    before = key()
    monkeypatch.setattr(measured, "device_name", lambda device: "another")
    assert key() != before


@pytest.mark.parametrize("package", ["weighin", "torch", "transformers", "tokenizers", "lm_eval", "datasets"])
def test_every_library_changes_the_key(key: Key, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    before, version = key(), measured.metadata.version
    monkeypatch.setattr(measured.metadata, "version", lambda name: "0" if name == package else version(name))
    assert key() != before


def test_the_suites_own_sources_change_the_key(key: Key, monkeypatch: pytest.MonkeyPatch) -> None:
    before = key()
    monkeypatch.setattr(measured, "source_digest", lambda: "edited")
    assert key() != before


def test_the_digest_of_sources_sees_an_edited_line(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    before = measured._files_digest(tmp_path, "**/*.py")
    (tmp_path / "a.py").write_text("x = 2\n")
    assert measured._files_digest(tmp_path, "**/*.py") != before


def test_the_documents_of_a_task_change_the_key(
    key: Key, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = key()
    for name in ("task.yaml", "physical.jsonl", "passage.jsonl"):
        (tmp_path / name).write_bytes((EMBEDDED / name).read_bytes())
    monkeypatch.setattr("suite.evaluate.harness.EMBEDDED", tmp_path)
    assert key() == before
    first, *rest = (tmp_path / "physical.jsonl").read_text().splitlines()
    edited = json.loads(first) | {"prompt": "Something else"}
    (tmp_path / "physical.jsonl").write_text("\n".join([json.dumps(edited), *rest]) + "\n")
    assert key() != before


def test_rows_come_in_the_order_in_which_items_were_asked_for(folder: Path, protocol: Protocol) -> None:
    side = Measured(load.resolve(str(folder)), protocol)
    task = protocol.tasks[0]
    items = side.items(task)
    asked = [items[index] for index in (7, 0, 19, 3)]
    documents = [json.loads(line) for line in (EMBEDDED / f"{task.name}.jsonl").read_text().splitlines()]
    rows = side.rows(task, asked)
    assert [row["item"] for row in rows] == [documents[index]["id"] for _, index in asked]


def test_a_cache_that_cannot_be_written_is_said_and_changes_nothing(
    folder: Path, protocol: Protocol, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    said: list[str] = []
    side = Measured(load.resolve(str(folder)), protocol, cache=tmp_path / "file" / "x", notice=said.append)
    task = protocol.tasks[0]
    assert len(side.rows(task, side.items(task))) == 20
    assert len(said) == 1
    assert "cannot be written" in said[0]
