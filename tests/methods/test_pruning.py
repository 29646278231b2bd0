"""Magnitude, Wanda and SparseGPT: which weights go, how many, and what becomes of the others."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from methods.pruning import Wanda, largest, sparsegpt, two_of_four
from suite.conformance import tiny
from suite.errors import CellFailed, ImpossibleBudget, InputError
from suite.models.anatomy import anatomy_of
from suite.recipe import Recipe
from suite.sparse_layers import SemiStructuredLinear, SparseLinear
from suite.specs import Budget

NAMES = ["magnitude", "wanda", "sparsegpt"]
METHODS = pytest.mark.parametrize("name", NAMES)


def sparse_linears(model: PreTrainedModel) -> dict[str, SparseLinear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, SparseLinear)}


def random_case(rows: int, columns: int, tokens: int = 400, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and the moment Σ x xᵀ of correlated inputs of uneven size, in float64."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    sizes = torch.logspace(-0.5, 0.5, columns, dtype=torch.float64)
    mix *= sizes[torch.randperm(columns, generator=generator)]
    inputs = torch.randn(tokens, columns, generator=generator, dtype=torch.float64) @ mix
    return weight, inputs.T @ inputs


def loss(weight: Tensor, new: Tensor, moment: Tensor) -> float:
    """tr(ΔW C ΔWᵀ)."""
    error = weight - new
    return float(((error @ moment) * error).sum())


def refitted(weight: Tensor, places: Tensor, moment: Tensor) -> Tensor:
    """The best weights with these zeros, row by row."""
    best = torch.zeros_like(weight)
    for row, kept in enumerate(places):
        right = (moment @ weight[row])[kept]
        best[row, kept] = torch.linalg.solve(moment[kept][:, kept], right)
    return best


def wanda(weight: Tensor, moment: Tensor, kept: int) -> Tensor:
    """Places that stay."""
    return largest(weight.abs() * moment.diagonal().sqrt(), kept)


@METHODS
def test_every_linear_of_the_decoder_loses_the_share_and_nothing_else_changes(name: str, family: str) -> None:
    dense, model = tiny.build(family), tiny.build(family)
    tiny.compress(model, f"{name}(sparsity=0.5)")
    sparse = sparse_linears(model)
    assert set(sparse) == {line.path for line in anatomy_of(dense).linears}
    for path, module in sparse.items():
        linear = dense.get_submodule(path)
        assert module.kept.numel() == linear.weight.numel() // 2
        assert (module.bias is None) == (linear.bias is None)
        assert module.bias is None or torch.equal(module.bias, linear.bias)
    for key, tensor in model.state_dict().items():
        if key.rpartition(".")[0] not in sparse:
            assert torch.equal(tensor, dense.state_dict()[key])
    assert tiny.logits_of(model).isfinite().all()


@METHODS
def test_no_sparsity_changes_nothing(name: str, model: PreTrainedModel) -> None:
    before = tiny.logits_of(model)
    assert not tiny.compress(model, f"{name}(sparsity=0)").stages[0].modules
    assert torch.equal(tiny.logits_of(model), before)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_kept_weights_stay_as_they_are_but_for_sparsegpt(pattern: str, llama: PreTrainedModel) -> None:
    knobs = "pattern=2:4" if pattern == "2:4" else "sparsity=0.4"
    for name in NAMES:
        model = tiny.build("llama")
        tiny.compress(model, f"{name}({knobs})")
        same = [
            torch.equal(module.dense()[module.places()], llama.get_submodule(path).weight[module.places()])
            for path, module in sparse_linears(model).items()
        ]
        assert len(same) == 7 * tiny.BLOCKS
        assert all(same) if name != "sparsegpt" else not any(same)


def test_wanda_prunes_every_row_alike(model: PreTrainedModel) -> None:
    tiny.compress(model, "wanda(sparsity=0.3)")
    for module in sparse_linears(model).values():
        kept = module.columns - int(0.3 * module.columns)
        assert (module.places().sum(1) == kept).all()


def test_magnitude_has_one_threshold_a_matrix(llama: PreTrainedModel) -> None:
    dense = tiny.build("llama")
    tiny.compress(llama, "magnitude(sparsity=0.3)")
    for path, module in sparse_linears(llama).items():
        sizes, places = dense.get_submodule(path).weight.abs(), module.places()
        assert sizes[places].min() >= sizes[~places].max()


@METHODS
def test_two_of_every_four_inputs_stay(name: str, family: str) -> None:
    model = tiny.build(family)
    plan = tiny.compress(model, f"{name}(pattern=2:4)", "params=0.8")
    sparse = sparse_linears(model)
    assert all(isinstance(module, SemiStructuredLinear) for module in sparse.values())
    for module in sparse.values():
        assert (module.places().reshape(-1, 4).sum(1) == 2).all()
        assert ((module.dense() != 0).reshape(-1, 4).sum(1) <= 2).all()
    assert (anatomy_of(model).params, anatomy_of(model).bytes) == (plan.final.params, plan.final.bytes)


def test_two_of_four_is_refused_where_it_cannot_be() -> None:
    model = tiny.build("llama", intermediate_size=110)
    with pytest.raises(InputError, match=r"multiples of four, but model\.layers\.0\.mlp\.down_proj has 110"):
        tiny.compress(model, "wanda(pattern=2:4)")
    with pytest.raises(InputError, match="leave sparsity out"):
        Recipe.parse("wanda(pattern=2:4, sparsity=0.6)")
    with pytest.raises(ImpossibleBudget, match="2:4 is always half"):
        tiny.compress(tiny.build("llama"), "wanda(pattern=2:4)", "params=0.4")


@METHODS
@pytest.mark.parametrize("budget", ["params=0.95", "params=0.55", "bytes=0.97", "bytes=0.5"])
def test_budgets_are_used_up_and_plans_are_the_ledgers_sizes(name: str, budget: str) -> None:
    model = tiny.build("llama", torch.bfloat16)
    dense = anatomy_of(model)
    plan = tiny.compress(model, name, budget)
    parsed = Budget.parse(budget)
    after = anatomy_of(model)
    assert (after.params, after.bytes) == (plan.final.params, plan.final.bytes)
    target = parsed.target(dense.size(parsed.metric))
    assert 0.99 * target < after.size(parsed.metric) <= target
    assert tiny.logits_of(model).isfinite().all()


def test_a_budget_is_spread_evenly() -> None:
    plan = Recipe.parse("wanda").plan(tiny.anatomy("llama"), Budget.parse("params=0.7")).stages[0]
    for spec in plan.modules.values():
        m, n, kept = (spec.arguments[key] for key in ("out_features", "in_features", "nonzeros"))
        assert kept % m == 0
        assert abs(kept / m - (1 - plan.knobs["sparsity"]) * n) <= 1.5


def test_equal_input_norms_make_wanda_magnitude_by_row() -> None:
    weight, _ = random_case(6, 16)
    method = Wanda(Wanda.Config())
    _, places = method._pruned(weight, 6 * 5, torch.full((16,), 3.0, dtype=torch.float64))
    assert torch.equal(places, largest(weight.abs(), 5))


def test_wanda_is_the_best_choice_for_every_row_when_inputs_are_uncorrelated() -> None:
    weight, moment = random_case(4, 7)
    moment = moment.diagonal().diag()
    for row, places in zip(weight, wanda(weight, moment, 4), strict=True):
        losses = {}
        for kept in itertools.combinations(range(7), 4):
            mask = torch.zeros(7, dtype=torch.bool)
            mask[list(kept)] = True
            losses[kept] = loss(row[None], (row * mask)[None], moment)
        assert min(losses, key=losses.__getitem__) == tuple(places.nonzero().flatten().tolist())


@pytest.mark.parametrize("kept", [None, 8 * 150])
def test_sparsegpt_keeps_the_planned_number_in_every_block_of_columns(kept: int | None) -> None:
    weight, moment = random_case(8, 300)
    new, places = sparsegpt(weight, moment, kept)
    assert places.sum() == 8 * 150
    assert ((new != 0) == places).all()
    counts = [int(part.sum()) for part in places.split(128, 1)]
    assert counts == [8 * 64, 8 * 64, 8 * 22]
    if kept is None:
        assert (places.reshape(-1, 4).sum(1) == 2).all()


@pytest.mark.parametrize("seed", range(5))
def test_no_choice_of_zeros_beats_the_refit_with_them(seed: int) -> None:
    weight, moment = random_case(8, 40, seed=seed)
    new, places = sparsegpt(weight, moment, 8 * 20)
    chosen = wanda(weight, moment, 20)
    assert loss(weight, refitted(weight, places, moment), moment) <= loss(weight, new, moment) * (1 + 1e-9)
    refit, masked = refitted(weight, chosen, moment), weight * chosen
    assert loss(weight, refit, moment) <= loss(weight, masked, moment)


def test_sparsegpt_loses_less_than_wanda_and_wanda_less_than_magnitude() -> None:
    totals = dict.fromkeys(NAMES, 0.0)
    for seed in range(5):
        weight, moment = random_case(16, 200, seed=seed)
        totals["magnitude"] += loss(weight, weight * largest(weight.abs(), 100), moment)
        totals["wanda"] += loss(weight, weight * wanda(weight, moment, 100), moment)
        totals["sparsegpt"] += loss(weight, sparsegpt(weight, moment, 16 * 100)[0], moment)
    assert totals["sparsegpt"] < 0.8 * totals["wanda"]
    assert totals["wanda"] < 0.8 * totals["magnitude"]


@pytest.mark.parametrize("kept", [None, 6 * 70])
def test_sparsegpt_is_column_by_column_elimination(kept: int | None) -> None:
    """Every pruned weight is made up for by those after it, as their inverse moment says."""
    weight, moment = random_case(6, 140)
    new, places = sparsegpt(weight, moment, kept)
    damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(140)
    expected = weight.clone()
    for column in range(140):
        inverse = torch.linalg.inv(damped[column:, column:])
        gone = expected[:, column] * ~places[:, column]
        expected[:, column:] -= gone[:, None] * inverse[0] / inverse[0, 0]
    torch.testing.assert_close(new, expected, rtol=1e-6, atol=1e-9)


def test_each_weight_of_sparsegpt_is_the_one_step_optimum_on_two_inputs() -> None:
    """With one weight a row to go, the other becomes its least-squares fit, but for the damping."""
    weight = torch.tensor([[0.1, 1.0]], dtype=torch.float64)
    moment = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    new, places = sparsegpt(weight, moment, 1)
    assert places.tolist() == [[False, True]]
    damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(2)
    assert float(new[0, 1]) == pytest.approx(1.0 + 0.1 * float(damped[0, 1] / damped[1, 1]))


def test_inputs_that_are_never_on_are_pruned_first() -> None:
    weight, moment = random_case(4, 16)
    moment[3], moment[:, 3] = 0, 0
    new, places = sparsegpt(weight, moment, 4 * 12)
    assert new.isfinite().all()
    assert not places[:, 3].any()


def test_a_moment_that_is_not_finite_fails_with_its_reason() -> None:
    weight, moment = random_case(4, 16)
    moment[0, 0] = torch.nan
    with pytest.raises(CellFailed, match="cannot be inverted"):
        sparsegpt(weight, moment, 4 * 12)


def test_inputs_come_from_the_pruned_blocks_before() -> None:
    model, dense = tiny.build("llama"), tiny.build("llama")
    tiny.compress(model, "wanda(sparsity=0.6)")
    down = "model.layers.3.mlp.down_proj"
    inputs: dict[str, Tensor] = {}
    layers = tiny.build("llama")
    for path, module in sparse_linears(model).items():
        if not path.startswith("model.layers.3."):
            layers.get_submodule(path).weight.data.copy_(module.dense())
    for name, streamed in (("pruned", layers), ("dense", dense)):

        def see(_: object, args: tuple[Tensor, ...], name: str = name) -> None:
            inputs[name] = args[0].detach().reshape(-1, 112).double()

        handle = streamed.get_submodule(down).register_forward_pre_hook(see)
        streamed(tiny.token_ids(4, 16))
        handle.remove()
    weight = dense.get_submodule(down).weight.detach()
    kept = int(sparse_linears(model)[down].kept.numel()) // 48
    masks = {
        name: largest(weight.abs().double() * value.square().sum(0).sqrt(), kept)
        for name, value in inputs.items()
    }
    assert torch.equal(sparse_linears(model)[down].places(), masks["pruned"])
    assert not torch.equal(masks["pruned"], masks["dense"])


@METHODS
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_half_precision_models_can_be_pruned(name: str, pattern: str) -> None:
    model = tiny.build("opt", torch.bfloat16)
    tiny.compress(model, f"{name}(pattern={pattern})", "bytes=0.8")
    assert tiny.logits_of(model).dtype == torch.bfloat16
    assert tiny.logits_of(model).isfinite().all()


def test_factors_can_be_pruned_and_pruned_weights_trained_but_not_quantized_or_factorised() -> None:
    model = tiny.build("llama")
    tiny.compress(model, "svd(share=0.8)+wanda(sparsity=0.5)")
    assert {path.rpartition(".")[2] for path in sparse_linears(model)} == {"first", "second"}
    tiny.compress(tiny.build("llama"), "wanda(sparsity=0.5)+layerchop(remove=1)")
    for after in ("rtn-int4", "rtn-int8", "svd(share=0.5)", "wanda(sparsity=0.5)"):
        with pytest.raises(InputError, match="stores the kept ones alone"):
            Recipe.parse(f"sparsegpt(sparsity=0.5)+{after}").plan(tiny.anatomy("llama"), Budget.parse("none"))


def test_two_largest_of_every_four() -> None:
    score = torch.tensor([[1.0, 4.0, 2.0, 3.0, 9.0, 0.0, 8.0, 7.0]])
    assert two_of_four(score).int().tolist() == [[0, 1, 0, 1, 1, 0, 1, 0]]
