"""Training under FSDP1 with `use_orig_params=True` is training in one process."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from matrix import Proves

sys.path.append(str(Path(__file__).parent / "engines"))

from launch import launch

CLOSE = 1e-6  # the largest difference of a parameter from one process, after 5 steps
SHARE = 0.51  # the most that state may take of AdamW's


@pytest.fixture(scope="module", params=[2, 3])
def figures(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {"processes": request.param, **launch("native.py", request.param, "fsdp1")["fsdp1"]}


# What the matrix says of each case, if it is close to one process.
FEATURES = {"llama": "plain", "tied": "tied", "experts": "experts", "fused": "fused"}


def test_training(figures: dict[str, Any], proves: Proves) -> None:
    processes = figures["processes"]
    cases = {name: of_case for name, of_case in figures.items() if name not in ("processes", "resumed")}
    assert {"llama", "cut", "tied", "conv1d"} <= set(cases)
    for name, of_case in cases.items():
        assert of_case["adam_mini"] <= CLOSE
        assert of_case["adam_mini moved"] > 1e-3
        assert of_case["adamw"] <= 1e-3
        assert of_case["adamw moved"] > 1e-3
        assert (of_case["flattened"] > 0) == (name != "not sharded")
        # One all-reduce a step, if a block is cut at all.
        calls = {"c10d.allreduce_": 1} if of_case["floats reduced"] else {}
        assert of_case["adam_mini calls"][1:] == [calls] * 4
    assert cases["llama"]["share"] <= SHARE
    for name in FEATURES.keys() & cases.keys():
        proves("FSDP1, torch", FEATURES[name], processes=processes)
    proves("FSDP1, torch", "state", processes=processes, value=f"≤ {SHARE}")
    proves("FSDP1, torch", "collectives", processes=processes, value="1")


def test_checkpoints(figures: dict[str, Any], proves: Proves) -> None:
    assert sorted(figures["resumed"]) == ["full", "sharded"]
    for of_kind in figures["resumed"].values():
        assert of_kind["adamw"] == 0.0
        assert of_kind["adam_mini"] == 0.0
    proves("FSDP1, torch", "resume", processes=figures["processes"])


def test_transformers_and_trl(tmp_path: Path, proves: Proves) -> None:
    figures = launch("hf.py", 2, "fsdp1", "trainer", "sft", CHECKPOINTS=str(tmp_path))["fsdp1"]
    for trainer, named in {"trainer": "Trainer", "sft": "TRL"}.items():
        assert figures[trainer]["adam_mini"] <= CLOSE
        assert figures[trainer]["adam_mini moved"] > 1e-3
        assert figures[trainer]["adamw"] <= 1e-3
        assert figures[trainer]["adamw moved"] > 1e-3
        proves(f"FSDP1, {named}", "plain", processes=2)
