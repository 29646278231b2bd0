"""Live progress of a grid: one line a cell, with stage, share done and time left."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from suite.records import Record
from suite.run.runner import Cell

_MARKS = {"ok": "✓", "cached": "✓", "failed": "✗", "not_applicable": "–", "running": "▸", "waiting": "·"}
_STYLES = {"ok": "green", "cached": "green", "failed": "red", "running": "cyan"}


class Display:
    """A live table on a terminal; one plain line per finished cell elsewhere."""

    def __init__(self, console: Console, cells: Sequence[Cell]):
        self.console, self.cells = console, cells
        self.started = time.monotonic()
        self.lock = threading.Lock()
        self.printed: set[int] = set()
        self.live = Live(get_renderable=self._table, console=console, refresh_per_second=4, transient=False)

    def __enter__(self) -> Self:
        self.console.print(_heading(self.cells))
        if self.console.is_terminal:
            self.live.start()
        else:
            for cell in self.cells:
                self.update(cell)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self.live.stop()

    def update(self, cell: Cell) -> None:
        """Take note that a cell changed."""
        if self.console.is_terminal:
            return
        with self.lock:
            if cell.finished and id(cell) not in self.printed:
                self.printed.add(id(cell))
                self.console.print(_line(cell), soft_wrap=True)

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 2))
        for cell in self.cells:
            style = _STYLES.get(cell.state, "dim")
            mark = Text(_MARKS[cell.state], style=style)
            bar = ProgressBar(total=1, completed=cell.share_done, width=20) if cell.state == "running" else ""
            recipe, status = escape(cell.spec.recipe), escape(_status(cell))
            table.add_row(mark, recipe, str(cell.spec.budget), status, bar)
        finished = sum(cell.finished for cell in self.cells)
        elapsed = time.monotonic() - self.started
        left = time_left(self.cells, elapsed)
        rest = "" if math.isnan(left) or finished == len(self.cells) else f", about {_clock(left)} left"
        table.add_row(
            "", f"{finished} of {len(self.cells)} cells", "", f"{_clock(elapsed)} elapsed{rest}", ""
        )
        return table


def _heading(cells: Sequence[Cell]) -> str:
    first = cells[0]
    dense, note = first.record.dense, first.record.model_note
    size = (
        f"{dense.params / 1e6:.1f} M parameters, {dense.bytes_disk / 1e6:.0f} MB{', ' + note if note else ''}"
    )
    partial = f" · first {first.spec.limit} items a task" if first.spec.limit else ""
    return f"Weigh-in · {first.spec.model} ({size}) · protocol {first.spec.protocol.name}{partial}"


def _line(cell: Cell) -> Text:
    text = Text(f" {_MARKS[cell.state]} ", style=_STYLES.get(cell.state, "dim"))
    return text.append(f"{cell.spec.recipe}  {cell.spec.budget}  {_status(cell)}", style="default")


def _status(cell: Cell) -> str:
    if cell.state == "running":
        detail = f" {cell.detail}" if cell.detail else ""
        return f"{cell.stage}{detail}"
    if cell.state == "waiting":
        return "waiting"
    if cell.state in ("failed", "not_applicable"):
        failure = cell.record.failure
        word = cell.state.replace("_", " ")
        return f"{word}: {failure.stage}: {failure.reason}" if failure else word
    return ("cached  " if cell.state == "cached" else "") + _summary(cell.record)


def _summary(record: Record) -> str:
    m = record.measurements
    if m is None:
        return ""
    accuracy = f"  acc {100 * sum(t.value for t in m.tasks) / len(m.tasks):.1f}" if m.tasks else ""
    share = m.sizes.params / record.dense.params
    stored = m.sizes.bytes_disk / record.dense.bytes_disk
    return (
        f"{m.sizes.params / 1e6:.1f} M ({share:.1%})  {m.sizes.bytes_disk / 1e6:.1f} MB ({stored:.1%})"
        f"  ppl {m.perplexity.perplexity:.4g}{accuracy}"
        f"  prefill {m.prefill.tokens_per_s:.0f}/s  decode {m.decode.tokens_per_s:.1f}/s"
    )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}:{rest:02d}"


def time_left(cells: Sequence[Cell], elapsed: float) -> float:
    """Seconds left, judged by the cells computed so far; NaN before there is anything to go by."""
    open_cells = [cell for cell in cells if not cell.finished]
    done = sum(1.0 for cell in cells if cell.state in ("ok", "failed") and cell.started)
    done += sum(cell.share_done for cell in open_cells)
    left = sum(1.0 - cell.share_done for cell in open_cells)
    return elapsed * left / done if done > 0 else math.nan
