"""The verdict as text, as Markdown for a pull request, and as JUnit XML."""

from __future__ import annotations

from xml.etree import ElementTree

from tabulate import tabulate

from suite.gate.gate import Report

FLIPS_SHOWN = 10
COLOURS = {"pass": "green", "fail": "red", "inconclusive": "yellow"}


def text(report: Report) -> str:
    """One line per criterion; unless all passed, also what moved and how to see it again."""
    lines = []
    for index, criterion in enumerate(report.criteria):
        head = f"gate: {report.verdict.upper()}  " if index == 0 else " " * (8 + len(report.verdict))
        mark = "" if criterion.verdict == report.verdict else f"[{criterion.verdict}] "
        lines.append(f"{head}{mark}{criterion.text}")
        if criterion.reason:
            lines.append(f"      {criterion.reason}")
    lines += [f"      note: {notice}" for notice in notes(report)]
    if report.verdict == "pass":
        return "\n".join(lines)
    if report.tasks:
        lines += ["", _tasks(report, "plain")]
    if report.flips:
        lines += ["", _flips_title(report), _flips(report, "plain")]
    lines += ["", "Again, and the candidate in full:", *(f"  {command}" for command in report.commands)]
    return "\n".join(lines)


def markdown(report: Report) -> str:
    """The same for a pull request."""
    rows = [(c.name, c.verdict, "; ".join(filter(None, (c.text, c.reason)))) for c in report.criteria]
    parts = [
        f"### Weigh-in gate: {report.verdict.upper()}",
        f"`{report.candidate}` against `{report.baseline}`, protocol {report.protocol}",
        tabulate(rows, headers=("criterion", "verdict", "found"), tablefmt="github"),
    ]
    parts += [f"- {notice}" for notice in notes(report)]
    if report.tasks:
        parts.append(_tasks(report, "github"))
    if report.flips:
        parts += [f"{_flips_title(report)}", _flips(report, "github")]
    parts.append("```\n" + "\n".join(report.commands) + "\n```")
    return "\n\n".join(parts) + "\n"


def junit(report: Report) -> str:
    """One test case per criterion. An inconclusive one is an error: it neither passed nor failed.

    (A skipped case would look like success to most readers of JUnit files.)
    """
    counts = {name: str(sum(c.verdict == v for c in report.criteria)) for name, v in _KINDS.items()}
    facts = {"name": "weighin.gate", "tests": str(len(report.criteria)), "skipped": "0"}
    suite = ElementTree.Element("testsuite", facts | counts)
    for criterion in report.criteria:
        case = ElementTree.SubElement(suite, "testcase", classname="weighin.gate", name=criterion.name)
        if criterion.verdict != "pass":
            tag = "failure" if criterion.verdict == "fail" else "error"
            message = "; ".join(filter(None, (criterion.text, criterion.reason)))
            problem = ElementTree.SubElement(case, tag, message=_legal(message), type=criterion.verdict)
            problem.text = _legal(text(report))
        ElementTree.SubElement(case, "system-out").text = _legal(criterion.text)
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


_KINDS = {"failures": "fail", "errors": "inconclusive"}


def notes(report: Report) -> list[str]:
    """The notices, and how the base itself moved."""
    found = list(report.notices)
    move = report.base_move
    if move is not None:
        found.append(
            f"the base itself moved by {move.points:+.2f} points since its record ({move.changed} of"
            f" {move.items:,} items changed); the candidate is compared with the base as measured now."
        )
    return found


def _tasks(report: Report, style: str) -> str:
    rows = [
        (m.task, m.items, m.base, m.candidate, m.candidate - m.base, m.lost, m.gained)
        for m in sorted(report.tasks, key=lambda move: move.candidate - move.base)
    ]
    headers = ("task", "items", "base %", "candidate %", "points", "lost", "gained")
    return tabulate(rows, headers=headers, tablefmt=style, floatfmt=("", "", ".1f", ".1f", "+.1f"))


def _flips_title(report: Report) -> str:
    shown, lost = min(FLIPS_SHOWN, len(report.flips)), sum(flip.lost for flip in report.flips)
    return f"{len(report.flips)} items flipped, {lost} of them lost; the first {shown}:"


def _flips(report: Report, style: str) -> str:
    rows = [
        (
            f.subtask,
            f.item,
            _short(f.base),
            _short(f.candidate),
            _short(f.target),
            "lost" if f.lost else "gained",
        )
        for f in report.flips[:FLIPS_SHOWN]
    ]
    headers = ("task", "item", "base says", "candidate says", "right", "")
    return tabulate(rows, headers=headers, tablefmt=style, disable_numparse=True)


def _short(answer: str) -> str:
    flat = " ".join(answer.split()).replace("|", "/")
    return flat if len(flat) <= 40 else f"{flat[:39]}…"


def _legal(content: str) -> str:
    """XML 1.0 has no control characters; generated text may."""
    return "".join(c for c in content if c in "\t\n" or c >= " ")
