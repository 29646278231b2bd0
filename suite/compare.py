"""Comparison of two or more records on the items and windows they share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from suite import stats
from suite.errors import InputError, nearest
from suite.paired import Paired, pair_items
from suite.records import Measurements, Perplexity, Record, RecordStore, read_items
from suite.specs import TaskSpec


@dataclass(frozen=True)
class Chosen:
    """A finished record with its items, and the name a comparison prints for it."""

    name: str
    record: Record
    measurements: Measurements
    items: pd.DataFrame


def choose(
    store: RecordStore,
    name: str,
    model: str | None = None,
    protocol: str | None = None,
    device: str | None = None,
) -> Chosen:
    """Find the record that a name means.

    Args:
        store: where to look.
        name: a record's file, its id or the beginning of it, `RECIPE@BUDGET`, or `RECIPE` alone.
        model: only records of this model.
        protocol: only records under the protocol of this name.
        device: only records measured on this device, as `cpu` or `cuda`.

    Raises:
        InputError: nothing or more than one record fits, or the record has nothing to compare.
    """
    path = Path(name)
    if path.suffix == ".json":
        if not path.is_file():
            raise InputError(f"record file '{name}' does not exist.")
        record = store.read(path)
    else:
        record = _search(store, name, model, protocol, device)
        path = store.path(record.spec)
    label = _label(record)
    if record.failure or not record.measurements:
        reason = f" ({record.failure.stage}: {record.failure.reason})" if record.failure else ""
        raise InputError(f"'{label}' ({record.id}) has no measurements to compare: {record.status}{reason}")
    if not record.spec.protocol.tasks:
        raise InputError(
            f"'{label}' ({record.id}) has no items to pair: protocol '{record.spec.protocol.name}' is"
            " perplexity alone. Compare rows of a protocol with tasks; perplexities are on the board."
        )
    frame = read_items(path)
    if frame is None:
        raise InputError(f"'{label}' ({record.id}) has no item outcomes beside '{path}'.")
    return Chosen(label, record, record.measurements, frame)


def _search(
    store: RecordStore, name: str, model: str | None, protocol: str | None, device: str | None
) -> Record:
    records = store.all()
    for what, wanted, known in (
        ("model", model, {r.spec.model for r in records}),
        ("protocol", protocol, {r.spec.protocol.name for r in records}),
        ("device", device, {r.spec.device for r in records}),
    ):
        if wanted is not None and wanted not in known:
            raise InputError(
                f"no record has {what} '{wanted}'.{nearest(wanted, known)}  ({', '.join(sorted(known))})"
            )
    by_id = [r for r in records if len(name) >= 4 and r.id.startswith(name)]
    # A file name would be longer than any recipe: what is left is RECIPE or RECIPE@BUDGET.
    recipe, _, budget = name.replace(" ", "").partition("@")
    found = by_id or [
        record
        for record in records
        if record.spec.recipe.replace(" ", "") == recipe
        and (not budget or str(record.spec.budget) == budget)
        and model in (None, record.spec.model)
        and protocol in (None, record.spec.protocol.name)
        and device in (None, record.spec.device)
    ]
    found = [record for record in found if record.status == "ok"] or found
    if not found:
        known = {_label(record) for record in records} | {record.spec.recipe for record in records}
        raise InputError(
            f"no record in '{store.folder}' is called '{name}'.{nearest(name, known)}  Name a record's file,"
            " its id, RECIPE@BUDGET or RECIPE; weighin board --format json lists ids."
        )
    if len(found) > 1:
        listing = "\n".join(
            f"  {r.id}  {_label(r)} · {r.spec.model} · {r.spec.protocol.name} · {r.spec.device}"
            + (f" · limit {r.spec.limit}" if r.spec.limit else "")
            for r in found
        )
        raise InputError(
            f"'{name}' means {len(found)} records; give an id, RECIPE@BUDGET, --model,"
            f" --protocol or --device:\n{listing}"
        )
    return found[0]


def _label(record: Record) -> str:
    spec = record.spec
    label = spec.recipe if spec.budget.metric == "none" else f"{spec.recipe}@{spec.budget}"
    return label + (f" (seed {spec.seed})" if spec.seed else "")


def compare(chosen: Sequence[Chosen], confidence: float = 0.95) -> dict[str, Any]:
    """Compare every record with the first one, on the items and windows they share.

    The intervals of each figure (accuracy, log-probability, perplexity ratio) hold for all comparisons
    together; p values are adjusted over all tasks of all comparisons.

    Raises:
        InputError: fewer than two records, or records that were not measured alike.
    """
    if len({c.record.id for c in chosen}) < max(len(chosen), 2):
        raise InputError("a comparison needs at least two different records.")
    names = [c.name for c in chosen]
    if len(set(names)) < len(names):
        names = [f"{c.name} [{c.record.id[:8]}]" for c in chosen]
    notes = _check_alike(chosen, names)
    paired = pair_items(dict(zip(names, (c.items for c in chosen), strict=True)))
    if min(paired.sizes) < 2:
        raise InputError("a task with fewer than two items gives no interval: use a larger --limit.")
    pairs = [(0, row) for row in range(1, len(chosen))]
    accuracy = stats.macro_differences(paired.correct, paired.tasks, pairs, confidence=confidence)
    likelihood = _likelihood(paired, pairs, confidence, notes)
    ratio = _perplexity_ratio([c.measurements.perplexity for c in chosen], pairs, confidence, notes)
    per_task = [_per_task(paired, pair) for pair in pairs]
    adjusted = stats.holm([task["p"] for tasks in per_task for task in tasks]).reshape(len(pairs), -1)
    flipped = [stats.flips(paired.correct[0], paired.correct[row]) for _, row in pairs]
    overall = [stats.mcnemar(lost, won) for lost, won in flipped]
    overall_adjusted = stats.holm(overall)
    comparisons = []
    for index, (pair, tasks) in enumerate(zip(pairs, per_task, strict=True)):
        line = {
            "name": names[pair[1]],
            "record": chosen[pair[1]].record.id,
            "accuracy_difference": _at(accuracy, index),
            "log_probability_difference": _at(likelihood, index),
            "perplexity_ratio": _at(ratio, index, np.exp),
            "lost": flipped[index][0],
            "won": flipped[index][1],
            "p": overall[index],
            "p_adjusted": float(overall_adjusted[index]),
            "tasks": [
                task | {"p_adjusted": float(p)} for task, p in zip(tasks, adjusted[index], strict=True)
            ],
        }
        comparisons.append(line | {"verdict": verdict(names[0], line)})
    first = chosen[0]
    return {
        "reference": {"name": names[0], "record": first.record.id},
        "model": first.record.spec.model,
        "protocol": first.record.spec.protocol.name,
        "limit": first.record.spec.limit,
        "items": len(paired.tasks),
        "confidence": confidence,
        "comparisons": comparisons,
        "noise": [noise.model_dump() for c in chosen for noise in c.record.noise or ()] or None,
        "notes": notes,
    }


def _check_alike(chosen: Sequence[Chosen], names: Sequence[str]) -> list[str]:
    """Refuse rows whose tasks were scored differently; returns notes on what differs and does no harm."""
    notes = []
    first = chosen[0]
    for other, name in zip(chosen[1:], names[1:], strict=True):
        ours, theirs = _scoring(first), _scoring(other)
        if set(ours) != set(theirs):
            only = ", ".join(sorted(set(ours) ^ set(theirs)))
            raise InputError(
                f"'{names[0]}' (protocol {first.record.spec.protocol.name}) and '{name}' (protocol"
                f" {other.record.spec.protocol.name}) have different tasks: {only} in only one of them."
            )
        for task, fields in ours.items():
            for what, value in fields.items():
                if theirs[task][what] != value:
                    raise InputError(
                        f"'{names[0]}' and '{name}' cannot be compared: task '{task}' has {what} {value} in"
                        f" one and {theirs[task][what]} in the other."
                    )
        a, b = first.record.spec, other.record.spec
        if a.model_digest != b.model_digest:
            notes.append(f"{name}: another model ({b.model}, not {a.model}), compared on the same items")
        differing = [key for key in type(a.protocol).model_fields if key != "tasks"]
        differing = [k for k in differing if getattr(a.protocol, k) != getattr(b.protocol, k)]
        if a.protocol_digest != b.protocol_digest:
            notes.append(f"{name}: another protocol; differs in {', '.join(differing) or 'task limits'}")
        if a.calibration != b.calibration:
            notes.append(f"{name}: another calibration ({b.calibration}, not {a.calibration})")
        if a.healing and b.healing and a.healing != b.healing:
            notes.append(f"{name}: trained on other tokens ({b.healing}, not {a.healing})")
        if a.device != b.device:
            notes.append(f"{name}: another device ({b.device}, not {a.device})")
    return notes


def _scoring(chosen: Chosen) -> dict[str, dict[str, Any]]:
    """What must be equal for outcomes of a task to be compared."""
    specs: dict[str, TaskSpec] = {task.name: task for task in chosen.record.spec.protocol.tasks}
    return {
        result.task: {
            "metric": result.metric,
            "filter": specs[result.task].filter,
            "version": result.version,
            "few-shot examples": result.fewshot,
        }
        for result in chosen.measurements.tasks
    }


def _likelihood(
    paired: Paired, pairs: stats.Pairs, confidence: float, notes: list[str]
) -> stats.Intervals | None:
    """Differences of the macro mean log-probability of the right answer, over the tasks that have it."""
    kept = paired.likely
    tasks, counts = np.unique(paired.tasks[kept], return_counts=True)
    kept = kept & np.isin(paired.tasks, tasks[counts > 1])
    if left_out := int((~kept).sum()):
        notes.append(f"log-probability: {left_out:,} items left out (no finite value for the right answer)")
    if not kept.any():
        return None
    values = paired.log_probabilities[:, kept]
    return stats.macro_differences(values, paired.tasks[kept], pairs, confidence=confidence, pseudo_pairs=0)


def _perplexity_ratio(
    measured: Sequence[Perplexity], pairs: stats.Pairs, confidence: float, notes: list[str]
) -> stats.Intervals | None:
    """Differences of the mean negative log-likelihood per token, the logarithms of perplexity ratios."""
    reason = _unpaired(measured)
    if reason:
        notes.append(f"perplexity is not compared: {reason}")
        return None
    windows = len(measured[0].window_nlls)
    nlls = np.array([m.window_nlls for m in measured]) * windows / measured[0].tokens
    return stats.macro_differences(nlls, np.zeros(windows), pairs, confidence=confidence, pseudo_pairs=0)


def _unpaired(measured: Sequence[Perplexity]) -> str | None:
    if len({(m.tokens_digest, m.window, m.stride, m.bos, len(m.window_nlls)) for m in measured}) > 1:
        return "the records measured it on different tokens or windows"
    if len(measured[0].window_nlls) < 2:
        return "the records hold fewer than two windows"
    if not np.isfinite([m.window_nlls for m in measured]).all():
        return "a window has no finite likelihood"
    return None


def _per_task(paired: Paired, pair: tuple[int, int]) -> list[dict[str, Any]]:
    lines = []
    for task in np.unique(paired.tasks):
        first, second = paired.correct[:, paired.tasks == task][list(pair)]
        lost, won = stats.flips(first, second)
        lines.append(
            {
                "task": str(task),
                "items": len(first),
                "reference": float(first.mean()),
                "difference": float((second - first).mean()),
                "lost": lost,
                "won": won,
                "p": stats.mcnemar(lost, won),
            }
        )
    return lines


def _at(intervals: stats.Intervals | None, index: int, scale: Any = float) -> dict[str, float] | None:
    if intervals is None:
        return None
    figures = {"estimate": intervals.estimate, "low": intervals.low, "high": intervals.high}
    with np.errstate(over="ignore"):
        return {key: float(scale(values[index])) for key, values in figures.items()}


def verdict(reference: str, line: Mapping[str, Any]) -> str:
    """What a comparison says, in one sentence."""
    accuracy = {key: 100 * value for key, value in line["accuracy_difference"].items()}
    low, high = accuracy["low"], accuracy["high"]
    if low > 0:
        text = f"better than {reference} by {accuracy['estimate']:.1f} points [{low:.1f}, {high:.1f}]"
    elif high < 0:
        text = f"worse than {reference} by {-accuracy['estimate']:.1f} points [{-high:.1f}, {-low:.1f}]"
    else:
        half = (high - low) / 2
        middle = _signed(accuracy["estimate"], 1)
        text = f"not told apart from {reference} in accuracy ({middle} ± {half:.1f} points)"
    likelihood, ratio = line["log_probability_difference"], line["perplexity_ratio"]
    if low <= 0 <= high and likelihood and not likelihood["low"] <= 0 <= likelihood["high"]:
        word = "more" if likelihood["estimate"] > 0 else "less"
        text += f"; its right answers are {word} likely ({_signed(likelihood['estimate'], 3)} nats an item)"
    if low <= 0 <= high and ratio and not ratio["low"] <= 1 <= ratio["high"]:
        word = "higher" if ratio["estimate"] > 1 else "lower"
        text += f"; its perplexity is {word} ({ratio['estimate']:.4g}×)"
    return f"{line['name']} is {text}"


def _signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")
