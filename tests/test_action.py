"""The GitHub action: its inputs are declared and used, and its steps do in a shell what they promise."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from suite.cli.gate import gate
from tests.suite.gate import examples
from tests.suite.gate.examples import save_checkpoint, save_record

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".github" / "actions" / "weighin"
RIGHT = {"one": [1.0] * 400, "two": [1.0, 0.0] * 200}
FEW = {"one": [1.0] * 20, "two": [1.0] * 20}


@pytest.fixture(scope="module")
def action() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((FOLDER / "action.yml").read_text())
    return content


def step_of(action: dict[str, Any], name: str) -> dict[str, Any]:
    return next(step for step in action["runs"]["steps"] if step["name"] == name)


def filled(text: str, inputs: dict[str, str]) -> str:
    return re.sub(r"\$\{\{ inputs\.([\w-]+) \}\}", lambda match: inputs[match[1]], text)


def run(action: dict[str, Any], tmp_path: Path, **inputs: str) -> tuple[int, str, str, str]:
    """The gate step as a runner would run it: exit code, verdict, job summary, log."""
    given = {name.replace("_", "-"): value for name, value in inputs.items()}
    values = {name: str(entry.get("default", "")) for name, entry in action["inputs"].items()} | given
    step = step_of(action, "Gate")
    (tmp_path / "bin").mkdir(exist_ok=True)
    (tmp_path / "output").write_text("")
    command = tmp_path / "bin" / "weighin"
    command.write_text(f"#!{sys.executable}\nfrom suite.cli import main\nmain()\n")
    command.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{command.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "GITHUB_OUTPUT": str(tmp_path / "output"),
        "GITHUB_STEP_SUMMARY": str(tmp_path / "job.md"),
        "WEIGHIN_CACHE_DIR": str(tmp_path / "cache"),
        **{name: filled(text, values) for name, text in step["env"].items()},
    }
    # What GitHub runs for `shell: bash`.
    shell = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
    done = subprocess.run(shell, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    verdict = re.search(r"^verdict=(.*)$", (tmp_path / "output").read_text(), re.MULTILINE)
    summary = tmp_path / "job.md"
    text = summary.read_text() if summary.is_file() else ""
    return done.returncode, verdict[1] if verdict else "", text, done.stdout + done.stderr


def test_every_input_is_described_and_used_and_nothing_else_is(action: dict[str, Any]) -> None:
    text = (FOLDER / "action.yml").read_text()
    used = set(re.findall(r"inputs\.([\w-]+)", text[text.index("\nruns:") :]))
    assert used == set(action["inputs"])
    assert all(entry["description"] for entry in action["inputs"].values())
    assert action["runs"]["using"] == "composite"
    assert all(step["shell"] == "bash" for step in action["runs"]["steps"])


def test_inputs_reach_the_shell_as_variables_only(action: dict[str, Any]) -> None:
    assert not any("${{" in step["run"] for step in action["runs"]["steps"])


def test_the_actions_flags_are_options_of_the_command(action: dict[str, Any]) -> None:
    options = {name.replace("_", "-") for name in gate.__wrapped__.__annotations__}
    others = {"inconclusive", "install-from"}
    assert set(action["inputs"]) - others <= options


def test_the_documented_workflow_is_valid_and_uses_declared_inputs(action: dict[str, Any]) -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", (FOLDER / "README.md").read_text(), re.DOTALL)
    steps = yaml.safe_load(block)["jobs"]["gate"]["steps"]
    (used,) = [step for step in steps if step.get("uses") == "./.github/actions/weighin"]
    assert set(used["with"]) <= set(action["inputs"])
    assert {name for name, entry in action["inputs"].items() if entry.get("required")} <= set(used["with"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("candidate", "inconclusive", "code", "verdict"),
    [
        (RIGHT, "fail", 0, "pass"),
        ({"one": [0.0] * 400, "two": [0.0] * 400}, "fail", 1, "fail"),
        (FEW, "fail", 4, "inconclusive"),
        (FEW, "pass", 0, "inconclusive"),
    ],
)
def test_the_step_gives_verdict_summary_and_junit(
    action: dict[str, Any],
    candidate: dict[str, list[float]],
    inconclusive: str,
    code: int,
    verdict: str,
    tmp_path: Path,
) -> None:
    base = save_record(tmp_path / "a", FEW if candidate is FEW else RIGHT)
    found = run(
        action,
        tmp_path,
        baseline=str(base),
        candidate=str(save_record(tmp_path / "b", candidate, recipe="svd")),
        max_drop="2",
        inconclusive=inconclusive,
    )
    assert found[:2] == (code, verdict), found[3]
    assert verdict.upper() in found[2]
    ElementTree.parse(tmp_path / "weighin-gate.xml")
    assert (tmp_path / "weighin-gate.md").read_text() == found[2]


@pytest.mark.slow
def test_the_step_judges_checkpoints_and_runs_no_text_of_an_input(
    action: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "p.yaml").write_text(examples.PROTOCOL_FILE)
    base = save_checkpoint(tmp_path / "base; touch stolen; $(touch stolen)")
    candidate = save_checkpoint(tmp_path / "copy")
    shared = {"baseline": str(base), "protocol": "p.yaml", "max_drop": "40"}
    code, verdict, _, log = run(action, tmp_path, candidate=str(candidate), **shared)
    assert (code, verdict) == (0, "pass"), log
    assert not (tmp_path / "stolen").exists()
    code, verdict, _, log = run(action, tmp_path, candidate="nowhere.json", **shared)
    assert (code, verdict) == (2, "")
    assert "does not exist" in log
