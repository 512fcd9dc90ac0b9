"""Training under DeepSpeed ZeRO is training in one process."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from matrix import Proves

pytest.importorskip("deepspeed", reason="it has no wheels, and is not everywhere")

sys.path.append(str(Path(__file__).parent / "engines"))

from launch import launch

CLOSE = 1e-6  # the largest difference of a parameter from one process, after 5 steps
SHARE = 0.51  # the most that state may take of AdamW's

# What the matrix says of each case, if it is close to one process.
FEATURES = {
    "1": ["plain"],
    "1, experts, offload": ["experts", "offload"],
    "1, bfloat16": ["bf16"],
    "2": ["plain"],
    "2, tied, offload": ["tied", "offload"],
    "2, LoRA": ["lora"],
    "2, bfloat16, offload": ["bf16"],
    "3": ["plain"],
    "3, sub-groups, offload": ["offload"],
    "3, fused, in parts": ["fused"],
    "3, LoRA": ["lora"],
    "3, tied, experts": ["tied", "experts"],
    "3, bfloat16": ["bf16"],
}


def near(figures: dict[str, Any]) -> None:
    """AdamMini ends where one process ends, after steps that could be told from standing still."""
    assert figures["adam_mini"] <= CLOSE
    assert figures["adam_mini moved"] > 1e-3
    # AdamW, measured in the same way: it has the same data and engine, and its own amplification of rounding.
    assert figures["adamw"] <= 1e-3
    assert figures["adamw moved"] > 1e-3


@pytest.fixture(scope="module")
def on_2() -> dict[str, Any]:
    return launch("native.py", 2, "zero", DS_ACCELERATOR="cpu")["zero"]


@pytest.fixture(scope="module")
def on_3() -> dict[str, Any]:
    return launch("native.py", 3, "zero", DS_ACCELERATOR="cpu")["zero"]


@pytest.mark.parametrize("processes", [2, 3])
def test_every_stage(processes: int, request: pytest.FixtureRequest, proves: Proves) -> None:
    figures = request.getfixturevalue(f"on_{processes}")
    cases = {name: of_case for name, of_case in figures.items() if name != "refused"}
    assert len(cases) == {2: 17, 3: 14}[processes]
    for name, of_case in cases.items():
        near(of_case)
        assert of_case["steps"] == [5.0]  # of each flat tensor, however often step() is called
        # DeepSpeed has one flat tensor stepped at a time: one all-reduce for each with a cut block.
        assert of_case["reductions"] <= 5 * of_case["flat tensors"]
        if "empty" not in name:  # AdamW keeps state for what pads a process's share
            assert of_case["share"] == of_case["as measured"]
    for name in ("1", "2", "3"):
        assert cases[name]["share"] <= SHARE
        proves(f"DeepSpeed ZeRO-{name}", "state", processes=processes, value=f"≤ {SHARE}")
    assert cases["3, sub-groups, offload"]["flat tensors"] > 5
    if processes == 2:
        assert [name for name, of_case in cases.items() if of_case["by BF16_Optimizer"]] == ["1, bfloat16"]
    for name in FEATURES.keys() & cases.keys():
        proves(f"DeepSpeed ZeRO-{name[0]}", *FEATURES[name], processes=processes)
    for stage in (1, 2, 3):
        proves(f"DeepSpeed ZeRO-{stage}", "collectives", processes=processes, value="1 a flat tensor")


def test_what_is_added_up(on_2: dict[str, Any], on_3: dict[str, Any]) -> None:
    # One all-reduce a step for each flat tensor that has a cut block, of a number a block: a process's end falls into
    # one block of a matrix. The 3 norms are cut in the middle of the second one.
    assert on_2["1"]["reductions"] == 5
    assert on_2["1"]["floats reduced"] == 1
    # ZeRO-3 cuts every tensor in the middle.
    assert on_2["3"]["reductions"] == 10


def test_round_robin_is_refused(on_2: dict[str, Any], on_3: dict[str, Any]) -> None:
    for figures in (on_2, on_3):
        assert "round_robin_gradients=True" in figures["refused"]["round robin"]
        assert "set round_robin_gradients to false" in figures["refused"]["round robin"]


def test_transformers_and_trl(tmp_path: Path, proves: Proves) -> None:
    ways = ("trainer", "sft, lora", "resumed")
    figures = launch("hf.py", 2, "zero1,zero2,zero3", *ways, CHECKPOINTS=str(tmp_path), DS_ACCELERATOR="cpu")
    assert sorted(figures) == ["zero1", "zero2", "zero3"]
    for name, of_stage in figures.items():
        near(of_stage["trainer"])
        near(of_stage["sft, lora"])
        assert of_stage["resumed"] == {"plain": 0.0}
        proves(f"DeepSpeed ZeRO-{name[-1]}, Trainer", "plain", "resume", processes=2)
        proves(f"DeepSpeed ZeRO-{name[-1]}, TRL", "lora", processes=2)


def test_lightning(tmp_path: Path, proves: Proves) -> None:
    names = ("zero 2", "zero 3")
    figures = launch("lightning_fit.py", 2, *names, CHECKPOINTS=str(tmp_path), DS_ACCELERATOR="cpu")
    assert sorted(figures) == sorted(names)
    for name, of_stage in figures.items():
        near(of_stage)
        assert of_stage["adamw resumed"] == 0.0
        assert of_stage["adam_mini resumed"] == 0.0
        proves(f"DeepSpeed ZeRO-{name[-1]}, Lightning", "plain", "resume", processes=2)
