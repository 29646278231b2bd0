"""Processes of cells and trials: what they leave behind when they are killed."""

from multiprocessing import resource_tracker
from multiprocessing.connection import Connection

import numba

from suite.run.processes import running


def _start_threads_of_numba(pipe: Connection) -> None:
    kept: list[str] = []
    resource_tracker.register = lambda name, kind: kept.append(name)  # type: ignore[assignment]
    numba.set_num_threads(1)
    pipe.send(kept)


def test_a_killed_process_leaks_no_semaphore_of_numba() -> None:
    with running(_start_threads_of_numba) as (_, receiver):
        assert receiver.recv() == []
