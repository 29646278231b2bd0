"""Peak memory of one phase, on CPU (resident set) or CUDA (allocator)."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_SAMPLE_SECONDS = 0.01


@dataclass
class Peak:
    """Highest memory of a phase in bytes; `how` says what was read."""

    bytes: int = 0
    how: str = ""


@contextmanager
def peak_memory(device: str) -> Iterator[Peak]:
    """Measure the highest memory this process holds inside the block.

    On CUDA the allocator's peak. On Linux the kernel's own high-water mark, reset at the start, so
    that nothing between two samples is missed; elsewhere the resident set, sampled.
    """
    peak = Peak()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        torch.cuda.synchronize(device)
        peak.bytes, peak.how = torch.cuda.max_memory_allocated(device), "CUDA allocator peak"
        return
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        with _sampled(peak):
            yield peak
        return
    yield peak
    peak.bytes, peak.how = _high_water_mark(), "resident set high-water mark"


def resident_memory() -> int:
    """Bytes this process holds in memory now."""
    return int(psutil.Process().memory_info().rss)


def _high_water_mark() -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resident_memory()


@contextmanager
def _sampled(peak: Peak) -> Iterator[None]:
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            peak.bytes = max(peak.bytes, resident_memory())
            stop.wait(_SAMPLE_SECONDS)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        peak.how = f"resident set sampled every {_SAMPLE_SECONDS:g} s"
