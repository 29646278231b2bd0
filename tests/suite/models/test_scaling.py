"""Scales moved between what writes channels and what reads them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from suite.conformance import tiny
from suite.models.anatomy import anatomy_of
from suite.models.scaling import divide_channels, obstacle, scaling_sites


def scale_all(model: PreTrainedModel) -> list[str]:
    """Move random scales at every possible site; returns the writers."""
    generator = torch.Generator().manual_seed(0)
    anatomy, writers = anatomy_of(model), []
    for block in model.get_submodule(anatomy.layout.blocks).children():
        for site in scaling_sites(anatomy, block):
            if obstacle(site, block) is not None:
                continue
            readers = [block.get_submodule(path) for path in site.readers]
            width = readers[0].weight.shape[1]
            scale = (0.7 * torch.randn(width, generator=generator)).exp()
            divide_channels(block.get_submodule(site.writer), scale)
            with torch.no_grad():
                for reader in readers:
                    reader.weight.mul_(scale)
            writers.append(site.writer)
    return writers


SITES = {"llama": 3, "llama-untied": 3, "qwen2": 3, "opt": 4, "gpt-neox": 2}


def test_a_moved_scale_changes_no_logit(family: str) -> None:
    model = tiny.build(family)
    before = tiny.logits_of(model)
    assert len(scale_all(model)) == SITES[family] * tiny.BLOCKS
    gap = (tiny.logits_of(model) - before).abs().max()
    assert 0 < gap < 1e-4 * before.abs().max()


def test_values_are_scaled_where_no_heads_share_them() -> None:
    model = tiny.build("llama", num_key_value_heads=4)
    before = tiny.logits_of(model)
    assert "self_attn.v_proj" in scale_all(model)
    assert torch.allclose(tiny.logits_of(model), before, atol=1e-4)


def test_an_activation_that_minds_a_scale_has_no_site() -> None:
    model = tiny.build("opt", activation_function="gelu")
    before = tiny.logits_of(model)
    assert "fc1" not in scale_all(model)
    assert torch.allclose(tiny.logits_of(model), before, atol=1e-4)


def test_norms_after_attention_have_no_site() -> None:
    model = tiny.build("opt-350m-like")
    before = tiny.logits_of(model)
    assert set(scale_all(model)) == {"self_attn.v_proj", "fc1"}
    assert torch.allclose(tiny.logits_of(model), before, atol=1e-4)


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [("svd(share=0.5)", "factorised"), ("slicegpt(layout=official, width=40)", "no scale of its own")],
)
def test_what_stands_in_the_way_is_told(llama: PreTrainedModel, recipe: str, reason: str) -> None:
    tiny.compress(llama, recipe)
    anatomy = anatomy_of(llama)
    block: nn.Module = llama.get_submodule(f"{anatomy.layout.blocks}.0")
    reasons = [obstacle(site, block) for site in scaling_sites(anatomy, block)]
    assert any(found is not None and reason in found for found in reasons)
