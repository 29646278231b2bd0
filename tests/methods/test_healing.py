"""Healing as a stage: what it trains, what it leaves, and where in a recipe it may stand."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from methods import healing
from suite.conformance import tiny
from suite.errors import InputError, NotApplicable
from suite.measure.ledger import ledger, total_params
from suite.models.anatomy import anatomy_of
from suite.recipe import Recipe
from suite.specs import Budget

needs_peft = pytest.mark.skipif(find_spec("peft") is None, reason="peft is not installed")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHIN_CACHE_DIR", str(tmp_path))


FULL = [(family, "full") for family in tiny.FAMILIES]
LORA = [pytest.param(family, "lora", marks=needs_peft) for family in ("llama", "opt")]
REST = [
    pytest.param(family, "lora", marks=[needs_peft, pytest.mark.exhaustive])
    for family in tiny.FAMILIES
    if family not in ("llama", "opt")
]


@pytest.mark.parametrize(("family", "mode"), [*FULL, *LORA, *REST])
@pytest.mark.parametrize("before", ["layerchop", "svd", "slicegpt", "tensor-network(sites=3)"])
def test_healing_moves_logits_and_no_shape(family: str, before: str, mode: str) -> None:
    plain, healed = tiny.build(family), tiny.build(family)
    tiny.compress(plain, before, "params=0.8")
    plan = tiny.compress(healed, f"{before}+heal(mode={mode})", "params=0.8")
    assert total_params(ledger(healed)) == total_params(ledger(plain)) == plan.final.params
    assert plain.state_dict().keys() == healed.state_dict().keys()
    assert not torch.equal(tiny.logits_of(plain), tiny.logits_of(healed))
    assert all(parameter.requires_grad for parameter in healed.parameters())


@needs_peft
def test_adapters_train_only_the_linears() -> None:
    model, before = tiny.build("llama"), tiny.build("llama")
    plan = tiny.compress(model, "heal(mode=lora,rank=4)")
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before.get_parameter(name))}
    assert changed == {f"{line.path}.weight" for line in anatomy_of(model).linears}
    shapes = [(line.out_features, line.in_features) for line in anatomy_of(model).linears]
    assert plan.stages[0].notes["trained_parameters"] == sum(4 * (m + n) for m, n in shapes)


@needs_peft
def test_beside_adapters_a_tensor_network_is_trained_as_it_is() -> None:
    """Cores hold no linear that an adapter could go on; every one of them moves, and nothing is left over."""
    recipe = "tensor-network(exclude=down,refine=0)"
    plain, healed = tiny.build("llama"), tiny.build("llama")
    tiny.compress(plain, recipe, "params=0.8")
    tiny.compress(healed, f"{recipe}+heal(mode=lora)", "params=0.8")
    before, after = dict(plain.named_parameters()), dict(healed.named_parameters())
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    cores = {name for name in before if ".cores." in name}
    linears = {name for name in before if name.endswith("_proj.weight")}
    assert cores
    assert linears
    assert changed == cores | linears | {name for name in before if name.endswith("_proj.scale")}


@needs_peft
def test_a_merged_adapter_leaves_the_logits_it_was_trained_to(monkeypatch: pytest.MonkeyPatch) -> None:
    model, logits = tiny.build("llama"), []
    real = healing.merge_adapters

    def spy(model: PreTrainedModel) -> None:
        logits.append(tiny.logits_of(model))
        real(model)

    monkeypatch.setattr(healing, "merge_adapters", spy)
    tiny.compress(model, "heal(mode=lora,learning_rate=0.01)")
    torch.testing.assert_close(tiny.logits_of(model), logits[0], rtol=1e-4, atol=1e-5)
    assert not torch.equal(tiny.logits_of(model), tiny.logits_of(tiny.build("llama")))
    assert not any("lora" in name for name, _ in model.named_modules())


def test_every_method_takes_the_same_steps_on_the_same_tokens() -> None:
    told = []
    for recipe in ("layerchop+heal", "svd+heal(distill=0.5)", "distill(hidden=1)"):
        notes = tiny.compress(tiny.build("llama"), recipe, "params=0.8").stages[-1].notes
        told.append([notes[key] for key in ("tokens", "steps", "tokens_per_step")])
    assert told[0] == told[1] == told[2]


def test_healing_alone_acts_on_no_budget() -> None:
    with pytest.raises(NotApplicable, match="heal leaves the model's params as they are"):
        Recipe.parse("heal").plan(tiny.anatomy("llama"), Budget.parse("params=0.8"))


def test_the_dense_model_heals_towards_itself_by_nothing() -> None:
    """The teacher's own weights are where the divergence is lowest."""
    model = tiny.build("llama")
    plan = tiny.compress(model, "heal(distill=1,learning_rate=1e-6)")
    assert max(plan.stages[0].notes["loss"]) < 1e-5


@pytest.mark.parametrize("recipe", ["svd+heal+rtn-int4", "layerchop+heal+rtn-int8"])
@pytest.mark.parametrize("family", ["llama", "opt", "gpt-neox"])
def test_a_quantizer_after_healing_keeps_the_budget(family: str, recipe: str) -> None:
    model = tiny.build(family)
    target = 0.35 * anatomy_of(model).bytes
    assert tiny.compress(model, recipe, "bytes=0.35").final.bytes <= target


def test_a_quantizer_comes_after_healing() -> None:
    with pytest.raises(InputError, match=r"'heal' needs dense weights.*Put the quantizer last: heal\+"):
        Recipe.parse("rtn-int8+heal").plan(tiny.anatomy("llama"), Budget.parse("none"))


def test_a_missing_extra_is_named(without: Callable[[str], None]) -> None:
    without("peft")
    with pytest.raises(InputError, match=r"pip install 'weighin\[lora\]'"):
        Recipe.parse("heal(mode=lora)").plan(tiny.anatomy("llama"), Budget.parse("none"))


@needs_peft
def test_adapters_on_sparse_linears_alone_are_refused_before_any_work() -> None:
    with pytest.raises(InputError, match=r"stored all of them without their zeros\. Use heal\(mode=spp\)"):
        Recipe.parse("wanda(sparsity=0.5)+heal(mode=lora)").plan(tiny.anatomy("llama"), Budget.parse("none"))
