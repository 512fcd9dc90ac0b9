"""The support matrix of docs/engines/README.md: what each engine is proven to do, by the tests that prove it.

A test takes the fixture `proves` and says, after its assertions, what they have shown:

    def test_zero_2(proves: Proves) -> None:
        figures = launch(...)
        near(figures["llama"])
        proves("DeepSpeed ZeRO-2", "plain", processes=2)  # a row of its own, in the column `plain`

That is kept in docs/engines/matrix.json with the test's name. When the test passes, what it has said must be what the
file has of it, so that nothing stands there which no test shows, and no test shows what doesn't stand there. After a
change of what is proven, `pytest --write-matrix tests/test_sharding.py ...` (one process) writes the file and the table
anew. Features are the columns below; `value` is what stands in a cell instead of the numbers of processes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest

DOCS = Path(__file__).parents[1] / "docs" / "engines"
BEGIN, END = "<!-- matrix -->\n", "<!-- end of matrix -->"
FEATURES = {
    "plain": "a Llama",
    "lora": "LoRA",
    "tied": "tied embeddings",
    "fused": "fused qkv",
    "experts": "stacks of experts",
    "bf16": "bfloat16",
    "offload": "offload to the CPU",
    "resume": "resume",
    "reshard": "resume on others",
    "state": "state, of AdamW's",
    "collectives": "all-reduces a step",
}


class Proves(Protocol):
    """Says which features of an engine a test has shown, and on how many processes."""

    def __call__(self, engine: str, *features: str, processes: int, value: str | None = None) -> None: ...


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-matrix", action="store_true", help="write docs/engines/matrix.json anew, and its table")


@pytest.fixture
def proves(request: pytest.FixtureRequest) -> Iterator[Proves]:
    test, shown = f"{request.node.path.name}::{request.node.name}", []

    def show(engine: str, *features: str, processes: int, value: str | None = None) -> None:
        for feature in features:
            assert feature in FEATURES, f"{feature!r} is none of {', '.join(FEATURES)}"
            shown.append({"engine": engine, "feature": feature, "processes": processes, "value": value, "test": test})

    yield show
    if not shown:
        return  # it failed before
    recorded = read()
    if request.config.getoption("--write-matrix"):
        write([row for row in recorded if row["test"] != test] + shown)
    else:
        stands = [row for row in recorded if row["test"] == test]
        said = "docs/engines/matrix.json does not have what this test shows: run it with --write-matrix"
        assert sorted(stands, key=str) == sorted(shown, key=str), said


def read() -> list[dict[str, Any]]:
    """What is proven, a row for each engine, feature, number of processes and test."""
    path = DOCS / "matrix.json"
    return json.loads(path.read_text()) if path.exists() else []


def write(rows: list[dict[str, Any]]) -> None:
    """Writes the record and the table."""
    rows = sorted(rows, key=lambda row: (row["engine"], list(FEATURES).index(row["feature"]), str(row)))
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    (DOCS / "matrix.json").write_text(f"[\n{lines}\n]\n")
    path = DOCS / "README.md"
    before, _, rest = path.read_text().partition(BEGIN)
    path.write_text(f"{before}{BEGIN}\n{table(rows)}\n{END}{rest.partition(END)[2]}")


def table(rows: list[dict[str, Any]]) -> str:
    """The matrix as Markdown: in each cell the numbers of processes that it is shown on, or a value."""
    lines = [f"| | {' | '.join(FEATURES.values())} |", f"| --- |{' --- |' * len(FEATURES)}"]
    for engine in sorted({row["engine"] for row in rows}):
        cells = []
        for feature in FEATURES:
            found = [row for row in rows if (row["engine"], row["feature"]) == (engine, feature)]
            values = sorted({row["value"] for row in found if row["value"] is not None})
            cells.append(", ".join(values or map(str, sorted({row["processes"] for row in found}))))
        lines.append(f"| {engine} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
