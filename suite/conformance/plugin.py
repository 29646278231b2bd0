"""pytest's option `--weighin-method`. Kept apart from the tests, so that pytest knows it before them."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--weighin-method FILE|NAME`."""
    parser.getgroup("weighin").addoption(
        "--weighin-method",
        action="append",
        metavar="FILE|NAME",
        help="Method for suite.conformance to check: a plug-in file, a name or a recipe. Repeatable;"
        " all installed methods when not given.",
    )
