"""Processes that cells and trials run in: how they start, how they end, and why they are gone."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from suite.errors import WeighinError


class WorkerFailed(WeighinError):
    """A process gave no answer; the message says why."""


def process_context() -> Any:
    """Fresh processes. With a fork server the libraries are imported once, not once per process."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["suite.run.preload"])
    return context


def supervised(
    target: Callable[..., None],
    arguments: tuple[Any, ...],
    log: Path,
    is_over: Callable[[], bool],
    hear: Callable[[str, Any], None] = lambda kind, content: None,
    started: Callable[[int | None], None] = lambda pid: None,
) -> dict[str, Any] | None:
    """The result that `target(*arguments, pipe)` sends from a process of its own; None once `is_over`.

    What else it sends on the way goes to `hear`; `log` is the file that its output goes to.

    Raises:
        WorkerFailed: it sent an error, or ended without a word.
    """
    context = process_context()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(*arguments, sender), daemon=True)
    process.start()
    sender.close()
    started(process.pid)
    try:
        while not is_over():
            if not receiver.poll(0.1):
                continue
            try:
                kind, content = receiver.recv()
            except EOFError:
                process.join()
                raise WorkerFailed(_describe_death(process, log)) from None
            if kind == "result":
                return dict(content)
            if kind == "error":
                raise WorkerFailed(str(content))
            hear(kind, content)
        return None
    finally:
        _end_process(process)
        receiver.close()


def _describe_death(process: BaseProcess, log: Path) -> str:
    """Why a worker is gone without a word: its signal, or its exit code and last line."""
    code = process.exitcode or 0
    if code < 0:
        name = signal.Signals(-code).name
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        return f"the worker was killed by {name}{hint}"
    lines = log.read_text(errors="replace").strip().splitlines() if log.is_file() else []
    last = f": {lines[-1]}" if lines else ""
    return f"the worker ended with exit code {code}{last}"


def _end_process(process: BaseProcess) -> None:
    """Give a process a moment to leave by itself, then make it."""
    process.join(0.5)
    if process.is_alive():
        process.terminate()
        process.join(2)
    if process.is_alive():
        process.kill()
        process.join()
