"""The paper's experiments, in small: the two exact claims, the judges against closed forms, stopping and resuming."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))
from examples.paper.__main__ import main
from examples.paper.frame import Experiment, Result, Verdict, flag, run, write_table
from examples.paper.preconditioner import Preconditioner, rotation
from examples.paper.quadratic import Quadratic

QUIET = Console(quiet=True)


def measured(experiment: Experiment) -> list[Result]:
    return [Result(case, experiment.measure(case), 0.0) for case in experiment.cases()]


def test_blockwise_rates_beat_adam_and_inside_each_block_one_rate_does() -> None:
    experiment = Quadratic(seeds=3, steps=100)
    results = measured(experiment)

    assert experiment.judge(results).held
    for result in results:
        # The error shrinks by (kappa - 1) / (kappa + 1) a step under one optimal rate.
        for problem, kappa in (("whole", 5000), ("block 1", 3), ("block 2", 101 / 99), ("block 3", 5000 / 4998)):
            contraction = result.found[problem]["single"]["contraction"]
            assert contraction == pytest.approx((kappa - 1) / (kappa + 1), rel=1e-6)
        whole = {method: figures["loss"][-1] for method, figures in result.found["whole"].items()}
        assert whole["blockwise"] < 1e-50 < whole["adam"] < 1
        for n in (1, 2, 3):
            block = {method: figures["loss"][-1] for method, figures in result.found[f"block {n}"].items()}
            assert block["single"] < 1e-50 < block["adam"] < 1


def test_the_claim_of_the_quadratic_is_not_held_by_what_contradicts_it() -> None:
    experiment = Quadratic(seeds=1, steps=20)
    (result,) = measured(experiment)
    block = result.found["block 2"]
    block["adam"], block["single"] = block["single"], block["adam"]
    assert not experiment.judge([result]).held


def test_the_preconditioner_helps_less_the_denser_a_block_is() -> None:
    experiment = Preconditioner(seeds=1, dimensions=(8, 12), kappas=(500.0,), dimension=12, angles=8, points=8)
    results = measured(experiment)

    verdict = experiment.judge(results)
    assert verdict.held
    assert "in 2 of 2 families" in verdict.line
    for result in results:
        assert result.found["tau"][0] == 1  # not turned at all: diagonal
        assert result.found["r"][0] < 0.2 < 1 < result.found["r"][-1]
        result.found["r"].reverse()
    assert not experiment.judge(results).held


def test_the_basis_is_the_product_of_the_rotations() -> None:
    d = 5
    theta = (torch.rand(1, d, d, dtype=torch.float64) - 0.5) * math.pi
    expected = np.eye(d)
    for i in range(d):
        for j in range(i + 1, d):
            turn = np.eye(d)
            cos, sin = math.cos(theta[0, i, j]), math.sin(theta[0, i, j])
            turn[np.ix_((i, j), (i, j))] = [[cos, sin], [-sin, cos]]
            expected = turn @ expected
    np.testing.assert_allclose(rotation(theta)[0], expected, atol=1e-14)


@dataclass(frozen=True)
class Counted(Experiment):
    """Squares; notes what it has measured, and stops where it is told to."""

    name = "counted"
    shows = "Figure 0"
    claim = "squares grow"
    seeds: int = flag(3, "how many")
    power: float = flag(2.0, "of them")
    log = []
    stop_at = None

    def cases(self):
        return [{"seed": seed, "power": self.power} for seed in range(self.seeds)]

    def measure(self, case):
        if case["seed"] == self.stop_at:
            raise KeyboardInterrupt
        self.log.append(case["seed"])
        return {"value": case["seed"] ** case["power"], "none": math.inf}

    def draw(self, results):
        from matplotlib import pyplot as plt

        return plt.figure(figsize=(1, 1))

    def judge(self, results):
        values = [result.found["value"] for result in results]
        return Verdict(values == sorted(values), f"{values}")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    monkeypatch.setattr(Counted, "log", [])
    return Counted.log


def test_what_was_stopped_goes_on_where_it_stopped(
    tmp_path: Path, log: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Counted, "stop_at", 2)
    with pytest.raises(KeyboardInterrupt):
        run(Counted(), tmp_path, False, QUIET)
    assert "stopped after 2 cases" in write_table([Counted], tmp_path).read_text()

    monkeypatch.setattr(Counted, "stop_at", None)
    run(Counted(), tmp_path, False, QUIET)
    assert log == [0, 1, 2]
    run(Counted(seeds=4), tmp_path, False, QUIET)
    assert log == [0, 1, 2, 3]

    record = json.loads((tmp_path / "counted.json").read_text())
    assert [result["found"] for result in record["results"]] == [{"value": v, "none": None} for v in (0, 1, 4, 9)]
    table = write_table([Counted], tmp_path).read_text()
    assert "| squares grow | **yes:** [0.0, 1.0, 4.0, 9.0] | 4 |" in table
    assert "`python -m examples.paper counted --seeds 4`" in table
    assert f"torch {torch.__version__}" in table


def test_results_of_other_flags_or_machines_are_not_mixed(tmp_path: Path, log: list[int]) -> None:
    run(Counted(), tmp_path, False, QUIET)
    with pytest.raises(SystemExit, match="cases of other flags"):
        run(Counted(power=3.0), tmp_path, False, QUIET)

    path = tmp_path / "counted.json"
    record = json.loads(path.read_text())
    record["environment"]["torch"] = "another"
    path.write_text(json.dumps(record))
    run(Counted(), tmp_path, False, QUIET)  # nothing is left to measure: judged and drawn anew
    with pytest.raises(SystemExit, match="another machine"):
        run(Counted(seeds=4), tmp_path, False, QUIET)
    assert json.loads(path.read_text())["environment"]["torch"] == "another"
    run(Counted(power=3.0), tmp_path, True, QUIET)
    assert log == [0, 1, 2, 0, 1, 2]


def test_from_the_command_line(tmp_path: Path) -> None:
    main(["quadratic", "--seeds", "1", "--steps", "20", "--output-dir", str(tmp_path)])
    assert (tmp_path / "quadratic.png").stat().st_size > 10_000
    table = (tmp_path / "README.md").read_text()
    assert "`python -m examples.paper quadratic --seeds 1 --steps 20`" in table
    assert "| not yet run |" in table
