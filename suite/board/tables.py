"""Leaderboard tables from records alone."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from tabulate import tabulate

from suite.board.agreement import agreements
from suite.board.notes import SIMULATED, Row, label, notes, points
from suite.board.rows import rows
from suite.board.smaller import smaller_dense
from suite.board.standings import Standings
from suite.records import Record

_LATEX = {"±": "$\\pm$", "×": "$\\times$", "κ": "$\\kappa$", "Δ": "$\\Delta$", "−": "$-$", "–": "--"}
_LATEX |= {"†": "$\\dagger$", "‡": "$\\ddagger$"}
_NESTED = ("slower_than_dense", "tasks", "accuracy_ci", "knobs", "rank", "accuracy_difference_ci", "noise")


@dataclass(frozen=True)
class Table:
    """The rows of one model under one protocol and one budget, with the dense row on top."""

    setting: str
    """The model and the protocol."""
    contest: str
    """Budget and training of the compressed rows; empty where there is only dense."""
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    @property
    def title(self) -> str:
        return f"{self.setting} · {self.contest}" if self.contest else self.setting


def tables(records: Sequence[Record], standings: Standings | None = None) -> list[Table]:
    """Group rows that may be compared: equal model, protocol, calibration, limit, device, budget, healing.

    Under the dense row come smaller dense models of its family, where there are records of any.
    """
    groups: dict[tuple[str, ...], list[Row]] = {}
    references: dict[str, Row] = {}
    for row in rows(records, standings):
        if row["recipe"] == "dense":
            references.setdefault(row["conditions"], row)
            continue
        groups.setdefault((row["conditions"], row["contest"]), []).append(row)
    for shared in references:
        if not any(key[0] == shared for key in groups):
            groups[(shared, "none")] = []
    versions = _versions_of_texts(references.values())
    result = []
    for (shared, contested), members in groups.items():
        reference = references.get(shared)
        every = list(members)
        if reference and reference["status"] == "ok":
            shares = bool(members) and (members[0]["budget_target"] or 0) <= 1
            metric = members[0]["budget_metric"] if shares else "none"
            every = smaller_dense(reference, list(references.values()), metric) + every
        every = ([reference] if reference else []) + every
        first = every[0]
        setting = f"{first['model']} · {first['protocol']}"
        lines = notes(every, reference is not None)
        if len(versions.get(_text_of(first), ())) > 1:
            lines += (
                f"perplexity is of text {first['text']}; other tables of this model and protocol have another"
                " version of it, so perplexities are compared within tables alone",
            )
        lines += _mixed_texts(every)
        result.append(Table(setting, "" if contested == "none" else contested, tuple(every), lines))
    return result


def _versions_of_texts(references: Iterable[Row]) -> dict[tuple[str, str], set[str]]:
    """The texts under one name, by model: of pydoc every interpreter ships its own version."""
    found: dict[tuple[str, str], set[str]] = {}
    for row in references:
        if row["text"]:
            found.setdefault(_text_of(row), set()).add(row["text"])
    return found


def _mixed_texts(members: Sequence[Row]) -> tuple[str, ...]:
    """What to say where rows of one table read different versions of the text."""
    by_text: dict[str, list[str]] = {}
    for row in members:
        if row["text"]:
            by_text.setdefault(row["text"], []).append(label(row))
    if len(by_text) < 2:
        return ()
    named = "; ".join(f"{text}: {', '.join(labels)}" for text, labels in sorted(by_text.items()))
    return (f"perplexity is of {len(by_text)} versions of its text, compared within each alone: {named}",)


def _text_of(row: Row) -> tuple[str, str]:
    return row["model"], row["protocol_name"]


def markdown(records: Sequence[Record], standings: Standings | None = None) -> str:
    """All tables as GitHub Markdown."""
    made = tables(records, standings)
    parts = [_table_text(table, "github", f"## {table.title}") for table in made]
    agreed = [f"- {agreement}" for agreement in agreements(rows(records))]
    return "\n\n".join(parts + (["## Do the protocols agree?", "\n".join(agreed)] if agreed else [])) + "\n"


def terminal(records: Sequence[Record], standings: Standings | None = None) -> str:
    """All tables for a terminal."""
    made = tables(records, standings)
    parts = [_table_text(table, "simple", table.title) for table in made]
    return "\n\n".join(parts + [str(agreement) for agreement in agreements(rows(records))]) + "\n"


def latex(records: Sequence[Record], standings: Standings | None = None) -> str:
    """All tables as LaTeX (booktabs)."""
    parts = [
        f"% {table.title}\n" + tabulate(cells(table.rows), headers(table.rows), tablefmt="latex_booktabs")
        for table in tables(records, standings)
    ]
    text = "\n\n".join(parts) + "\n"
    for sign, command in _LATEX.items():
        text = text.replace(sign, command)
    return text


def comma_separated(records: Sequence[Record], standings: Standings | None = None) -> str:
    """All rows as CSV, one accuracy column per task."""
    flat = []
    for row in rows(records, standings):
        tasks = {f"accuracy_{name}": task["value"] for name, task in (row["tasks"] or {}).items()}
        low, high = row["accuracy_ci"] or (None, None)
        ranks = row["rank"] or (None, None)
        below, above = row["accuracy_difference_ci"] or (None, None)
        plain = {key: value for key, value in row.items() if key not in _NESTED}
        ends = {"accuracy_low": low, "accuracy_high": high, "rank_low": ranks[0], "rank_high": ranks[1]}
        differences = {"accuracy_difference_low": below, "accuracy_difference_high": above}
        flat.append(plain | ends | differences | tasks)
    return pd.DataFrame(flat).to_csv(index=False)


def as_json(records: Sequence[Record], standings: Standings | None = None) -> str:
    """All rows as a plain JSON list."""
    return json.dumps([finite(row) for row in rows(records, standings)], indent=1, ensure_ascii=False) + "\n"


Format = Callable[[Sequence[Record], Standings | None], str]
FORMATS: dict[str, Format] = {
    "md": markdown,
    "csv": comma_separated,
    "json": as_json,
    "tex": latex,
    "text": terminal,
}


_COLUMNS: list[tuple[str, Callable[[Row], str]]] = [
    ("recipe", lambda r: label(r)),
    ("rank", lambda r: rank(r["rank"])),
    ("accuracy", lambda r: _accuracy(r)),
    ("Δ dense", lambda r: _difference(r)),
    ("perplexity", lambda r: _perplexity(r["perplexity"])),
    ("achieved", lambda r: _share(r["budget_achieved"])),
    ("unused", lambda r: _percent(r["unused"])),
    ("params M", lambda r: _number(r["params"], 1e6)),
    ("κ", lambda r: _share(r["decoder_ratio"], 3)),
    ("disk MB", lambda r: _number(r["bytes_disk"], 1e6)),
    ("resident MB", lambda r: _number(r["bytes_resident"], 1e6)),
    ("peak MB", lambda r: _number(r["peak_memory_bytes"], 1e6)),
    ("prefill tok/s", lambda r: _speed(r, "prefill")),
    ("decode tok/s", lambda r: _speed(r, "decode")),
    ("train tok/s", lambda r: _speed(r, "train")),
    ("compress s", lambda r: _number(r["compress_seconds"], 1)),
    ("compress MB", lambda r: _number(r["compress_peak_bytes"], 1e6)),
]


def _table_text(table: Table, style: str, title: str) -> str:
    body = tabulate(cells(table.rows), headers(table.rows), tablefmt=style, disable_numparse=True)
    notes = "\n".join(f"- {note}" for note in table.notes)
    return f"{title}\n\n{body}\n\n{notes}"


def headers(members: Sequence[Row]) -> list[str]:
    """Column names of a table: the fixed ones that have something to say in it, then one per task."""
    return [name for name, _ in _columns(members)] + _task_names(members)


def cells(members: Sequence[Row]) -> list[list[str]]:
    """The formatted cells of a table, line by line."""
    names, columns = _task_names(members), _columns(members)
    lines = []
    for row in members:
        if row["status"] == "ok":
            scores = [_percent((row["tasks"] or {}).get(name, {}).get("value")) for name in names]
            lines.append([show(row) for _, show in columns] + scores)
        else:
            word = "not applicable" if row["status"] == "not_applicable" else "failed"
            lines.append([label(row), word] + [""] * (len(columns) - 2 + len(names)))
    return lines


def _columns(members: Sequence[Row]) -> list[tuple[str, Callable[[Row], str]]]:
    measured = [row for row in members if row["status"] == "ok"] or members
    return [column for column in _COLUMNS if any(column[1](row) for row in measured)] or _COLUMNS


def _task_names(members: Sequence[Row]) -> list[str]:
    names: dict[str, None] = {}
    for row in members:
        names |= dict.fromkeys(row["tasks"] or {})
    return list(names)


def rank(interval: tuple[int, int] | None) -> str:
    """A rank interval: "2", "1–3", or nothing."""
    if interval is None:
        return ""
    low, high = interval
    return str(low) if low == high else f"{low}–{high}"


def _share(value: float | None, digits: int = 4) -> str:
    if value is None:
        return ""
    return f"{value:.{digits}f}" if value <= 1.5 else f"{value:,.0f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _number(value: float | None, unit: float) -> str:
    return "" if value is None else f"{value / unit:,.1f}"


def _perplexity(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if value < 1e4 else f"{value:.1e}"


def _speed(row: Row, name: str) -> str:
    value, ratio = row[f"{name}_tokens_per_s"], row[f"{name}_ratio"]
    if value is None:
        return ""
    text = f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
    share = row.get("simulated_share")
    if row.get("simulated_decode_share" if name == "decode" else "simulated_share", share):
        return text + SIMULATED
    return text if ratio is None or row["recipe"] == "dense" else f"{text} ({ratio:.2f}×)"


def _accuracy(row: Row) -> str:
    if row["accuracy"] is None:
        return ""
    low, high = row["accuracy_ci"]
    return f"{100 * row['accuracy']:.1f} ± {50 * (high - low):.1f}"


def _difference(row: Row) -> str:
    if row["accuracy_difference"] is None:
        return ""
    low, high = row["accuracy_difference_ci"]
    return f"{points(row['accuracy_difference'])} ± {50 * (high - low):.1f}"


def finite(value: Any) -> Any:
    """JSON has no infinity: such numbers become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value
