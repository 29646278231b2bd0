"""`weighin gate`: exit codes, files and messages."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import Result
from typer.testing import CliRunner

from suite.cli import app
from tests.suite.gate.examples import save_record

RIGHT = {"one": [1.0] * 400, "two": [1.0, 0.0] * 200}
FEW = {"one": [1.0] * 20, "two": [1.0] * 20}


def gate(baseline: Path, candidate: Path, *more: str) -> Result:
    arguments = ["gate", "--baseline", str(baseline), "--candidate", str(candidate), *more]
    return CliRunner().invoke(app, arguments)


@pytest.fixture(autouse=True)
def _no_summary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)


@pytest.mark.parametrize(
    ("base", "candidate", "code", "verdict"),
    [
        (RIGHT, RIGHT, 0, "pass"),
        (RIGHT, {"one": [0.0] * 400, "two": [0.0] * 400}, 1, "fail"),
        (FEW, FEW, 4, "inconclusive"),
    ],
)
def test_each_verdict_has_its_exit_code_and_writes_every_file(
    base: dict[str, list[float]],
    candidate: dict[str, list[float]],
    code: int,
    verdict: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    junit, summary, step = tmp_path / "new" / "j.xml", tmp_path / "s.md", tmp_path / "step.md"
    step.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(step))
    one = save_record(tmp_path / "a", base)
    two = save_record(tmp_path / "b", candidate, recipe="svd")
    result = gate(one, two, "--max-drop", "2", "--junit", str(junit), "--summary", str(summary))
    assert result.exit_code == code, result.output
    assert result.stdout.startswith(f"gate: {verdict.upper()}  accuracy ")
    ElementTree.parse(junit)
    assert verdict.upper() in summary.read_text()
    assert step.read_text() == "before\n" + summary.read_text()


def test_json_on_standard_output_is_the_whole_report(tmp_path: Path) -> None:
    one, two = save_record(tmp_path / "a", RIGHT), save_record(tmp_path / "b", RIGHT, recipe="svd")
    result = gate(one, two, "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 0
    assert found["verdict"] == "pass"
    assert found["criteria"][0]["limit"] == 1.0
    assert found["items_used"] < found["items_available"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--max-drop", "0"], "--max-drop 0 must be above 0"),
        (["--throughput", "both"], "must be prefill or decode"),
        (["--protocol", "embeded"], "Did you mean 'embedded'?"),
        (["--min-throughput-ratio", "0.9"], "needs both models"),
        (["--junit", "{folder}"], "cannot be written"),
        (["--device", "cuda:9"], "no device 'cuda:9'"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(flags: list[str], words: str, tmp_path: Path) -> None:
    one, two = save_record(tmp_path / "a", RIGHT), save_record(tmp_path / "b", RIGHT, recipe="svd")
    result = gate(one, two, *(flag.format(folder=tmp_path) for flag in flags))
    message = " ".join(result.stderr.split())
    assert result.exit_code == 2, result.output
    assert message.startswith("error: ")
    assert words in message
    assert "Traceback" not in result.output


def test_an_unknown_side_names_what_it_might_be(tmp_path: Path) -> None:
    one = save_record(tmp_path / "a", RIGHT)
    assert "does not exist" in gate(one, tmp_path / "nowhere.json").stderr
    assert "Did you mean 'smollm2-135m'" in " ".join(gate(Path("smolm2-135m"), one).stderr.split())
