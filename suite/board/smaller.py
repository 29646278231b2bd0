"""A smaller dense model of the same family as a control: what training small gives instead of compressing."""

from __future__ import annotations

from collections.abc import Sequence

from suite.board.notes import Row


def smaller_dense(reference: Row, references: Sequence[Row], metric: str) -> list[Row]:
    """Rows for the dense models that are smaller than `reference`, largest first.

    They are of its family (architecture and vocabulary), were measured under its protocol, calibration,
    limit and device kind, and show their sizes and speeds against it. `metric`: what the table's budget
    counts, "params", "bytes" or "none". They have a size of their own, so they are not ranked.
    """
    alike = [row for row in references if _kin(row) and _kin(row) == _kin(reference)]
    smaller = [r for r in alike if r["status"] == "ok" and r["params"] < reference["params"]]
    return [_against(row, reference, metric) for row in sorted(smaller, key=lambda row: -row["params"])]


def _kin(row: Row) -> tuple[str, str] | None:
    """Family and setting; None for records from before the family was kept."""
    return (row["family"], row["setting"]) if "family" in row else None


def _against(row: Row, reference: Row, metric: str) -> Row:
    sizes = {
        "params": row["params"] / reference["params"],
        "bytes": row["bytes_disk"] / reference["bytes_disk"],
    }
    speeds = {name: f"{name}_tokens_per_s" for name in ("prefill", "decode", "train")}
    alike = row["device"] == reference["device"] and not row.get("concurrent_cells")
    ratios = {
        f"{name}_ratio": row[speed] / reference[speed] if alike else None for name, speed in speeds.items()
    }
    changed = {
        "recipe": f"dense {row['model']}",
        "budget_achieved": sizes.get(metric),
        "params_ratio": sizes["params"],
        "bytes_ratio": sizes["bytes"],
        "decoder_ratio": None,
        "noise": None,
    }
    return row | ratios | changed
