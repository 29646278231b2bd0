"""pytest plug-in: guard a model, or check a method, in the tests of another project.

Name it in the project's `conftest.py` (`pytest_plugins = ["suite.pytest_plugin"]`) or as `pytest -p
suite.pytest_plugin`. It is not loaded by itself: a test run that does not ask for it has none of its
options.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest

if TYPE_CHECKING:
    from suite.gate.gate import Report

GateFixture = Callable[..., "Report"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--weighin-method FILE|NAME` for the tests of `suite.conformance`."""
    parser.getgroup("weighin").addoption(
        "--weighin-method",
        action="append",
        metavar="FILE|NAME",
        help="Method for suite.conformance to check: a plug-in file, a name or a recipe. Repeatable;"
        " all installed methods when not given.",
    )


@pytest.fixture(scope="session")
def weighin_gate() -> GateFixture:
    """Gives a function with the settings of `weighin gate` as keywords; returns the report of a PASS.

    `weighin_gate(baseline="results/records/prod", candidate="build/checkpoint", max_drop=1.0)` fails the
    test with the gate's own text on FAIL. An inconclusive gate fails it too, or skips it when asked to
    with `inconclusive="skip"`. Wrong settings fail with their one message.
    """
    return _judge


def _judge(
    baseline: str | Path,
    candidate: str | Path,
    *,
    inconclusive: Literal["fail", "skip"] = "fail",
    data_dir: str | Path | None = None,
    **criteria: Any,
) -> Report:
    __tracebackhide__ = True
    from dataclasses import fields

    from pydantic import TypeAdapter, ValidationError

    from suite.data import data_directory
    from suite.errors import WeighinError, nearest
    from suite.gate.gate import Settings, run
    from suite.gate.reports import text

    if inconclusive not in ("fail", "skip"):
        pytest.fail(f"weighin_gate: inconclusive='{inconclusive}' must be 'fail' or 'skip'.", pytrace=False)
    known = ["data_dir", *(field.name for field in fields(Settings) if field.name != "data_folder")]
    for name in criteria:
        if name not in known:
            hint = nearest(name, known)
            pytest.fail(f"weighin_gate has no setting '{name}'.{hint}  ({', '.join(known)})", pytrace=False)
    try:
        folder = data_directory(data_dir)
        sides = {"baseline": str(baseline), "candidate": str(candidate)}
        settings = TypeAdapter(Settings).validate_python({**sides, **criteria, "data_folder": folder})
        report = run(settings)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        pytest.fail(f"weighin_gate: {where}={first['input']!r}: {first['msg']}.", pytrace=False)
    except WeighinError as error:
        pytest.fail(f"weighin_gate: {error}", pytrace=False)
    if report.verdict == "inconclusive" and inconclusive == "skip":
        pytest.skip(text(report).partition("\n")[0])
    if report.verdict != "pass":
        pytest.fail(text(report), pytrace=False)
    return report


@pytest.fixture
def weighin_throughput(request: pytest.FixtureRequest) -> Callable[..., float]:
    """Gives a function that times prefill or decode of a model through pytest-benchmark.

    `weighin_throughput("build/checkpoint", "decode")` runs one step of the protocol's shape per benchmark
    round, adds tokens per step and per second to the benchmark's `extra_info`, and returns the median
    tokens per second. The first argument is a checkpoint folder, a model's name or a loaded model.
    """
    if not request.config.pluginmanager.hasplugin("benchmark"):
        pytest.fail("weighin_throughput needs pytest-benchmark: pip install pytest-benchmark", pytrace=False)
    benchmark: Any = request.getfixturevalue("benchmark")

    def measure(
        model: Any,
        phase: Literal["prefill", "decode"] = "decode",
        *,
        protocol: str = "embedded",
        device: str = "cpu",
    ) -> float:
        __tracebackhide__ = True
        from suite.errors import WeighinError
        from suite.gate.measured import load_side
        from suite.measure import speed
        from suite.models.load import resolve
        from suite.specs import Protocol

        try:
            chosen = Protocol.load(protocol)
            loaded = (
                load_side(resolve(str(model)), device, chosen) if isinstance(model, str | Path) else model
            )
        except WeighinError as error:
            pytest.fail(f"weighin_throughput: {error}", pytrace=False)
        if phase not in ("prefill", "decode"):
            pytest.fail(f"weighin_throughput: phase '{phase}' must be 'prefill' or 'decode'.", pytrace=False)
        if phase == "prefill":
            forward, tokens = speed.prefill_step(loaded, chosen.speed)
            prepare: Callable[[], tuple[Any, ...]] = tuple
            step: Callable[..., None] = forward
        else:
            read, step, tokens = speed.decode_step(loaded, chosen.speed)
            prepare = lambda: (read(),)  # noqa: E731

        def timed(*prepared: Any) -> None:
            step(*prepared)
            speed.synchronize(loaded)

        rounds = chosen.speed.repeats
        benchmark.pedantic(timed, setup=lambda: (prepare(), {}), rounds=rounds, warmup_rounds=1)
        if benchmark.stats is None:  # benchmarks are disabled; the step has run once
            return float("nan")
        rate = tokens / float(benchmark.stats.stats.median)
        benchmark.extra_info.update(phase=phase, tokens_per_step=tokens, tokens_per_s=rate)
        return rate

    return measure
