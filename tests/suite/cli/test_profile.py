"""`weighin profile` as a person meets it."""

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
from suite.sensitivity.measure import Profiler
from suite.shares import load_allocation

SMALL = ("--calibration", "pydoc:2x16", "--held-back", "3")


@pytest.fixture
def profile(folder_of: Callable[[str], Path], tmp_path: Path) -> Callable[..., Result]:
    def run(*arguments: str) -> Result:
        shared = ["--model", str(folder_of("llama")), "--results", str(tmp_path), *SMALL]
        return CliRunner().invoke(app, ["profile", *shared, *arguments])

    return run


def test_a_profile_is_shown_drawn_and_kept(profile: Callable[..., Result], tmp_path: Path) -> None:
    result = profile("--method", "svd", "--strength", "0.5")
    assert result.exit_code == 0, result.output
    for word in ("block 3", "keeps 0.5", "nats per token", "Spearman"):
        assert word in result.stdout
    assert sorted(file.suffix for file in (tmp_path / "profiles").iterdir()) == [".json", ".png", ".png"]


def test_json_alone_goes_to_standard_output_and_a_second_call_says_the_same(
    profile: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--method", "svd", "--by", "role", "--strength", "0.5", "--no-plots", "--json")
    first = json.loads(profile(*arguments).stdout)
    assert [point["part"] for point in first["points"]] == [
        "query",
        "key",
        "value",
        "output",
        "gate",
        "up",
        "down",
    ]
    assert first["plots"] == []

    def never(*_: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(Profiler, "_compressed", never)
    assert json.loads(profile(*arguments).stdout) == first


def test_an_allocation_can_be_run(profile: Callable[..., Result], tmp_path: Path) -> None:
    target = tmp_path / "mine.json"
    result = profile("--method", "svd", "--no-plots", "--allocate", "params=0.8", "--output", str(target))
    assert result.exit_code == 0, result.output
    assert f"svd(shares={target})" in " ".join(result.stderr.split())
    assert load_allocation(target).budget == "params=0.8"
    assert Recipe.parse(f"svd(shares={target})").versions[0] == "svd@1"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "svd", "--by", "blok"], "use block, role, linear. Did you mean 'block'?"),
        (["--method", "svd", "--metric", "loss"], "use perplexity, accuracy, both"),
        (["--method", "svd", "--blocks", "0,x"], "write block numbers with commas"),
        (["--method", "svd", "--blocks", "9"], "this model has blocks 0 to 3"),
        (["--method", "svdd"], "Did you mean 'svd'?"),
        (["--method", "dense"], "Methods that can:"),
        (["--method", "svd", "--strength", "2"], "lies between 0 and 1"),
        (["--method", "svd", "--allocate", "bytes=0.5"], "this profile counts params"),
        (["--method", "svd", "--metric", "accuracy", "--allocate", "params=0.8"], "never tunes on items"),
        (["--method", "svd", "--calibration", "pydoc-held-out:2x16"], "what models are scored on"),
        (["--method", "svd", "--calibration", "pydoc:9x60000"], "holds only"),
    ],
)
def test_wrong_input_gets_one_message(
    profile: Callable[..., Result], arguments: list[str], words: str
) -> None:
    result = profile(*arguments)
    message = " ".join(result.stderr.split())
    assert result.exit_code == 2, result.output
    assert message.startswith("error: ")
    assert words in message


def test_a_stop_says_what_is_kept(profile: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    original = Profiler._compressed

    def stopped(self: Profiler, part: Any, plan: Any) -> Any:
        if part.block == 1:
            raise KeyboardInterrupt
        return original(self, part, plan)

    monkeypatch.setattr(Profiler, "_compressed", stopped)
    result = profile("--method", "svd", "--strength", "0.5", "--no-plots")
    assert result.exit_code == 130
    assert "the same command goes on from there" in " ".join(result.stderr.split())


def test_a_point_that_breaks_is_named_and_the_exit_code_says_so(
    profile: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Profiler._compressed

    def breaks(self: Profiler, part: Any, plan: Any) -> Any:
        if part.block == 1:
            raise RuntimeError("no luck")
        return original(self, part, plan)

    monkeypatch.setattr(Profiler, "_compressed", breaks)
    result = profile("--method", "svd", "--strength", "0.5", "--no-plots")
    assert result.exit_code == 3
    assert "not measured: block 1 at 0.5: RuntimeError: no luck" in " ".join(result.stderr.split())


def test_missing_matplotlib_is_said_before_anything_is_measured(
    profile: Callable[..., Result], without: Callable[[str], None]
) -> None:
    without("matplotlib")
    result = profile("--method", "svd", "--strength", "0.5")
    assert result.exit_code == 2
    assert "pip install 'weighin[plots]'" in " ".join(result.stderr.split())
