"""`weighin search` as a person meets it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from suite.cli import app
from suite.recipe import Recipe
from suite.search import Search
from tests.suite import examples


@pytest.fixture
def search(folder_of: Callable[[str], Path], tmp_path: Path) -> Callable[..., Result]:
    protocol = tmp_path / "tiny.yaml"
    protocol.write_text(examples.TINY_PROTOCOL)

    def run(*arguments: str) -> Result:
        shared = ["--model", str(folder_of("llama")), "--results", str(tmp_path), "--held-back", "2"]
        return CliRunner().invoke(app, ["search", *shared, "--protocol", str(protocol), *arguments])

    return run


def test_the_best_recipe_and_the_next_command_are_shown(
    search: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def figure(self: Search, recipe: Recipe, deadline: float) -> dict[str, Any]:
        return {"nll_per_token": 1.0 if str(recipe) == "rtn-int8" else 2.0, "params": 1, "bytes": 2}

    monkeypatch.setattr(Search, "_in_process", figure)
    arguments = ["--budget", "bytes=0.5", "--time", "5m", "--recipe", "rtn-int4", "--recipe", "rtn-int8"]
    shown = json.loads(search(*arguments, "--json").stdout)
    assert shown["best"]["recipe"] == "rtn-int8"
    assert [trial["status"] for trial in shown["trials"]] == ["ok", "ok"]
    assert f"weighin run --from-search {shown['file']}" in shown["next"]
    assert Path(shown["file"]).parent == tmp_path / "searches"
    table = " ".join(search(*arguments).stdout.split())
    assert "perplexity on 2 sequences of pydoc" in table
    assert "rtn-int8" in table


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--budget", "none"], "needs a budget"),
        (["--budget", "bytes=2"], "(0, 1]"),
        (["--budget", "bytes=0.5", "--time", "soon"], "Use 30m, 2h, 90s or 1h30m"),
        (["--budget", "bytes=0.5", "--recipe", "svdd"], "Did you mean 'svd'?"),
        (["--budget", "bytes=0.5", "--calibration", "pydoc-held-out:2x16"], "what models are scored on"),
        (["--budget", "bytes=0.01", "--recipe", "rtn-int4"], "no recipe could be measured"),
    ],
)
def test_a_wrong_input_is_told_in_one_line(
    search: Callable[..., Result], arguments: list[str], word: str
) -> None:
    result = search(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert word in " ".join(result.stderr.split())


def test_a_missing_optuna_names_the_install_command(
    search: Callable[..., Result], without: Callable[[str], None]
) -> None:
    without("optuna")
    result = search("--budget", "bytes=0.5")
    assert result.exit_code == 2
    assert "pip install 'weighin[search]'" in " ".join(result.stderr.split())


@pytest.mark.slow
def test_a_record_of_a_searched_recipe_says_so(search: Callable[..., Result], tmp_path: Path) -> None:
    found = json.loads(
        search("--budget", "bytes=0.5", "--recipe", "rtn-int8", "--time", "20m", "--json").stdout
    )
    command = ["run", "--from-search", found["file"], "--results", str(tmp_path), "--json"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    marks = {row["recipe"]: row.get("searched") for row in json.loads(result.stdout)}
    assert marks == {"dense": None, "rtn-int8": found["search"]}
