"""Findings and rankings as text for a terminal, as JSON-able values and as JUnit XML."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.markup import escape

from suite.conformance.findings import Finding
from suite.conformance.ranking import Ranking
from suite.conformance.trial import Examination

_MARKS = {"passed": "[green]✓[/]", "failed": "[bold red]✗[/]", "exempt": "[dim]–[/]"}


def text(examination: Examination, families: int) -> RenderableType:
    """The findings: offences and figures on lines of their own, the rest side by side."""
    failed = sum(finding.status == "failed" for finding in examination.findings)
    verdict = f"[bold red]{failed} checks failed[/]" if failed else "[green]all checks passed[/]"
    title = f"[bold]{escape(examination.subject.recipe)}[/] · {families} architectures · {verdict}"
    title += f" · {examination.seconds:.0f} s"
    told = [finding for finding in examination.findings if finding.details]
    short = [finding for finding in examination.findings if not finding.details]
    lines: list[RenderableType] = [title]
    lines += [_line(finding) for finding in told if finding.status != "failed"]
    if short:
        lines.append(Columns([f" {_MARKS[f.status]} {f.check.name}" for f in short], padding=(0, 3)))
    lines += [_line(finding) for finding in told if finding.status == "failed"]
    return Group(*lines)


def ranking_text(ranking: Ranking) -> str:
    """Where the method stands, in two or three lines."""
    partial = f", at most {ranking.limit} a task: partial" if ranking.limit else ""
    what = "items" if ranking.unit == "accuracy" else "windows of text"
    lines = [
        f"Against the baselines at {ranking.budget} on {escape(ranking.model)} ({ranking.protocol},"
        f" {ranking.items:,} {what}, paired{partial}):"
    ]
    if ranking.rank is None:
        lines.append(" no rank: it has no result, or nothing to compare with")
    else:
        low, high = ranking.rank
        place = f"rank {low}" if low == high else f"rank {low}–{high}"
        lines.append(f" {place} of {ranking.rows}; " + "; ".join(_sentences(ranking)))
    lines += [f" {escape(name)}: {escape(reason)}" for name, reason in ranking.failed.items()]
    return "\n".join(lines)


def as_json(examination: Examination, rankings: Sequence[Ranking]) -> dict[str, Any]:
    """Everything about one subject."""
    return {
        "method": examination.subject.recipe,
        "passed": examination.passed,
        "seconds": round(examination.seconds, 2),
        "checks": [
            {
                "name": finding.check.name,
                "sentence": finding.check.sentence,
                "status": finding.status,
                "details": list(finding.details),
            }
            for finding in examination.findings
        ],
        "rankings": [
            vars(ranking) | {"differences": [vars(difference) for difference in ranking.differences]}
            for ranking in rankings
        ],
    }


def junit(examinations: Sequence[Examination]) -> str:
    """JUnit XML: a suite per subject, a test case per check."""
    root = ElementTree.Element("testsuites", name="weighin validate")
    for examination in examinations:
        findings = examination.findings
        suite = ElementTree.SubElement(
            root,
            "testsuite",
            name=examination.subject.recipe,
            tests=str(len(findings)),
            failures=str(sum(finding.status == "failed" for finding in findings)),
            skipped=str(sum(finding.status == "exempt" for finding in findings)),
            time=f"{examination.seconds:.3f}",
        )
        for finding in findings:
            case = ElementTree.SubElement(
                suite,
                "testcase",
                classname=f"weighin.{examination.subject.recipe}",
                name=finding.check.name,
            )
            message = "; ".join(finding.details)
            if finding.status == "failed":
                failure = ElementTree.SubElement(case, "failure", message=message)
                failure.text = finding.check.sentence
            elif finding.status == "exempt":
                ElementTree.SubElement(case, "skipped", message=message)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _line(finding: Finding) -> str:
    separator = "\n     " if finding.status == "failed" else ", "
    details = separator.join(escape(detail) for detail in finding.details)
    return f" {_MARKS[finding.status]} {finding.check.name}: {details}"


def _sentences(ranking: Ranking) -> list[str]:
    better = [d for d in ranking.differences if d.low > 0]
    worse = [d for d in ranking.differences if d.high < 0]
    rest = [d for d in ranking.differences if d.low <= 0 <= d.high]
    scale, digits, unit = (100, 1, "points") if ranking.unit == "accuracy" else (1, 3, "nats a token")

    def by(*figures: float) -> str:
        estimate, low, high = (f"{scale * figure:.{digits}f}" for figure in figures)
        return f"{estimate} {unit} \\[{low}, {high}]"

    told = [f"better than {escape(d.other)} by {by(d.estimate, d.low, d.high)}" for d in better]
    told += [f"worse than {escape(d.other)} by {by(-d.estimate, -d.high, -d.low)}" for d in worse]
    if rest:
        halves = [f"{escape(d.other)} (±{scale * (d.high - d.low) / 2:.{digits}f})" for d in rest]
        told.append("not told apart from " + ", ".join(halves))
    return told
