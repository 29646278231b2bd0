"""What a profile says: tables for the terminal, the trend over depth, and JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from rich.table import Table
from scipy.stats import spearmanr

from suite.sensitivity.profile import Part, Point, Profile
from suite.specs import Frozen
from suite.stats import holm

SIGNIFICANT = 0.05
_FEWEST = 4


class Trend(Frozen):
    """Spearman's correlation of a block's depth with the increase of log-perplexity it causes."""

    strength: float
    role: str | None
    """None: whole blocks, or the sum over the linears of a block."""
    blocks: int
    correlation: float
    p_value: float
    """Two-sided, against no monotone relation; adjusted for all trends of the profile (Holm, 1979)."""

    def sentence(self) -> str:
        """The answer to "are deeper blocks more compressible here?"."""
        how = f"keeping {self.strength:g}" if self.strength else "removed"
        what = f"{self.role}, {how}" if self.role else how
        if self.p_value >= SIGNIFICANT:
            answer = "no clear relation of depth and sensitivity"
        elif self.correlation < 0:
            answer = "deeper blocks are more compressible"
        else:
            answer = "deeper blocks are less compressible"
        figures = f"Spearman ρ = {self.correlation:+.2f}, p = {self.p_value:.2g}, {self.blocks} blocks"
        return f"{what}: {answer} ({figures})"


def over_depth(
    profile: Profile, parts: Sequence[Part], strength: float, role: str | None = None
) -> dict[int, float]:
    """Increase by block: of one role, or summed over all parts of the block that were measured."""
    sums: dict[int, float] = {}
    incomplete: set[int] = set()
    for part in parts:
        if part.block is None or (role is not None and part.role != role):
            continue
        point = profile.find(part.name, strength)
        if point is None or point.increase is None:
            incomplete.add(part.block)
        else:
            sums[part.block] = sums.get(part.block, 0.0) + point.increase
    return {block: sums[block] for block in sorted(sums) if block not in incomplete}


def trends(profile: Profile, parts: Sequence[Part], strengths: Sequence[float]) -> list[Trend]:
    """One trend per strength, and per role where linears were profiled one by one.

    Their p-values hold together: they are adjusted by Holm's procedure.
    """
    roles = [None, *_roles(parts)] if profile.spec.by == "linear" else [None]
    found = []
    for strength in strengths:
        for role in roles:
            values = over_depth(profile, parts, strength, role)
            if len(values) < _FEWEST:
                continue
            result = spearmanr(list(values), list(values.values()))
            if math.isfinite(result.statistic):
                found.append(
                    Trend(
                        strength=strength,
                        role=role,
                        blocks=len(values),
                        correlation=float(result.statistic),
                        p_value=float(result.pvalue),
                    )
                )
    adjusted = holm([trend.p_value for trend in found]).tolist()
    return [trend.model_copy(update={"p_value": value}) for trend, value in zip(found, adjusted, strict=True)]


def tables(profile: Profile, parts: Sequence[Part], strengths: Sequence[float]) -> list[Table]:
    """Parts × strengths; for single linears blocks × roles, one table per strength."""
    if profile.spec.by != "linear":
        table = Table(title=heading(profile))
        table.add_column("part")
        for strength in strengths:
            table.add_column(f"keeps {strength:g}" if strength else "removed", justify="right")
        for part in parts:
            table.add_row(part.name, *(_cell(profile.find(part.name, strength)) for strength in strengths))
        return [table]
    found = []
    names = {(part.block, part.role): part.name for part in parts}
    for strength in strengths:
        table = Table(title=f"{heading(profile)}, keeps {strength:g}")
        table.add_column("block", justify="right")
        for role in _roles(parts):
            table.add_column(role, justify="right")
        for block in dict.fromkeys(part.block for part in parts):
            cells = (profile.find(names.get((block, role), ""), strength) for role in _roles(parts))
            table.add_row(str(block), *(_cell(point, brief=True) for point in cells))
        found.append(table)
    return found


def heading(profile: Profile) -> str:
    """Model, method and what is compressed alone."""
    spec = profile.spec
    return f"{spec.model}, {spec.method}, one {spec.by} at a time"


def conditions_line(profile: Profile) -> str:
    """Units and conditions, for a caption."""
    spec, dense = profile.spec, profile.dense
    lines = []
    if dense.window_nlls:
        level = math.exp(sum(dense.window_nlls) / dense.tokens)
        lines.append(
            f"increase of log-perplexity in nats per token ± standard error over {len(dense.window_nlls)} ×"
            f" {spec.calibration.length} tokens of {spec.calibration.source} held back from calibration"
            f" ({spec.calibration}); dense perplexity {level:.2f}"
        )
    if dense.accuracy:
        items = "all items" if spec.limit is None else f"{spec.limit} items a task"
        level = sum(dense.accuracy.values()) / len(dense.accuracy)
        lines.append(
            f"change of mean accuracy over {len(dense.accuracy)} tasks of {spec.protocol.name}"
            f" ({items}); dense {level:.1%}"
        )
    return "; ".join(lines)


def as_json(profile: Profile, parts: Sequence[Part], found: Sequence[Trend], extra: dict[str, Any]) -> str:
    """The points asked for, the trends, and where files were written."""
    shown = json.loads(profile.model_dump_json(exclude={"points"}))
    by_name = {part.name: part for part in parts}
    shown["points"] = [
        {"block": part.block, "role": part.role} | json.loads(point.model_dump_json())
        for point in profile.points
        if (part := by_name.get(point.part))
    ]
    shown["depth"] = [trend.model_dump() for trend in found]
    return json.dumps(shown | extra, indent=1, ensure_ascii=False)


def _roles(parts: Sequence[Part]) -> list[str]:
    return list(dict.fromkeys(part.role for part in parts if part.role))


def _cell(point: Point | None, brief: bool = False) -> str:
    if point is None:
        return "–"
    shown = []
    if point.increase is not None:
        error = "" if brief or point.standard_error is None else f" ± {point.standard_error:.4f}"
        shown.append(f"{point.increase:+.4f}{error}")
    if point.accuracy_change is not None:
        shown.append(f"{100 * point.accuracy_change:+.1f} pts")
    return ", ".join(shown)
