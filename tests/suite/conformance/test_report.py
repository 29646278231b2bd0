"""What a person and a CI system see of an examination and a ranking."""

from __future__ import annotations

from dataclasses import replace
from xml.etree import ElementTree

import pytest
from rich.console import Console

from suite.conformance import report
from suite.conformance.checks import CHECKS
from suite.conformance.findings import Finding, Outcome, summed
from suite.conformance.ranking import Difference, Ranking
from suite.conformance.trial import Examination, Subject

SLOW = "a forward takes 37 × the dense model's time"
FINDINGS = (
    Finding(CHECKS["budget met"], "passed", ("params 0.8 → 0.7996",)),
    Finding(CHECKS["deterministic"], "passed", ()),
    Finding(CHECKS["trains"], "exempt", ("no trainable parameters",)),
    Finding(CHECKS["not silently slow"], "failed", (f"{SLOW} (llama)",)),
)
EXAMINATION = Examination(Subject("my-svd"), FINDINGS, 3.2)
RANKING = Ranking(
    budget="params=0.8",
    model="tiny",
    protocol="embedded",
    items=1612,
    limit=None,
    rank=(2, 3),
    rows=4,
    differences=(
        Difference("svd", 0.062, 0.041, 0.083),
        Difference("layerchop", 0.01, -0.01, 0.03),
        Difference("dense", -0.1, -0.12, -0.08),
    ),
    failed={"random-layers": "timed out after 3 s"},
)


def shown(renderable: object) -> str:
    console = Console(width=150, highlight=False)
    with console.capture() as capture:
        console.print(renderable, soft_wrap=True)
    return capture.get()


def test_the_text_names_every_offence() -> None:
    text = shown(report.text(EXAMINATION, 5))
    assert "my-svd · 5 architectures · 1 checks failed" in text
    assert "✗ not silently slow: a forward takes 37 ×" in text
    assert "✓ budget met: params 0.8 → 0.7996" in text
    assert "– trains: no trainable parameters" in text


def test_a_ranking_says_rank_differences_with_intervals_and_what_cannot_be_told_apart() -> None:
    text = shown(report.ranking_text(RANKING))
    assert "Against the baselines at params=0.8 on tiny (embedded, 1,612 items, paired):" in text
    assert "rank 2–3 of 4; better than svd by 6.2 points [4.1, 8.3]" in text
    assert "worse than dense by 10.0 points [8.0, 12.0]" in text
    assert "not told apart from layerchop (±2.0)" in text
    assert "random-layers: timed out after 3 s" in text


def test_a_ranking_by_perplexity_says_so() -> None:
    text = shown(report.ranking_text(replace(RANKING, unit="nats", items=16)))
    assert "(embedded, 16 windows of text, paired):" in text
    assert "better than svd by 0.062 nats a token [0.041, 0.083]" in text
    assert "not told apart from layerchop (±0.020)" in text


def test_junit_counts_failures_and_carries_the_offence() -> None:
    suite = ElementTree.fromstring(report.junit([EXAMINATION])).find("testsuite")
    assert suite is not None
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("4", "1", "1")
    failure = suite.find("testcase/failure")
    assert failure is not None
    assert SLOW in failure.get("message", "")


def test_json_holds_checks_and_rankings() -> None:
    content = report.as_json(EXAMINATION, [RANKING])
    assert content["passed"] is False
    assert content["checks"][3]["status"] == "failed"
    assert content["rankings"][0]["differences"][0]["other"] == "svd"


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        (["passed", "failed"], "failed"),
        (["passed", "exempt"], "passed"),
        (["exempt"], "exempt"),
        ([], "exempt"),
    ],
)
def test_one_failing_family_fails_a_check_and_nothing_passes_unseen(
    statuses: list[str], expected: str
) -> None:
    outcomes = [Outcome("trains", f"family{i}", status, "x") for i, status in enumerate(statuses)]  # type: ignore[arg-type]
    assert summed(CHECKS["trains"], outcomes).status == expected


def test_equal_offences_of_several_families_are_told_once() -> None:
    outcomes = [Outcome("trains", family, "failed", "no") for family in ("llama", "opt")]
    assert summed(CHECKS["trains"], outcomes).details == ("no (llama, opt)",)


def test_every_check_has_a_sentence() -> None:
    assert all(check.sentence.endswith(".") for check in CHECKS.values())
