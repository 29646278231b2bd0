"""The tables of `weighin compare`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tabulate import tabulate

from suite.board.notes import noise_notes, points

Result = Mapping[str, Any]
"""What `suite.compare.compare` returns."""


def terminal(result: Result) -> str:
    """A comparison for a terminal."""
    return _text(result, "simple", "")


def markdown(result: Result) -> str:
    """A comparison as GitHub Markdown."""
    return _text(result, "github", "## ")


FORMATS: dict[str, Callable[[Result], str]] = {"text": terminal, "md": markdown}


def _text(result: Result, style: str, mark: str) -> str:
    lines, reference = result["comparisons"], result["reference"]["name"]
    partial = f" (partial: first {result['limit']} items a task)" if result["limit"] else ""
    title = (
        f"{mark}{result['model']} · {result['protocol']}{partial} · against {reference} · {result['items']:,}"
        f" items, {len(lines[0]['tasks'])} task{'s' if len(lines[0]['tasks']) > 1 else ''}"
    )
    summary = [
        [
            line["name"],
            _interval(line["accuracy_difference"], 100, ".1f"),
            f"{line['lost']} / {line['won']}",
            _p(line["p_adjusted"]),
            _interval(line["log_probability_difference"], 1, ".3f"),
            _ratio(line["perplexity_ratio"]),
        ]
        for line in lines
    ]
    columns = [
        "",
        "accuracy, points",
        "lost / won",
        "p, all items",
        "log-probability, nats",
        "perplexity ratio",
    ]
    per_task = [
        [task["task"], f"{task['items']:,}", f"{100 * task['reference']:.1f}"]
        + [_task_cell(line["tasks"][index]) for line in lines]
        for index, task in enumerate(lines[0]["tasks"])
    ]
    task_columns = ["task", "items", reference, *(line["name"] for line in lines)]
    confidence = f"{100 * result['confidence']:g} %"
    notes = [
        f"differences to {reference} on the same items; [intervals] hold for all comparisons together with"
        f" {confidence} confidence",
        "accuracy: mean over tasks; lost / won: items that were right and are wrong now, and the reverse;"
        " p: exact McNemar over all items alike, adjusted over the comparisons (Holm)",
        "log-probability: of the right answer among the choices, mean over tasks",
        "by task: difference in points, lost / won, p of McNemar's test adjusted over the whole table (Holm)",
        *noise_notes(result["noise"]),
        *result["notes"],
    ]
    parts = [
        title,
        "\n".join(f"- {line['verdict']}" for line in lines),
        tabulate(summary, columns, tablefmt=style, disable_numparse=True),
        tabulate(per_task, task_columns, tablefmt=style, disable_numparse=True),
        "\n".join(f"- {note}" for note in notes),
    ]
    return "\n\n".join(parts) + "\n"


def _task_cell(task: Mapping[str, Any]) -> str:
    return f"{points(task['difference'])} ({task['lost']} / {task['won']}), p {_p(task['p_adjusted'])}"


def _interval(figures: Mapping[str, float] | None, scale: float, form: str) -> str:
    if figures is None:
        return ""
    middle, low, high = (f"{scale * figures[key]:+{form}}" for key in ("estimate", "low", "high"))
    return f"{middle} [{low}, {high}]".replace("-", "−")


def _ratio(figures: Mapping[str, float] | None) -> str:
    if figures is None:
        return ""
    middle, low, high = (f"{v:.4f}" if v < 100 else f"{v:.3g}" for v in figures.values())
    return f"{middle} [{low}, {high}]"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
