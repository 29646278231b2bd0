"""SliceGPT: the invariants of its card, on every family and both kinds of residual."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from methods import slicegpt
from methods.slicegpt import SliceGpt, SliceGptConfig, principal_components
from suite.calibration import Calibration
from suite.conformance import tiny
from suite.errors import ImpossibleBudget, InputError
from suite.method import Plan
from suite.models.anatomy import Anatomy, anatomy_of
from suite.models.layouts import layout_of
from suite.models.sliced import SlicedBlock, SlicedLayout, UnscaledNorm, sliced_modules
from suite.packed_layers import TiedHead
from suite.recipe import Recipe
from suite.specs import Budget

SIZE = 48
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in tiny.FAMILIES},
    "gpt-neox-sequential": ("gpt-neox", {"use_parallel_residual": False}),
    "opt-without-biases": ("opt", {"enable_bias": False}),
    "opt-norms-without-scale": ("opt", {"layer_norm_elementwise_affine": False}),
    "qwen3": ("qwen3", {}),
}
LAYOUTS: list[SlicedLayout] = ["tie-preserving", "official"]
TOKENS = tiny.token_ids(6, 32, seed=8)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def exact_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers' RMSNorm rounds to float32 even in a float64 model; here it does not."""

    def forward(norm: Any, x: Tensor) -> Tensor:
        return norm.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon)

    for cls in (LlamaRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm):
        monkeypatch.setattr(cls, "forward", forward)


def build(kind: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    family, changes = KINDS[kind]
    return tiny.build(family, dtype, **changes)


def points(anatomy: Anatomy) -> int:
    return anatomy.n_blocks * (1 if anatomy.parallel else 2) + 1


def cut(
    model: PreTrainedModel,
    width: int,
    layout: SlicedLayout = "tie-preserving",
    tokens: Tensor = TOKENS,
    signal: str = "raw",
) -> PreTrainedModel:
    """Rotate at every point, at full width too, and keep `width` coordinates."""
    anatomy = anatomy_of(model)
    modules = sliced_modules(anatomy, [width] * points(anatomy), layout, keep_whole=False)
    config = SliceGptConfig.model_validate({"signal": signal})
    SliceGpt(config).compress(model, Plan(modules=modules), Calibration(tokens, ""))
    return model


def blocks_of(model: PreTrainedModel) -> list[SlicedBlock]:
    return [block for block in model.modules() if isinstance(block, SlicedBlock)]


def skips_of(model: PreTrainedModel) -> list[Tensor]:
    linears = [skip for block in blocks_of(model) for skip in (block.attention_skip, block.mlp_skip)]
    return [linear.weight.detach() for linear in linears if linear is not None]


def distance(kind: str, width: int) -> float:
    """Mean divergence of a sliced model's predictions from the dense model's, in nats."""
    dense = tiny.logits_of(build(kind), TOKENS).log_softmax(-1)
    found = tiny.logits_of(cut(build(kind), width), TOKENS).log_softmax(-1)
    return float((dense.exp() * (dense - found)).sum(-1).mean())


# Exactness


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("exact_norms")
def test_rotations_without_a_cut_leave_the_logits_alone(kind: str, layout: SlicedLayout) -> None:
    dense = tiny.logits_of(build(kind))
    torch.testing.assert_close(tiny.logits_of(cut(build(kind), SIZE, layout)), dense, rtol=0, atol=1e-9)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_single_precision_too(kind: str, layout: SlicedLayout) -> None:
    dense = tiny.logits_of(build(kind, torch.float32))
    model = cut(build(kind, torch.float32), SIZE, layout)
    torch.testing.assert_close(tiny.logits_of(model), dense, rtol=0, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("exact_norms")
def test_signals_of_low_rank_survive_the_cut_and_only_with_the_dense_width_as_divisor(
    kind: str, layout: SlicedLayout
) -> None:
    few = TOKENS[:1, :20]
    dense = tiny.logits_of(build(kind), few)
    model = cut(build(kind), 24, layout, tokens=few)
    torch.testing.assert_close(tiny.logits_of(model, few), dense, rtol=0, atol=1e-8)
    for norm in model.modules():
        if isinstance(norm, UnscaledNorm):
            norm.size = 24
    assert (tiny.logits_of(model, few) - dense).abs().max() > 1e-3


@pytest.mark.usefixtures("exact_norms")
def test_the_tie_preserving_layout_gives_the_logits_of_the_untied_one(kind: str) -> None:
    """The head is sliced in both: with a head of full width the last stream would be wider."""
    tied, untied = (tiny.logits_of(cut(build(kind), 30, layout)) for layout in LAYOUTS)
    torch.testing.assert_close(tied, untied, rtol=0, atol=1e-9)
    assert (tied - tiny.logits_of(build(kind))).abs().max() > 1e-3


# Bases


@given(st.integers(2, 12), st.integers(1, 30), st.integers(0, 1000))
def test_principal_components_are_orthonormal_and_sorted(size: int, rows: int, seed: int) -> None:
    x = torch.randn(rows, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    basis = principal_components(x.T @ x)
    identity = torch.eye(size, dtype=torch.float64)
    torch.testing.assert_close(basis.T @ basis, identity, rtol=0, atol=1e-12)
    rotated = basis.T @ x.T @ x @ basis
    energies = rotated.diagonal()
    assert (energies[:-1] >= energies[1:] - 1e-9).all()
    assert (rotated - energies.diag()).abs().max() < 1e-9 * max(1.0, float(energies.max()))


def test_whole_skip_matrices_are_orthogonal(kind: str) -> None:
    skips = skips_of(cut(build(kind), SIZE))
    assert skips
    for skip in skips:
        torch.testing.assert_close(skip @ skip.T, torch.eye(SIZE, dtype=torch.float64), rtol=0, atol=1e-10)


def test_no_skip_matrix_stretches(kind: str) -> None:
    for skip in skips_of(cut(build(kind), 20)):
        assert skip.shape == (20, 20)
        values = torch.linalg.svdvals(skip)
        assert values.max() <= 1 + 1e-10
        assert values.min() < 1 - 1e-6


@pytest.mark.usefixtures("exact_norms")
def test_the_sliced_models_own_stream_is_in_its_principal_components_at_every_block(kind: str) -> None:
    """So every basis was found on what the sliced prefix gives, not on the dense model's stream."""
    model = cut(build(kind), 30)
    seen: dict[int, Tensor] = {}
    for index, block in enumerate(blocks_of(model)):
        norm = block.get_submodule(layout_of(model.config).norms[0])
        norm.register_forward_pre_hook(
            lambda _, args, index=index: seen.update({index: args[0].flatten(0, 1)})
        )
    tiny.logits_of(model, TOKENS)
    assert len(seen) == tiny.BLOCKS
    for stream in seen.values():
        moment = stream.T @ stream
        energies = moment.diagonal()
        assert (energies[:-1] >= energies[1:]).all()
        assert (moment - energies.diag()).abs().max() < 1e-8 * energies.max()


def test_the_raw_signal_follows_a_huge_token_and_the_normed_one_does_not() -> None:
    def entrance(scale: float, signal: str) -> Tensor:
        model = build("llama-untied")
        with torch.no_grad():
            model.get_input_embeddings().weight[TOKENS[0, 0]] *= scale
        module = blocks_of(cut(model, 24, signal=signal))[0].entrance
        assert module is not None
        return (
            module.weight.detach().T @ module.weight.detach()
        )  # the projection, whatever the signs of its basis

    def change(signal: str) -> float:
        return float((entrance(1, signal) - entrance(1000, signal)).abs().max())

    assert change("raw") > 0.05
    assert change("normed") < 1e-3


# What a cut costs


def test_a_narrower_stream_is_further_from_the_dense_model(kind: str) -> None:
    distances = [distance(kind, width) for width in (SIZE, 40, 32, 24, 16, 8)]
    assert distances[0] < 1e-9
    for wider, narrower in pairwise(distances):
        assert narrower > 0.95 * wider


def test_coordinates_cut_without_a_rotation_cost_more(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rotated = distance(kind, 32)

    def columns(moment: Tensor) -> Tensor:
        order = moment.diagonal().argsort(descending=True)
        return torch.eye(len(moment), dtype=moment.dtype)[:, order]

    monkeypatch.setattr(slicegpt, "principal_components", columns)
    assert distance(kind, 32) > rotated


# Sizes


def on_meta(**changes: Any) -> Anatomy:
    """The reference model of the cards: 135 million parameters, tied."""
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
        **changes,
    )
    with torch.device("meta"):
        return anatomy_of(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16))


@pytest.fixture(scope="module")
def reference() -> Anatomy:
    return on_meta()


@given(width=st.integers(8, 575))
def test_parameters_are_those_of_the_closed_form(reference: Anatomy, width: int) -> None:
    layers, size, vocab, linears = 30, 576, 49152, 6144
    blocks = layers * (width * linears + 2 * width**2)
    expected = {
        "slicegpt": blocks + 2 * size * width + size + vocab * size,
        "slicegpt(layout=official,head=sliced)": blocks + 2 * vocab * width,
        # The last MLP and its skip matrix write all coordinates, and the head reads them.
        "slicegpt(layout=official)": blocks + (size - width) * (1536 + width) + vocab * width + vocab * size,
    }
    for recipe, params in expected.items():
        given = recipe.replace(")", f",width={width})") if "(" in recipe else f"{recipe}(width={width})"
        assert Recipe.parse(given).plan(reference, Budget(metric="none")).final.params == params


@pytest.mark.parametrize(
    ("width", "official", "sliced", "tied"),
    [
        (512, 1.217, 1.193, 1.033),
        (456, 1.097, 1.051, 0.932),
        (432, 1.046, 0.991, 0.889),
        (400, 0.979, 0.912, 0.833),
    ],
)
def test_shares_are_those_of_the_card(
    reference: Anatomy, width: int, official: float, sliced: float, tied: float
) -> None:
    for recipe, share in (
        (f"slicegpt(layout=official,width={width})", official),
        (f"slicegpt(layout=official,head=sliced,width={width})", sliced),
        (f"slicegpt(width={width})", tied),
    ):
        final = Recipe.parse(recipe).plan(reference, Budget(metric="none")).final
        assert final.params / reference.params == pytest.approx(share, abs=6e-4)


@pytest.mark.parametrize(("width", "params"), [(456, 147_489_984), (400, 131_641_088)])
def test_the_official_layout_has_as_many_parameters_as_the_official_programs(
    reference: Anatomy, width: int, params: int
) -> None:
    plan = Recipe.parse(f"slicegpt(layout=official,width={width})").plan(reference, Budget(metric="none"))
    assert plan.final.params == params


@pytest.mark.parametrize(("share", "width"), [(0.9, 438), (0.8, 381)])
def test_solved_widths_are_those_of_the_card(reference: Anatomy, share: float, width: int) -> None:
    plan = Recipe.parse("slicegpt").plan(reference, Budget(metric="params", value=share))
    assert plan.stages[0].knobs["width"] == pytest.approx(width, abs=1)


@given(
    share=st.floats(0.45, 0.99), layout=st.sampled_from([*LAYOUTS, None]), rounding=st.sampled_from([1, 8])
)
def test_the_solved_width_is_the_largest_that_fits(
    reference: Anatomy, share: float, layout: str | None, rounding: int
) -> None:
    knobs = f"rounding={rounding}" + (f",layout={layout}" if layout else "")
    budget = Budget(metric="params", value=share)
    target = budget.target(reference.params)
    plan = Recipe.parse(f"slicegpt({knobs})").plan(reference, budget)
    width = plan.stages[0].knobs["width"]
    assert width % rounding == 0
    wider = Recipe.parse(f"slicegpt({knobs},width={width + rounding})").plan(reference, Budget(metric="none"))
    assert plan.final.params <= target < wider.final.params
    if rounding == 1:
        assert plan.final.params > 0.99 * target


def test_the_plan_is_what_the_model_becomes(kind: str) -> None:
    for knobs in ("width=30", "layout=official,width=30", "layout=official,head=sliced,width=30"):
        model = build(kind, torch.float32)
        plan = tiny.compress(model, f"slicegpt({knobs})")
        found = anatomy_of(model)
        assert sorted(found.entries, key=str) == sorted(plan.final.entries, key=str)
        assert sorted(found.linears, key=str) == sorted(plan.final.linears, key=str)
        for fact in ("tied", "embedding_size", "head_size", "head_bias"):
            assert getattr(found, fact) == getattr(plan.final, fact), fact


def test_the_whole_size_changes_nothing(model: PreTrainedModel) -> None:
    """With skip matrices a cut of nothing would be larger than the dense model."""
    dense = tiny.logits_of(model)
    for recipe, budget in (("slicegpt", "params=1"), ("slicegpt(width=48)", "none"), ("slicegpt", "none")):
        assert not tiny.compress(model, recipe, budget).stages[0].modules
    assert torch.equal(tiny.logits_of(model), dense)


# Layouts


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt"])
def test_tied_models_keep_their_table_and_their_tie(family: str) -> None:
    model, dense = tiny.build(family), tiny.build(family)
    plan = tiny.compress(model, "slicegpt(width=30)").stages[0]
    assert plan.knobs["layout"] == "tie-preserving"
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert torch.equal(table.weight, dense.get_input_embeddings().weight)
    assert head.weight is table.weight


@pytest.mark.parametrize("family", ["llama-untied", "gpt-neox"])
def test_untied_models_get_a_sliced_table_and_a_sliced_head(family: str) -> None:
    model = tiny.build(family)
    plan = tiny.compress(model, "slicegpt(width=30)").stages[0]
    assert plan.knobs["layout"] == "official"
    assert model.get_input_embeddings().weight.shape == (tiny.VOCAB, 30)
    assert model.get_output_embeddings().weight.shape == (tiny.VOCAB, 30)


def test_the_official_layout_unties_and_keeps_the_head_whole_unless_asked(model: PreTrainedModel) -> None:
    plan = tiny.compress(model, "slicegpt(layout=official,width=30)")
    assert model.get_input_embeddings().weight.shape == (tiny.VOCAB, 30)
    assert model.get_output_embeddings().weight.shape == (tiny.VOCAB, SIZE)
    assert not model.config.tie_word_embeddings
    assert not plan.final.tied


def test_blocks_have_one_skip_matrix_for_every_addition() -> None:
    for kind, expected in (("gpt-neox", 1), ("gpt-neox-sequential", 2), ("llama", 2)):
        assert len(skips_of(cut(build(kind), 30))) == expected * tiny.BLOCKS


def test_what_is_inside_attention_is_not_cut(kind: str) -> None:
    model, dense = cut(build(kind), 30), build(kind)
    for line in anatomy_of(dense).linears:
        found = model.get_submodule(line.path)
        assert isinstance(found, nn.Linear)
        if line.role in ("output", "down"):
            assert (found.in_features, found.out_features) == (line.in_features, 30)
        else:
            assert (found.in_features, found.out_features) == (30, line.out_features)


def test_norms_keep_the_models_own_epsilon() -> None:
    model = cut(tiny.build("llama", torch.float64, rms_norm_eps=0.25), 30)
    norms = [norm for norm in model.modules() if isinstance(norm, UnscaledNorm)]
    assert len(norms) == 2 * tiny.BLOCKS
    assert {norm.eps for norm in norms} == {0.25}
    assert {norm.size for norm in norms} == {SIZE}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["llama", "opt", "gpt-neox"])
def test_a_quantized_embedding_stacks_on_either_layout(family: str, layout: str) -> None:
    model = tiny.build(family)
    plan = tiny.compress(model, f"slicegpt(layout={layout},width=32)+rtn-int4(embedding=8,group=20)")
    assert anatomy_of(model).bytes == plan.final.bytes
    head = model.get_submodule(layout_of(model.config).head)
    assert isinstance(head, TiedHead) == (layout == "tie-preserving" and family != "gpt-neox")
    assert tiny.logits_of(model).isfinite().all()


# Schedules


def test_a_linear_schedule_cuts_more_and_more() -> None:
    model = tiny.build("llama")
    tiny.compress(model, "slicegpt(schedule=linear,start=0.25,end=0.5,mlp_start=0.5,mlp_end=0)")
    blocks = blocks_of(model)
    assert [block.entering for block in blocks] == [36, 32, 28, 24]
    assert [block.between for block in blocks] == [24, 32, 40, 48]
    assert blocks[-1].leaving == 24
    assert tiny.logits_of(model).isfinite().all()


def test_whole_blocks_of_a_linear_schedule_need_no_skip_matrix(kind: str) -> None:
    model = build(kind)
    tiny.compress(model, "slicegpt(schedule=linear,start=0,end=0.5,mlp_start=0,mlp_end=0)")
    # Rounding to whole coordinates leaves the first block alone whole at both of its ends.
    whole = [block.attention_skip is None for block in blocks_of(model) if block.between is not None]
    if whole:
        assert whole == [True, False, False, False]
    assert tiny.logits_of(model).isfinite().all()


def test_a_budget_scales_a_linear_schedule(kind: str) -> None:
    model = build(kind, torch.float32)
    plan = tiny.compress(
        model, "slicegpt(layout=tie-preserving,schedule=linear,start=0.2,end=0.4)", "params=0.7"
    )
    cuts = [1 - block.entering / SIZE for block in blocks_of(model)]
    assert cuts == sorted(cuts)
    assert cuts[0] == pytest.approx(cuts[-1] / 2, abs=1.5 / SIZE)
    assert 0.6 * plan.start.params < anatomy_of(model).params <= 0.7 * plan.start.params


# Work


def test_calibration_passes_through_every_branch_once(llama: PreTrainedModel) -> None:
    calls: dict[str, int] = {}
    modules = {line.path: llama.get_submodule(line.path) for line in anatomy_of(llama).linears}

    def count(path: str) -> Callable[..., None]:
        return lambda *_: calls.update({path: calls.get(path, 0) + 1})

    for path, module in modules.items():
        module.register_forward_hook(count(path))
    cut(llama, 30, tokens=tiny.token_ids(16, 8))
    assert calls == dict.fromkeys(modules, 2)  # two batches of eight sequences


def test_the_same_calibration_gives_the_same_weights(kind: str) -> None:
    first, second = (cut(build(kind, torch.float32), 30).state_dict() for _ in range(2))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


# Refusals


def test_models_with_norms_after_the_additions_are_refused() -> None:
    with pytest.raises(InputError, match="rotates what stands before a norm"):
        tiny.compress(tiny.build("opt-350m-like"), "slicegpt(width=30)")


@pytest.mark.parametrize(
    "first", ["svd(share=0.5)", "slicegpt(width=40)", "slicegpt(layout=official,width=40)"]
)
def test_linears_that_are_not_whole_are_refused(first: str, llama: PreTrainedModel) -> None:
    with pytest.raises(InputError, match="Put slicegpt first"):
        tiny.compress(llama, f"{first}+slicegpt(width=30)")


def test_packed_linears_are_refused(llama: PreTrainedModel) -> None:
    with pytest.raises(InputError, match="Put the quantizer last"):
        tiny.compress(llama, "rtn-int8+slicegpt(width=30)")


def test_blocks_of_a_sliced_model_cannot_be_removed(llama: PreTrainedModel) -> None:
    with pytest.raises(InputError, match="Put slicegpt after the stage that removes blocks"):
        tiny.compress(llama, "slicegpt(width=30)+layerchop(remove=1)")
    tiny.compress(tiny.build("llama"), "layerchop(remove=1)+slicegpt(width=30)")


def test_a_width_beyond_the_models_is_refused(llama: PreTrainedModel) -> None:
    with pytest.raises(InputError, match="only 48 wide"):
        tiny.compress(llama, "slicegpt(width=49)")


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ("schedule=linear", "needs start and end"),
        ("schedule=linear,start=0.1,end=0.2,width=30", "belongs to schedule=constant"),
        ("start=0.1", "belong to schedule=linear"),
        ("layout=tie-preserving,head=sliced", "head belongs to layout=official"),
        ("width=0", "width"),
    ],
)
def test_knobs_that_do_not_go_together_are_refused(knobs: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Recipe.parse(f"slicegpt({knobs})")


def test_a_budget_below_one_coordinate_is_refused_with_the_smallest_size(reference: Anatomy) -> None:
    with pytest.raises(ImpossibleBudget) as refusal:
        Recipe.parse("slicegpt").plan(reference, Budget(metric="params", value=0.2))
    smallest = Recipe.parse("slicegpt(width=1)").plan(reference, Budget(metric="none")).final.params
    assert refusal.value.smallest == smallest


# The real model


@pytest.mark.real_model
@pytest.mark.slow
def test_perplexity_rises_with_the_cut_on_the_real_model(data_folder: Path) -> None:
    from suite import bfloat16
    from suite.calibration import draw
    from suite.evaluate import perplexity
    from suite.models import load
    from suite.specs import CalibrationSpec, PerplexitySpec

    source = load.resolve("smollm2-135m")
    tokenizer = load.load_tokenizer(source.location)
    calibration = draw(CalibrationSpec.parse("wikitext2:4x256"), tokenizer, 0, data_folder)
    spec = PerplexitySpec(source="pydoc", window=256, windows=4)
    found = []
    with bfloat16.widened("cpu"):
        for recipe in ("dense", "slicegpt(width=456)"):
            model = load.load_model(source)
            cut = Recipe.parse(recipe)
            cut.compress(model, cut.plan(anatomy_of(model), Budget(metric="none")), calibration)
            found.append(perplexity.measure(model, tokenizer, spec, data_folder).perplexity)
    dense, sliced = found
    assert dense < sliced < 20 * dense
