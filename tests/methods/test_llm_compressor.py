"""GPTQ by llm-compressor: its own codes in the suite's packed linear."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from methods.llm_compressor import LlmCompressorGptqInt4, quantize, rounded
from suite.conformance import tiny
from suite.errors import MissingExtra
from suite.models import load
from suite.models.anatomy import anatomy_of
from suite.packed_layers import PackedLinear
from suite.recipe import Recipe
from suite.specs import Budget

RECIPE = "llm-compressor-gptq-int4(group=16)"
library = pytest.mark.skipif(
    importlib.util.find_spec("llmcompressor") is None, reason="llm-compressor is not installed"
)


def method(**knobs: Any) -> LlmCompressorGptqInt4:
    return LlmCompressorGptqInt4(LlmCompressorGptqInt4.Config(**knobs))


@given(st.integers(1, 300), st.integers(1, 128))
def test_a_group_divides_the_columns_and_is_no_larger_than_asked(columns: int, group: int) -> None:
    taken = method(group=group).format(4, columns)["group"]
    assert columns % taken == 0
    assert taken == columns or min(group, columns) // 2 <= taken <= group


@pytest.mark.parametrize(("columns", "group", "taken"), [(576, 64, 64), (112, 64, 56), (61, 16, 61)])
def test_a_group_that_does_not_divide_gives_way_to_a_smaller_one_or_the_row(
    columns: int, group: int, taken: int
) -> None:
    assert method(group=group).format(4, columns)["group"] == taken
    assert method(group="channel").format(4, columns)["group"] == columns


@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_are_read_off_rounded_weights(symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (6, 24), generator=generator).float()
    scales = torch.rand(6, 3, generator=generator) + 0.1
    zeros = (
        torch.full((6, 3), 8.0) if symmetric else torch.randint(0, 16, (6, 3), generator=generator).float()
    )
    linear: Any = nn.Linear(24, 6, bias=False)
    steps = codes.unflatten(1, (-1, 8)) - zeros.unsqueeze(-1)
    linear.weight.data = (steps * scales.unsqueeze(-1)).flatten(1)
    linear.weight_scale = scales
    if not symmetric:
        linear.weight_zero_point = zeros.to(torch.int8) - 8
    found = rounded(linear, 4, 8)
    assert all(torch.equal(one, other) for one, other in zip(found, (codes, scales, zeros), strict=True))


def test_without_the_library_planning_names_the_extra(without: Callable[[str], None]) -> None:
    without("llmcompressor")
    with pytest.raises(MissingExtra, match=r"weighin\[llm-compressor\]"):
        Recipe.parse(RECIPE).plan(tiny.anatomy("llama"), Budget(metric="none"))


@library
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_packed_weights_are_the_librarys(family: str, symmetric: bool, tmp_path: Path) -> None:
    recipe = f"llm-compressor-gptq-int4(group=16,symmetric={str(symmetric).lower()})"
    tiny.build(family).save_pretrained(tmp_path)  # the library looks at the file of the configuration
    source = load.resolve(str(tmp_path))
    theirs, ours = load.load_model(source), load.load_model(source)
    plan = Recipe.parse(recipe).plan(anatomy_of(theirs), Budget(metric="none")).stages[0]
    quantize(theirs, plan.modules, tiny.calibration_sample().tokens)
    tiny.compress(ours, recipe)
    for path in plan.modules:
        packed, linear = ours.get_submodule(path), theirs.get_submodule(path)
        assert type(packed) is PackedLinear
        # Equal but for scales, which the suite stores as float16.
        torch.testing.assert_close(packed.dequantize(torch.float32), linear.weight, rtol=1e-3, atol=1e-6)


@library
def test_linears_that_the_library_rounds_to_nearest_are_counted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tiny.build("llama").save_pretrained(tmp_path)
    source = load.resolve(str(tmp_path))

    def notes() -> dict[str, Any]:
        return tiny.compress(load.load_model(source), RECIPE).stages[0].notes

    assert "rounded_to_nearest" not in notes()

    def fail(moment: Tensor, *, out: tuple[Tensor, Tensor], **_: Any) -> None:
        out[1].fill_(1)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", fail)
    assert notes()["rounded_to_nearest"] == 7 * tiny.BLOCKS


@library
def test_linears_whose_group_gave_way_are_counted() -> None:
    plan = Recipe.parse("llm-compressor-gptq-int4").plan(tiny.anatomy("llama"), Budget(metric="none"))
    assert plan.stages[0].notes == {"linears_with_another_group": 4}
