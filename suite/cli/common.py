"""What all commands share: the app, the consoles, common options, and how errors reach the user."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from suite.errors import WeighinError

app = typer.Typer(
    help="Weigh-in: compressed language models at identical budgets.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

console = Console(stderr=True, highlight=False)
# Tables that go into a file or a pipe are not squeezed to 80 columns.
output_console = Console(highlight=False, width=None if sys.stdout.isatty() else 180)

Json = Annotated[bool, typer.Option("--json", help="Print machine-readable JSON on standard output.")]
Results = Annotated[Path, typer.Option("--results", help="Folder of the records.")]
Plugins = Annotated[
    list[str] | None, typer.Option("--plugin", help="Python file that registers methods. Repeatable.")
]
LARGEST_SEED = 2**32 - 1
Seed = Annotated[int, typer.Option("--seed", min=0, max=LARGEST_SEED, help="Seed.")]
DataDir = Annotated[
    str | None,
    typer.Option("--data-dir", help="Folder with evaluation data (else WEIGHIN_DATA_DIR, else hub)."),
]
DEFAULT_RESULTS = Path("results")


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Turn errors meant for the user into one message and exit code 2, and Ctrl-C into one and 130."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except WeighinError as error:
            console.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:  # where nothing was begun that a command has more to say about
            console.print("Stopped.")
            raise typer.Exit(130) from None

    return run
