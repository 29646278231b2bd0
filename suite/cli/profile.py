"""`weighin profile`: what each part of a model bears, and a budget allocation made of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from suite.cli.common import (
    DEFAULT_RESULTS,
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
from suite.errors import InputError, nearest, require

if TYPE_CHECKING:
    from suite.sensitivity.measure import Profiler

GRANULARITIES = ("block", "role", "linear")
MEASURES = ("perplexity", "accuracy", "both")


@app.command()
@guarded
def profile(
    method: Annotated[str, typer.Option(help="method or method(knob=value) that can act on parts.")],
    model: Annotated[str, typer.Option(help="Hub id, local folder, GGUF file or alias.")] = "smollm2-135m",
    by: Annotated[str, typer.Option(help="What is compressed alone: block, role or linear.")] = "block",
    strength: Annotated[
        list[float] | None,
        typer.Option(help="Share of the part that stays; 0.75, 0.5, 0.25 if none. Repeatable."),
    ] = None,
    blocks: Annotated[str | None, typer.Option(help="Only these blocks, such as 0,5,15.")] = None,
    metric: Annotated[str, typer.Option(help="perplexity, accuracy or both.")] = "perplexity",
    protocol: Annotated[str, typer.Option(help="Protocol: its name or a YAML file.")] = "embedded",
    calibration: Annotated[str | None, typer.Option(help="NAME:COUNTxLENGTH, e.g. wikitext2:64x512.")] = None,
    held_back: Annotated[
        int, typer.Option(min=2, help="Sequences of the calibration's text kept for perplexity.")
    ] = 16,
    limit: Annotated[int | None, typer.Option(min=1, help="Items per task, for accuracy.")] = None,
    seed: Seed = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    results: Results = DEFAULT_RESULTS,
    data_dir: DataDir = None,
    plugin: Plugins = None,
    allocate: Annotated[
        str | None,
        typer.Option(metavar="BUDGET", help="Also spread this budget, such as params=0.8, over the linears."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Where the allocation goes.")] = None,
    plots: Annotated[bool, typer.Option(help="Draw the heat map and the curves over depth.")] = True,
    as_json: Json = False,
) -> None:
    """Compress one part of a model at a time and see what it costs in perplexity or accuracy.

    Points are kept in RESULTS/profiles as they are measured; the same command goes on from there.
    """
    from suite import data
    from suite.evaluate.harness import check_tasks
    from suite.models import load
    from suite.recipe import Recipe
    from suite.registry import load_plugin, origin
    from suite.run.runner import check_device
    from suite.sensitivity import measure, report
    from suite.sensitivity.allocate import allocate as allocated
    from suite.sensitivity.allocate import check_allocatable
    from suite.sensitivity.plots import draw
    from suite.sensitivity.profile import ProfileSpec, parts_of
    from suite.specs import Budget, CalibrationSpec, Protocol

    _one_of("--by", by, GRANULARITIES)
    _one_of("--metric", metric, MEASURES)
    plugins = {str(Path(p).expanduser().resolve()): load_plugin(p) for p in plugin or ()}
    chosen = measure.method_for(method, by)  # type: ignore[arg-type]
    strengths = measure.strengths_for(chosen, strength)
    counted = measure.metric_of(chosen)
    budget = Budget.parse(allocate) if allocate else None
    if budget is not None:
        check_allocatable(type(chosen), metric, budget, counted)
    settings = Protocol.load(protocol)
    sample = CalibrationSpec.parse(calibration) if calibration else settings.calibration
    data.check_learnt(sample.source, settings.perplexity.source)
    if metric != "perplexity":
        check_tasks(settings)
    check_device(device)
    if plots:
        require("matplotlib", "the heat map")
    source = load.resolve(model)
    anatomy = load.load_anatomy(source)
    parts = parts_of(anatomy, by, _numbers(blocks))  # type: ignore[arg-type]
    recipe = Recipe((chosen,))
    foreign = plugins.values() if origin(type(chosen)) in plugins else ()
    spec = ProfileSpec(
        model=source.name,
        model_digest=source.digest,
        method=str(recipe),
        method_versions=(*recipe.versions, *foreign),
        by=by,  # type: ignore[arg-type]
        measures=metric,  # type: ignore[arg-type]
        metric=counted,
        protocol=settings,
        calibration=sample,
        held_back=held_back,
        seed=seed,
        device=device,
        limit=limit,
    )
    path = spec.path(results)
    profiler = measure.Profiler(spec, source, chosen, anatomy, path, data.data_directory(data_dir))
    whole = _measured(profiler, lambda listener: profiler.run(parts, strengths, listener))
    found = whole.only(parts, strengths)
    trends = report.trends(found, parts, strengths)
    files = draw(found, parts, strengths, path) if plots else []
    extra: dict[str, Any] = {"file": str(path), "plots": [str(file) for file in files]}
    if budget is not None:
        allocation = allocated(whole, parts, anatomy, budget)
        target = output or results / "allocations" / f"{path.stem}-{budget}.json"
        _write(target, allocation.model_dump_json(indent=1))
        extra["allocation"] = str(target)
    extra["skipped"] = [vars(skipped) for skipped in profiler.skipped]
    if as_json:
        typer.echo(report.as_json(found, parts, trends, extra))
    else:
        for table in report.tables(found, parts, strengths):
            output_console.print(table)
        output_console.print(report.conditions_line(found), soft_wrap=True)
        for trend in trends:
            output_console.print(trend.sentence(), soft_wrap=True)
        console.print(f"Written: {', '.join([str(path), *extra['plots']])}", soft_wrap=True)
        if budget is not None:
            console.print(
                f"Allocation: {target}, predicted increase {allocation.predicted_increase:.4f} nats per"
                f" token. Next: weighin run --model {model} --budget {budget}"
                f" --recipe '{chosen.name}(shares={target})'",
                soft_wrap=True,
            )
    for skipped in profiler.skipped:
        console.print(f"[yellow]not measured:[/] {escape(skipped.reason)}", soft_wrap=True)
    if any(skipped.failed for skipped in profiler.skipped):
        raise typer.Exit(3)


def _measured(profiler: Profiler, run: Callable[[Callable[[str, int, int], None]], Any]) -> Any:
    """Run with a progress bar; Ctrl-C says what is kept."""
    try:
        with _bar() as listener:
            return run(listener)
    except KeyboardInterrupt:
        console.print(
            f"Stopped. What was measured is in {profiler.path}; the same command goes on from there.",
            soft_wrap=True,
        )
        raise typer.Exit(130) from None


@contextmanager
def _bar() -> Iterator[Callable[[str, int, int], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("dense", total=None)
        yield lambda what, done, total: progress.update(task, description=what, completed=done, total=total)


def _one_of(flag: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise InputError(f"{flag} {value}: use {', '.join(known)}.{nearest(value, known)}")


def _numbers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise InputError(
            f"--blocks {text}: write block numbers with commas between, such as 0,5,15."
        ) from None


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    except OSError as error:
        raise InputError(f"'{path}' cannot be written: {error.strerror}.") from None
