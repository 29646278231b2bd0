"""Where parameters and bytes are, and that nothing is counted twice or forgotten."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from suite import checkpoint
from suite.conformance import tiny
from suite.measure.ledger import ledger, tensor_bytes, total_disk, total_params
from suite.packed_layers import PackedLinear

RECIPES = [
    "dense",
    "svd(share=0.5)",
    "rtn-int4(embedding=4)",
    "rtn-int4(embedding=8, group=10, symmetric=false)",
    "svd(share=0.5)+rtn-int8(embedding=8)",
]


def test_parameters_and_bytes_agree_with_torch(model: PreTrainedModel) -> None:
    entries = ledger(model)
    assert total_params(entries) == tiny.unique_params(model)
    assert total_disk(entries) == 4 * tiny.unique_params(model)
    assert len({entry.path for entry in entries}) == len(entries)


def test_tied_weights_count_once_where_they_first_stand() -> None:
    tied = {entry.path: entry for entry in ledger(tiny.build("llama"))}
    untied = {entry.path: entry for entry in ledger(tiny.build("llama-untied"))}
    assert "lm_head" not in tied
    assert tied["model.embed_tokens"] == untied["model.embed_tokens"]
    assert untied["lm_head"].params == tiny.VOCAB * 48


def test_two_views_of_one_storage_count_once() -> None:
    weight = nn.Parameter(torch.zeros(4, 4))
    model = nn.ModuleList([nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)])
    model[0].weight = weight
    model[1].weight = nn.Parameter(weight.data)
    assert total_params(ledger(model)) == 16


def test_packed_integers_count_as_the_weights_they_stand_for() -> None:
    linear = nn.Linear(30, 20)
    packed = PackedLinear.from_linear(linear, 4, 7, False)
    (entry,) = ledger(packed)
    assert entry.params == total_params(ledger(linear)) == 30 * 20 + 20
    assert entry.disk == entry.resident == 20 * 15 + 2 * 20 * 5 + 20 * 3 + 4 * 20
    assert entry.nominal == entry.disk  # 30 columns of 4 bits need no padding


def test_the_nominal_size_leaves_the_padding_out() -> None:
    packed = PackedLinear.from_linear(nn.Linear(5, 3, bias=False), 3, 5, True)
    (entry,) = ledger(packed)
    assert entry.disk == 3 * 2 + 3 * 2  # 15 bits take two bytes
    assert entry.nominal == 3 * 15 / 8 + 3 * 2


def test_a_quantizer_leaves_the_number_of_parameters_alone(model: PreTrainedModel) -> None:
    before = total_params(ledger(model))
    tiny.compress(model, "rtn-int4(embedding=4)")
    assert total_params(ledger(model)) == before


def test_buffers_that_no_checkpoint_stores_are_resident_only() -> None:
    module = nn.Module()
    module.register_buffer("kept", torch.zeros(3))
    module.register_buffer("recomputed", torch.zeros(5), persistent=False)
    (entry,) = ledger(module)
    assert (entry.params, entry.disk, entry.resident) == (3, 12, 32)


def test_rotary_tables_are_resident_but_not_on_disk(llama: PreTrainedModel) -> None:
    rotary = {entry.type: entry for entry in ledger(llama)}["LlamaRotaryEmbedding"]
    assert rotary.disk == rotary.params == 0
    assert rotary.resident > 0


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", ["llama", "opt", "gpt-neox"])
def test_bytes_on_disk_are_those_of_the_file_without_its_header(
    model: PreTrainedModel, recipe: str, tmp_path: Path
) -> None:
    tiny.compress(model, recipe)
    checkpoint.save(model, None, tmp_path)
    files = sorted(tmp_path.glob("*.safetensors"))
    headers = [int.from_bytes(file.read_bytes()[:8], "little") for file in files]
    data = sum(file.stat().st_size - 8 - header for file, header in zip(files, headers, strict=True))
    assert total_disk(ledger(model)) == data
    assert total_disk(ledger(checkpoint.reload(tmp_path))) == data
    assert checkpoint.weight_bytes(tmp_path) == tensor_bytes(files) == data


def test_the_header_of_a_weight_file_is_not_counted(tmp_path: Path) -> None:
    header = json.dumps({"x": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"abc")
    assert tensor_bytes([tmp_path / "a.safetensors"]) == 3


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", ["llama", "llama-untied"])
def test_the_ledger_is_the_same_on_the_meta_device(model: PreTrainedModel, family: str, recipe: str) -> None:
    tiny.compress(model, recipe)
    skeleton = tiny.on_meta(family)
    checkpoint.perform(skeleton, checkpoint.surgery_of(model))
    assert ledger(skeleton) == ledger(model)


def test_half_precision_halves_the_bytes(family: str) -> None:
    single, half = (ledger(tiny.build(family, dtype)) for dtype in (torch.float32, torch.bfloat16))
    assert total_params(single) == total_params(half)
    assert total_disk(single) == 2 * total_disk(half)
