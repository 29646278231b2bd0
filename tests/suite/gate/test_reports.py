"""What people and machines read after the gate."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from suite.gate import reports
from suite.gate.criteria import Criterion
from suite.gate.gate import BaseMove, Flip, Report, TaskMove
from suite.gate.sequential import Verdict


def report(*verdicts: Verdict, flips: int = 12) -> Report:
    found = [
        Criterion(name=f"criterion-{i}", verdict=v, text=f"figure {i} < limit & so on", limit=1.0)
        for i, v in enumerate(verdicts)
    ]
    return Report(
        verdict="fail" if "fail" in verdicts else "inconclusive" if "inconclusive" in verdicts else "pass",
        baseline="dense",
        candidate="small",
        protocol="embedded",
        criteria=tuple(found),
        tasks=(
            TaskMove(task="steady", items=50, base=60.0, candidate=60.0, lost=2, gained=2),
            TaskMove(task="science", items=50, base=60.0, candidate=40.0, lost=12, gained=2),
        ),
        flips=tuple(
            Flip(
                task="science",
                subtask="science",
                item=f"science-{i:03}",
                base="1",
                candidate="a | long\nanswer " * 9 + "\x1b",
                target="1",
                lost=i < 7,
            )
            for i in range(flips)
        ),
        base_move=BaseMove(points=-0.4, changed=3, items=100),
        notices=("a notice",),
        commands=("weighin gate --baseline dense", "weighin run --model small"),
    )


def test_a_pass_is_one_line_per_criterion_and_the_notes() -> None:
    lines = reports.text(report("pass", "pass")).splitlines()
    assert lines[0] == "gate: PASS  figure 0 < limit & so on"
    assert lines[1].strip() == "figure 1 < limit & so on"
    assert "a notice" in lines[2]
    assert "the base itself moved by -0.40 points since its record (3 of 100 items changed)" in lines[3]
    assert len(lines) == 4


@pytest.mark.parametrize("verdict", ["fail", "inconclusive"])
def test_anything_else_says_what_moved_which_items_flipped_and_how_to_see_it_again(verdict: Verdict) -> None:
    found = reports.text(report("pass", verdict))
    assert found.startswith(f"gate: {verdict.upper()}  [pass] figure 0")
    assert found.index("science  ") < found.index("steady  ")
    assert "12 items flipped, 7 of them lost; the first 10:" in found
    assert "science-009" in found
    assert "science-010" not in found
    assert found.splitlines()[-2:] == ["  weighin gate --baseline dense", "  weighin run --model small"]


def test_markdown_keeps_its_tables_whole_whatever_a_model_answers() -> None:
    found = reports.markdown(report("fail"))
    assert found.startswith("### Weigh-in gate: FAIL")
    table = [line for line in found.splitlines() if line.startswith("| science | science-")]
    assert len(table) == 10
    assert {line.count("|") for line in table} == {7}
    assert "```\nweighin gate --baseline dense\n" in found


def test_junit_has_one_case_per_criterion_and_counts_the_undecided_as_errors() -> None:
    root = ElementTree.fromstring(reports.junit(report("pass", "fail", "inconclusive")))
    (suite,) = root
    assert {key: suite.get(key) for key in ("tests", "failures", "errors", "skipped")} == {
        "tests": "3",
        "failures": "1",
        "errors": "1",
        "skipped": "0",
    }
    kinds = [[child.tag for child in case] for case in suite]
    assert kinds == [["system-out"], ["failure", "system-out"], ["error", "system-out"]]
    assert suite[1][0].get("message") == "figure 1 < limit & so on"
    assert "science-003" in (suite[1][0].text or "")


def test_a_report_survives_json() -> None:
    before = report("pass", "inconclusive")
    assert Report.model_validate_json(before.model_dump_json()) == before
