"""The conformance checks as tests, one for each method and check.

    pytest -p suite.pytest_plugin --pyargs suite.conformance --weighin-method my_svd.py

Without `--weighin-method`, every installed method is checked.
"""

from __future__ import annotations

import functools

import pytest

from suite.conformance.checks import CHECKS
from suite.conformance.trial import Examination, Subject, examine, subjects_of
from suite.errors import InputError
from suite.method import methods


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for every method and check."""
    chosen = metafunc.config.getoption("--weighin-method", None) or list(methods)
    try:
        subjects = [subject for what in chosen for subject in subjects_of(what)]
    except InputError as error:
        raise pytest.UsageError(str(error)) from None
    pairs = [(subject, name) for subject in subjects for name in CHECKS]
    ids = [f"{subject.recipe}-{name}" for subject, name in pairs]
    metafunc.parametrize(("subject", "check"), pairs, ids=ids)


_examination: functools._lru_cache_wrapper[Examination] = functools.lru_cache(maxsize=1)(examine)


def test_conformance(subject: Subject, check: str) -> None:
    """The method holds what the check asks for, on tiny models of every family."""
    finding = _examination(subject).finding(check)
    if finding.status == "exempt":
        pytest.skip("; ".join(finding.details))
    if finding.status == "failed":
        pytest.fail(f"{finding.check.sentence}\n" + "\n".join(finding.details), pytrace=False)
