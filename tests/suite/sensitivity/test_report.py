"""What a profile says: tables, JSON, and whether deeper blocks are more compressible."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table

from suite.conformance import tiny
from suite.models.anatomy import anatomy_of
from suite.sensitivity import report
from suite.sensitivity.profile import parts_of
from tests.suite.sensitivity import examples

DEEP = anatomy_of(tiny.build("llama", num_hidden_layers=12))


def text_of(table: Table) -> str:
    console = Console(width=150)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


@pytest.mark.parametrize(
    ("slope", "correlation", "words"), [(-0.005, -1, "more compressible"), (0.005, 1, "less compressible")]
)
def test_a_trend_over_depth_is_found_and_named(slope: float, correlation: float, words: str) -> None:
    parts, profile = examples.rising_with_depth(DEEP, slope=slope)
    found = report.trends(profile, parts, [0.5])
    assert [(trend.blocks, trend.role) for trend in found] == [(12, None)]
    assert found[0].correlation == pytest.approx(correlation)
    assert found[0].p_value < 1e-6
    assert words in found[0].sentence()


def test_without_a_trend_none_is_claimed() -> None:
    parts = parts_of(DEEP, "block")
    zigzag = {part.name: 0.1 + 0.01 * ((part.block or 0) % 2) for part in parts}
    (trend,) = report.trends(examples.made_up(parts, {0.5: zigzag}), parts, [0.5])
    assert trend.p_value > 0.05
    assert "no clear relation" in trend.sentence()


def test_three_blocks_are_too_few_for_a_trend() -> None:
    parts, profile = examples.rising_with_depth(DEEP)
    assert report.trends(profile, parts[:3], [0.5]) == []


@given(st.floats(0.001, 0.2), st.sampled_from([0.75, 0.5, 0.25]))
def test_the_curve_over_depth_sums_the_linears_of_a_block(each: float, strength: float) -> None:
    parts = parts_of(DEEP, "linear")
    profile = examples.made_up(parts, {strength: {part.name: each for part in parts}}, by="linear")
    assert report.over_depth(profile, parts, strength) == pytest.approx(dict.fromkeys(range(12), 7 * each))
    assert report.over_depth(profile, parts, strength, "down") == pytest.approx(
        dict.fromkeys(range(12), each)
    )


def test_a_block_of_which_something_is_missing_is_left_out_of_the_sum() -> None:
    parts, profile = examples.rising_with_depth(DEEP, "linear")
    missing = profile.model_copy(
        update={"points": tuple(p for p in profile.points if p.part != "block 4 gate")}
    )
    assert 4 not in report.over_depth(missing, parts, 0.5)
    assert set(report.over_depth(missing, parts, 0.5, "down")) == set(range(12))


def test_linears_have_a_trend_for_each_role_and_for_their_sum() -> None:
    parts, profile = examples.rising_with_depth(DEEP, "linear")
    roles = [trend.role for trend in report.trends(profile, parts, [0.5])]
    assert roles == [None, "query", "key", "value", "output", "gate", "up", "down"]


def test_p_values_of_several_trends_hold_together() -> None:
    parts = parts_of(DEEP, "block")
    curve = {part.name: 0.1 + 0.01 * ((7 * (part.block or 0)) % 12) for part in parts}
    profile = examples.made_up(parts, dict.fromkeys((0.75, 0.5, 0.25), curve))
    (alone,) = report.trends(profile, parts, [0.5])
    found = [trend.p_value for trend in report.trends(profile, parts, [0.75, 0.5, 0.25])]
    assert found == pytest.approx([min(1.0, 3 * alone.p_value)] * 3)


def test_the_tables_show_every_point_and_a_dash_where_there_is_none() -> None:
    parts, profile = examples.rising_with_depth(DEEP)
    (table,) = report.tables(profile, parts, [0.75, 0.1])
    shown = text_of(table)
    assert "keeps 0.75" in shown
    assert "+0.0056" in shown
    assert "–" in shown
    linears, profile = examples.rising_with_depth(DEEP, "linear")
    by_linear = report.tables(profile, linears, [0.75, 0.5])
    assert len(by_linear) == 2
    assert "down" in text_of(by_linear[0])


def test_units_and_conditions_are_stated() -> None:
    _, profile = examples.rising_with_depth(DEEP)
    line = report.conditions_line(profile)
    for word in ("nats per token", "2 × 16 tokens of pydoc held back", "pydoc:2x16", "dense perplexity 8.17"):
        assert word in line


def test_json_holds_points_trends_and_files() -> None:
    parts, profile = examples.rising_with_depth(DEEP)
    trends = report.trends(profile, parts, [0.5])
    shown = json.loads(report.as_json(profile, parts, trends, {"file": "x.json"}))
    assert len(shown["points"]) == 36
    assert shown["points"][0].keys() >= {"block", "role", "part", "strength", "kept", "increase"}
    assert shown["depth"][0]["correlation"] == pytest.approx(-1)
    assert shown["file"] == "x.json"
