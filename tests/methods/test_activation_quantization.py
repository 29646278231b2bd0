"""Quantizers that round activations as well as weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from methods.activation_quantization import sites, smooth, smoothing_scale
from suite.conformance import tiny
from suite.dynamic_layers import DynamicInt8Linear, OutlierInt8Linear
from suite.errors import InputError
from suite.models.anatomy import anatomy_of
from suite.models.layouts import layout_of
from suite.packed_layers import PackedEmbedding, PackedLinear
from suite.recipe import Recipe
from suite.specs import Budget
from suite.streaming import stream


def with_outliers(family: str, size: float = 60.0) -> PreTrainedModel:
    """A tiny model in which one channel of every norm's output is far larger than the others."""
    model = tiny.build(family)
    layout = layout_of(model.config)
    with torch.no_grad():
        for block in model.get_submodule(layout.blocks).children():
            for norm, readers in sites(layout):
                block.get_submodule(norm).weight[5] *= size
                for path in readers:
                    block.get_submodule(path).weight[:, 5] /= size
    return model


def distance(model: PreTrainedModel, recipe: str) -> float:
    """Relative distance of the logits from those before the recipe."""
    dense = tiny.logits_of(model)
    tiny.compress(model, recipe)
    return float((tiny.logits_of(model) - dense).norm() / dense.norm())


@pytest.mark.parametrize("recipe", ["int8-dynamic", "llm-int8", "smoothquant"])
def test_eight_bits_of_both_stay_close_to_the_dense_model(family: str, recipe: str) -> None:
    assert 0 < distance(tiny.build(family), recipe) < 0.05


@pytest.mark.parametrize("recipe", ["smoothquant", "llm-int8"])
def test_outlying_channels_cost_less_than_without_the_method(family: str, recipe: str) -> None:
    assert distance(with_outliers(family), recipe) < 0.8 * distance(with_outliers(family), "int8-dynamic")


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.85, 1.0])
def test_smoothing_alone_leaves_the_logits_as_they_are(family: str, alpha: float) -> None:
    model = with_outliers(family)
    before = tiny.logits_of(model)
    smooth(model, tiny.token_ids(4, 16), alpha)
    torch.testing.assert_close(
        tiny.logits_of(model), before, rtol=1e-4, atol=1e-4 * float(before.abs().max())
    )


def largest_inputs(model: PreTrainedModel, tokens: Tensor) -> list[Tensor]:
    """The largest |x| of every channel at every site, in order."""
    found: list[Tensor] = []
    for block in stream(model, tokens):
        for _, readers in sites(layout_of(model.config)):
            found.append(torch.zeros(48))
            block.observe({readers[0]: lambda x: found.append(torch.maximum(found.pop(), x.abs().amax(0)))})
    return found


def weights_read(model: PreTrainedModel) -> list[Tensor]:
    """The largest |W| of every channel over all linears of a site, in order."""
    layout = layout_of(model.config)
    return [
        torch.cat([block.get_submodule(path).weight for path in readers]).abs().amax(0)
        for block in model.get_submodule(layout.blocks).children()
        for _, readers in sites(layout)
    ]


def test_alpha_divides_the_difficulty_as_the_paper_says(family: str) -> None:
    tokens = tiny.token_ids(4, 16)
    dense, model = with_outliers(family), with_outliers(family)
    smooth(model, tokens, 0.5)
    sides = zip(
        largest_inputs(dense, tokens),
        weights_read(dense),
        largest_inputs(model, tokens),
        weights_read(model),
        strict=True,
    )
    for x, w, smooth_x, smooth_w in sides:
        # With α = ½ activations and weights of a channel end up equally large: √(max|x| · max|w|).
        torch.testing.assert_close(smooth_x, (x * w).sqrt(), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(smooth_w, (x * w).sqrt(), rtol=1e-3, atol=1e-5)


def test_all_of_the_difficulty_or_none_is_moved_at_the_ends_of_alpha() -> None:
    x, w = torch.tensor([4.0, 0.5]), torch.tensor([[0.1, -2.0], [-0.3, 1.0]])
    torch.testing.assert_close(smoothing_scale(x, [w], 1.0), x)
    torch.testing.assert_close(smoothing_scale(x, [w], 0.0), 1 / torch.tensor([0.3, 2.0]))


def test_the_largest_weight_of_all_readers_counts() -> None:
    x, w = torch.tensor([4.0, 1.0]), torch.tensor([[0.1, 2.0]])
    together = smoothing_scale(x, [w, 4 * w], 0.5)
    torch.testing.assert_close(together, smoothing_scale(x, [4 * w], 0.5))


def test_channels_that_are_not_used_are_left_alone() -> None:
    x, w = torch.tensor([0.0, 1.0, 1.0]), torch.tensor([[1.0, 0.0, 1.0]])
    assert smoothing_scale(x, [w], 0.5).tolist() == [1.0, 1.0, 1.0]


def test_maxima_are_those_of_the_dense_model(llama: PreTrainedModel) -> None:
    tokens = tiny.calibration_sample().tokens
    by_hand = tiny.build("llama")
    smooth(by_hand, tokens, 0.5)
    tiny.compress(by_hand, "int8-dynamic")
    tiny.compress(llama, "smoothquant")
    assert torch.equal(tiny.logits_of(by_hand), tiny.logits_of(llama))


def test_low_rank_readers_are_scaled_in_their_first_factor(llama: PreTrainedModel) -> None:
    tiny.compress(llama, "svd(share=0.8)")
    before = tiny.logits_of(llama)
    smooth(llama, tiny.token_ids(4, 16), 0.5)
    torch.testing.assert_close(tiny.logits_of(llama), before, rtol=1e-4, atol=1e-4)
    assert distance(llama, "smoothquant") < 0.05


@pytest.mark.parametrize(
    ("family", "recipe", "told"),
    [
        ("opt-350m-like", "smoothquant", "norms after them"),
        ("llama", "slicegpt(width=40)+smoothquant", "an earlier stage replaced"),
        ("llama", "rtn-int8+smoothquant", "an earlier stage quantized them"),
    ],
)
def test_what_cannot_be_smoothed_is_refused_when_planning(family: str, recipe: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        Recipe.parse(recipe).plan(tiny.anatomy(family), Budget(metric="none"))


@pytest.mark.parametrize("knobs", ["group=64", "symmetric=false"])
def test_weights_have_one_symmetric_scale_per_channel(knobs: str) -> None:
    with pytest.raises(InputError):
        Recipe.parse(f"int8-dynamic({knobs})")


def test_large_activations_stay_in_floating_point_from_the_threshold_on(family: str) -> None:
    recipes = ("llm-int8(threshold=1e-9)", "llm-int8(threshold=1000)", "int8-dynamic", "rtn-int8")
    logits = []
    for recipe in recipes:
        model = tiny.build(family)
        tiny.compress(model, recipe)
        logits.append(tiny.logits_of(model))
    torch.testing.assert_close(logits[0], logits[3], rtol=1e-3, atol=1e-4)  # all of them: weights only
    assert torch.equal(logits[1], logits[2])  # none of them
    assert not torch.equal(logits[0], logits[1])


@pytest.mark.parametrize(
    ("recipe", "layer"),
    [
        ("int8-dynamic", DynamicInt8Linear),
        ("llm-int8", OutlierInt8Linear),
        ("smoothquant", DynamicInt8Linear),
    ],
)
def test_every_decoder_linear_and_nothing_else_becomes_the_layer(
    model: PreTrainedModel, recipe: str, layer: type[nn.Module]
) -> None:
    linears = {line.path for line in anatomy_of(model).linears}
    plan = tiny.compress(model, recipe)
    assert {path for path, module in model.named_modules() if type(module) is layer} == linears
    assert plan.final.bytes == anatomy_of(model).bytes
    assert plan.final.params == anatomy_of(model).params


def test_a_smaller_budget_takes_the_embedding_too_and_packs_weights_only_there() -> None:
    for family in ("llama-untied", "gpt-neox"):
        model = tiny.build(family)
        tiny.compress(model, "int8-dynamic", budget="bytes=0.3")
        layout = layout_of(model.config)
        assert type(model.get_submodule(layout.embedding)) is PackedEmbedding
        assert type(model.get_submodule(layout.head)) is PackedLinear


@pytest.mark.parametrize("recipe", ["llm-int8(threshold=2)", "smoothquant(embedding=8)"])
def test_half_precision_models_can_be_quantized(family: str, recipe: str) -> None:
    model = tiny.build(family, torch.bfloat16)
    tiny.compress(model, recipe)
    logits = tiny.logits_of(model)
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()
