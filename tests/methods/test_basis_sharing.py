"""Basis Sharing: neighbouring blocks on one basis, stored once, also after saving and packing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from methods.basis_sharing import SHARED_ROLES, BorrowedBasisLinear, SharedBasisLinear
from methods.whitened import whitened_svd
from suite import checkpoint
from suite.conformance import tiny
from suite.errors import ImpossibleBudget, InputError
from suite.measure.ledger import ledger, total_disk, total_params
from suite.models.anatomy import anatomy_of
from suite.recipe import Recipe
from suite.specs import Budget

UP = "model.layers.{}.mlp.up_proj"


def stands_for(module: object) -> Tensor:
    """The matrix of a linear on a shared basis."""
    owner = module._owner[0] if isinstance(module, BorrowedBasisLinear) else module
    assert isinstance(owner, SharedBasisLinear)
    assert isinstance(module, SharedBasisLinear | BorrowedBasisLinear)
    return (module.coefficients.weight.double() @ owner.basis.weight.double()).detach()


def test_groups_of_one_are_svd_llm(family: str) -> None:
    alone, whitened = tiny.build(family), tiny.build(family)
    anatomy = anatomy_of(alone)
    plan = tiny.compress(alone, "basis-sharing(group=1)", "params=0.8").stages[0]
    ranks = {path: spec.arguments["rank"] for path, spec in plan.modules.items()}
    tiny.compress(whitened, "svd-llm", "params=0.8")
    assert ranks.keys() == {line.path for line in anatomy.linears}
    for path, rank in ranks.items():
        assert alone.get_submodule(path).first.out_features == rank
        if whitened.get_submodule(path).first.out_features == rank:
            for factor in ("first", "second"):
                expected = whitened.get_submodule(f"{path}.{factor}").weight
                assert torch.equal(alone.get_submodule(f"{path}.{factor}").weight, expected)


def test_two_identical_blocks_have_the_same_coefficients_on_the_basis_of_one() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(9, 6, dtype=torch.float64, generator=generator)
    inputs = torch.randn(30, 6, dtype=torch.float64, generator=generator)
    moment = inputs.T @ inputs
    left, basis = whitened_svd(torch.cat([weight, weight]), 2 * moment, 3)
    torch.testing.assert_close(left[:9], left[9:])
    alone = whitened_svd(weight, moment, 3)
    torch.testing.assert_close(left[:9] @ basis, alone[0] @ alone[1])


def test_identical_neighbours_stay_identical_in_a_model() -> None:
    """Blocks that pass their inputs on unchanged and have equal weights meet equal inputs."""
    model = tiny.build("llama")
    with torch.no_grad():
        for block in range(2):
            for inner in ("self_attn.o_proj", "mlp.down_proj"):
                model.get_submodule(f"model.layers.{block}.{inner}").weight.zero_()
        model.model.layers[1].load_state_dict(model.model.layers[0].state_dict())
    dense = model.model.layers[0].mlp.up_proj.weight.clone()
    tiny.compress(model, "basis-sharing(share=0.8)")
    first, second = (model.get_submodule(UP.format(block)) for block in range(2))
    torch.testing.assert_close(stands_for(first), stands_for(second), rtol=1e-5, atol=1e-6)
    assert not torch.equal(stands_for(first).float(), dense)


def test_each_group_of_blocks_stands_on_one_basis_and_the_rest_alone(model: PreTrainedModel) -> None:
    linears = anatomy_of(model).linears
    tiny.compress(model, "basis-sharing(share=0.6)")
    for line in linears:
        module = model.get_submodule(line.path)
        if line.role not in SHARED_ROLES:
            assert not isinstance(module, SharedBasisLinear | BorrowedBasisLinear)
        elif line.block % 2 == 0:
            assert isinstance(module, SharedBasisLinear)
        else:
            assert isinstance(module, BorrowedBasisLinear)
            owner = line.path.replace(f".{line.block}.", f".{line.block - 1}.", 1)
            assert module._owner[0] is model.get_submodule(owner)


def test_the_first_block_of_a_group_owns_its_basis_where_an_earlier_stage_changed_another(
    llama: PreTrainedModel,
) -> None:
    tiny.compress(llama, "llm-pruner(share=0.9,first=0,last=1)+basis-sharing(share=0.8)")
    borrowed = {
        path: module._owner[0]
        for path, module in llama.named_modules()
        if isinstance(module, BorrowedBasisLinear)
    }
    paths = {module: path for path, module in llama.named_modules()}
    blocks = [(int(paths[owner].split(".")[2]), int(path.split(".")[2])) for path, owner in borrowed.items()]
    assert blocks
    assert all(first + 1 == second for first, second in blocks)


def test_a_last_group_may_be_shorter() -> None:
    model = tiny.build("llama")
    tiny.compress(model, "basis-sharing(group=3,share=0.6)")
    kinds = [type(model.get_submodule(UP.format(block))).__name__ for block in range(4)]
    assert kinds == ["SharedBasisLinear", "BorrowedBasisLinear", "BorrowedBasisLinear", "LowRankLinear"]


@pytest.mark.parametrize("budget", ["params=0.8", "params=0.5", "bytes=0.7"])
def test_the_basis_counts_once_and_budgets_are_used_to_a_percent(family: str, budget: str) -> None:
    model = tiny.build(family)
    parsed = Budget.parse(budget)
    dense = anatomy_of(model)
    target = parsed.target(dense.size(parsed.metric))
    plan = tiny.compress(model, "basis-sharing", budget)
    entries = ledger(model)
    assert total_params(entries) == plan.final.params == tiny.unique_params(model)
    assert total_disk(entries) == plan.final.bytes
    assert 0.99 * target <= plan.final.size(parsed.metric) <= target


def test_sharing_leaves_a_larger_rank_than_factorising_alone(family: str) -> None:
    anatomy = tiny.anatomy(family)
    ranks = {}
    for recipe in ("basis-sharing(share=0.6)", "basis-sharing(group=1,share=0.6)"):
        plan = Recipe.parse(recipe).plan(anatomy, Budget.parse("none")).stages[0]
        ranks[recipe] = {path: spec.arguments["rank"] for path, spec in plan.modules.items()}
    together, alone = ranks.values()
    roles = {line.path: line.role for line in anatomy.linears}
    assert all(together[path] > alone[path] for path, role in roles.items() if role in SHARED_ROLES)


def test_the_basis_is_saved_once_and_shared_again_after_the_reload(family: str, tmp_path: Path) -> None:
    model = tiny.build(family)
    tiny.compress(model, "basis-sharing", "params=0.8")
    before = tiny.logits_of(model)
    checkpoint.save(model, None, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    owners = {path for path, module in model.named_modules() if isinstance(module, SharedBasisLinear)}
    assert owners
    assert {name for name in stored if ".basis." in name} == {f"{path}.basis.weight" for path in owners}
    again = checkpoint.reload(tmp_path)
    assert torch.equal(tiny.logits_of(again), before)
    for path, module in again.named_modules():
        if isinstance(module, BorrowedBasisLinear):
            assert module._owner[0] is again.get_submodule(module.source), path
    assert total_params(ledger(again)) == total_params(ledger(model))


def test_a_packed_basis_is_the_one_that_borrowers_read(llama: PreTrainedModel) -> None:
    tiny.compress(llama, "basis-sharing(share=0.6)+rtn-int4")
    before = tiny.logits_of(llama)
    basis = llama.get_submodule(UP.format(0)).basis
    basis.scales.zero_()
    borrower = llama.get_submodule(UP.format(1))
    assert not borrower(torch.ones(1, 48)).any()
    assert not torch.equal(tiny.logits_of(llama), before)


def test_a_gradient_of_every_block_of_the_group_reaches_the_basis(llama: PreTrainedModel) -> None:
    tiny.compress(llama, "basis-sharing(share=0.6)")
    owner, borrower = (llama.get_submodule(UP.format(block)) for block in range(2))
    borrower(torch.ones(1, 48)).sum().backward()
    assert owner.basis.weight.grad.abs().sum() > 0
    assert owner.coefficients.weight.grad is None


def test_blocks_on_a_shared_basis_cannot_be_removed(llama: PreTrainedModel) -> None:
    with pytest.raises(InputError, match="Put basis-sharing after the stage that removes blocks"):
        tiny.compress(llama, "basis-sharing(share=0.6)+layerchop(remove=1)")


def test_blocks_removed_before_are_no_hindrance(model: PreTrainedModel) -> None:
    plan = tiny.compress(model, "layerchop(remove=1)+basis-sharing(share=0.6)")
    assert anatomy_of(model).params == plan.final.params
    assert tiny.logits_of(model).isfinite().all()


def test_factors_are_not_factorised_again(llama: PreTrainedModel) -> None:
    with pytest.raises(InputError, match="would factorise factors"):
        tiny.compress(llama, "basis-sharing(share=0.9)+svd-llm(share=0.5)")


def test_biases_are_kept(family: str) -> None:
    dense, model = tiny.build(family), tiny.build(family)
    biased = [line.path for line in anatomy_of(dense).linears if line.bias and line.role in SHARED_ROLES]
    tiny.compress(model, "basis-sharing(share=0.5)")
    for path in biased:
        assert torch.equal(model.get_submodule(path).coefficients.bias, dense.get_submodule(path).bias)


def test_an_impossible_budget_names_the_smallest_size(model: PreTrainedModel) -> None:
    anatomy = anatomy_of(model)
    with pytest.raises(ImpossibleBudget) as caught:
        Recipe.parse("basis-sharing").plan(anatomy, Budget.parse("params=1000"))
    smallest = Budget(metric="params", value=float(caught.value.smallest))
    assert Recipe.parse("basis-sharing").plan(anatomy, smallest).final.params == caught.value.smallest
