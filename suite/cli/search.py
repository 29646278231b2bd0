"""`weighin search`: the best stack of methods that a time's worth of trials can find for a budget."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

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
from suite.errors import InputError, require

if TYPE_CHECKING:
    from suite.models.anatomy import Anatomy
    from suite.search import Found

SHOWN = 10


@app.command()
@guarded
def search(
    budget: Annotated[str, typer.Option(help="params=0.8, bytes=0.25 or bytes=64MiB.")],
    model: Annotated[str, typer.Option(help="Hub id, local folder, GGUF file or alias.")] = "smollm2-135m",
    time: Annotated[str, typer.Option(help="How long: 30m, 2h, 90s or 1h30m.")] = "30m",
    recipe: Annotated[
        list[str] | None,
        typer.Option(help="Choose among these recipes only; every stack if none. Repeatable."),
    ] = None,
    protocol: Annotated[str, typer.Option(help="Protocol: its name or a YAML file.")] = "embedded",
    calibration: Annotated[str | None, typer.Option(help="NAME:COUNTxLENGTH, e.g. wikitext2:64x512.")] = None,
    healing: Annotated[
        str | None, typer.Option(help="What recipes that train are trained on: NAME:COUNTxLENGTH/BATCH.")
    ] = None,
    held_back: Annotated[
        int, typer.Option(min=1, help="Sequences of the calibration's text kept for perplexity.")
    ] = 16,
    seed: Seed = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    results: Results = DEFAULT_RESULTS,
    data_dir: DataDir = None,
    plugin: Plugins = None,
    as_json: Json = False,
) -> None:
    """Search the stack with the least perplexity for a budget; trials are kept in RESULTS/searches.

    Judged on text that no method learns from and no board is scored on. The same command goes on.
    """
    from suite import data, search
    from suite.models import load
    from suite.recipe import Recipe
    from suite.registry import load_plugin
    from suite.run.runner import check_device, training_text
    from suite.specs import Budget, CalibrationSpec, Protocol

    require("optuna", "weighin search")
    digests = [load_plugin(path) for path in plugin or ()]
    wanted, seconds = Budget.parse(budget), search.seconds_of(time)
    if wanted.metric == "none":
        raise InputError("a search needs a budget to search for, such as bytes=0.2 or params=0.8.")
    settings = Protocol.load(protocol)
    sample = CalibrationSpec.parse(calibration) if calibration else settings.calibration
    data.check_learnt(sample.source, settings.perplexity.source)
    check_device(device)
    candidates = [Recipe.parse(text) for text in recipe or ()]
    trained = any("training" in candidate.needs for candidate in candidates)
    text = training_text(healing, settings) if trained or healing or settings.healing else None
    kinds = {} if candidates else search.choices(text is not None, device)
    named = [name for names in kinds.values() for name in names]
    source = load.resolve(model)
    spec = search.SearchSpec(
        model=model,
        model_digest=source.digest,
        budget=wanted,
        protocol=settings,
        protocol_given=protocol,
        calibration=sample,
        healing=text,
        held_back=held_back,
        seed=seed,
        device=device,
        candidates=tuple(dict.fromkeys(map(str, candidates))),
        choices=kinds,
        versions=(
            *search.versions_of(named),
            *(version for candidate in candidates for version in candidate.versions),
            *digests,
        ),
    )
    anatomy = load.load_anatomy(source)
    folder = data.data_directory(data_dir)
    path = spec.path(results)
    job = search.Search(spec, source, anatomy, results, folder, tuple(plugin or ()))
    try:
        with console.status("Searching") as status:
            found = job.run(seconds, lambda what, so_far: status.update(_progress(what, so_far)))
    except KeyboardInterrupt:
        console.print(f"Stopped. What was tried is in {path}; the same command goes on from there.")
        raise typer.Exit(130) from None
    following = _next(found, path, results, data_dir, plugin) if found.ranked else None
    if as_json:
        trials = [trial.model_dump(mode="json") for trial in found.trials]
        best = found.ranked[0].model_dump(mode="json") if found.ranked else None
        shown: dict[str, Any] = {"search": found.digest, "file": str(path), "best": best, "next": following}
        typer.echo(json.dumps(shown | {"trials": trials}, indent=1))
    else:
        output_console.print(_table(found, anatomy))
    for trial in found.trials:
        if trial.status in ("failed", "slow"):
            told = escape(f"{trial.recipe}: {trial.reason}")
            console.print(f"[yellow]{trial.status}:[/] {told}", soft_wrap=True)
    impossible = sum(trial.status == "impossible" for trial in found.trials)
    console.print(
        f"{len(found.ranked)} measured, {impossible} impossible for {budget}. Kept: {path}", soft_wrap=True
    )
    if following is None:
        raise InputError(f"no recipe could be measured in {time}. Give it more --time or another --budget.")
    console.print(f"Next: {following}", soft_wrap=True)


def _progress(what: str, found: Found) -> str:
    best = f"; best so far {found.ranked[0].recipe}, {found.ranked[0].perplexity:.4g}" if found.ranked else ""
    return escape(f"Trying {what}{best}")


def _table(found: Found, anatomy: Anatomy) -> Table:
    spec = found.spec
    text = f"{spec.held_back} sequences of {spec.calibration.source}"
    title = f"{Path(spec.model).name} · {spec.budget} · perplexity on {text}"
    table = Table("recipe", "perplexity", "params", "bytes", "seconds", title=title)
    for trial in found.ranked[:SHOWN]:
        table.add_row(
            escape(trial.recipe),
            f"{trial.perplexity:.4g}",
            f"{(trial.params or 0) / anatomy.params:.4f}",
            f"{(trial.bytes or 0) / anatomy.bytes:.4f}",
            f"{trial.seconds:.1f}",
        )
    return table


def _next(found: Found, path: Path, results: Path, data_dir: str | None, plugins: list[str] | None) -> str:
    """The command that measures the best recipe for the board."""
    best, spec = found.ranked[0], found.spec
    words = ["weighin", "run", "--from-search", str(path), "--results", str(results)]
    if spec.device != "cpu":
        words += ["--device", spec.device]
    if data_dir:
        words += ["--data-dir", data_dir]
    for plugin in plugins or ():
        words += ["--plugin", plugin]
    return f"{shlex.join(words)}  (that is --recipe {shlex.quote(best.recipe)} --budget {spec.budget})"
