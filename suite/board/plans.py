"""The table of `weighin plan`: what each recipe would do for a budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from suite.errors import ImpossibleBudget, InputError, NotApplicable
from suite.method import methods
from suite.models import load
from suite.models.anatomy import Anatomy
from suite.recipe import Recipe
from suite.specs import Budget


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
            table.add_row(line["recipe"], line["budget"], f"{line['status']}: {line['reason']}", *[""] * 4)
            continue
        knobs = "; ".join(
            f"{stage}: " + ", ".join(f"{k}={_short(v)}" for k, v in knobs.items())
            for stage, knobs in line["knobs"].items()
            if knobs
        )
        table.add_row(
            line["recipe"],
            line["budget"],
            knobs,
            f"{line['params']:,} ({line['params_ratio']:.2%})",
            f"{line['bytes']:,} ({line['bytes_ratio']:.2%})",
            f"{line['decoder_ratio']:.3f}",
            "" if line["unused"] is None else f"{line['unused']:.2%}",
        )
    return table


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
