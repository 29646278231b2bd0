"""Processes that cells and trials run in: how they start, how they end, and why they are gone."""

from __future__ import annotations

import multiprocessing
import signal
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any


def process_context() -> Any:
    """Fresh processes. With a fork server the libraries are imported once, not once per process."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["suite.run.preload"])
    return context


def describe_death(process: BaseProcess, log: Path) -> str:
    """Why a worker is gone without a word: its signal, or its exit code and last line."""
    code = process.exitcode or 0
    if code < 0:
        name = signal.Signals(-code).name
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        return f"the worker was killed by {name}{hint}"
    lines = log.read_text(errors="replace").strip().splitlines() if log.is_file() else []
    last = f": {lines[-1]}" if lines else ""
    return f"the worker ended with exit code {code}{last}"


def end_process(process: BaseProcess) -> None:
    """Give a process a moment to leave by itself, then make it."""
    process.join(0.5)
    if process.is_alive():
        process.terminate()
        process.join(2)
    if process.is_alive():
        process.kill()
        process.join()
