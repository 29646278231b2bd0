"""The table of `weighin plan`: what each recipe would do for a budget."""

from __future__ import annotations

import gzip
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from suite import stats
from suite.errors import ImpossibleBudget, InputError, NotApplicable
from suite.evaluate.harness import DATA_FILES, EMBEDDED
from suite.method import methods
from suite.models import load
from suite.models.anatomy import Anatomy
from suite.recipe import Recipe
from suite.specs import Budget, Protocol


def plan_rows(
    model: str, recipes: Sequence[str] | None, budgets: Sequence[Budget], seed: int
) -> list[dict[str, Any]]:
    """One row per recipe and budget, solved on shapes; all registered methods when none is named."""
    parsed = [Recipe.parse(text) for text in recipes or [name for name in methods if name != "dense"]]
    anatomy = load.load_anatomy(load.resolve(model))
    return [_row(recipe, budget, anatomy, seed) for budget in budgets for recipe in parsed]


def plan_table(model: str, lines: Sequence[dict[str, Any]]) -> Table:
    """The rows for a terminal."""
    table = Table("recipe", "budget", "knobs", "params", "bytes", "κ", "unused", title=f"Plans for {model}")
    for line in lines:
        if line["status"] != "ok":
            why = escape(f"{line['status']}: {line['reason']}")
            table.add_row(escape(line["recipe"]), line["budget"], why, *[""] * 4)
            continue
        knobs = "; ".join(
            f"{stage}: " + ", ".join(f"{k}={_short(v)}" for k, v in knobs.items())
            for stage, knobs in line["knobs"].items()
            if knobs
        )
        table.add_row(
            escape(line["recipe"]),
            line["budget"],
            escape(knobs),
            f"{line['params']:,} ({line['params_ratio']:.2%})",
            f"{line['bytes']:,} ({line['bytes_ratio']:.2%})",
            f"{line['decoder_ratio']:.3f}",
            "" if line["unused"] is None else f"{line['unused']:.2%}",
        )
    return table


def item_counts(
    protocol: Protocol, limit: int | None = None, folder: Path | None = None
) -> dict[str, int | None]:
    """How many items of each task a run would score; None where only the hub knows.

    Args:
        protocol: names the tasks and their own limits.
        limit: items per task, as `weighin run --limit`.
        folder: the data directory, None for the hub.
    """
    counts = {}
    for task in protocol.tasks:
        size = _rows_of(task.name, folder)
        if size is not None:
            size = min(n for n in (size, task.limit, limit) if n is not None)
        counts[task.name] = size
    return counts


def _rows_of(task: str, folder: Path | None) -> int | None:
    path = EMBEDDED / f"{task}.jsonl"
    if not path.is_file():
        if folder is None or task not in DATA_FILES:
            return None
        path = folder / next(iter(DATA_FILES[task].values()))  # the split that is scored comes first
    if not path.is_file():
        return None
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
        return sum(1 for line in lines if line.strip())


def detectable(counts: Mapping[str, int | None]) -> dict[str, Any]:
    """The smallest accuracy differences a run over these items can show, by share of differing items.

    `items` is None and nothing is said about differences where a task's size is not known.
    """
    sizes = [size for size in counts.values() if size]
    unknown = sorted(name for name, size in counts.items() if not size)
    known = bool(sizes) and not unknown
    return {
        "tasks": len(counts),
        "items": sum(sizes) if known else None,
        "unknown": unknown,
        "power": 0.8,
        "alpha": 0.05,
        "smallest": {
            f"{share:g}": stats.smallest_difference(sizes, share) if known else None
            for share in (0.1, 0.2, 0.4)
        },
    }


def detectable_line(protocol: str, found: Mapping[str, Any]) -> str:
    """The same as one sentence."""
    if not found["tasks"]:
        return f"protocol {protocol} has no tasks: no accuracy is compared"
    if found["items"] is None:
        names = ", ".join(found["unknown"])
        return (
            f"smallest accuracy difference protocol {protocol} can show: unknown without the data of {names}"
            " (name a data directory with --data-dir)"
        )
    shown = {share: value for share, value in found["smallest"].items() if value is not None}
    figures = [f"{100 * value:.1f} if {100 * float(share):g} %" for share, value in shown.items()]
    return (
        f"smallest accuracy difference protocol {protocol} can show (mean over {found['tasks']} tasks,"
        f" {found['items']:,} items, paired, power 80 %, α 0.05), in points by the share of items that"
        " differ: " + (", ".join(figures) or "none, there are too few items")
    )


def _row(recipe: Recipe, budget: Budget, anatomy: Anatomy, seed: int) -> dict[str, Any]:
    row: dict[str, Any] = {"recipe": str(recipe), "budget": str(budget)}
    try:
        plan = recipe.plan(anatomy, budget, seed)
    except NotApplicable as error:
        return row | {"status": "not applicable", "reason": str(error)}
    except ImpossibleBudget as error:
        return row | {"status": "impossible", "reason": str(error), "smallest": error.smallest}
    except InputError as error:
        if len(recipe.stages) > 1:
            raise
        return row | {"status": "refused", "reason": str(error)}
    final = plan.final
    unused = None
    if budget.metric != "none":
        unused = 1 - final.size(budget.metric) / budget.target(anatomy.size(budget.metric))
    return row | {
        "status": "ok",
        "knobs": plan.knobs(recipe),
        "params": final.params,
        "params_ratio": final.params / anatomy.params,
        "bytes": final.bytes,
        "bytes_ratio": final.bytes / anatomy.bytes,
        "decoder_ratio": final.decoder_params / anatomy.decoder_params,
        "unused": unused,
    }


def _short(value: Any) -> str:
    if isinstance(value, list) and len(value) > 6:
        return f"[{value[0]}, {value[1]}, … {value[-1]}]"
    return str(value)
