"""`examples/align.py`, the whole path in small: what each stage leaves is what the next one needs."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="the trl extra is not installed")
SCRIPT = Path(__file__).parents[1] / "examples" / "align.py"
STAGES = ("pretrain", "sft", "reward", "optimize")


def write_functions(folder: Path) -> None:
    folder.mkdir()
    for number in range(20):
        source = [
            f'def take_{name}_{number}(self, {name}):\n    """Returns {name}, {number} times."""\n    return {name}\n'
            for name in ("first", "second", "last", "key", "value", "item", "left", "right")
        ]
        (folder / f"module_{number}.py").write_text("\n\n".join(source))


def test_the_whole_path_in_small(tmp_path: Path) -> None:
    write_functions(tmp_path / "source")
    small = [option for stage in STAGES for option in (f"--steps-{stage}", "2", f"--batch-{stage}", "2")]
    options = ["--dataset", str(tmp_path / "source"), "--seeds", "0", "--eval-functions", "8", "--output-dir", "out"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    done = subprocess.run(
        [sys.executable, str(SCRIPT), *small, *options, "--completion-tokens", "12"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out" / "align.json").read_text())
    assert [(run["stage"], run["optim"]) for run in record["runs"]] == [
        ("pretrain", "adam_mini"),
        *((stage, optim) for stage in STAGES[1:] for optim in ("adam_mini", "adamw_torch")),
    ]
    for run in record["runs"]:
        assert run["before"].keys() == run["after"].keys()
        assert all(map(math.isfinite, (*run["before"].values(), *run["after"].values())))
        assert run["state_ratio"] < 0.6 if run["optim"] == "adam_mini" else run["state_ratio"] == 1
    for one, other in zip(record["runs"][1::2], record["runs"][2::2]):
        assert one["before"] == other["before"]  # both optimizers start from the same weights
    assert all((tmp_path / "out" / f"{stage}.png").stat().st_size > 10_000 for stage in STAGES)
    assert {"before", "after", "Adam-mini", "AdamW"} <= set(done.stdout.split())
