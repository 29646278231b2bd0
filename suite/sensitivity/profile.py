"""A sensitivity profile: its parts, its measured points, and the file that keeps them.

Layer sensitivity profiling as in CompactifAI (arXiv 2401.14109): one part of a model is compressed
alone at several strengths. Here the strength is the share of the part's own size that stays.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, ValidationError

from suite.errors import InputError
from suite.measure.ledger import Entry
from suite.method import Metric
from suite.models.anatomy import Anatomy
from suite.records import atomically
from suite.specs import CalibrationSpec, Frozen, Protocol, digest_of, explain

Granularity = Literal["block", "role", "linear"]
Measures = Literal["perplexity", "accuracy", "both"]


class Part(Frozen):
    """Linears that are compressed together while the rest of the model stays dense."""

    name: str
    block: int | None
    """None for a role, which lies in all blocks."""
    role: str | None
    """None for a whole block."""
    paths: tuple[str, ...]

    def size(self, entries: Iterable[Entry], metric: Metric) -> int:
        """Parameters or bytes of the part's linears, biases included."""
        own = [entry for entry in entries if entry.path in self.paths]
        return sum(entry.params if metric == "params" else entry.disk for entry in own)


def parts_of(anatomy: Anatomy, by: Granularity, blocks: Sequence[int] | None = None) -> list[Part]:
    """The parts of a model: its blocks, its roles, or the linears of one role in one block.

    Raises:
        InputError: a block is named that the model does not have.
    """
    chosen = range(anatomy.n_blocks) if blocks is None else sorted(set(blocks))
    missing = [block for block in chosen if not 0 <= block < anatomy.n_blocks]
    if missing:
        raise InputError(
            f"there is no block {missing[0]}: this model has blocks 0 to {anatomy.n_blocks - 1}."
        )
    where = "" if blocks is None else f" in blocks {','.join(map(str, chosen))}"
    groups: dict[tuple[int | None, str | None], list[str]] = {}
    for line in anatomy.linears:
        if line.block in chosen:
            key = (None if by == "role" else line.block, None if by == "block" else line.role)
            groups.setdefault(key, []).append(line.path)
    parts = []
    for (block, role), paths in groups.items():
        name = f"{role}{where}" if block is None else f"block {block}" + (f" {role}" if role else "")
        parts.append(Part(name=name, block=block, role=role, paths=tuple(paths)))
    return parts


class ProfileSpec(Frozen):
    """What a profile measures. Parts and strengths are left out: one file gathers them all."""

    schema_version: ClassVar[int] = 1

    model: str
    model_digest: str
    method: str
    method_versions: tuple[str, ...]
    by: Granularity
    measures: Measures
    metric: Metric
    protocol: Protocol
    calibration: CalibrationSpec
    held_back: int
    """Sequences of the calibration's text that no method sees, for perplexity."""
    seed: int = 0
    device: str = "cpu"
    limit: int | None = None

    def digest(self) -> str:
        """Sixteen hexadecimal digits naming the profile."""
        return digest_of([self.schema_version, self.model_dump(mode="json")])[:16]

    def path(self, results: Path) -> Path:
        """Where the profile is kept."""
        names = "-".join((Path(self.model).name, self.method, self.by))
        return results / "profiles" / f"{re.sub(r'[^A-Za-z0-9.-]+', '_', names)}-{self.digest()[:8]}.json"


class Baseline(Frozen):
    """The dense model under the same conditions."""

    window_nlls: tuple[float, ...] = ()
    """Summed negative log-likelihood of each held-back sequence, in nats."""
    tokens: int = 0
    """Scored tokens of all sequences."""
    accuracy: dict[str, float] = Field(default_factory=dict)
    calibration_digest: str
    text_digest: str
    conditions: dict[str, Any] = Field(default_factory=dict)


class Point(Frozen):
    """One part compressed alone to one strength."""

    part: str
    strength: float
    """Share of the part's size asked for."""
    kept: float
    """Share of the part's size that stayed."""
    increase: float | None = None
    """Increase of log-perplexity, in nats per token."""
    standard_error: float | None = None
    """Of the increase, paired over the held-back sequences."""
    accuracy: dict[str, float] = Field(default_factory=dict)
    accuracy_change: float | None = None
    """Change of the mean accuracy over the tasks."""


class Profile(Frozen):
    """Everything measured so far under one specification."""

    spec: ProfileSpec
    dense: Baseline
    points: tuple[Point, ...] = ()

    def find(self, part: str, strength: float) -> Point | None:
        """The point of a part at a strength, if it was measured."""
        return next((p for p in self.points if p.part == part and p.strength == strength), None)

    def of(self, part: str) -> list[Point]:
        """All points of a part, strongest compression first."""
        return sorted((p for p in self.points if p.part == part), key=lambda point: point.strength)

    def only(self, parts: Iterable[Part], strengths: Iterable[float]) -> Profile:
        """The same profile, of these parts and strengths alone."""
        names, shares = {part.name for part in parts}, set(strengths)
        points = tuple(p for p in self.points if p.part in names and p.strength in shares)
        return self.model_copy(update={"points": points})

    def digest(self) -> str:
        """SHA-256 of the contents."""
        return digest_of(json.loads(self.model_dump_json()))


def load_profile(path: Path) -> Profile | None:
    """The profile kept in a file; None when there is no such file.

    Raises:
        InputError: the file is not a profile.
    """
    try:
        return Profile.model_validate_json(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"profile '{path}' cannot be read: {error}.") from None
    except ValidationError as error:
        raise InputError(f"profile '{path}': {explain(error, Profile)} Move it away to start anew.") from None


def save_profile(profile: Profile, path: Path) -> Profile:
    """Write a profile, joined with the points another process has put into the file meanwhile.

    Raises:
        InputError: the folder cannot be written.
    """
    there = load_profile(path)
    if there is not None:
        known = {(point.part, point.strength) for point in profile.points}
        others = tuple(p for p in there.points if (p.part, p.strength) not in known)
        profile = profile.model_copy(update={"points": (*others, *profile.points)})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomically(path, lambda to: to.write_text(profile.model_dump_json(indent=1) + "\n"))
    except OSError as error:
        raise InputError(f"'{path}' cannot be written: {error}. What it held is untouched.") from None
    return profile
