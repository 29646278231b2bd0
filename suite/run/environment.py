"""The facts about machine and software that a number depends on."""

from __future__ import annotations

import functools
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from suite import bfloat16, kernels

PACKAGES = ("weighin", "torch", "transformers", "tokenizers", "lm_eval", "datasets", "safetensors", "numpy")


def conditions(device: str, jobs: int, dtype: str) -> dict[str, Any]:
    """Conditions of a measurement: device, threads, other work, versions and the suite's own state.

    `kernels` says which path multiplied by packed weights in this process, where there was a choice.
    """
    return {
        "device": device_name(device),
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "concurrent_cells": jobs,
        "load_average": psutil.getloadavg()[0],
        "memory_bytes": psutil.virtual_memory().total,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "git": git_state(),
        "kernels": kernels.chosen(),
    }


def device_name(device: str) -> str:
    """The accelerator's own name; of a processor also what decides how fast torch is on it.

    Processors of one name differ tenfold in bfloat16, so that their speeds must not be compared.
    """
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    instructions = torch.backends.cpu.get_cpu_capability()
    products = "" if bfloat16.native(device) else ", bfloat16 in float32"
    return f"{_processor()}, {psutil.cpu_count(logical=True)} cores, {instructions}{products}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return model or platform.machine()


@functools.cache
def git_state() -> str | None:
    """Commit of the suite's own checkout, with "+changes" when it differs; None outside of git."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "--short=12", "HEAD")
        changed = _git(
            root, "status", "--porcelain", "--untracked-files=no", "--", "suite", "methods", "tasks"
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}+changes" if changed else commit


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()  # noqa: S603
