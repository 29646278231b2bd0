"""The pytest fixtures, as a project with its own tests sees them."""

from __future__ import annotations

from pathlib import Path

import pytest

from suite.gate import gate, reports
from tests.suite.gate.examples import save_checkpoint, save_record

pytest_plugins = ["pytester"]

RIGHT = {"one": [1.0] * 400, "two": [1.0, 0.0] * 200}
WORSE = {"one": [0.0] * 400, "two": [0.0] * 400}
FEW = {"one": [1.0] * 20, "two": [1.0] * 20}
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module", autouse=True)
def _imported(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Import everything before pytester, which forgets modules that an inner run was the first to import."""
    folder = tmp_path_factory.mktemp("import")
    side = str(save_record(folder, FEW))
    reports.text(gate.run(gate.Settings(side, side)))


def project(
    pytester: pytest.Pytester, arguments: str, base: dict[str, list[float]], other: dict[str, list[float]]
) -> pytest.RunResult:
    """Run a project whose one test calls the gate."""
    baseline = save_record(pytester.path / "a", base)
    candidate = save_record(pytester.path / "b", other, recipe="svd")
    pytester.makepyfile(f"""
        def test_quality(weighin_gate):
            report = weighin_gate(baseline={str(baseline)!r}, candidate={str(candidate)!r}, {arguments})
            assert report.verdict == "pass"
    """)
    return pytester.runpytest_inprocess("-p", "suite.pytest_plugin", "-p", "no:cacheprovider", "-rs")


def test_a_candidate_that_keeps_its_quality_passes(pytester: pytest.Pytester) -> None:
    project(pytester, "max_drop=2.0, results='elsewhere'", RIGHT, RIGHT).assert_outcomes(passed=1)


def test_a_loss_fails_the_test_with_the_gates_own_text(pytester: pytest.Pytester) -> None:
    result = project(pytester, "max_drop=2.0", RIGHT, WORSE)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["gate: FAIL *lower bound of the drop*", "*items flipped*"])
    result.stdout.no_fnmatch_line("*Traceback*")


def test_an_undecided_gate_fails_unless_asked_to_skip(pytester: pytest.Pytester) -> None:
    project(pytester, "max_drop=2.0", FEW, FEW).assert_outcomes(failed=1)
    result = project(pytester, "max_drop=2.0, inconclusive='skip'", FEW, FEW)
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["*gate: INCONCLUSIVE*"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("max_drp=2.0", "*Did you mean 'max_drop'?*"),
        ("max_drop=0.0", "*must be above 0*"),
        ("inconclusive='ignore'", "*must be 'fail' or 'skip'*"),
        ("data_dir='nowhere'", "*does not exist*"),
        ("data_folder='nowhere'", "*has no setting 'data_folder'.*Did you mean 'data_dir'?*"),
        ("max_drop='much'", "*max_drop='much': *valid number*"),
        ("throughput='decoding'", "*throughput='decoding': *'prefill' or 'decode'*"),
    ],
)
def test_a_wrong_setting_is_one_message(pytester: pytest.Pytester, arguments: str, words: str) -> None:
    result = project(pytester, arguments, RIGHT, RIGHT)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines([words])


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_throughput_goes_through_pytest_benchmark(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    folder = save_checkpoint(pytester.path / "model")
    pytester.makepyfile(f"""
        def test_speed(weighin_throughput, benchmark):
            rate = weighin_throughput({str(folder)!r}, {phase!r})
            assert rate == benchmark.extra_info["tokens_per_s"] > 0
            assert len(benchmark.stats.stats.data) == 5
            assert benchmark.extra_info["phase"] == {phase!r}
    """)
    # pytest-benchmark measures nothing where xdist is at work.
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    arguments = ("-p", "suite.pytest_plugin", "-p", "no:cacheprovider", "-p", "no:xdist")
    pytester.runpytest_inprocess(*arguments).assert_outcomes(passed=1)


def test_a_misspelt_phase_is_not_taken_for_another(pytester: pytest.Pytester) -> None:
    folder = save_checkpoint(pytester.path / "model")
    pytester.makepyfile(f"""
        def test_speed(weighin_throughput):
            weighin_throughput({str(folder)!r}, "decoding")
    """)
    arguments = ("-p", "suite.pytest_plugin", "-p", "no:cacheprovider", "--benchmark-disable")
    result = pytester.runpytest_inprocess(*arguments)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*phase 'decoding' must be 'prefill' or 'decode'*"])


def test_throughput_without_benchmarks_runs_the_step_once(pytester: pytest.Pytester) -> None:
    folder = save_checkpoint(pytester.path / "model")
    pytester.makepyfile(f"""
        import math

        def test_speed(weighin_throughput):
            assert math.isnan(weighin_throughput({str(folder)!r}))
    """)
    arguments = ("-p", "suite.pytest_plugin", "-p", "no:cacheprovider", "--benchmark-disable")
    pytester.runpytest_inprocess(*arguments).assert_outcomes(passed=1)
