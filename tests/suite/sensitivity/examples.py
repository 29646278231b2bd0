"""Profiles that several tests need: measured on a tiny model, or made up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from suite.models import load
from suite.models.anatomy import Anatomy
from suite.recipe import Recipe
from suite.sensitivity.measure import Profiler, method_for, metric_of
from suite.sensitivity.profile import Baseline, Part, Point, Profile, ProfileSpec, parts_of
from suite.specs import CalibrationSpec
from tests.suite.examples import PROTOCOL

CALIBRATION = CalibrationSpec(source="pydoc", count=2, length=16)


def spec_of(recipe: str = "svd", by: Any = "block", **changes: Any) -> ProfileSpec:
    fields: dict[str, Any] = {
        "model": "tiny",
        "model_digest": "0",
        "method": recipe,
        "method_versions": Recipe.parse(recipe).versions,
        "by": by,
        "measures": "perplexity",
        "metric": metric_of(method_for(recipe, by)),
        "protocol": PROTOCOL,
        "calibration": CALIBRATION,
        "held_back": 3,
    }
    return ProfileSpec(**{**fields, **changes})


def profiler(folder: Path, results: Path, recipe: str = "svd", by: Any = "block", **changes: Any) -> Profiler:
    """Ready to measure the model in `folder`."""
    source = load.resolve(str(folder))
    spec = spec_of(recipe, by, model=source.name, model_digest=source.digest, **changes)
    anatomy = load.load_anatomy(source)
    return Profiler(spec, source, method_for(recipe, by), anatomy, spec.path(results))


def made_up(parts: Sequence[Part], increases: Mapping[float, Mapping[str, float]], **changes: Any) -> Profile:
    """A profile with these increases, by strength and part."""
    points = [
        Point(part=part.name, strength=strength, kept=strength, increase=by_part[part.name])
        for strength, by_part in increases.items()
        for part in parts
    ]
    dense = Baseline(window_nlls=(30.0, 33.0), tokens=30, calibration_digest="", text_digest="")
    return Profile(spec=spec_of(**changes), dense=dense, points=tuple(points))


def rising_with_depth(
    anatomy: Anatomy, by: Any = "block", slope: float = -0.01
) -> tuple[list[Part], Profile]:
    """Blocks that suffer less (or, for a positive slope, more) the deeper they lie."""
    parts = parts_of(anatomy, by)
    increases = {
        strength: {part.name: (1 - strength) ** 2 * (0.1 + slope * (part.block or 0)) for part in parts}
        for strength in (0.75, 0.5, 0.25)
    }
    return parts, made_up(parts, increases, by=by)
