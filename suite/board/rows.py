"""Flat rows of the board, one for each record."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from suite.board.notes import Row
from suite.board.standings import Standing, Standings, conditions, contest, setting
from suite.records import Measurements, Record, TaskResult

_Z95 = 1.959963984540054


def rows(records: Sequence[Record], standings: Standings | None = None) -> list[Row]:
    """One flat row per record, in the order of the board: dense first, then by budget and quality.

    Quality is accuracy, or perplexity where the protocol has no tasks. The model with most rows is first.

    Without `standings`, which need the items, rows have no rank and no difference to dense.
    """
    dense = {
        (conditions(record), _device(record)): record.measurements
        for record in records
        if record.spec.recipe == "dense" and record.measurements and _together(record) == 1
    }
    standings = standings or {}
    result = [
        _row(
            record,
            dense.get((conditions(record), _device(record))),
            standings.get(record.id, Standing()),
        )
        for record in records
    ]
    count = Counter(row["model"] for row in result)
    return sorted(result, key=lambda row: (-count[row["model"]], *_order(row)))


def _row(record: Record, dense: Measurements | None, standing: Standing) -> Row:
    """`dense` was measured on the same kind of machine, so that speeds can be compared."""
    spec, m, budget = record.spec, record.measurements, record.spec.budget
    sizes = m.sizes if m else None
    accuracy, interval = _mean_accuracy(m)
    achieved = target = None
    if budget.metric != "none":
        base = record.dense.params if budget.metric == "params" else record.dense.bytes_disk
        target = budget.value
        count = (sizes.params if budget.metric == "params" else sizes.bytes_disk) if sizes else None
        if count is not None:
            achieved = count / base if budget.value <= 1 else float(count)
    simulated = m.simulated_share if m else None
    simulated_decode = m.simulated_decode_share if m else None
    partly_trained = m is not None and m.trainable_params < m.sizes.params
    # Older records of packed weights do not say whether they were rebuilt for each call.
    untold = partly_trained and simulated is None
    row: Row = {
        "model": spec.model,
        "method": "+".join(version.partition("@")[0] for version in spec.method_versions if "@" in version),
        "recipe": spec.recipe,
        "budget_metric": budget.metric,
        "budget_target": target,
        "budget_achieved": achieved,
        "params": sizes.params if sizes else None,
        "params_ratio": sizes.params / record.dense.params if sizes else None,
        "decoder_ratio": sizes.decoder_params / record.dense.decoder_params if sizes else None,
        "bytes_disk": sizes.bytes_disk if sizes else None,
        "bytes_resident": sizes.bytes_resident if sizes else None,
        "bytes_nominal": sizes.bytes_nominal if sizes else None,
        "peak_memory_bytes": m.memory.inference if m else None,
        "prefill_tokens_per_s": m.prefill.tokens_per_s if m else None,
        "decode_tokens_per_s": m.decode.tokens_per_s if m else None,
        "train_tokens_per_s": m.training.tokens_per_s if m else None,
        "perplexity": m.perplexity.perplexity if m else None,
        "accuracy": accuracy,
        "accuracy_ci": interval,
        "tasks": {t.task: t.model_dump(exclude={"task"}) for t in m.tasks} if m else None,
        "compress_seconds": record.compression.seconds if record.compression else None,
        "status": record.status,
        "reason": f"{record.failure.stage}: {record.failure.reason}" if record.failure else None,
        "record": record.id,
        "checkpoint": record.checkpoint,
        # Beyond the required keys:
        "budget": str(budget),
        "unused": 1 - achieved / target if achieved is not None and target else None,
        "bytes_ratio": sizes.bytes_disk / record.dense.bytes_disk if sizes else None,
        "prefill_ratio": None if untold or simulated else _ratio(m, dense, "prefill"),
        "decode_ratio": None
        if untold or (simulated if simulated_decode is None else simulated_decode)
        else _ratio(m, dense, "decode"),
        "train_ratio": None if simulated or partly_trained else _ratio(m, dense, "training"),
        "load_memory_bytes": m.memory.load if m else None,
        "compress_peak_bytes": record.compression.peak_bytes if record.compression else None,
        "knobs": record.knobs,
        "protocol": _protocol_label(record),
        "protocol_name": spec.protocol.name,
        "text": m.perplexity.tokens_digest[:8] if m else None,
        "seed": spec.seed,
        "device": _device(record),
        "note": record.model_note,
        "rank": standing.rank,
        "accuracy_difference": standing.difference,
        "accuracy_difference_ci": _around(standing.difference, standing.half_width),
        "standing_note": standing.note,
        "noise": [noise.model_dump() for noise in record.noise] if record.noise else None,
        "conditions": conditions(record),
        "contest": contest(record),
        "healing_tokens": spec.healing.tokens if spec.healing else 0,
    }
    # What older records do not know is left out, so that boards made of them stay as they were.
    if record.family is not None:
        row |= {"family": record.family, "setting": setting(record)}
    if record.measured_at is not None:
        row["measured_at"] = record.measured_at
    if sizes and "+" in spec.recipe and sizes.decoder_params == record.dense.decoder_params:
        row["kept_whole"] = True
    if record.searched is not None:
        row["searched"] = record.searched
    if _together(record) > 1:
        row["concurrent_cells"] = _together(record)
    if simulated is not None:
        row["simulated_share"] = simulated
        if simulated_decode is not None:
            row["simulated_decode_share"] = simulated_decode
        row["slower_than_dense"] = [
            name for name in ("prefill", "decode") if _hundredths(_ratio(m, dense, name)) < 100
        ]
    if untold:
        row["untold"] = True
    return row


def _device(record: Record) -> str:
    """What speeds were measured on; cells that ran at the same time took it from one another."""
    device = record.conditions.get("device") or record.spec.device
    threads = record.conditions.get("threads")
    if threads and record.spec.device == "cpu":
        device += f", {threads} thread{'s' if threads > 1 else ''}"
    together = _together(record)
    return f"{device}, {together} cells at the same time" if together > 1 else device


def _together(record: Record) -> int:
    """Cells that ran at the same time; beside others no speed is fit for a comparison."""
    return int(record.conditions.get("concurrent_cells", 1))


def _hundredths(ratio: float | None) -> int:
    """A ratio as precisely as the board shows it; no ratio is no loss."""
    return 100 if ratio is None else round(100 * ratio)


def _mean_accuracy(m: Measurements | None) -> tuple[float | None, tuple[float, float] | None]:
    """Mean over tasks with its normal 95 % interval; the tasks' errors are independent."""
    if m is None or not m.tasks:
        return None, None
    mean = sum(task.value for task in m.tasks) / len(m.tasks)
    half = _Z95 * math.sqrt(sum(_variance(task) for task in m.tasks)) / len(m.tasks)
    return mean, (mean - half, mean + half)


def _variance(task: TaskResult) -> float:
    """Of a share of right answers, with four pseudo-items (Agresti & Coull, 1998): never 0."""
    items = task.items + 4
    share = (task.value * task.items + 2) / items
    return share * (1 - share) / items


def _around(middle: float | None, half: float | None) -> tuple[float, float] | None:
    return None if middle is None or half is None else (middle - half, middle + half)


def _ratio(m: Measurements | None, dense: Measurements | None, name: str) -> float | None:
    if m is None or dense is None:
        return None
    return float(getattr(m, name).tokens_per_s / getattr(dense, name).tokens_per_s)


def _protocol_label(record: Record) -> str:
    spec = record.spec
    label = spec.protocol.name
    if spec.limit is not None:
        label += f" (partial: first {spec.limit} items a task)"
    if spec.calibration != spec.protocol.calibration:
        label += f" (calibration {spec.calibration})"
    return label if spec.device == "cpu" else f"{label} · {spec.device}"


def _perplexity(row: Row) -> float:
    """What rows without accuracy are ordered by; no number is the worst."""
    value = row["perplexity"]
    return math.inf if row["accuracy"] is not None or value is None or math.isnan(value) else value


def _order(row: Row) -> tuple[Any, ...]:
    metric = {"none": 0, "params": 1, "bytes": 2}[row["budget_metric"]]
    status = {"ok": 0, "failed": 1, "not_applicable": 2}[row["status"]]
    return (
        row["model"],
        row["protocol"],
        row["conditions"],
        row["recipe"] != "dense",
        metric,
        -(row["budget_target"] or 0),
        row["healing_tokens"],
        status,
        -(row["accuracy"] or 0),
        _perplexity(row),
        row["recipe"],
        row["seed"],
    )
