"""`weighin validate` and `new-method`: whether a method keeps the rules, and a first file of one's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from suite.cli.common import DataDir, Json, Results, app, console, guarded, output_console
from suite.errors import InputError


@app.command()
@guarded
def validate(
    what: Annotated[
        str, typer.Argument(metavar="FILE|NAME", help="Plug-in file, method or recipe to examine.")
    ],
    no_rank: Annotated[bool, typer.Option("--no-rank", help="Only the checks, no ranking.")] = False,
    model: Annotated[str, typer.Option(help="Model to rank on.")] = "smollm2-135m",
    protocol: Annotated[str, typer.Option(help="Protocol to rank under.")] = "embedded",
    budget: Annotated[
        list[str] | None, typer.Option(help="Budget to rank at: params=0.8 or bytes=0.45. Repeatable.")
    ] = None,
    against: Annotated[
        list[str] | None, typer.Option(help="Recipe to rank against; all baselines if none. Repeatable.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=2, help="Items per task.")] = None,
    results: Results = Path("validate"),
    data_dir: DataDir = None,
    junit: Annotated[Path | None, typer.Option(help="Also write the checks as JUnit XML.")] = None,
    as_json: Json = False,
) -> None:
    """Check a method on tiny models of every family, then rank it against the baselines on a real one.

    Exit code 1 when a check failed, 3 when a cell of the ranking did. `--results results` uses baseline rows
    that are there already.
    """
    from suite import data
    from suite.conformance import ranking, report, tiny
    from suite.conformance.trial import examine, subjects_of
    from suite.models.load import resolve
    from suite.recipe import Recipe
    from suite.run.display import Display
    from suite.run.runner import Grid, Options
    from suite.specs import Budget, Protocol, Track

    subjects = subjects_of(what)
    options = Options(results=results, data_folder=data.data_directory(data_dir))
    if not no_rank:  # what a user may have got wrong is found before the checks are run
        try:
            resolve(model)
        except InputError as error:
            raise InputError(f"{error}  (--no-rank runs the checks alone.)") from None
        Protocol.load(protocol)
        for text in budget or ():
            Budget.parse(text)
        for text in against or ():
            Recipe.parse(text)

    def run(grid: Grid) -> None:
        with Display(console, grid.cells) as display:
            grid.run(display.update)

    reports, examinations = [], []
    broken = False
    for subject in subjects:
        with console.status(f"Checking {subject.recipe}"):
            examination = examine(subject)
        examinations.append(examination)
        if not as_json:
            output_console.print(report.text(examination, len(tiny.FAMILIES)))
        rankings: list[ranking.Ranking] = []
        budgets = budget or ranking.default_budgets(subject)
        if not no_rank and budgets and examination.passed:
            track = Track(models=(model,), budgets=tuple(budgets), protocol=protocol, limit=limit)
            rankings = ranking.rank(subject, track, options, against, run)
            broken = broken or any(entry.broken for entry in rankings)
            if not as_json:
                for entry in rankings:
                    output_console.print(report.ranking_text(entry), soft_wrap=True)
        elif not no_rank and not as_json:
            why = "it acts on no budget" if examination.passed else "a check failed"
            output_console.print(f"Not ranked: {why}.")
        reports.append(report.as_json(examination, rankings))
    if as_json:
        typer.echo(json.dumps(reports, indent=1, ensure_ascii=False))
    if junit is not None:
        try:
            junit.write_text(report.junit(examinations))
        except OSError as error:
            raise InputError(f"'{junit}' cannot be written: {error.strerror}.") from None
    if not all(examination.passed for examination in examinations):
        raise typer.Exit(1)
    if broken:
        raise typer.Exit(3)


@app.command("new-method")
@guarded
def new_method(
    name: Annotated[str, typer.Argument(help="Name of the method, such as my-svd.")],
    folder: Annotated[Path, typer.Option(help="Where the two files go.")] = Path(),
) -> None:
    """Write a small working method and its tests, to start from."""
    from suite.conformance.new_method import write

    method, test = write(name, folder)
    console.print(f"Written: {method} and {test}")
    console.print(f"Next: weighin validate {method}   or   pytest {test}", soft_wrap=True)
