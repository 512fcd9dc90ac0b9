"""Training under DeepSpeed ZeRO is training in one process."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent / "engines"))

from launch import launch

pytestmark = pytest.mark.xdist_group("engines")  # one launch at a time

CLOSE = 1e-6  # the largest difference of a parameter from one process, after 5 steps


def near(figures: dict[str, Any]) -> None:
    """AdamMini ends where one process ends, after steps that could be told from standing still."""
    assert figures["adam_mini"] <= CLOSE
    assert figures["adam_mini moved"] > 1e-3
    # AdamW, measured in the same way: it has the same data and engine, and its own amplification of rounding.
    assert figures["adamw"] <= 1e-3
    assert figures["adamw moved"] > 1e-3


@pytest.fixture(scope="module")
def by_processes() -> dict[int, dict[str, Any]]:
    return {processes: launch("native.py", processes, "zero", DS_ACCELERATOR="cpu")["zero"] for processes in (2, 3)}


@pytest.mark.parametrize("processes", [2, 3])
def test_every_stage(processes: int, by_processes: dict[int, dict[str, Any]]) -> None:
    figures = dict(by_processes[processes])
    del figures["refused"]
    assert len(figures) == (15 if processes == 2 else 12)
    for of_case in figures.values():
        near(of_case)
        assert of_case["steps"] == [5.0]
