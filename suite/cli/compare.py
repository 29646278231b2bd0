"""`weighin compare`: paired statistics of two or more records."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from suite.cli.common import DEFAULT_RESULTS, Json, Results, app, guarded
from suite.errors import InputError, nearest


@app.command()
@guarded
def compare(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="A B [C ...]",
            help="Records: a file, an id or its beginning, RECIPE@BUDGET, RECIPE; the first is the reference",
        ),
    ],
    results: Results = DEFAULT_RESULTS,
    model: Annotated[str | None, typer.Option(help="Look among the records of this model.")] = None,
    protocol: Annotated[str | None, typer.Option(help="Look among the records of this protocol.")] = None,
    device: Annotated[str | None, typer.Option(help="Look among the records of this device.")] = None,
    confidence: Annotated[float, typer.Option(help="Confidence of all intervals together.")] = 0.95,
    format: Annotated[str, typer.Option(help="text or md.")] = "text",
    as_json: Json = False,
) -> None:
    """Compare records with the first one named, item by item: which differences are real?"""
    from suite.board.comparison import FORMATS
    from suite.board.tables import finite
    from suite.compare import choose
    from suite.compare import compare as compared
    from suite.records import RecordStore

    if format not in FORMATS:
        raise InputError(f"no format is called '{format}'.{nearest(format, FORMATS)}  ({', '.join(FORMATS)})")
    if not 0.5 <= confidence < 1:
        raise InputError(f"--confidence {confidence:g}: it must be at least 0.5 and below 1, such as 0.95.")
    store = RecordStore(results)
    result = compared([choose(store, name, model, protocol, device) for name in names], confidence)
    if as_json:
        typer.echo(json.dumps(finite(result), indent=1, ensure_ascii=False))
    else:
        typer.echo(FORMATS[format](result), nl=False)
