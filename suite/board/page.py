"""The leaderboard as one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from jinja2 import Environment, PackageLoader

from suite.board.agreement import agreements
from suite.board.rows import rows
from suite.board.standings import Standings
from suite.board.tables import Table, cells, headers, tables
from suite.records import Record


def page(records: Sequence[Record], standings: Standings | None = None) -> str:
    """All tables on one page; nothing is loaded from elsewhere."""
    environment = Environment(loader=PackageLoader("suite", "board"), autoescape=True)
    template = environment.get_template("page.html.jinja2")
    versions = sorted({str(r.conditions["git"]) for r in records if r.conditions.get("git")})
    return template.render(
        tables=[_view(table) for table in tables(records, standings)],
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        agreements=[str(agreement) for agreement in agreements(rows(records))],
        versions=versions,
        cells=len(records),
    )


def _view(table: Table) -> dict[str, object]:
    lines = [
        {"status": row["status"], "dense": row["recipe"] == "dense", "cells": cells, "record": row["record"]}
        for row, cells in zip(table.rows, cells(table.rows), strict=True)
    ]
    names = {"title": table.title, "setting": table.setting, "contest": table.contest or "dense"}
    return {**names, "headers": headers(table.rows), "lines": lines, "notes": table.notes}
