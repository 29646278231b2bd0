"""A profile as pictures: a heat map, and curves over depth. Needs matplotlib."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from suite.errors import InputError
from suite.sensitivity.profile import Part, Profile
from suite.sensitivity.report import over_depth

# Luminance of this map rises evenly: printed in grey, darker still means more sensitive.
_COLOURS = "cividis_r"
_DECADES = 1e-3
_TITLE_WIDTH = 85
_LINES = ("-", "--", "-.", ":")
_MARKS = "osD^v"
_INCREASE = "increase of log-perplexity (nats per token)"


def draw(profile: Profile, parts: Sequence[Part], strengths: Sequence[float], path: Path) -> list[Path]:
    """Write the heat map beside the profile at `path`, and the curves over depth where there are some.

    Raises:
        InputError: the pictures cannot be written.
    """
    from matplotlib.figure import Figure

    written = []
    pictures: dict[str, Figure | None] = {
        ".png": _heat_map(profile, parts, strengths),
        ".depth.png": _curves(profile, parts, strengths),
    }
    for suffix, figure in pictures.items():
        if figure is not None:
            file = path.with_suffix(suffix)
            try:
                figure.savefig(file, dpi=150)
            except OSError as error:
                raise InputError(f"'{file}' cannot be written: {error}.") from None
            written.append(file)
    return written


def _heat_map(profile: Profile, parts: Sequence[Part], strengths: Sequence[float]) -> Any:
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    panels = _panels(profile, parts, strengths)
    values = np.concatenate([panel.ravel() for panel, _, _ in panels])
    positive = values[np.isfinite(values) & (values > 0)]
    if not len(positive):
        return None
    high = float(positive.max())
    low = max(float(positive.min()), high * _DECADES)
    norm = LogNorm(low, high if high > low else low * 10)
    columns = panels[0][0].shape[1]
    rows = sum(len(panel) for panel, _, _ in panels)
    size = (max(6.4, 2.6 + 0.27 * columns), 1.4 + 0.4 * len(panels) + 0.3 * rows)
    figure = Figure(figsize=size, layout="constrained")
    heights = [len(panel) for panel, _, _ in panels]
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (panel, labels, title) in zip(axes, panels, strict=True):
        # At or below the scale's foot, gains by noise among them, is its lightest colour.
        image = axis.imshow(np.clip(panel, low, None), norm=norm, cmap=_COLOURS, aspect="auto")
        axis.set_yticks(range(len(labels)), labels)
        axis.set_title(title, fontsize=9, loc="left")
        axis.spines[:].set_visible(False)
    if profile.spec.by == "role":
        axes[-1].set_xticks(range(len(parts)), [part.name for part in parts], rotation=30, ha="right")
    else:
        blocks = list(dict.fromkeys(part.block for part in parts))
        step = 1 if columns <= 12 else 5 if columns > 20 else 2
        chosen = list(range(0, columns, step))
        axes[-1].set_xticks(chosen, [str(blocks[index]) for index in chosen])
        axes[-1].set_xlabel("block (0 is nearest the input)")
    for axis in axes:
        axis.set_ylabel("role" if profile.spec.by == "linear" else "kept share")
    cut = bool((values[np.isfinite(values)] < low).any())
    bar = figure.colorbar(image, ax=list(axes), extend="min" if cut else "neither", pad=0.02)
    bar.ax.yaxis.set_major_formatter(_plain)
    bar.ax.yaxis.set_minor_formatter("")
    bar.set_label("nats per token")
    title = f"{_title(profile, strengths)}\ncolour: {_INCREASE}, log scale"
    figure.suptitle(title, fontsize=9, x=0.01, ha="left")
    return figure


def _panels(
    profile: Profile, parts: Sequence[Part], strengths: Sequence[float]
) -> list[tuple[Any, list[str], str]]:
    """Values (rows × columns), row labels and title of each panel; NaN where nothing was measured."""

    def value(part: str, strength: float) -> float:
        point = profile.find(part, strength)
        return np.nan if point is None or point.increase is None else point.increase

    if profile.spec.by != "linear":
        rows = np.array([[value(part.name, strength) for part in parts] for strength in strengths])
        return [(rows, [f"{strength:g}" for strength in strengths], "")]
    blocks = list(dict.fromkeys(part.block for part in parts))
    roles = list(dict.fromkeys(str(part.role) for part in parts))
    names = {(part.block, part.role): part.name for part in parts}
    panels = []
    for strength in strengths:
        cells = [[value(names.get((block, role), ""), strength) for block in blocks] for role in roles]
        panels.append((np.array(cells), roles, f"keeps {strength:g} of one matrix"))
    return panels


def _curves(profile: Profile, parts: Sequence[Part], strengths: Sequence[float]) -> Any:
    from matplotlib.figure import Figure

    curves = {strength: over_depth(profile, parts, strength) for strength in strengths}
    curves = {strength: values for strength, values in curves.items() if len(values) > 1}
    if not curves:
        return None
    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.subplots()
    for index, (strength, values) in enumerate(curves.items()):
        style = _LINES[index % len(_LINES)] + _MARKS[index % len(_MARKS)]
        label = "removed" if strength == 0 else f"keeps {strength:g}"
        grey = f"{0.1 + 0.5 * index / len(curves):.2f}"
        axis.plot(list(values), list(values.values()), style, label=label, color=grey, markersize=4)
    lowest = min(min(values.values()) for values in curves.values())
    highest = max(max(values.values()) for values in curves.values())
    if lowest > 0 and highest > 30 * lowest:
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(_plain)
    else:
        axis.axhline(0, color="0.7", linewidth=0.8, zorder=0)
    axis.set_xlabel("block (0 is nearest the input)")
    summed = ",\nsum over the block's linears" if profile.spec.by == "linear" else ""
    axis.set_ylabel(_INCREASE + summed)
    axis.spines[["top", "right"]].set_visible(False)
    if len(curves) > 1:
        axis.legend(frameon=False)
    figure.suptitle(_title(profile, strengths), fontsize=9, x=0.01, ha="left")
    return figure


def _plain(value: float, _: float) -> str:
    """0.1 where a logarithmic axis would say 10 to the minus 1."""
    return f"{value:g}"


def _title(profile: Profile, strengths: Sequence[float]) -> str:
    spec, dense = profile.spec, profile.dense
    shares = ", ".join(f"{strength:g}" for strength in strengths)
    what = {"params": "parameters", "bytes": "bytes"}[spec.metric]
    done = f"reduced to {shares} of its {what}" if any(strengths) else "removed"
    # A recipe has no blanks to break at.
    what_was_done = f"{spec.model}, {spec.method.replace(',', ', ')}: one {spec.by} at a time {done}"
    return (
        f"{textwrap.fill(what_was_done, _TITLE_WIDTH)}\n"
        f"{len(dense.window_nlls)} × {spec.calibration.length} tokens of {spec.calibration.source},"
        f" held back from calibration ({spec.calibration}, seed {spec.seed})"
    )
