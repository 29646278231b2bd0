"""Orders of stages that make no sense are refused while planning, with one that works."""

from __future__ import annotations

from typing import Any

import pytest

from methods.healing import Heal
from suite.conformance import tiny
from suite.errors import InputError
from suite.method import register
from suite.models.anatomy import anatomy_of
from suite.recipe import Recipe
from suite.specs import Budget


@register
class HealsPacked(Heal):
    """A training that minds no packed weights, as one of adapters beside them."""

    name = "heals-packed"
    trains_packed = True

    def plan(self, anatomy: Any, target: Any, seed: int) -> Any:
        return super().plan(tiny.anatomy("llama"), target, seed)


def refusal(recipe: str, budget: str = "none") -> str:
    with pytest.raises(InputError) as caught:
        Recipe.parse(recipe).plan(tiny.anatomy("llama"), Budget.parse(budget))
    return str(caught.value)


@pytest.mark.parametrize(
    ("recipe", "reason", "advice"),
    [
        ("dense+rtn-int4", "'dense' changes nothing", "Leave it out: rtn-int4."),
        ("svd(share=0.5)+dense", "'dense' changes nothing", "Leave it out: svd(share=0.5)."),
        ("rtn-int8+rtn-int4", "quantized them, and once is enough", "Leave it out: rtn-int8."),
        ("rtn-int8+svd", "'svd' needs dense weights", "This order works: svd+rtn-int8."),
        (
            "svd+rtn-int8+heal",
            "'heal' needs dense weights to train, but an earlier stage quantized them",
            "This order works: svd+heal+rtn-int8.",
        ),
        ("svd+heal+heal", "'heal' trains already", "Leave it out: svd+heal."),
        ("distill+heal", "'distill' trains already", "Leave it out: distill."),
        (
            "svd(share=0.5)+distill",
            "'distill' copies whole linears, but an earlier stage factorised them",
            "This order works: distill+svd(share=0.5).",
        ),
        (
            "svd(share=0.5)+slicegpt",
            "'slicegpt' needs the blocks' linears whole",
            "This order works: slicegpt+svd(share=0.5).",
        ),
        (
            "slicegpt(width=40)+slicegpt(width=36)",
            "an earlier stage factorised or sliced them",
            "Leave it out: slicegpt(width=40).",
        ),
        (
            "slicegpt(width=40)+layerchop(remove=1)",
            "none of them can be removed",
            "This order works: layerchop(remove=1)+slicegpt(width=40).",
        ),
        ("tensor-network(share=0.5)+rom", "'rom' acts on linears, but an earlier stage", "order works: rom+"),
        ("svd(share=0.5)+rom(share=0.5)", "'rom' would factorise factors", "Leave it out: svd(share=0.5)."),
    ],
)
def test_an_order_that_makes_no_sense_is_refused_with_one_that_works(
    recipe: str, reason: str, advice: str
) -> None:
    told = refusal(recipe)
    assert told.startswith(f"recipe '{recipe}': ")
    assert reason in told
    assert told.endswith(".")
    assert advice in told
    assert "\n" not in told


def test_the_advised_order_is_one_that_can_be_planned() -> None:
    advised = refusal("svd+rtn-int8+heal", "bytes=0.15").rpartition(": ")[2].removesuffix(".")
    Recipe.parse(advised).plan(tiny.anatomy("llama"), Budget.parse("bytes=0.15"))


@pytest.mark.parametrize(
    "recipe",
    [
        "rtn-int8+layerchop(remove=1)",
        "random-layers+heal",
        "svd(share=0.5)+heal+rtn-int4",
        "svd(share=0.5)+tensor-network(share=0.9)",
        "slicegpt(width=40)+svd(share=0.5)+heal",
        "rtn-int4+heals-packed",
    ],
)
def test_an_order_that_makes_sense_is_planned(recipe: str) -> None:
    Recipe.parse(recipe).plan(tiny.anatomy("llama"), Budget.parse("none"))


def test_a_knob_that_fits_no_model_is_no_matter_of_order() -> None:
    told = refusal("svd(share=0.5)+layerchop(remove=9)")
    assert told == "layerchop(remove=9): at most 2 of 4 blocks can go."


@pytest.mark.parametrize("family", ["llama", "llama-untied", "opt", "gpt-neox"])
@pytest.mark.parametrize("second", ["rom(share=0.6)", "tensor-network(share=0.6,refine=1)"])
def test_calibration_reaches_the_blocks_of_a_sliced_model(family: str, second: str) -> None:
    model = tiny.build(family)
    plan = tiny.compress(model, f"slicegpt(width=40)+{second}")
    assert anatomy_of(model).bytes == plan.final.bytes
    assert tiny.logits_of(model).isfinite().all()
