"""What stands under a board's tables: reasons, conditions, and what its marks mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = dict[str, Any]
SEARCHED, SIMULATED = " †", " ‡"


def label(row: Row) -> str:
    """The recipe, its seed if that is not 0, and a mark if a search found it."""
    seed = f" (seed {row['seed']})" if row["seed"] else ""
    return f"{row['recipe']}{seed}" + (SEARCHED if row.get("searched") else "")


def notes(members: Sequence[Row], has_dense: bool) -> tuple[str, ...]:
    """The lines under a table."""
    lines = [f"{row['recipe']}: {row['reason']}" for row in members if row["status"] != "ok"]
    lines += [f"{row['recipe']}: {row['standing_note']}" for row in members if row["standing_note"]]
    lines += [
        f"{label(row)}: the same checkpoint as under {row['measured_at']}, and measured there"
        for row in members
        if row.get("measured_at")
    ]
    if whole := [label(row) for row in members if row.get("kept_whole")]:
        lines.append(f"the quantizer alone meets this budget, the structure stays whole: {', '.join(whole)}")
    lines += sorted({row["note"] for row in members if row["note"]})
    lines += _device_notes(members)
    scored = any(row["accuracy"] is not None for row in members)
    accuracy = "accuracy: mean over tasks in %, 95 % interval of one row alone; " if scored else ""
    lines.append(
        f"{accuracy}κ: share of the decoder's linear parameters kept; peak: highest memory during inference"
        " above the empty process; compress MB: highest memory of the whole process that compresses"
    )
    lines.append(
        "train tok/s: every floating-point parameter is stepped; packed weights stay fixed, and rows that"
        " have any show no ratio"
    )
    if any(row["rank"] for row in members):
        paired = "items" if scored else "windows of the text that perplexity is measured on"
        lines.append(
            f"rank: the places a row can have among the compressed rows of this table, from paired {paired},"
            " all together with 95 % confidence; rows whose ranks overlap may not be told apart"
        )
    if any(row["accuracy_difference"] is not None for row in members):
        lines.append("Δ dense: accuracy minus dense in points, paired, 95 % for all rows together")
    if any(row["recipe"].startswith("dense ") for row in members):
        lines.append(
            "dense NAME: a smaller dense model of the same family, at the size it has; not ranked, as it is"
            " not made for the budget"
        )
    lines += noise_notes(next((row["noise"] for row in members if row["noise"]), None))
    lines += _speed_notes(members)
    if any(row.get("searched") for row in members):
        searches = ", ".join(sorted({row["searched"] for row in members if row.get("searched")}))
        lines.append(
            f"†: the recipe was chosen by a search over many (weighin search, {searches}) on text that is"
            " neither learnt from nor scored on; rows without it were named by a person"
        )
    if has_dense:
        lines.append(
            "in brackets: ratio to dense, measured apart on the same kind of machine; peak and ratios carry"
            " its noise"
        )
    return tuple(lines)


def _speed_notes(members: Sequence[Row]) -> list[str]:
    lines = []
    simulated = [f"{label(row)} ({share})" for row in members if (share := _simulated(row))]
    if simulated:
        shares = ", ".join(simulated)
        lines.append(
            "‡: dense weights are rebuilt for each call in a share of the linear parameters, so the speed is"
            f" that of the imitation and has no ratio: {shares}"
        )
    if untold := [label(row) for row in members if row.get("untold")]:
        lines.append(
            "records from before it was kept whether packed weights are rebuilt for each call have no ratio:"
            f" {', '.join(untold)}"
        )
    if any(row.get("concurrent_cells") for row in members):
        lines.append(
            "speeds measured with other cells at the same time (above, beside the device) took from each"
            " other and are not compared"
        )
    slower = [row for row in members if row["recipe"] != "dense" and row.get("slower_than_dense")]
    if slower:
        named = ", ".join(f"{label(row)} ({' and '.join(row['slower_than_dense'])})" for row in slower)
        lines.append(f"slower than dense, measured on the same device and at the same batch: {named}")
    return lines


def _simulated(row: Row) -> str:
    """The shares that rebuild dense weights: one for both speeds, or that of each where they differ."""
    both = row.get("simulated_share") or 0.0
    decode = row.get("simulated_decode_share")
    if decode is None or decode == both:
        return f"{100 * both:.0f} %" if both else ""
    named = {"prefill": both, "decode": decode}
    return ", ".join(f"{name} {100 * share:.0f} %" for name, share in named.items() if share)


def _device_notes(members: Sequence[Row]) -> list[str]:
    """What was measured on which device; with one device for all, no row is named."""
    named: dict[str, list[str]] = {}
    for row in members:
        if row["status"] == "ok":
            named.setdefault(row["device"], []).append(label(row))
    return [
        f"measured on {device}" + (f": {', '.join(labels)}" if len(named) > 1 else "")
        for device, labels in sorted(named.items())
    ]


def noise_notes(noise: Sequence[Mapping[str, Any]] | None) -> list[str]:
    """What the same model changes by when only how it is computed changes, one line per change."""
    if not noise:
        return ["noise floor: not measured in these records"]
    return [f"noise floor, dense with {n['changed']}: {_moved(n)}" for n in noise]


def _moved(noise: Mapping[str, Any]) -> str:
    perplexity = f"perplexity × {noise['perplexity_ratio']:.6g}"
    if not noise["items"]:
        return perplexity
    return (
        f"{noise['flips']:,} of {noise['items']:,} items flip, accuracy"
        f" {points(noise['accuracy_difference'])} points, a log-likelihood by up to"
        f" {noise['largest_log_likelihood_difference']:.3g} nats, {perplexity}"
    )


def points(share: float) -> str:
    """A difference of shares in points, with its sign."""
    return f"{100 * share:+.1f}".replace("-", "−")
