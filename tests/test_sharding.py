"""Training cut over processes is training in one process, and little is sent for it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent / "engines"))

from launch import launch

# The largest difference of a parameter from one process, after 5 steps.
CLOSE = 1e-6


def near(figures: dict[str, Any], tolerance: float = CLOSE) -> None:
    """AdamMini ends where one process ends, after steps that could be told from standing still."""
    assert figures["adam_mini"] <= tolerance
    assert figures["adam_mini moved"] > 1e-3
    assert figures["adamw moved"] > 1e-3
    # AdamW, measured in the same way: it has the same data and engine, and its own amplification of rounding.
    assert figures["adamw"] <= 1e-3
    assert figures["adamw calls"] == [{}] * 5


def one_all_reduce(figures: dict[str, Any], floats: int) -> None:
    assert figures["adam_mini calls"] == [{"c10d.allreduce_": 1}] * 5
    assert figures["floats reduced"] == floats


def test_fsdp2_on_3_processes() -> None:
    figures = launch("fsdp2.py", 3)
    bfloat16 = figures.pop("bfloat16")
    assert bfloat16["adam_mini"] <= 2**-10  # gradients are rounded before they are added up: a few last places
    for of_case in figures.values():
        assert of_case["placements"] == ["(Shard(dim=0),)"]
        near(of_case)
    # 60 rows of queries are cut between heads, 20 of keys inside both heads: 2 for each layer, 1 for each of 5 norms.
    one_all_reduce(figures["llama"], 2 * 2 + 5)
    # A head of keys, 3 norms; the queries' 30 rows fall apart into heads.
    one_all_reduce(figures["tied"], 1 + 3)
    # 60 + 20 + 20 rows are cut at 34 and 68: inside a query head, and inside a key head.
    one_all_reduce(figures["fused, swapped"], 2 + 3)
    # Conv1D's matrices are cut across their columns, so that every block is cut.
    blocks = 6 + 6 + 48 + 48 + 192 + 48
    one_all_reduce(figures["conv1d"], blocks + 3)
    assert figures["experts"]["empty parts"] == 3  # 4 experts, twice, and the router's 4 rows
    assert figures["llama"]["share"] <= 0.51


def test_fsdp2_on_2_processes() -> None:
    figures = launch("fsdp2.py", 2, "llama", "tied", "conv1d")
    for of_case in figures.values():
        assert of_case["placements"] == ["(Shard(dim=0),)"]
        near(of_case)
    one_all_reduce(figures["llama"], 5)  # no head is cut
    one_all_reduce(figures["tied"], 1 + 1 + 3)  # the middle one of 3 query heads, the key head
    assert figures["llama"]["share"] <= 0.51
