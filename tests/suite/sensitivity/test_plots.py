"""The heat map and the curves over depth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from suite.conformance import tiny
from suite.models.anatomy import anatomy_of
from suite.sensitivity import plots
from tests.suite.sensitivity import examples

DEEP = anatomy_of(tiny.build("llama", num_hidden_layers=12))


@pytest.mark.parametrize("by", ["block", "role", "linear"])
def test_a_profile_becomes_pictures(by: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    parts, profile = examples.rising_with_depth(DEEP, by)
    written = plots.draw(profile, parts, [0.75, 0.25], tmp_path / "p.json")
    names = ["p.png"] if by == "role" else ["p.png", "p.depth.png"]
    assert [file.name for file in written] == names
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in written)


def test_a_heat_map_of_linears_has_a_panel_of_roles_by_blocks_for_each_strength() -> None:
    parts, profile = examples.rising_with_depth(DEEP, "linear")
    panels = plots._panels(profile, parts, [0.75, 0.5])
    assert [panel.shape for panel, _, _ in panels] == [(7, 12), (7, 12)]
    values, roles, _ = panels[1]
    point = profile.find("block 5 down", 0.5)
    assert point is not None
    assert values[roles.index("down"), 5] == point.increase


def test_what_was_not_measured_is_left_blank() -> None:
    parts, profile = examples.rising_with_depth(DEEP)
    ((values, _, _),) = plots._panels(profile, parts, [0.75, 0.1])
    assert np.isfinite(values[0]).all()
    assert np.isnan(values[1]).all()


def test_the_colours_grow_darker_all_the_way() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    colours = matplotlib.colormaps[plots._COLOURS](np.linspace(0, 1, 64))[:, :3]
    grey = colours @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(grey) < 0).all()
