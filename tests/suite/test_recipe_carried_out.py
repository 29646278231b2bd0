"""A recipe is carried out stage by stage; what the data decided is what the next stage meets."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest

from methods.low_rank import TruncatedSvd
from suite.carrying_out import Work
from suite.conformance import tiny
from suite.errors import CellFailed
from suite.measure.ledger import ledger, total_disk, total_params
from suite.method import Plan, Target, register
from suite.models.anatomy import Anatomy, anatomy_of
from suite.recipe import Recipe, RecipePlan
from suite.specs import Budget


@register
class Moving(TruncatedSvd):
    """Takes ranks from the first block and gives them to the others, as data might tell it to."""

    name = "moving-ranks"
    adaptive = True
    extra: ClassVar[int] = 0

    def compress(self, model: Any, plan: Plan, calibration: Any) -> Plan:
        anatomy = anatomy_of(model)
        modules = dict(plan.modules)
        for line in anatomy.linears:
            spec = modules[line.path]
            change = -2 if line.block == 0 else self.extra
            arguments = {**spec.arguments, "rank": max(1, spec.arguments["rank"] + change)}
            modules[line.path] = spec.model_copy(update={"arguments": arguments})
        moved = plan.model_copy(update={"modules": modules, "notes": {"why": "the data"}})
        super().compress(model, moved, calibration)
        return moved


class Greedy(Moving):
    """Gives out more ranks than it takes."""

    name = "greedy-ranks"
    extra = 3


register(Greedy)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_later_stage_is_planned_for_the_shapes_it_meets(family: str) -> None:
    model = tiny.build(family)
    target = 0.245 * anatomy_of(model).bytes
    plan = tiny.compress(model, "moving-ranks+rtn-int8", "bytes=0.245")
    entries = ledger(model)
    assert total_disk(entries) == plan.final.bytes
    assert total_params(entries) == plan.final.params
    assert total_disk(entries) <= target


def test_notes_of_a_stage_are_kept_by_its_name() -> None:
    recipe = Recipe.parse("svd+moving-ranks(share=0.5)")
    assert recipe.plan(tiny.anatomy("llama"), Budget.parse("none")).notes(recipe) == {}
    model = tiny.build("llama")
    plan = tiny.compress(model, "moving-ranks", "params=0.8")
    assert plan.notes(Recipe.parse("moving-ranks")) == {"moving-ranks": {"why": "the data"}}


def test_a_stage_may_not_make_more_than_was_planned() -> None:
    with pytest.raises(CellFailed, match=r"greedy-ranks made [\d,]+ params of a plan for [\d,]+"):
        tiny.compress(tiny.build("llama"), "greedy-ranks", "params=0.8")


def test_an_adaptive_first_stage_leaves_the_last_one_room() -> None:
    dense: Anatomy = tiny.anatomy("llama")
    sizes = [
        Recipe.parse(f"{first}+rtn-int8").plan(dense, Budget.parse("bytes=0.245")).final.bytes
        for first in ("svd", "moving-ranks")
    ]
    assert sizes[1] <= 0.995 * 0.245 * dense.bytes <= sizes[0]
    assert sizes[1] >= 0.98 * 0.245 * dense.bytes


def used_by(recipe: str, budget: str, dense: Any = None) -> tuple[float, list[str]]:
    """Share of the budget that was used, and the stages that were carried out."""
    carried_out: list[str] = []
    model = tiny.build("llama")
    parsed, wanted = Recipe.parse(recipe), Budget.parse(budget)
    before = anatomy_of(model)
    target = wanted.target(before.bytes)
    plan = parsed.compress(
        model,
        parsed.plan(before, wanted),
        tiny.calibration_sample(),
        lambda stage: carried_out.append(stage.name),
        dense,
    )
    assert total_disk(ledger(model)) == plan.final.bytes <= target
    assert tiny.logits_of(model).isfinite().all()
    return plan.final.bytes / target, carried_out


def test_bytes_that_the_data_left_idle_are_given_to_the_adaptive_stage_once() -> None:
    # The cores are not packed; what stays dense beyond the plan is, and leaves bytes idle.
    recipe, budget = "tensor-network(refine=0)+rtn-int4", "bytes=0.13"
    idle, stages = used_by(recipe, budget)
    assert stages == ["tensor-network", "rtn-int4"]
    assert idle < 0.98
    used, stages = used_by(recipe, budget, lambda: tiny.build("llama"))
    assert stages == ["tensor-network", "tensor-network", "rtn-int4"]
    assert used > 0.99


def test_asking_an_adaptive_stage_for_too_much_goes_back_to_what_fitted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe, budget = "tensor-network(refine=0)+rtn-int8", "bytes=0.13"
    fitted, _ = used_by(recipe, budget)

    def too_much(self: Work, plan: RecipePlan, done: tuple[Plan, ...]) -> RecipePlan:
        return self._asking(plan, done, Target("bytes", plan.start.bytes))

    monkeypatch.setattr(Work, "_larger", too_much)
    used, stages = used_by(recipe, budget, lambda: tiny.build("llama"))
    assert stages == [*["tensor-network"] * 3, "rtn-int8"]
    assert used == fitted


@pytest.mark.parametrize("recipe", ["moving-ranks", "svd+rtn-int8", "rom(share=0.9)+rtn-int4"])
def test_a_stage_is_carried_out_once_where_no_bytes_can_be_won(recipe: str) -> None:
    _, stages = used_by(recipe, "bytes=0.7", lambda: tiny.build("llama"))
    assert stages == [stage.name for stage in Recipe.parse(recipe).stages]


def test_a_recipe_whose_adaptive_stage_may_be_asked_twice_says_so_in_its_versions() -> None:
    assert Recipe.parse("moving-ranks+rtn-int8").versions[-1] == "sizes=2"
    assert "sizes=2" not in Recipe.parse("svd+rtn-int8").versions
    assert "sizes=2" not in Recipe.parse("moving-ranks").versions
