"""Sparsity-preserving tuning: zeros stay zero, step 0 is the pruned model, few parameters are trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from methods.sparse_tuning import add_scales, merge_scales
from suite.conformance import tiny
from suite.errors import InputError
from suite.measure.ledger import ledger
from suite.models.anatomy import anatomy_of
from suite.recipe import Recipe
from suite.sparse_layers import SparseLinear
from suite.specs import Budget


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHIN_CACHE_DIR", str(tmp_path))


def pruned(family: str, pattern: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model = tiny.build(family, dtype)
    tiny.compress(model, f"wanda(pattern={pattern})", "params=0.8")
    return model


def linears(model: PreTrainedModel) -> dict[str, SparseLinear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, SparseLinear)}


PATTERNS = pytest.mark.parametrize("pattern", ["unstructured", "2:4"])


@PATTERNS
def test_it_starts_as_the_pruned_model_and_no_zero_ever_moves(pattern: str, family: str) -> None:
    model = pruned(family, pattern)
    before = tiny.logits_of(model)
    places = {path: module.places() for path, module in linears(model).items()}
    scales = add_scales(model, 16, 16.0)
    assert torch.equal(tiny.logits_of(model), before)
    optimizer = torch.optim.AdamW(scales, lr=0.05)
    for step in range(3):
        ids = tiny.token_ids(2, 12, seed=step)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for path, module in linears(model).items():
            assert (module.dense()[~places[path]] == 0).all()
    moved = tiny.logits_of(model)
    assert not torch.equal(moved, before)
    merge_scales(model)
    assert torch.equal(tiny.logits_of(model), moved)
    for path, module in linears(model).items():
        assert torch.equal(module.places(), places[path])


@PATTERNS
def test_the_effective_weight_is_the_papers(pattern: str) -> None:
    """W + s·W ⊙ (rows of α, each repeated m/r times, ⊙ β by row)."""
    model = pruned("llama", pattern)
    linear = next(iter(linears(model).values()))
    before = linear.dense().detach()
    add_scales(model, 16, 8.0)
    scales = linear.parametrizations["kept"][0]
    with torch.no_grad():
        scales.beta.normal_()
    repeated = scales.alpha.repeat_interleave(linear.rows // 16, 0)
    expected = before + 0.5 * before * (repeated * scales.beta[:, None])
    torch.testing.assert_close(linear.dense(), expected)


@PATTERNS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_healing_with_it_changes_values_and_nothing_else(pattern: str, dtype: torch.dtype) -> None:
    plain, healed = pruned("qwen2", pattern, dtype), tiny.build("qwen2", dtype)
    recipe = f"wanda(pattern={pattern})+heal(mode=spp, rank=8, learning_rate=0.03)"
    plan = tiny.compress(healed, recipe, "params=0.8")
    shapes = [(module.rows, module.columns) for module in linears(healed).values()]
    assert plan.stages[1].notes["trained_parameters"] == sum(8 * n + m for m, n in shapes)
    assert ledger(healed) == ledger(plain)
    state, before = healed.state_dict(), plain.state_dict()
    assert state.keys() == before.keys()
    changed = {key for key in state if not torch.equal(state[key], before[key])}
    assert changed == {f"{path}.kept" for path in linears(healed)}
    assert (anatomy_of(healed).params, anatomy_of(healed).bytes) == (plan.final.params, plan.final.bytes)
    assert all(isinstance(module.kept, nn.Parameter) for module in linears(healed).values())


@PATTERNS
def test_training_all_kept_weights_keeps_the_zeros_too(pattern: str) -> None:
    plain, healed = pruned("llama", pattern), tiny.build("llama")
    tiny.compress(healed, f"wanda(pattern={pattern})+heal(learning_rate=0.001)", "params=0.8")
    for path, module in linears(healed).items():
        assert torch.equal(module.index, linears(plain)[path].index)
        assert not torch.equal(module.kept, linears(plain)[path].kept)


def test_without_sparse_linears_it_is_refused() -> None:
    for before in ("", "svd(share=0.5)+"):
        with pytest.raises(InputError, match="there are none"):
            Recipe.parse(f"{before}heal(mode=spp)").plan(tiny.anatomy("llama"), Budget.parse("none"))
