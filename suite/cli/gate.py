"""`weighin gate`: whether a candidate keeps what a baseline can do. Exit codes 0 pass, 1 fail, 4 neither."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from suite.cli.common import (
    DEFAULT_RESULTS,
    DataDir,
    Json,
    Plugins,
    Results,
    app,
    guarded,
    output_console,
)
from suite.errors import InputError

EXIT_CODES = {"pass": 0, "fail": 1, "inconclusive": 4}
_SIDE = "a record (file, id, or folder holding exactly one), a checkpoint folder, or a model"


@app.command()
@guarded
def gate(
    baseline: Annotated[str, typer.Option(help=f"What must be kept: {_SIDE}.")],
    candidate: Annotated[str, typer.Option(help=f"What is to be judged: {_SIDE}.")],
    max_drop: Annotated[
        float | None,
        typer.Option(help="Points of accuracy that may be lost (1.0 when no criterion is given)."),
    ] = None,
    max_perplexity_ratio: Annotated[
        float | None, typer.Option(help="Perplexity over the baseline's, e.g. 1.05.")
    ] = None,
    max_size_ratio: Annotated[
        float | None, typer.Option(help="Bytes of weights over the baseline's, e.g. 1.0.")
    ] = None,
    max_memory_ratio: Annotated[
        float | None, typer.Option(help="Peak memory over the baseline's, e.g. 1.1.")
    ] = None,
    min_throughput_ratio: Annotated[
        float | None,
        typer.Option(help="Tokens per second over the baseline's, e.g. 0.9 (needs both models)."),
    ] = None,
    throughput: Annotated[str, typer.Option(help="Which throughput: prefill or decode.")] = "decode",
    protocol: Annotated[
        str | None, typer.Option(help="Protocol; that of the record, else embedded, when not given.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most this many items per task.")] = None,
    alpha: Annotated[float, typer.Option(help="Chance of a wrong verdict that is allowed.")] = 0.05,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    junit: Annotated[Path | None, typer.Option(help="Write JUnit XML to this file.")] = None,
    summary: Annotated[Path | None, typer.Option(help="Write Markdown to this file.")] = None,
    results: Results = DEFAULT_RESULTS,
    data_dir: DataDir = None,
    plugin: Plugins = None,
    as_json: Json = False,
) -> None:
    """Judge a candidate against a baseline: pass (exit code 0), fail (1) or inconclusive (4)."""
    from suite import data
    from suite.gate import reports
    from suite.gate.gate import Settings, run

    if throughput not in ("prefill", "decode"):
        raise InputError(f"--throughput '{throughput}' must be prefill or decode.")
    settings = Settings(
        baseline=baseline,
        candidate=candidate,
        max_drop=max_drop,
        max_perplexity_ratio=max_perplexity_ratio,
        max_size_ratio=max_size_ratio,
        max_memory_ratio=max_memory_ratio,
        min_throughput_ratio=min_throughput_ratio,
        throughput="prefill" if throughput == "prefill" else "decode",
        protocol=protocol,
        limit=limit,
        alpha=alpha,
        device=device,
        results=results,
        data_folder=data.data_directory(data_dir),
        plugins=tuple(plugin or ()),
    )
    # Bound to the present standard error: libraries' own progress bars are redirected while it shows.
    with Console(file=sys.stderr, highlight=False).status("Comparing") as status:
        report = run(
            settings,
            lambda used, available, decision: status.update(
                f"{used:,} of {available:,} items, drop {100 * decision.drop:+.2f} points so far"
            ),
        )
    for file, content in ((junit, reports.junit), (summary, reports.markdown)):
        if file is not None:
            _write(file, content(report))
    if step_summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        _write(Path(step_summary), reports.markdown(report), append=True)
    if as_json:
        typer.echo(report.model_dump_json(indent=1))
    else:
        colour = reports.COLOURS[report.verdict]
        first, _, rest = reports.text(report).partition("\n")
        console_text = f"[bold {colour}]{escape(first)}[/]" + (f"\n{escape(rest)}" if rest else "")
        output_console.print(console_text, soft_wrap=True)
    raise typer.Exit(EXIT_CODES[report.verdict])


def _write(file: Path, content: str, append: bool = False) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a" if append else "w", encoding="utf-8") as out:
            out.write(content)
    except OSError as error:
        raise InputError(f"'{file}' cannot be written: {error.strerror}.") from None
