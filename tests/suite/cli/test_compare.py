from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from typer.testing import CliRunner

from suite.cli import app
from suite.records import RecordStore
from tests.suite import examples

RIGHT = np.arange(200) % 5 > 0


@pytest.fixture
def results(tmp_path: Path) -> str:
    store = RecordStore(tmp_path)
    store.save(examples.finished("dense", "none"), examples.item_rows(RIGHT))
    store.save(examples.finished("svd"), examples.item_rows(~RIGHT))
    store.save(examples.finished("rtn-int8", "bytes=0.55"), examples.item_rows(RIGHT))
    return str(tmp_path)


def compare(results: str, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["compare", "--results", results, *arguments])


def test_it_says_which_row_is_worse_and_which_is_not_told_apart(results: str) -> None:
    result = compare(results, "dense", "svd", "rtn-int8")
    assert result.exit_code == 0
    assert "svd@params=0.8 is worse than dense by 60.0 points [" in result.stdout
    assert "rtn-int8@bytes=0.55 is not told apart from dense in accuracy (+0.0 ± " in result.stdout
    assert "200 items, 1 task\n" in result.stdout
    assert "160 / 40" in result.stdout


def test_markdown_is_a_table_for_a_pull_request(results: str) -> None:
    text = compare(results, "dense", "svd", "--format", "md").stdout
    assert text.startswith("## ")
    assert "| svd@params=0.8 " in text


def test_json_carries_every_figure(results: str) -> None:
    found = json.loads(compare(results, "dense", "svd", "--json").stdout)
    line = found["comparisons"][0]
    assert found["confidence"] == 0.95
    assert line["accuracy_difference"]["estimate"] == pytest.approx(-0.6)
    assert (line["lost"], line["won"]) == (160, 40)
    assert line["tasks"][0]["p_adjusted"] < 0.001
    assert found["noise"] is None


def test_less_confidence_gives_a_shorter_interval(results: str) -> None:
    lengths = []
    for confidence in ("0.95", "0.8"):
        found = json.loads(compare(results, "dense", "svd", "--json", "--confidence", confidence).stdout)
        ends = found["comparisons"][0]["accuracy_difference"]
        lengths.append(ends["high"] - ends["low"])
    assert lengths[1] < lengths[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["dense"], "at least two"),
        (["dense", "svdd"], "Did you mean 'svd'?"),
        (["dense", "svd", "--format", "html"], "no format is called 'html'"),
        (["dense", "svd", "--confidence", "95"], "below 1"),
        (["dense", "svd", "--protocol", "exampel"], "Did you mean 'example'?"),
        (["dense", "svd", "--model", "tinny"], "Did you mean 'tiny'?"),
    ],
)
def test_bad_input_gets_one_message_and_exit_code_2(arguments: list[str], words: str, results: str) -> None:
    result = compare(results, *arguments)
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.split())
    assert "Traceback" not in result.output
