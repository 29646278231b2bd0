"""Tensor networks in place of a model's linears."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from methods import tensor_network
from methods.tensor_layers import TensorLinear
from methods.tensor_network import TensorNetwork, TensorNetworkConfig
from suite.conformance import tiny
from suite.errors import ImpossibleBudget, InputError
from suite.layers import replace
from suite.models.anatomy import anatomy_of
from suite.recipe import Recipe
from suite.specs import Budget

PLAIN = "bonds=uniform,weighting=none,metric=outputs,refine=0"
FORMS = ["", "sites=3", "pairing=square", "form=tucker"]


def recipe(*knobs: str) -> str:
    return f"tensor-network({','.join(knob for knob in knobs if knob)})"


def _knobs(form: str) -> dict[str, object]:
    key, _, value = form.partition("=")
    return {key: int(value) if value.isdigit() else value} if form else {}


def weight_error(layer: TensorLinear, linear: nn.Module) -> float:
    assert isinstance(linear, nn.Linear)
    return float((layer.matrix() - linear.weight).detach().square().sum())


def networks(model: PreTrainedModel) -> dict[str, TensorLinear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, TensorLinear)}


def test_the_whole_share_leaves_the_logits_alone(model: PreTrainedModel) -> None:
    before = tiny.logits_of(model)
    plan = tiny.compress(model, "tensor-network(share=1)")
    assert not plan.stages[0].modules
    assert torch.equal(tiny.logits_of(model), before)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("budget", ["params=0.8", "params=0.6", "bytes=0.7"])
def test_budgets_are_used_and_kept(family: str, form: str, budget: str) -> None:
    anatomy = tiny.anatomy(family)
    metric, share = budget.split("=")
    plan = Recipe.parse(recipe(form)).plan(anatomy, Budget.parse(budget))
    used = plan.final.size(metric) / anatomy.size(metric)
    assert float(share) * 0.99 <= used <= float(share)


@pytest.mark.parametrize("form", FORMS)
def test_water_filling_stays_within_the_plan_and_uses_it(family: str, form: str) -> None:
    model = tiny.build(family)
    anatomy, parsed = anatomy_of(model), Recipe.parse(recipe(form, "refine=2"))
    plan = parsed.plan(anatomy, Budget.parse("params=0.8"))
    done = parsed.compress(model, plan, tiny.calibration_sample())
    assert anatomy_of(model).params == done.final.params
    assert 0.99 * plan.final.params <= done.final.params <= plan.final.params
    assert networks(model).keys() == done.stages[0].modules.keys()


def test_water_filling_gives_more_to_what_matters_more(llama: PreTrainedModel) -> None:
    """A linear whose outputs are thrown away gets the least there is."""
    with torch.no_grad():
        llama.get_submodule("model.layers.1.self_attn.o_proj").weight.zero_()
    tiny.compress(llama, recipe("refine=0"), "params=0.8")
    found = networks(llama)
    for name in ("q_proj", "k_proj", "v_proj"):
        assert max(found[f"model.layers.1.self_attn.{name}"].bonds) == 1


@pytest.mark.parametrize("form", FORMS)
def test_uniform_bonds_keep_the_same_share_everywhere(family: str, form: str) -> None:
    plan = Recipe.parse(recipe(form, "share=0.6", "bonds=uniform")).plan(
        tiny.anatomy(family), Budget.parse("none")
    )
    method = TensorNetwork(TensorNetworkConfig.model_validate(_knobs(form)))
    for line in tiny.anatomy(family).linears:
        bonds = plan.stages[0].modules[line.path].arguments["bonds"]
        kept = method.network(line).parameters(bonds) / (line.out_features * line.in_features)
        assert kept == pytest.approx(0.6, abs=0.08)


@pytest.mark.parametrize("form", FORMS)
def test_the_error_falls_with_the_share(form: str) -> None:
    gaps = []
    for share in (0.2, 0.5, 0.8):
        dense, model = tiny.build("llama"), tiny.build("llama")
        tiny.compress(model, recipe(form, f"share={share}", PLAIN))
        gaps.append(
            sum(weight_error(layer, dense.get_submodule(path)) for path, layer in networks(model).items())
        )
    assert gaps == sorted(gaps, reverse=True)


@pytest.mark.parametrize("weighting", ["none", "diagonal", "kronecker"])
@pytest.mark.parametrize("form", FORMS)
def test_every_weighting_runs_and_refining_lowers_every_loss(form: str, weighting: str) -> None:
    model = tiny.build("llama")
    plan = tiny.compress(model, recipe(form, f"weighting={weighting}", "refine=5"), "params=0.75")
    losses = plan.stages[0].notes["relative_losses"]
    assert losses.keys() == plan.stages[0].modules.keys()
    assert all(after <= before for before, after in losses.values())
    assert sum(after < before for before, after in losses.values()) > len(losses) / 2
    assert anatomy_of(model).params == plan.final.params
    assert tiny.logits_of(model).isfinite().all()


def test_refined_and_weighted_networks_keep_the_outputs_better_than_plain_ones(family: str) -> None:
    """On the calibration text itself, summed over the blocks' outputs."""
    tokens = tiny.calibration_sample().tokens
    before = tiny.logits_of(tiny.build(family), tokens)
    errors = []
    for knobs in (PLAIN, "bonds=uniform,metric=outputs"):
        model = tiny.build(family)
        tiny.compress(model, recipe(knobs), "params=0.75")
        errors.append(float((tiny.logits_of(model, tokens) - before).square().sum()))
    assert errors[1] < 0.7 * errors[0]


def test_embedding_head_norms_and_biases_are_left_alone(model: PreTrainedModel) -> None:
    linears = {line.path for line in anatomy_of(model).linears}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tiny.compress(model, recipe(PLAIN), "params=0.8")
    assert networks(model).keys() <= linears
    for name, tensor in model.state_dict().items():
        if ".cores." not in name:
            assert torch.equal(tensor, before[name])


def test_excluded_linears_stay_dense_and_the_others_pay() -> None:
    plan = Recipe.parse("tensor-network(exclude=down layers.0)").plan(
        tiny.anatomy("llama"), Budget.parse("params=0.8")
    )
    for line in tiny.anatomy("llama").linears:
        assert (line.path in plan.stages[0].modules) == (line.role != "down" and line.block != 0)
    assert 0.99 * 0.8 <= plan.final.params / tiny.anatomy("llama").params <= 0.8


def test_shares_and_limits_of_single_linears_are_kept(llama: PreTrainedModel) -> None:
    config = {
        "shares": {"gate": 0.5, "layers.3": 1.0, "model.layers.1.mlp.gate_proj": 0.25},
        "limits": {"layers.2.self_attn": 3},
        "refine": 1,
    }
    method = TensorNetwork(TensorNetworkConfig.model_validate(config))
    parsed = Recipe((method,))
    plan = parsed.plan(anatomy_of(llama), Budget.parse("params=0.85"))
    parsed.compress(llama, plan, tiny.calibration_sample())
    found = networks(llama)
    dense = 112 * 48
    assert not [path for path in found if "layers.3" in path]
    assert found["model.layers.2.self_attn.q_proj"].bonds == (3,)
    for block, share in ((0, 0.5), (1, 0.25)):
        gate = found[f"model.layers.{block}.mlp.gate_proj"]
        kept = gate.network.parameters(gate.bonds)
        assert kept <= share * dense < gate.network.parameters([gate.bonds[0] + 1])


def test_lists_and_mappings_are_the_same_as_words() -> None:
    by_words = TensorNetworkConfig(exclude="down layers.0", shares="gate:0.5 up:1")
    by_values = TensorNetworkConfig.model_validate(
        {"exclude": ["down", "layers.0"], "shares": {"gate": 0.5, "up": 1}}
    )
    assert by_words == by_values
    text = str(Recipe((TensorNetwork(by_values),)))
    assert str(Recipe.parse(text)) == text


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ("shares=down", "down:0.5"),
        ("shares=down:2", "down:0.5"),
        ("limits=down:0.5", "down:40"),
        ("form=tucker,sites=3", "leave out 'sites'"),
        ("sites=4", "2 or 3"),
    ],
)
def test_bad_knobs_are_refused_with_what_is_allowed(knobs: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        Recipe.parse(recipe(knobs))


def test_a_name_that_no_linear_has_is_refused() -> None:
    with pytest.raises(InputError, match=r"'dwon'.*Use a role \(query, key"):
        Recipe.parse("tensor-network(exclude=dwon)").plan(tiny.anatomy("llama"), Budget.parse("none"))


def test_a_budget_out_of_reach_says_what_excluding_costs() -> None:
    parsed = Recipe.parse("tensor-network(exclude=down)")
    with pytest.raises(ImpossibleBudget) as refused:
        parsed.plan(tiny.anatomy("llama"), Budget.parse("params=0.3"))
    smallest = refused.value.smallest
    assert (
        parsed.plan(tiny.anatomy("llama"), Budget(metric="params", value=smallest)).final.params == smallest
    )


def replace_emptied(model: nn.Module, path: str, module: nn.Module) -> None:
    if "layers.0.mlp.down_proj" in path:
        assert isinstance(module, TensorLinear)
        with torch.no_grad():
            module.cores[0].zero_()
    replace(model, path, module)


def test_inputs_come_from_the_networks_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeroing what block 0 gives must change how block 1 is fitted."""
    found = []
    for zeroed in (False, True):
        model = tiny.build("llama")
        if zeroed:
            monkeypatch.setattr(tensor_network, "replace", replace_emptied)
        tiny.compress(model, recipe("bonds=uniform", "metric=outputs", "share=0.5", "refine=2"))
        found.append(networks(model)["model.layers.1.self_attn.q_proj"].matrix())
    assert not torch.allclose(found[0], found[1])


def test_the_choice_of_forward_is_recorded(family: str) -> None:
    plan = Recipe.parse("tensor-network").plan(tiny.anatomy(family), Budget.parse("params=0.7"))
    knobs = plan.stages[0].knobs
    assert knobs["factored_up_to_rows"]
    assert all("×" in factors for factors in knobs["factored_up_to_rows"])


def test_factors_of_an_earlier_stage_can_be_tensorised(llama: PreTrainedModel) -> None:
    plan = tiny.compress(llama, "svd(share=0.9)+tensor-network(share=0.6,refine=1)")
    assert anatomy_of(llama).params == plan.final.params
    assert tiny.logits_of(llama).isfinite().all()


def test_excluded_linears_are_quantized_by_the_next_stage(llama: PreTrainedModel) -> None:
    plan = tiny.compress(llama, "tensor-network(exclude=down,share=0.6,bonds=uniform,refine=1)+rtn-int4")
    tensorised, packed = (stage.modules for stage in plan.stages)
    down = {line.path for line in tiny.anatomy("llama").linears if line.role == "down"}
    assert tensorised.keys() == {line.path for line in tiny.anatomy("llama").linears} - down
    assert down <= packed.keys()
    assert not packed.keys() & tensorised.keys()
