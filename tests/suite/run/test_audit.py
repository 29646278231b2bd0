"""Each audit refuses what it is made for, with the offence by name, and lets honest checkpoints pass."""

from __future__ import annotations

import gc
import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from suite import checkpoint, data, kernels, numba_kernels
from suite.calibration import draw
from suite.conformance import tiny
from suite.errors import CellFailed
from suite.evaluate import harness
from suite.measure.census import hidden_memory, holder
from suite.measure.ledger import ledger
from suite.models import load
from suite.models.anatomy import anatomy_of, drop_blocks
from suite.packed_layers import PackedLinear
from suite.run import audit
from suite.run.runner import Grid, Options
from suite.seal import Trespass, sealed
from suite.specs import Budget, CalibrationSpec, Track
from tests.suite import examples

BIG = 6_000_000
"""Numbers in an array that no other test holds anything as large as."""


@pytest.fixture
def saved(llama: PreTrainedModel, folder_of: Callable[[str], Path], tmp_path: Path) -> Path:
    """A compressed checkpoint, honestly made."""
    tiny.compress(llama, "svd+rtn-int4", "bytes=0.3")
    checkpoint.save(llama, load.load_tokenizer(str(folder_of("llama"))), tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_an_honest_checkpoint_passes_all_audits(
    saved: Path, folder_of: Callable[[str], Path], family: str
) -> None:
    model = checkpoint.reload(saved)
    entries = ledger(model)
    source = load.resolve(str(folder_of("llama")))
    audit.checkpoint_bytes(entries, saved)
    audit.within_budget(Budget.parse("bytes=0.3"), tiny.anatomy("llama"), entries)
    audit.as_planned(anatomy_of(model), entries)
    audit.counted_honestly(model, torch.float32)
    audit.finite_tensors(model)
    audit.same_config(load.load_config(source), source.location, model)
    audit.same_tokenizer(load.load_tokenizer(source.location), load.load_tokenizer(str(saved)))


def test_a_dropped_block_changes_only_structural_fields(family: str, tmp_path: Path) -> None:
    dense, model = tiny.build(family), tiny.build(family)
    dense.save_pretrained(tmp_path / "dense")
    drop_blocks(model, [1])
    checkpoint.save(model, None, tmp_path / "dropped")
    config = load.load_config(load.resolve(str(tmp_path / "dense")))
    audit.same_config(config, str(tmp_path / "dense"), checkpoint.reload(tmp_path / "dropped"))


@pytest.mark.parametrize(
    ("field", "value"), [("max_position_embeddings", 4096), ("eos_token_id", 5), ("rms_norm_eps", 0.1)]
)
def test_a_changed_config_field_is_named_with_both_values(
    field: str, value: float, saved: Path, folder_of: Callable[[str], Path]
) -> None:
    source = load.resolve(str(folder_of("llama")))
    model = checkpoint.reload(saved)
    setattr(model.config, field, value)
    with pytest.raises(CellFailed, match=rf"'{field}' was changed from .* to {value}"):
        audit.same_config(load.load_config(source), source.location, model)


def test_a_changed_tokenizer_is_refused_by_what_was_changed(tokenizer: PreTrainedTokenizerFast) -> None:
    for change, part in (
        (lambda t: t.add_tokens(["answer"]), "vocabulary"),
        (lambda t: setattr(t, "chat_template", "x"), "chat template"),
        (lambda t: setattr(t, "eos_token", "<s>"), "special tokens"),
    ):
        changed = tiny.byte_tokenizer()
        change(changed)
        with pytest.raises(CellFailed, match=part):
            audit.same_tokenizer(tokenizer, changed)


def test_nan_is_found_in_a_row_that_no_prompt_reaches(llama: PreTrainedModel) -> None:
    embedding: Any = llama.get_input_embeddings()
    embedding.weight.data[123, 4] = float("inf")
    with pytest.raises(CellFailed, match=r"embed_tokens.weight holds NaN or infinity in 1 rows.*row 123"):
        audit.finite_tensors(llama)


def test_a_packed_matrix_must_be_as_large_as_it_claims() -> None:
    honest = PackedLinear.from_linear(nn.Linear(48, 16), 4, 16, False)
    audit.counted_honestly(nn.Sequential(honest), torch.float32)
    honest.packed = torch.zeros(16, 48, dtype=torch.uint8)
    with pytest.raises(CellFailed, match="does not fit a matrix of 16×48 at 4 bits"):
        audit.counted_honestly(nn.Sequential(honest), torch.float32)


def test_few_wide_indices_are_no_offence() -> None:
    model = nn.Sequential(nn.Linear(200, 200))
    model.register_buffer("order", torch.arange(200))
    audit.counted_honestly(model, torch.float32)
    model.register_buffer("order", torch.arange(20000))
    with pytest.raises(CellFailed, match=r"order \(int64\)"):
        audit.counted_honestly(model, torch.float32)


class Holder(nn.Linear):
    """A layer to hang things on."""

    shared: ClassVar[list[Tensor]] = []


_GLOBAL: list[object] = []


def _closure(value: object) -> Callable[..., object]:
    return lambda *_: value


@pytest.fixture
def earlier_objects_left_out() -> Iterator[None]:
    """As in a worker, what is alive before a test is no business of the census, and costs it no time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("earlier_objects_left_out")
@pytest.mark.parametrize(
    ("hang", "where"),
    [
        (lambda layer, big: setattr(layer, "kept", [{"deep": (big,)}]), "0 keeps it in attribute 'kept'"),
        (
            lambda layer, big: setattr(layer, "call", _closure(big)),
            "attribute 'call' (the closure of _closure",
        ),
        (lambda layer, big: setattr(Holder, "shared", [big]), "class Holder keeps it in attribute 'shared'"),
        (lambda layer, big: globals().update(_GLOBAL=[{"big": big}]), "keeps it in the global '_GLOBAL'"),
        (
            lambda layer, big: layer.register_forward_hook(_closure(big)),
            "0 keeps it in attribute '_forward_hooks' (the closure of _closure",
        ),
    ],
)
@pytest.mark.parametrize("kind", ["tensor", "array", "bytes"])
def test_hidden_memory_is_found_wherever_it_hangs(hang: Any, where: str, kind: str) -> None:
    big = {
        "tensor": lambda: torch.zeros(BIG),
        "array": lambda: np.ones(BIG, np.float32),
        "bytes": lambda: os.urandom(4 * BIG),
    }[kind]()
    model = nn.Sequential(Holder(4, 4))
    hang(model[0], big)
    del big
    try:
        found = hidden_memory(model)[0]
        assert found.bytes == 4 * BIG
        assert where in holder(model, found.objects)
    finally:
        Holder.shared = []
        globals().update(_GLOBAL=[])


@pytest.mark.usefixtures("earlier_objects_left_out")
def test_a_tensor_is_found_in_a_container_that_was_there_before() -> None:
    _GLOBAL.append(torch.zeros(BIG))
    try:
        found = hidden_memory(nn.Linear(4, 4))[0]
        assert found.bytes == 4 * BIG
        assert "keeps it in the global '_GLOBAL'" in holder(nn.Linear(4, 4), found.objects)
    finally:
        _GLOBAL.clear()


@pytest.mark.usefixtures("earlier_objects_left_out")
def test_machine_code_of_kernels_is_no_hidden_memory_but_the_same_bytes_elsewhere_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class CompiledKernel:
        def __init__(self, code: bytes):
            self.asm = {"cubin": code}
            self.kernel = code

    compiler = ModuleType("triton.compiler.compiler")
    compiler.CompiledKernel = CompiledKernel  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "triton.compiler.compiler", compiler)
    kernels = [CompiledKernel(os.urandom(4 * BIG))]
    assert all(item.bytes < 4 * BIG for item in hidden_memory(nn.Linear(4, 4)))
    model = Holder(4, 4)
    model.kept = [kernels[0].kernel]
    assert hidden_memory(model)[0].bytes == 4 * BIG


@pytest.mark.usefixtures("earlier_objects_left_out")
def test_what_numba_compiles_is_no_hidden_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build("llama")
    tiny.compress(model, "rtn-int4")
    monkeypatch.setattr(kernels, "_measure", lambda calls, probe: list(calls)[-1])
    kernels.forget()
    numba_kernels._kernel.cache_clear()
    tiny.logits_of(model, tiny.token_ids(1, 4))
    assert set(kernels.chosen().values()) == {kernels.COMPILED}
    kernels.forget()
    assert all("numba" not in holder(model, item.objects) for item in hidden_memory(model))


@pytest.mark.usefixtures("earlier_objects_left_out")
def test_the_models_own_tensors_are_not_hidden_but_what_a_view_keeps_alive_is() -> None:
    model = nn.Sequential(nn.Linear(3000, 2000, bias=False))
    assert all(item.bytes < 4 * BIG for item in hidden_memory(model))
    model[0].weight = nn.Parameter(torch.zeros(2 * BIG)[:BIG].view(2000, 3000))
    found = hidden_memory(model)[0]
    assert found.bytes == 4 * BIG
    assert "view of a larger storage" in holder(model, found.objects)


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (lambda folder: (harness.EMBEDDED / "physical.jsonl").open().close(), "physical.jsonl"),
        (lambda folder: os.open(harness.EMBEDDED / "science.jsonl", os.O_RDONLY), "science.jsonl"),
        (lambda folder: (folder / "link").read_text(), "passage.jsonl"),
        (lambda folder: harness.load_tasks("physical", None), "items of task 'physical'"),
        (lambda folder: data.text("pydoc-held-out"), "evaluation text 'pydoc-held-out'"),
        (lambda folder: data.text("wikitext2-test", folder), "evaluation text 'wikitext2-test'"),
        (lambda folder: socket.socket().connect(("192.0.2.1", 9)), "connected to '192.0.2.1'"),
        (lambda folder: (folder / "piqa" / "validation.jsonl").read_text(), "piqa"),
    ],
)
@pytest.mark.parametrize("hidden", [False, True])
def test_what_a_model_is_scored_on_is_out_of_reach_even_when_the_refusal_is_caught(
    attempt: Callable[[Path], object], words: str, hidden: bool, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(harness.EMBEDDED / "passage.jsonl")

    def work() -> None:
        try:
            attempt(tmp_path)
        except Exception:
            if not hidden:
                raise

    with pytest.raises(Trespass, match="must not see what it is scored on") as caught:  # noqa: SIM117
        with sealed(audit.evaluation_paths(tmp_path), data.HELD_OUT):
            work()
    assert words in str(caught.value)


def test_the_seal_holds_only_inside_its_block_and_lets_calibration_through(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    with sealed(audit.evaluation_paths(None), data.HELD_OUT):
        assert len(draw(CalibrationSpec(source="pydoc", count=2, length=16), tokenizer).tokens) == 2
        (tmp_path / "own.txt").write_text("a method may write and read files of its own")
    assert data.text("pydoc-held-out")
    assert harness.load_tasks("physical", None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "stage", "reason"),
    [
        ("opens-items", "compress", "opened the evaluation data"),
        ("plans-too-much", "audit", "not as planned"),
        ("changes-config", "audit", "'max_position_embeddings' was changed"),
        ("changes-tokenizer", "audit", "the tokenizer was changed"),
        ("rare-nan", "audit", "NaN or infinity in 1 rows, the first is row 299"),
    ],
)
def test_a_whole_cell_that_cheats_is_a_failed_row(
    name: str, stage: str, reason: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    protocol = tmp_path / "tiny.yaml"
    protocol.write_text(examples.TINY_PROTOCOL)
    zoo = Path(__file__).parents[1] / "conformance" / "zoo" / "behaviour.py"
    track = Track(
        models=(str(folder_of("llama")),), recipes=(name,), budgets=("params=0.8",), protocol=str(protocol)
    )
    grid = Grid(track, Options(results=tmp_path / "results", plugins=(str(zoo),)))
    grid.cells = grid.cells[1:]
    grid.run()
    failure = grid.cells[0].record.failure
    assert failure is not None
    assert failure.stage == stage
    assert reason in failure.reason
