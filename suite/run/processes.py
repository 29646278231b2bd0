"""Processes that cells and trials run in: how they start, how they end, and why they are gone."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from suite.errors import WeighinError


class WorkerFailed(WeighinError):
    """A process gave no answer; the message says why."""


@contextmanager
def running(target: Callable[..., None], *arguments: Any) -> Iterator[tuple[BaseProcess, Connection]]:
    """A fresh process that runs `target(*arguments, pipe)`, and where its pipe is heard; killed at the end.

    With a fork server the libraries are imported once, not once per process.
    """
    forking = "forkserver" in multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if forking else "spawn")
    if forking:
        context.set_forkserver_preload(["suite.run.preload"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(target, *arguments, sender), daemon=True)
    try:
        with _starting:
            process.start()
        sender.close()
        yield process, receiver
    finally:
        if process.pid is not None:
            process.kill()  # nothing is left to do there, and tidying up takes it a second
            process.join()
        receiver.close()


_starting = threading.Lock()


def _run(target: Callable[..., None], *arguments: Any) -> None:
    """What each such process does."""
    # Ctrl-C and a batch system's SIGTERM reach every process: the parent alone answers, and kills this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Under "forkserver", taken for a fork, Numba makes a semaphore that a killed process would leak.
    multiprocessing.set_start_method("spawn", force=True)
    target(*arguments)


def _end_with_parent() -> None:
    """A parent that is killed cannot end its processes, and there is nobody left to hear them."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


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
    with running(target, *arguments) as (process, receiver):
        started(process.pid)
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
