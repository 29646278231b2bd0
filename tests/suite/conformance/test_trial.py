"""Which cases an examination is made of."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from suite.conformance.findings import Outcome
from suite.conformance.trial import Desk, Subject, _cases


@pytest.mark.parametrize(
    ("recipe", "stacked", "exempt"),
    [
        ("svd", True, []),
        ("heal", True, []),  # it acts on no budget, and leaves dense linears all the same
        ("rtn-int8", False, ["it leaves no dense linears"]),
        ("dense", False, ["it changes nothing"]),
    ],
)
def test_whether_a_quantizer_can_follow_is_tried_or_the_reason_against_it_is_said(
    recipe: str, stacked: bool, exempt: list[str], folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    shutil.copytree(folder_of("llama"), tmp_path / "dense" / "llama")
    outcomes: list[Outcome] = []
    cases = _cases(Desk(Subject(recipe), tmp_path, ("llama",)), "llama", outcomes)
    assert any(case.scope == "stack" for case, _ in cases) == stacked
    assert [found.detail for found in outcomes if found.check == "stacks under int4"] == exempt
