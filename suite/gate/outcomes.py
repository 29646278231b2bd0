"""Per-item outcomes that a record holds; what is needed of them needs neither torch nor a model."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from suite.errors import InputError
from suite.evaluate.items import COLUMNS, spread
from suite.records import Perplexity, Record

Row = dict[str, Any]
Key = tuple[str, str, str, str]


def key_of(row: Row) -> Key:
    """What makes two rows outcomes of the same item: task, subtask, item and hash of its text."""
    return row["task"], row["subtask"], row["item"], row["hash"]


class Recorded:
    """Outcomes that a record holds."""

    def __init__(self, record: Record, file: Path):
        """`file` holds the outcomes; it is read when they are asked for, as not every protocol has any."""
        self.record, self.file = record, file

    @functools.cached_property
    def by_task(self) -> dict[str, list[Row]]:
        """Rows by task.

        Raises:
            InputError: the file is missing or not of this shape.
        """
        try:
            table = pd.read_parquet(self.file)[COLUMNS]
        except (OSError, ValueError, KeyError) as error:
            raise InputError(
                f"the item outcomes of record {self.record.id} cannot be read from '{self.file}'"
                f" ({type(error).__name__}). Run the cell again with: weighin run"
            ) from None
        found: dict[str, list[Row]] = {}
        for row in table.to_dict("records"):
            found.setdefault(row["task"], []).append({str(name): row[name] for name in row})
        return found

    @functools.cached_property
    def _by_key(self) -> dict[Key, Row]:
        return {key_of(row): row for rows in self.by_task.values() for row in rows}

    def first(self, task: str, limit: int | None) -> list[Row]:
        """The rows of a task, of them those that a run with this limit would have scored."""
        parts: dict[str, list[Row]] = {}
        for row in self.by_task.get(task, []):
            parts.setdefault(row["subtask"], []).append(row)
        return [
            parts[name][i] for name, i in spread({name: len(rows) for name, rows in parts.items()}, limit)
        ]

    def matching(self, rows: Sequence[Row]) -> list[Row]:
        """This record's row for each of the other side's rows.

        Raises:
            InputError: with the number of items it lacks.
        """
        missing = [row for row in rows if key_of(row) not in self._by_key]
        if missing:
            example = missing[0]
            raise InputError(
                f"{len(missing)} of {len(rows)} items have no match in record {self.record.id} (equal task,"
                f" item and text), for example {example['subtask']} {example['item']}. The two sides were"
                " scored on different items; use records of the same protocol, limit and data."
            )
        return [self._by_key[key_of(row)] for row in rows]

    def perplexity(self) -> Perplexity:
        """The record's perplexity, with its windows."""
        if self.record.measurements is None:
            raise InputError(f"record {self.record.id} holds no measurements.")
        return self.record.measurements.perplexity
