"""The support matrix stands in the docs as it is recorded, and each of its rows has a test."""

from __future__ import annotations

import ast
from pathlib import Path

import matrix
import pytest

HERE = Path(__file__).parent


def test_the_table_is_that_of_the_record() -> None:
    page = (matrix.DOCS / "README.md").read_text()
    assert page.partition(matrix.BEGIN)[2].partition(matrix.END)[0].strip() == matrix.table(matrix.read()).strip()


def test_each_row_has_a_test_that_shows_it() -> None:
    rows = matrix.read()
    assert rows
    for test in {row["test"] for row in rows}:
        file, _, name = test.partition("::")
        tree = ast.parse((HERE / file).read_text())
        functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
        function = functions[name.partition("[")[0]]
        assert "proves" in [argument.arg for argument in function.args.args]


def test_what_a_test_shows_must_be_recorded(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    docs = pytester.mkdir("docs")
    (docs / "README.md").write_text(f"before\n{matrix.BEGIN}{matrix.END}\nafter\n")
    monkeypatch.setattr(matrix, "DOCS", docs)
    pytester.makeconftest("from matrix import proves, pytest_addoption")
    file = pytester.makepyfile(test_it="def test_it(proves):\n    proves('DDP', 'plain', 'tied', processes=2)\n")
    pytester.inline_run(file).assertoutcome(passed=1, failed=1)  # pytest counts an error in a fixture so
    pytester.inline_run("--write-matrix", file).assertoutcome(passed=1)
    pytester.inline_run(file).assertoutcome(passed=1)
    assert "| DDP | 2 |  | 2 |" in (docs / "README.md").read_text()
    assert (docs / "README.md").read_text().startswith("before\n")
    assert (docs / "README.md").read_text().endswith("\nafter\n")
    file.write_text("def test_it(proves):\n    proves('DDP', 'plain', processes=2)\n")
    pytester.inline_run(file).assertoutcome(passed=1, failed=1)
