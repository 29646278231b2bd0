"""The template is a method that works: it passes its own tests and every check."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from suite.conformance.new_method import write
from suite.errors import InputError


def test_the_method_is_short_and_documented(tmp_path: Path) -> None:
    method, _ = write("my-svd", tmp_path)
    source = method.read_text()
    assert len(source.splitlines()) <= 60
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef)):
            assert ast.get_docstring(node)
    imported = {node.module for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)}
    assert not any(str(name).startswith("methods") for name in imported)


def test_existing_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "test_my_svd.py").write_text("mine")
    with pytest.raises(InputError, match=r"test_my_svd\.py' is there already"):
        write("my-svd", tmp_path)
    assert not (tmp_path / "my_svd.py").exists()


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("svd", "such as 'my-svd'"),
        ("My SVD", "'my-svd'"),
        ("2nd", "'my-2nd'"),
        ("class", "'my-class'"),
        ("../up", "'up'"),
        ("", "'my'"),
    ],
)
def test_a_name_that_cannot_be_used_is_refused_with_one_that_can(
    name: str, advice: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=advice):
        write(name, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_its_own_tests_pass_and_the_checks_as_tests_of_another_package(tmp_path: Path) -> None:
    method, test = write("my-low-rank", tmp_path)
    kit = ["-p", "suite.pytest_plugin", "--pyargs", "suite.conformance", "--weighin-method", method.name]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(test), *kit],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert "49 passed" in done.stdout  # 22 checks in both, and one test for each of five families
