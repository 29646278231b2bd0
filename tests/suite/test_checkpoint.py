"""Save, reload through plain transformers, and save again: nothing may change."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from suite import checkpoint, kernels
from suite.conformance import tiny
from suite.errors import InputError
from suite.layers import ModuleSpec
from suite.models.anatomy import anatomy_of
from suite.models.layouts import layout_of
from suite.packed_layers import PackedLinear, TiedHead

CASES = [
    ("svd", "params=0.8"),
    ("layerchop", "params=0.8"),
    ("rtn-int8", "none"),
    ("rtn-int4(embedding=4)", "none"),
    ("rtn-int4(symmetric=false, embedding=8, group=20)", "none"),
    ("svd+rtn-int8", "bytes=0.27"),
    ("slicegpt(width=40)", "none"),
    ("slicegpt(layout=official,width=40)+rtn-int4(embedding=8)", "none"),
]


def plain(folder: Path) -> PreTrainedModel:
    """What everyone else's code does."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    return model


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(("recipe", "budget"), CASES)
def test_a_reloaded_checkpoint_is_the_compressed_model(
    model: PreTrainedModel, recipe: str, budget: str, tmp_path: Path
) -> None:
    plan = tiny.compress(model, recipe, budget)
    first, second = tmp_path / "first", tmp_path / "second"
    checkpoint.save(model, None, first)
    again = plain(first)
    assert torch.equal(tiny.logits_of(again), tiny.logits_of(model))
    assert anatomy_of(again).entries == anatomy_of(model).entries
    assert checkpoint.weight_bytes(first) == plan.final.bytes
    assert checkpoint.surgery_of(again) == checkpoint.surgery_of(model)
    assert torch.equal(tiny.greedy(again, use_cache=True), tiny.greedy(again, use_cache=False))
    checkpoint.save(again, None, second)
    assert files(second) == files(first)


@pytest.mark.parametrize(("recipe", "budget"), CASES)
def test_half_precision_survives_the_round_trip_too(recipe: str, budget: str, tmp_path: Path) -> None:
    model = tiny.build("llama", torch.bfloat16)
    tiny.compress(model, recipe, budget if budget != "bytes=0.27" else "bytes=0.5")
    checkpoint.save(model, None, tmp_path)
    again = checkpoint.reload(tmp_path)
    assert again.dtype == plain(tmp_path).dtype == torch.bfloat16
    assert not again.training
    assert torch.equal(tiny.logits_of(again), tiny.logits_of(model))
    for name, tensor in model.state_dict().items():
        assert again.state_dict()[name].dtype == tensor.dtype
        assert torch.equal(again.state_dict()[name], tensor)


def test_a_saved_folder_is_a_whole_model_without_pickles(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = tiny.build("llama")
    tiny.compress(model, "svd(share=0.5)+rtn-int8")
    checkpoint.save(model, tokenizer, tmp_path)
    kinds = {path.suffix for path in tmp_path.iterdir()}
    assert kinds == {".json", ".safetensors"}
    text = "Any text survives, même en français."
    assert AutoTokenizer.from_pretrained(tmp_path)(text).input_ids == tokenizer(text).input_ids


def test_the_config_lists_each_replaced_module_with_its_arguments(tmp_path: Path) -> None:
    model = tiny.build("llama")
    tiny.compress(model, "svd(share=0.5)+rtn-int8")
    checkpoint.save(model, None, tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert stored["quant_method"] == "weighin"
    down = "model.layers.0.mlp.down_proj"
    assert stored["surgery"][down]["type"] == "low_rank"
    assert stored["surgery"][f"{down}.first"] == {
        "type": "packed_linear",
        "arguments": {
            "in_features": 112,
            "out_features": 16,
            "bits": 8,
            "group": 112,
            "symmetric": True,
            "bias": False,
        },
    }


@pytest.mark.parametrize("recipe", ["dense", "layerchop(remove=1)"])
def test_a_model_without_replaced_modules_is_an_ordinary_checkpoint(recipe: str, tmp_path: Path) -> None:
    model = tiny.build("llama")
    tiny.compress(model, recipe)
    checkpoint.save(model, None, tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_a_dense_model_saved_by_the_suite_is_the_one_transformers_saves(
    tiny_folder: Path, family: str, tmp_path: Path
) -> None:
    checkpoint.save(plain(tiny_folder), None, tmp_path)
    for name, content in files(tmp_path).items():
        assert content == (tiny_folder / name).read_bytes()
    assert torch.equal(tiny.logits_of(plain(tiny_folder)), tiny.logits_of(tiny.build(family)))


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_tied_head_stays_tied_to_the_packed_table(family: str, tmp_path: Path) -> None:
    model = tiny.build(family)
    tiny.compress(model, "rtn-int4(embedding=4)")
    checkpoint.save(model, None, tmp_path)
    again = plain(tmp_path)
    layout = layout_of(again.config)
    head = again.get_submodule(layout.head)
    assert isinstance(head, TiedHead)
    assert head._table == [again.get_submodule(layout.embedding)]
    with safe_open(tmp_path / "model.safetensors", "pt") as stored:
        assert not [name for name in stored.keys() if name.startswith(layout.head)]  # noqa: SIM118


def test_the_tensors_in_the_file_are_the_packed_ones(tmp_path: Path) -> None:
    model = tiny.build("gpt-neox")
    tiny.compress(model, "rtn-int4(embedding=8)")
    checkpoint.save(model, None, tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as stored:
        dtypes = {name: stored.get_tensor(name).dtype for name in stored.keys()}  # noqa: SIM118
    packed = [name for name in dtypes if name.endswith(".packed")]
    assert len(packed) == tiny.BLOCKS * 4 + 2
    assert {dtypes[name] for name in packed} == {torch.uint8}
    assert {dtypes[name] for name in dtypes if name.endswith(".scales")} == {torch.float16}


def test_a_surgery_list_that_does_not_fit_the_model_is_refused(llama: PreTrainedModel) -> None:
    spec = ModuleSpec(type="low_rank", arguments={"in_features": 4, "out_features": 4, "rank": 1})
    with pytest.raises(InputError, match=r"names 'model\.layers\.9\.mlp', which this model lacks"):
        checkpoint.perform(llama, {"model.layers.9.mlp": spec})


def test_a_checkpoint_with_an_unknown_module_type_asks_for_its_plug_in(tmp_path: Path) -> None:
    model = tiny.build("llama")
    tiny.compress(model, "svd(share=0.5)")
    checkpoint.save(model, None, tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"low_rank"', '"tensor_train"'))
    with pytest.raises(InputError, match="no module type is called 'tensor_train'"):
        plain(tmp_path)


DOWN = "model.layers.0.mlp.down_proj"
LINEAR = {"in_features": 112, "out_features": 48, "bits": 4, "group": 16}


@pytest.mark.parametrize(
    ("surgery", "reason"),
    [
        (None, "no surgery list"),
        ({}, "no surgery list"),
        ([DOWN], "no surgery list"),
        ({DOWN: "packed_linear"}, f"at '{DOWN}': Input should be a valid dictionary"),
        ({DOWN: {"type": "packed_linear"}}, "'arguments': Field required"),
        ({DOWN: {"type": "packed_linear", "arguments": {}}}, f"at '{DOWN}' cannot be built: .*missing"),
        ({DOWN: {"type": "packed_linear", "arguments": LINEAR | {"bits": 5}}}, "5 bits cannot be packed"),
        ({DOWN: {"type": "packed_linear", "arguments": LINEAR | {"group": 0}}}, "cannot be built: .*zero"),
        ({DOWN: {"type": "packed_linear", "arguments": LINEAR | {"group": "x"}}}, "cannot be built: "),
        ({DOWN: {"type": "low_rank", "arguments": LINEAR}}, "'low_rank' .* unexpected keyword"),
        ({f"{DOWN}.x.y": {"type": "packed_linear", "arguments": LINEAR}}, "which this model lacks"),
        ({"lm_head": {"type": "tied_head", "arguments": {"source": "x"}}}, "at 'lm_head' cannot be built: "),
        ({"lm_head": {"type": "tied_head", "arguments": {"source": DOWN}}}, "is not a packed embedding"),
    ],
)
def test_a_damaged_surgery_list_is_refused_in_one_line_that_names_its_file(
    surgery: object, reason: str, tmp_path: Path
) -> None:
    checkpoint.save(tiny.build("llama"), None, tmp_path)
    file = tmp_path / "config.json"
    quantization = {"quant_method": "weighin", "surgery": surgery}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": quantization}))
    with pytest.raises(InputError, match=f"^'{file}': .*{reason}") as refused:
        checkpoint.reload(tmp_path)
    assert "\n" not in str(refused.value)


def test_outer_modules_come_before_those_inside_them(llama: PreTrainedModel) -> None:
    tiny.compress(llama, "svd(share=0.5)+rtn-int8")
    paths = list(checkpoint.surgery_of(llama))
    down = "model.layers.0.mlp.down_proj"
    assert paths.index(down) < paths.index(f"{down}.first")
    assert isinstance(llama.get_submodule(f"{down}.first"), PackedLinear)


def test_a_compressed_checkpoint_can_be_trained_on(tmp_path: Path) -> None:
    model = tiny.build("llama")
    tiny.compress(model, "svd(share=0.5)")
    checkpoint.save(model, None, tmp_path)
    again = plain(tmp_path).train()
    ids = tiny.token_ids()
    again(ids, labels=ids).loss.backward()
    factor = again.get_submodule("model.layers.0.mlp.up_proj.first")
    assert factor.weight.grad.abs().sum() > 0


def test_the_probe_is_read_back_exactly(tmp_path: Path) -> None:
    ids, logits = tiny.token_ids(), tiny.logits_of(tiny.build("llama", torch.bfloat16))
    checkpoint.save_probe(tmp_path / "probe.safetensors", ids, logits[:, ::2])
    stored_ids, stored_logits = checkpoint.load_probe(tmp_path / "probe.safetensors")
    assert torch.equal(stored_ids, ids)
    assert torch.equal(stored_logits, logits[:, ::2])


@pytest.mark.slow
def test_a_fresh_process_reads_the_same_model(tmp_path: Path) -> None:
    model = tiny.build("llama")
    tiny.compress(model, "svd(share=0.6)+rtn-int4(embedding=4)")
    checkpoint.save(model, None, tmp_path)
    script = """
import hashlib, sys, torch
from suite import kernels
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
with torch.inference_mode(), kernels.reference():
    logits = model(torch.arange(24).reshape(2, 12), use_cache=False).logits
print(hashlib.sha256(logits.numpy().tobytes()).hexdigest())
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True
    )
    with kernels.reference():
        logits = tiny.logits_of(model, torch.arange(24).reshape(2, 12))
    assert done.stdout.split()[-1] == hashlib.sha256(logits.numpy().tobytes()).hexdigest()


def test_weights_that_are_missing_are_never_made_up(llama: PreTrainedModel, tmp_path: Path) -> None:
    tiny.compress(llama, "rtn-int4")
    checkpoint.save(llama, None, tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.mlp.up_proj.packed"], weights["model.layers.1.mlp.up_proj.scales"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"not whole: 'model\.layers\.1\.mlp\.up_proj\.packed' and 1 more"):
        checkpoint.reload(tmp_path)
