"""What the checks found, case by case and summed up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from suite.conformance.checks import Check

Status = Literal["passed", "failed", "exempt"]


@dataclass(frozen=True)
class Outcome:
    """What one check found in one case."""

    check: str
    family: str
    status: Status
    detail: str = ""


@dataclass(frozen=True)
class Finding:
    """What one check found over all tiny models."""

    check: Check
    status: Status
    details: tuple[str, ...]
    """Offences of a failed check, else what it reports."""


def summed(check: Check, outcomes: Sequence[Outcome]) -> Finding:
    """One finding from the outcomes of all cases; equal offences of several families are told once."""
    own = [outcome for outcome in outcomes if outcome.check == check.name]
    failed = [outcome for outcome in own if outcome.status == "failed"]
    passed = [outcome for outcome in own if outcome.status == "passed"]
    if failed:
        families: dict[str, list[str]] = {}
        for outcome in failed:
            families.setdefault(outcome.detail, []).append(outcome.family)
        texts = [f"{detail} ({', '.join(dict.fromkeys(f))})" for detail, f in families.items()]
        return Finding(check, "failed", tuple(texts))
    if passed:
        first = passed[0].family
        details = dict.fromkeys(o.detail for o in passed if o.family == first and o.detail)
        return Finding(check, "passed", tuple(details))
    why = dict.fromkeys(outcome.detail for outcome in own if outcome.detail)
    return Finding(check, "exempt", tuple(why) or ("nothing to look at",))
