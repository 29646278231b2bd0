"""The command line. Exit codes: 0 fine, 1 verdict negative, 2 bad input, 3 some cells failed."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from suite.errors import InputError, WeighinError, nearest

if TYPE_CHECKING:
    from suite.records import Record

app = typer.Typer(
    help="Weigh-in: compressed language models at identical budgets.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="The data directory for offline evaluation.", no_args_is_help=True)
app.add_typer(data_app, name="data")

console = Console(stderr=True, highlight=False)
# Tables that go into a file or a pipe are not squeezed to 80 columns.
output_console = Console(highlight=False, width=None if sys.stdout.isatty() else 180)

Json = Annotated[bool, typer.Option("--json", help="Print machine-readable JSON on standard output.")]
Results = Annotated[Path, typer.Option("--results", help="Folder of the records.")]
Plugins = Annotated[
    list[str] | None, typer.Option("--plugin", help="Python file that registers methods. Repeatable.")
]
DataDir = Annotated[
    str | None,
    typer.Option("--data-dir", help="Folder with evaluation data (else WEIGHIN_DATA_DIR, else hub)."),
]
DEFAULT_RESULTS = Path("results")


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Turn errors meant for the user into one message and exit code 2."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except WeighinError as error:
            console.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
            raise typer.Exit(2) from None

    return run


@app.command()
@guarded
def run(
    track: Annotated[str | None, typer.Argument(help="A track: its name or a YAML file.")] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="Hub id, local folder, GGUF file or alias. Repeatable.")
    ] = None,
    recipe: Annotated[
        list[str] | None, typer.Option(help="method, method(knob=value) or stage+stage. Repeatable.")
    ] = None,
    budget: Annotated[
        list[str] | None, typer.Option(help="params=0.8, bytes=0.25, bytes=64MiB or none. Repeatable.")
    ] = None,
    protocol: Annotated[str | None, typer.Option(help="Protocol: its name or a YAML file.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Seed. Repeatable.")] = None,
    calibration: Annotated[str | None, typer.Option(help="NAME:COUNTxLENGTH, e.g. wikitext2:64x512.")] = None,
    results: Results = DEFAULT_RESULTS,
    data_dir: DataDir = None,
    plugin: Plugins = None,
    jobs: Annotated[
        int, typer.Option(min=1, help="Cells at the same time (speeds then disturb each other).")
    ] = 1,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    timeout: Annotated[
        float | None, typer.Option(min=1, help="Seconds after which a cell is given up.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Items per task; such rows are marked partial.")
    ] = None,
    keep_checkpoints: Annotated[
        Path | None, typer.Option(help="Keep each cell's checkpoint in this folder.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compress, measure and record a grid of cells; what is already recorded is not computed again."""
    from suite import data
    from suite.board.tables import as_json as json_rows
    from suite.board.tables import terminal
    from suite.run.display import Display
    from suite.run.runner import Grid, Options
    from suite.specs import Track

    chosen = Track.load(track) if track else Track()
    given = {
        "models": model,
        "recipes": recipe,
        "budgets": budget,
        "protocol": protocol,
        "seeds": seed,
        "calibration": calibration,
        "limit": limit,
    }
    changes = {key: value for key, value in given.items() if value is not None}
    chosen = Track.model_validate(chosen.model_dump() | changes)
    if not track and not recipe:
        raise InputError("nothing to run: name a track (weighin tasks lists them) or give --recipe.")
    options = Options(
        results=results,
        device=device,
        jobs=jobs,
        timeout=timeout,
        data_folder=data.data_directory(data_dir),
        plugins=tuple(plugin or ()),
        keep_checkpoints=keep_checkpoints.resolve() if keep_checkpoints else None,
    )
    with console.status("Planning the grid"):
        grid = Grid(chosen, options)
    display = Display(console, grid.cells)
    try:
        with display:
            grid.run(display.update)
    except KeyboardInterrupt:
        done = sum(cell.finished for cell in grid.cells)
        console.print(
            f"Stopped. {done} of {len(grid.cells)} cells are in {results}/;"
            " the same command goes on from there."
        )
        raise typer.Exit(130) from None
    records = [cell.record for cell in grid.cells]
    if as_json:
        typer.echo(json_rows(records), nl=False)
    else:
        typer.echo(terminal(records))
        console.print(f"Records are in {results}/records. Next: weighin board --results {results}")
    if any(cell.state == "failed" for cell in grid.cells):
        raise typer.Exit(3)


@app.command()
@guarded
def board(
    results: Results = DEFAULT_RESULTS,
    format: Annotated[str, typer.Option(help="text, md, csv, json, tex or html.")] = "text",
    output: Annotated[Path | None, typer.Option(help="Write every format into this folder instead.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="Only these models. Repeatable.")] = None,
    protocol: Annotated[list[str] | None, typer.Option(help="Only these protocols. Repeatable.")] = None,
) -> None:
    """Make the leaderboard from the records in a results folder."""
    from suite.board.page import page
    from suite.board.tables import FORMATS
    from suite.records import RecordStore

    formats: dict[str, Callable[[Sequence[Record]], str]] = {**FORMATS, "html": page}
    if format not in formats:
        raise InputError(f"no format is called '{format}'.{nearest(format, formats)}  ({', '.join(formats)})")
    records = RecordStore(results).all()
    records = _only(records, "model", model, lambda record: record.spec.model)
    records = _only(records, "protocol", protocol, lambda record: record.spec.protocol.name)
    if output is None:
        typer.echo(formats[format](records), nl=False)
        return
    try:
        output.mkdir(parents=True, exist_ok=True)
        for suffix in ("md", "csv", "json", "tex", "html"):
            (output / f"board.{suffix}").write_text(formats[suffix](records))
    except OSError as error:
        raise InputError(f"'{output}' cannot be written: {error.strerror}.") from None
    typer.echo(formats["text"](records), nl=False)
    console.print(f"Written: {output}/board.md, .csv, .json, .tex and .html")


@app.command()
@guarded
def plan(
    model: Annotated[str, typer.Option(help="Hub id, local folder, GGUF file or alias.")] = "smollm2-135m",
    budget: Annotated[list[str] | None, typer.Option(help="Budget. Repeatable.")] = None,
    recipe: Annotated[list[str] | None, typer.Option(help="Recipe; all methods when not given.")] = None,
    seed: Annotated[int, typer.Option(help="Seed.")] = 0,
    plugin: Plugins = None,
    as_json: Json = False,
) -> None:
    """Show what every method would do for a budget, without reading any weights."""
    from suite.board.plans import plan_rows, plan_table
    from suite.registry import load_plugin
    from suite.specs import Budget

    for path in plugin or ():
        load_plugin(path)
    budgets = [Budget.parse(text) for text in budget or ["params=0.8"]]
    lines = plan_rows(model, recipe, budgets, seed)
    if as_json:
        typer.echo(json.dumps(lines, indent=1))
    else:
        output_console.print(plan_table(model, lines))
    if lines and all(line["status"] == "impossible" for line in lines):
        raise typer.Exit(2)


@app.command()
@guarded
def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder, dense or compressed.")],
    as_json: Json = False,
) -> None:
    """Show where the parameters and bytes of a checkpoint are, module by module."""
    from dataclasses import asdict

    from suite.checkpoint import reload, weight_bytes
    from suite.measure.ledger import ledger, total_disk, total_params
    from suite.models.load import load_config, resolve

    source = resolve(str(checkpoint))
    load_config(source)
    entries = ledger(reload(Path(source.location)))
    total = {
        "params": total_params(entries),
        "disk": total_disk(entries),
        "resident": sum(entry.resident for entry in entries),
        "nominal": sum(entry.nominal for entry in entries),
        "safetensors": weight_bytes(Path(source.location)),
    }
    if as_json:
        typer.echo(json.dumps({"total": total, "modules": [asdict(entry) for entry in entries]}, indent=1))
        return
    table = Table("module", "type", *(f"{c}" for c in ("params", "disk B", "resident B", "nominal B")))
    for column in table.columns[2:]:
        column.justify = "right"
    for e in entries:
        figures = (f"{value:,.0f}" for value in (e.params, e.disk, e.resident, e.nominal))
        table.add_row(e.path or "(model)", e.type, *figures)
    table.add_section()
    figures = (f"{total[key]:,.0f}" for key in ("params", "disk", "resident", "nominal"))
    table.add_row("total", f"{total['safetensors']:,} B in safetensors", *figures)
    output_console.print(table)


@app.command()
@guarded
def methods(plugin: Plugins = None, as_json: Json = False) -> None:
    """List all compression methods, their knobs and where each comes from."""
    from suite.method import methods as registry
    from suite.registry import broken_entry_points, load_plugin, origin

    for path in plugin or ():
        load_plugin(path)
    lines: list[dict[str, Any]] = []
    for name in registry:
        cls = registry.get(name)
        lines.append(
            {
                "name": name,
                "family": cls.family,
                "acts_on": sorted(cls.acts_on),
                "needs": sorted(cls.needs),
                "knobs": {key: _default(info) for key, info in cls.Config.model_fields.items()},
                "source": cls.source,
                "version": cls.version,
                "defined_in": _shortened(origin(cls)),
            }
        )
    if as_json:
        typer.echo(json.dumps(lines, indent=1))
    else:
        table = Table("method", "family", "acts on", "needs", "knobs", "source", "defined in")
        for line in lines:
            knobs = ", ".join(f"{k}={v}" for k, v in line["knobs"].items())
            table.add_row(
                line["name"],
                line["family"],
                ", ".join(line["acts_on"]) or "–",
                ", ".join(line["needs"]) or "–",
                knobs or "–",
                line["source"],
                line["defined_in"],
            )
        output_console.print(table)
    for entry, why in broken_entry_points.items():
        console.print(f"[yellow]not importable:[/] {entry} ({escape(why)})", soft_wrap=True)


@app.command()
@guarded
def tasks(as_json: Json = False) -> None:
    """List protocols, tracks and tasks."""
    from suite.evaluate.harness import DATA_FILES, embedded_tasks
    from suite.specs import Protocol, Track, named_files

    protocols = {name: Protocol.load(name) for name in named_files("protocol")}
    tracks = {name: Track.load(name) for name in named_files("track")}
    if as_json:
        listing = {
            "protocols": {name: item.model_dump(mode="json") for name, item in protocols.items()},
            "tracks": {name: item.model_dump(mode="json") for name, item in tracks.items()},
            "embedded_tasks": embedded_tasks(),
            "data_directory_tasks": sorted(DATA_FILES),
        }
        typer.echo(json.dumps(listing, indent=1))
        return
    table = Table("protocol", "tasks", "calibration", "what it is")
    for name, item in protocols.items():
        names = ", ".join(f"{task.name} ({task.metric})" for task in item.tasks)
        table.add_row(name, names, str(item.calibration), item.description)
    output_console.print(table)
    table = Table("track", "protocol", "cells", "recipes")
    for name, entry in tracks.items():
        recipes = list(dict.fromkeys(recipe for recipe, _ in entry.pairs()))
        table.add_row(name, entry.protocol, str(len(entry.pairs())), ", ".join(recipes))
    output_console.print(table)


@data_app.command("pull")
@guarded
def data_pull(
    folder: Annotated[Path, typer.Argument(help="Folder to fill.")],
    task: Annotated[list[str] | None, typer.Option(help="Only these tasks or texts. Repeatable.")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="At most this many rows of each split.")] = None,
) -> None:
    """Fill a data directory from the hub, for machines without a network."""
    from suite.pull import pull

    for name, files in pull(folder, task, rows):
        console.print(f"{name}: {', '.join(files)}")
    console.print(f"Use it with --data-dir {folder} or WEIGHIN_DATA_DIR={folder}")


def _only(
    records: list[Record], name: str, chosen: list[str] | None, get: Callable[[Record], str]
) -> list[Record]:
    known = sorted({get(record) for record in records})
    for wanted in chosen or ():
        if wanted not in known:
            raise InputError(
                f"no record has {name} '{wanted}'.{nearest(wanted, known)}  ({', '.join(known)})"
            )
    return [record for record in records if not chosen or get(record) in chosen]


def _default(info: Any) -> str:
    return "solved" if info.default is None else str(info.default)


def _shortened(path: str) -> str:
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except ValueError:
        return "/".join(Path(path).parts[-2:])


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
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def main() -> None:
    """Entry point of the `weighin` command."""
    try:
        app()
    except KeyboardInterrupt:
        console.print("Stopped.")
        sys.exit(130)
