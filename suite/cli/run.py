"""`weighin run`, `board` and `plan`: the way from a grid to a leaderboard."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from suite.cli.common import (
    DEFAULT_RESULTS,
    LARGEST_SEED,
    DataDir,
    Json,
    Plugins,
    Results,
    Seed,
    app,
    console,
    guarded,
    output_console,
)
from suite.errors import InputError, nearest

if TYPE_CHECKING:
    from suite.records import Record
    from suite.specs import Track


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
    seed: Annotated[list[int] | None, typer.Option(min=0, max=LARGEST_SEED, help="Seed. Repeatable.")] = None,
    calibration: Annotated[str | None, typer.Option(help="NAME:COUNTxLENGTH, e.g. wikitext2:64x512.")] = None,
    healing: Annotated[
        str | None, typer.Option(help="What recipes that train are trained on: NAME:COUNTxLENGTH/BATCH.")
    ] = None,
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
    from_search: Annotated[
        Path | None,
        typer.Option(help="Also run the best recipe of this search, marked as searched."),
    ] = None,
    keep_checkpoints: Annotated[
        Path | None, typer.Option(help="Keep each cell's checkpoint in this folder.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compress, measure and record a grid of cells; what is already recorded is not computed again."""
    from suite import data
    from suite.board.standings import standings
    from suite.board.tables import as_json as json_rows
    from suite.board.tables import terminal
    from suite.run.display import Display
    from suite.run.runner import Grid, Options
    from suite.specs import Track

    chosen = Track.load(track) if track else Track()
    searched: dict[tuple[str, str], str] = {}
    if from_search is not None:
        chosen, searched = _with_search(chosen, from_search, bool(track), model)
    given = {
        "models": model,
        "recipes": recipe,
        "budgets": budget,
        "protocol": protocol,
        "seeds": seed,
        "calibration": calibration,
        "healing": healing,
        "limit": limit,
    }
    changes = {key: value for key, value in given.items() if value is not None}
    chosen = Track.model_validate(chosen.model_dump() | changes)
    if not track and not recipe and not from_search:
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
        grid = Grid(chosen, options, searched)
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
    standing = standings(records, grid.store)
    if as_json:
        typer.echo(json_rows(records, standing), nl=False)
    else:
        typer.echo(terminal(records, standing))
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
    from suite.board.standings import current, standings
    from suite.board.tables import FORMATS, Format
    from suite.records import RecordStore

    formats: dict[str, Format] = {**FORMATS, "html": page}
    if format not in formats:
        raise InputError(f"no format is called '{format}'.{nearest(format, formats)}  ({', '.join(formats)})")
    store = RecordStore(results)
    everything = store.all()
    records = current(everything)
    if older := len(everything) - len(records):
        console.print(f"Left out: {older} records of older versions of their methods.")
    records = _only(records, "model", model, lambda record: record.spec.model)
    records = _only(records, "protocol", protocol, lambda record: record.spec.protocol.name)
    standing = standings(records, store)
    if output is None:
        typer.echo(formats[format](records, standing), nl=False)
        return
    try:
        output.mkdir(parents=True, exist_ok=True)
        for suffix in ("md", "csv", "json", "tex", "html"):
            (output / f"board.{suffix}").write_text(formats[suffix](records, standing))
    except OSError as error:
        raise InputError(f"'{output}' cannot be written: {error.strerror}.") from None
    typer.echo(formats["text"](records, standing), nl=False)
    console.print(f"Written: {output}/board.md, .csv, .json, .tex and .html")


@app.command()
@guarded
def plan(
    model: Annotated[str, typer.Option(help="Hub id, local folder, GGUF file or alias.")] = "smollm2-135m",
    budget: Annotated[list[str] | None, typer.Option(help="Budget. Repeatable.")] = None,
    recipe: Annotated[list[str] | None, typer.Option(help="Recipe; all methods when not given.")] = None,
    seed: Seed = 0,
    protocol: Annotated[str, typer.Option(help="Protocol whose resolution is shown.")] = "embedded",
    limit: Annotated[int | None, typer.Option(min=1, help="Items per task, as for a run.")] = None,
    data_dir: DataDir = None,
    plugin: Plugins = None,
    as_json: Json = False,
) -> None:
    """Show what every method would do for a budget, and which accuracy difference a run could show."""
    from suite import data
    from suite.board.plans import detectable, detectable_line, item_counts, plan_rows, plan_table
    from suite.registry import load_plugin
    from suite.specs import Budget, Protocol

    for path in plugin or ():
        load_plugin(path)
    budgets = [Budget.parse(text) for text in budget or ["params=0.8"]]
    chosen = Protocol.load(protocol)
    found = detectable(item_counts(chosen, limit, data.data_directory(data_dir)))
    lines = plan_rows(model, recipe, budgets, seed)
    if as_json:
        shared = {"protocol": chosen.name, "detectable_difference": found}
        typer.echo(json.dumps([line | shared for line in lines], indent=1))
    else:
        output_console.print(plan_table(model, lines))
        output_console.print(detectable_line(chosen.name, found), soft_wrap=True)
    if lines and all(line["status"] == "impossible" for line in lines):
        raise typer.Exit(2)


def _with_search(
    track: Track, file: Path, named: bool, models: list[str] | None
) -> tuple[Track, dict[tuple[str, str], str]]:
    """The track with the best recipe of a search beside its cells, and the mark of that recipe.

    Without a track of that name, everything else is as in the search too.
    """
    from suite.models import load
    from suite.search import load_found

    found = load_found(file)
    spec, best = found.spec, found.ranked[0]
    for name in models or [spec.model]:
        if load.resolve(name).digest != spec.model_digest:
            raise InputError(f"search '{file}' was of another model than '{name}': search anew for this one.")
    cell = (best.recipe, str(spec.budget))
    changes: dict[str, object] = {"cells": (*track.cells, cell)}
    if not named:
        changes |= {
            "models": (spec.model,),
            "seeds": (spec.seed,),
            "calibration": str(spec.calibration),
            "healing": str(spec.healing) if spec.healing else None,
            "protocol": spec.protocol_given,
        }
    return track.model_copy(update=changes), {cell: found.digest}


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
