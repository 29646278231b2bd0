"""What ships with the suite, on a GPU: checkpoints reload there, and it loses no more than on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from suite import checkpoint, kernels
from suite.conformance import tiny
from suite.errors import MissingExtra, WeighinError
from suite.measure.ledger import ledger, total_disk, total_params
from suite.method import methods
from suite.recipe import Recipe
from suite.run import audit
from suite.specs import Budget

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
QUICK = {"bolaco": "bolaco(trials=2)", "tensor-network": "tensor-network(refine=2)"}
STACKS = ("svd+rtn-int8", "slicegpt+gptq-int4", "wanda+heal(mode=spp)", "svd+heal(mode=lora)")
RECIPES = [
    *(QUICK.get(name, name) for name in methods if methods.get(name).__module__.startswith("methods.")),
    *STACKS,
]
BUDGETS = ("params=0.8", "bytes=0.5", "none")


def compressed(recipe: str, device: str) -> PreTrainedModel:
    model = tiny.build("llama").to(device)
    tiny.compress(model, recipe, budget_of(recipe))
    return model


def budget_of(recipe: str) -> str:
    for budget in BUDGETS:
        try:
            Recipe.parse(recipe).plan(tiny.anatomy("llama"), Budget.parse(budget))
        except MissingExtra as missing:
            pytest.skip(str(missing))
        except WeighinError:
            continue
        return budget
    raise AssertionError(f"{recipe} can be planned for none of {BUDGETS}")


def error_of(model: PreTrainedModel) -> float:
    """The norm of what compression did to the logits, as a share of the dense model's."""
    ids = tiny.token_ids(4, 32, seed=5)
    dense = tiny.logits_of(tiny.build("llama"), ids)
    with kernels.reference():
        found = tiny.logits_of(model, ids.to(model.device)).cpu()
    return float((found - dense).norm() / dense.norm())


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_method_does_on_a_gpu_what_it_does_on_a_cpu(recipe: str, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    model = compressed(recipe, DEVICE)
    assert {p.device.type for p in model.parameters()} == {DEVICE}
    ids = tiny.token_ids(2, 16).to(DEVICE)
    expected = audit.logits_of(model, ids)
    checkpoint.save(model, None, tmp_path)
    reloaded = checkpoint.reload(tmp_path, DEVICE)
    assert torch.equal(audit.logits_of(reloaded, ids), expected)
    on_cpu = compressed(recipe, "cpu")
    sizes = [(total_params(e), total_disk(e)) for e in (ledger(reloaded), ledger(on_cpu))]
    assert sizes[0] == sizes[1]
    assert error_of(reloaded) <= 1.1 * error_of(on_cpu) + 1e-5


def test_numbers_of_a_gpu_are_those_of_a_cpu_before_anything_is_compressed() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    assert error_of(tiny.build("llama").to(DEVICE)) < 1e-5
