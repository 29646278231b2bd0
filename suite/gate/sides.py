"""What the two sides are: a record or a model, and whether a record may stand for its model here."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from suite.errors import InputError, nearest
from suite.records import Record, RecordStore
from suite.specs import Protocol

if TYPE_CHECKING:
    from suite.models import load

VERSIONS = ("weighin", "torch", "transformers", "tokenizers", "lm_eval", "datasets")


@dataclass(frozen=True)
class Side:
    """The baseline or the candidate as it was found: a record, or a model."""

    role: str
    given: str
    record: Record | None = None
    file: Path | None = None
    """The record's file; its outcomes lie beside it."""
    source: load.Source | None = None

    @property
    def name(self) -> str:
        """How reports call it."""
        if self.record is None:
            return self.given
        spec = self.record.spec
        budget = "" if spec.budget.metric == "none" else f" {spec.budget}"
        return f"{spec.model} {spec.recipe}{budget} (record {self.record.id})"

    @property
    def outcomes_file(self) -> Path:
        """Where the record's item outcomes are."""
        if self.file is None:
            raise InputError(f"{self.role} '{self.given}' is not a record.")
        return self.file.with_suffix(".items.parquet")


def find(role: str, given: str, results: Path, protocol: str | None, limit: int | None) -> Side:
    """What a user named: a record's file, its id, a folder with one fitting record, or a model.

    Raises:
        InputError: nothing of that name, no fitting record, or more than one.
    """
    path = Path(given).expanduser()
    if path.is_file() and path.suffix == ".json":
        return _recorded(role, given, [path], None, None)
    if path.is_dir() and not (path / "config.json").is_file():
        pattern = "records/*/*.json" if (path / "records").is_dir() else "*.json"
        files = sorted(path.glob(pattern))
        if not files:
            raise InputError(f"{role} folder '{given}' holds neither a checkpoint (config.json) nor records.")
        return _recorded(role, given, files, protocol, limit)
    if re.fullmatch(r"[0-9a-f]{6,16}", given):
        files = sorted((results / "records").glob(f"*/{given}*.json"))
        if not files:
            known = [file.stem for file in (results / "records").glob("*/*.json")]
            raise InputError(f"no record in '{results}' is called '{given}'.{nearest(given, known)}")
        return _recorded(role, given, files, None, None)
    if path.suffix == ".json":
        raise InputError(f"{role} record '{given}' does not exist.")
    from suite.models import load  # two records need no torch

    return Side(role, given, source=load.resolve(given))


def _recorded(role: str, given: str, files: list[Path], protocol: str | None, limit: int | None) -> Side:
    found = [(file, RecordStore(file.parent).read(file)) for file in files]
    if len(found) == 1 and found[0][1].status != "ok":
        reason = found[0][1].failure.reason if found[0][1].failure else found[0][1].status
        raise InputError(f"{role} record '{given}' has no outcomes: {reason}.")
    wanted = protocol and Protocol.load(protocol).name
    fitting = [
        (file, record)
        for file, record in found
        if record.status == "ok"
        and (wanted is None or record.spec.protocol.name == wanted)
        and (limit is None or record.spec.limit is None or record.spec.limit >= limit)
    ]
    if len(fitting) != 1:
        asked = f" of protocol '{wanted}'" if wanted else ""
        listing = [
            f"{record.id} ({record.spec.recipe} {record.spec.budget}, {record.spec.protocol.name})"
            for _, record in (fitting or found)[:8]
        ]
        more = ", …" if len(fitting or found) > 8 else ""
        raise InputError(
            f"{role} '{given}' holds {len(fitting)} finished records{asked}; exactly one is needed."
            f" Name one by its file or id: {', '.join(listing)}{more}."
        )
    file, record = fitting[0]
    return Side(role, given, record=record, file=file)


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two sets of conditions, as "torch 2.12 → 2.13"; facts that either lacks differ."""
    found = []
    for name in ("device", "dtype", "threads", "git"):
        # Two states with uncommitted changes are never known to be the same.
        unknown = name == "git" and str(now.get(name)).endswith("+changes")
        if name in now and (unknown or before.get(name) != now.get(name)):
            label = "suite" if name == "git" else name
            found.append(f"{label} {before.get(name)} → {now.get(name)}")
    earlier, later = before.get("versions") or {}, now.get("versions") or {}
    found += [
        f"{name} {earlier.get(name)} → {later.get(name)}"
        for name in VERSIONS
        if earlier.get(name) != later.get(name)
    ]
    return found
