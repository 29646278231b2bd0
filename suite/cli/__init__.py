"""The command line. Exit codes: 0 fine, 1 verdict negative, 2 bad input, 3 failed cells, 4 not decided."""

from __future__ import annotations

import os
import signal
from typing import Annotated

import typer

from suite.cli import (  # noqa: F401 (importing adds commands)
    compare,
    gate,
    profile,
    run,
    search,
    show,
    validate,
)
from suite.cli.common import app


def _version(shown: bool) -> None:
    if shown:
        from suite import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def main() -> None:
    """Entry point of the `weighin` command."""
    # Asked to end, as by tox or a batch system, it stops as after Ctrl-C: workers do not outlive it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        app()
    finally:  # all is said; what a second request would interrupt is the interpreter tidying up
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
