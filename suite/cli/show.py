"""`weighin inspect`, `methods`, `tasks` and `data`: what there is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from suite.cli.common import Json, Plugins, app, console, guarded, output_console

data_app = typer.Typer(help="The data directory for offline evaluation.", no_args_is_help=True)
app.add_typer(data_app, name="data")


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
    from suite.errors import EXTRAS
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
                "extra": EXTRAS.get(cls.library or ""),
                "library": cls.library,
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
                ", ".join([*line["needs"], *_library(line)]) or "–",
                escape(knobs) or "–",
                escape(line["source"]),
                escape(line["defined_in"]),
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


def _library(line: dict[str, Any]) -> list[str]:
    """What to install for a method: the suite's own extra, or the package that a plug-in wants."""
    if line["extra"]:
        return [f"extra {line['extra']}"]
    return [f"package {line['library']}"] if line["library"] else []


def _default(info: Any) -> str:
    return "solved" if info.default is None else str(info.default)


def _shortened(path: str) -> str:
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except ValueError:
        return "/".join(Path(path).parts[-2:])
