"""The paper's experiments, in small: the two exact claims, the judges against closed forms, stopping and resuming."""

from __future__ import annotations

import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from tiny import llama

import adam_mini_plugins
from adam_mini_plugins import AdamMini

sys.path.insert(0, str(Path(__file__).parents[1]))
from examples.paper.__main__ import main
from examples.paper.frame import Experiment, Result, Verdict, flag, run, write_table
from examples.paper.graph import GCN, LABELLED, Graph
from examples.paper.hessian_mlp import HessianMLP, inside
from examples.paper.hessian_transformer import PARTS, HessianTransformer, of_elements
from examples.paper.hessian_transformer import condition as condition_of_rank
from examples.paper.leave_one_out import LeaveOneOut
from examples.paper.memory import Memory
from examples.paper.on_par import OnPar
from examples.paper.partition import PARTITIONS, PartitionAblation
from examples.paper.preconditioner import Preconditioner, rotation
from examples.paper.quadratic import Quadratic
from examples.paper.reduction import ReducedAdamMini, Reduction
from examples.paper.spectra import adam_preconditioner, condition
from examples.paper.throughput import Throughput, largest
from examples.paper.trajectory import Trajectory
from examples.paper.value import Value
from examples.paper.vision import Vision, digits
from examples.paper.workers import Workers, cores

QUIET = Console(quiet=True)
SMALL = {
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


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
    assert "| [counted](#counted) | Figure 0 | squares grow | **yes** | 4 | 0.0 |" in table
    assert "Claim: squares grow. **Yes:** [0.0, 1.0, 4.0, 9.0]." in table
    assert "`python -m examples.paper counted --seeds 4` on machine 1;" in table
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


def test_cases_side_by_side_give_what_they_give_one_by_one(tmp_path: Path) -> None:
    experiment = Quadratic(seeds=3, steps=20)
    run(experiment, tmp_path / "here", False, QUIET)
    with Workers(2) as workers:
        assert workers.threads == max(1, min(torch.get_num_threads(), cores() // 2))
        own = os.getpid()
        ids = set(workers.completed(process, range(2)))
        assert own not in ids
        run(experiment, tmp_path / "there", False, QUIET, workers)
    here, there = (json.loads((tmp_path / name / "quadratic.json").read_text()) for name in ("here", "there"))
    assert there["environment"]["threads"] == workers.threads
    for one, other in zip(here["results"], there["results"], strict=True):
        assert (one["case"], one["found"]) == (other["case"], other["found"])
    assert here["verdict"] == there["verdict"]


def process(_: int) -> int:
    return os.getpid()


def test_what_measures_time_is_measured_alone(tmp_path: Path, log: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Counted, "parallel", False)
    workers = Workers(2)  # its processes begin when they have something to do
    run(Counted(), tmp_path, False, QUIET, workers)
    assert log == [0, 1, 2]
    record = json.loads((tmp_path / "counted.json").read_text())
    assert record["environment"]["threads"] == torch.get_num_threads()


def test_core_minutes_are_the_seconds_of_all_cases(tmp_path: Path, log: list[int]) -> None:
    run(Counted(seeds=4), tmp_path, False, QUIET)
    path = tmp_path / "counted.json"
    record = json.loads(path.read_text())
    for result in record["results"]:
        result["seconds"] = 90.0
    path.write_text(json.dumps(record))
    table = write_table([Counted], tmp_path).read_text()
    assert "| **yes** | 4 | 6.0 |" in table
    assert "together they are 6," in table


def test_from_the_command_line(tmp_path: Path) -> None:
    main(["quadratic", "--seeds", "1", "--steps", "20", "--jobs", "1", "--output-dir", str(tmp_path)])
    assert (tmp_path / "quadratic.png").stat().st_size > 10_000
    table = (tmp_path / "README.md").read_text()
    assert "`python -m examples.paper quadratic --seeds 1 --steps 20`" in table
    assert "| not yet run |" in table


def test_the_mass_of_an_mlp_lies_inside_its_neurons() -> None:
    experiment = HessianMLP(seeds=1, inputs=8, width=4, samples=20, steps=4)
    (result,) = measured(experiment)
    assert result.found["step"] == [0, 1, 2, 4]
    assert experiment.judge([result]).held

    even = Result(result.case, {**result.found, "coupling": [torch.ones(4, 4).tolist()] * 4}, 0.0)
    assert not experiment.judge([even]).held
    assert inside(torch.ones(4, 4)) == 0.25


def test_elements_have_the_hessian_that_the_loss_is_made_of() -> None:
    weight = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    hessian = torch.randn(12, 12, dtype=torch.float64)
    hessian = hessian + hessian.T
    elements = torch.tensor([0, 1, 4, 5, 8, 9, 2, 3])  # rows of a weight that is stored the other way round, say
    gradient, second = of_elements(weight.flatten() @ hessian @ weight.flatten() / 2, weight, elements)
    torch.testing.assert_close(gradient, (hessian @ weight.detach().flatten())[elements])
    torch.testing.assert_close(second, hessian[elements][:, elements])

    rates = adam_preconditioner(gradient)
    expected = np.linalg.cond(np.diag(1 / np.abs(gradient.numpy())) @ second.numpy())
    assert condition(second, rates).item() == pytest.approx(expected, rel=1e-8)


def test_directions_on_which_the_loss_does_not_depend_are_no_part_of_kappa() -> None:
    basis, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))
    hessian = basis @ torch.tensor([12.0, 5, 4, 3, 0, 0], dtype=torch.float64).diag() @ basis.T
    assert condition_of_rank(hessian) == pytest.approx(4, rel=1e-8)
    rates = torch.rand(6, dtype=torch.float64) + 0.1
    values = np.linalg.svd(np.diag(rates.numpy()) @ hessian.numpy(), compute_uv=False)
    assert condition_of_rank(hessian, rates) == pytest.approx(values[0] / values[3], rel=1e-8)


def test_the_hessian_of_a_transformer_is_that_of_its_blocks() -> None:
    experiment = HessianTransformer(seeds=1, width=4, heads=2, neurons=4, vocabulary=260, sequences=2, tokens=8)
    (result,) = measured(experiment)
    for part in PARTS:
        found = result.found[part]
        whole, gauss_newton = torch.tensor(found["mass"]), torch.tensor(found["gauss_newton"])
        assert whole.shape == gauss_newton.shape == (4, 4)
        assert (whole - gauss_newton).abs().max() > 1e-3 * whole.max()
        assert 1 < found["kappa"] < math.inf
        assert 1 < found["adam"] < math.inf
    query = torch.tensor(result.found["query"]["mass"])
    assert query[:2, :2].sum() + query[2:, 2:].sum() > query.sum() / 2


def test_the_blocks_of_a_transformer_are_judged_by_what_lies_inside() -> None:
    experiment = HessianTransformer(width=8, heads=2, neurons=8)
    (case, *_) = experiment.cases()
    head, neuron = torch.block_diag(torch.ones(4, 4), torch.ones(4, 4)), torch.eye(8)
    kappas = {"kappa": 2.0, "adam": 3.0}

    def found(query: torch.Tensor, rest: torch.Tensor) -> list[Result]:
        masses = {part: query if level == "head" else rest for part, level in PARTS.items()}
        both = {part: (mass + 0.1).tolist() for part, mass in masses.items()}
        return [Result(case, {p: {"mass": m, "gauss_newton": m, **kappas} for p, m in both.items()}, 0.0)]

    assert experiment.judge(found(head, neuron)).held
    assert not experiment.judge(found(head, torch.ones(8, 8))).held
    assert not experiment.judge(found(torch.ones(8, 8), neuron)).held
    kappas["adam"] = 1.0
    assert not experiment.judge(found(head, neuron)).held


def test_memory_is_what_plan_predicts() -> None:
    experiment = Memory(models=("gpt2",))
    (result,) = measured(experiment)
    assert result.found["parameters"] == 124_439_808
    assert result.found["state"]["AdamW"] == pytest.approx(8 * 124_439_808, rel=1e-5)
    assert experiment.judge([result]).held
    result.found["state"]["Adam-mini"] = result.found["state"]["AdamW"]
    assert not experiment.judge([result]).held


def stepped(optimizer: type[AdamMini], **options: object) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The second moments and the weights after a step, by name."""
    torch.manual_seed(0)
    model = llama(**SMALL)
    stepper = optimizer.for_model(model, lr=0.01, **options)
    tokens = torch.arange(10).view(2, 5)
    model(tokens, labels=tokens).loss.backward()
    stepper.step()
    moments = {name: stepper.state[p]["exp_avg_sq"] for name, p in model.named_parameters()}
    return moments, {name: p.grad for name, p in model.named_parameters()}


def test_reductions_of_a_block() -> None:
    expected, _ = stepped(AdamMini)
    found, _ = stepped(ReducedAdamMini, reduction="mean")
    for name, moment in expected.items():
        torch.testing.assert_close(found[name], moment, rtol=1e-5, atol=1e-12)

    oracles = {
        "max": lambda squares: squares.amax((1, 2)),
        "min": lambda squares: squares.amin((1, 2)),
        "1-norm": lambda squares: squares.sum((1, 2)),
        "2-norm": lambda squares: squares.square().sum((1, 2)).sqrt(),
    }
    query = "model.layers.0.self_attn.q_proj.weight"
    for reduction, oracle in oracles.items():
        moments, gradients = stepped(ReducedAdamMini, reduction=reduction)
        heads = oracle(gradients[query].square().view(2, 4, 8))  # two heads of four rows
        expected_rows = 0.001 * heads[:, None].expand(2, 4).reshape(8, 1)
        torch.testing.assert_close(moments[query], expected_rows, rtol=1e-4, atol=0)


def test_partitions_have_the_blocks_that_their_names_say() -> None:
    model = llama(**SMALL)
    count = {name: adam_mini_plugins.partition(model, **given).num_blocks() for name, given in PARTITIONS.items()}
    assert count["one for the embedding"] == count["one for the head"] == count["the paper's"] - 10
    assert count["one for embedding and head"] == count["the paper's"] - 20
    assert count["embedding and head element-wise"] == count["the paper's"] + 2 * 11 * 7
    assert count["query and key by neuron"] == count["the paper's"] + 2 * (8 - 2)
    assert count["value as a whole"] == count["the paper's"] - 7
    assert count["a block a tensor"] == len(list(model.parameters()))


def test_trainings_in_small(text: str, tmp_path: Path) -> None:
    """Each experiment that trains, from its flags to its verdict; at the same seed AdamW is the same in all."""
    small = {"seeds": 1, "steps": 4, "dataset": text}
    rivals = ("AdamW", "Adam-mini", "Adafactor", "CAME", "SM3", "Lion", "LAMB")
    experiments = (
        PartitionAblation(**small, lrs=(1e-3,)),
        Reduction(**small, lrs=(1e-3,), reductions=("mean", "1-norm")),
        Value(**small, lengths=2, lr=1e-3),
        LeaveOneOut(**small, blocks=1, factors=(1.0,)),
        Trajectory(**small, lr=1e-3, checkpoints=2, optimizers=rivals),
    )
    found = {}
    for experiment in experiments:
        run(experiment, tmp_path / "out", False, QUIET)
        record = json.loads((tmp_path / "out" / f"{experiment.name}.json").read_text())
        found[experiment.name] = [(result["case"], result["found"]) for result in record["results"]]
        assert (tmp_path / "out" / f"{experiment.name}.png").stat().st_size > 10_000

    adamw = [
        measured["validation"]
        for name in ("partition", "reduction")
        for case, measured in found[name]
        if case["name"] == "AdamW" and case["steps"] == 4
    ]
    assert len(adamw) == 2
    assert adamw[0] == adamw[1]
    mean, ours, neuron = (
        next(one["validation"] for case, one in found[name] if case["name"] == label and case["steps"] == 4)
        for name, label in (("reduction", "mean"), ("partition", "the paper's"), ("value", "the paper's"))
    )
    assert neuron == ours
    torch.testing.assert_close(torch.tensor(mean), torch.tensor(ours), rtol=1e-4, atol=0)
    assert all(losses[-1][1] < losses[0][1] for losses in (*adamw, ours))
    for case, measured in found["trajectory"]:
        assert measured["step"] == [2, 4]
        assert 0 < measured["travelled"][0] < measured["travelled"][1]
        if case["name"] == "AdamW":
            assert measured["distance"] == [0, 0]
        else:
            assert all(0 < distance < math.inf for distance in measured["distance"])


def scores(experiment: OnPar, adamw: tuple[float, ...], ours: tuple[float, ...]) -> list[Result]:
    return [
        Result({"model": model, "name": name, "seed": seed}, {"step": [1], "score": [score]}, 0.0)
        for model in experiment.tasks
        for name, ends in (("AdamW", adamw), ("Adam-mini", ours))
        for seed, score in enumerate(ends)
    ]


def test_on_par_is_what_seeds_differ_by() -> None:
    accuracies = Graph(seeds=3)
    for ours, held in (((94.0, 95.0, 93.0), True), ((91.0, 90.0, 91.5), True), ((89.0, 89.0, 95.0), False)):
        assert accuracies.judge(scores(accuracies, (92.0, 91.0, 92.0), ours)).held is held
    losses = Vision(seeds=3)
    for result in (found := scores(losses, (0.12, 0.11, 0.13), (0.2, 0.2, 0.2))):
        if result.case["model"] != "DDPM":
            result.found["score"] = [90.0]
    assert not losses.judge(found).held  # the accuracies are the same, the loss is higher
    assert "where AdamW's seeds differ by 0.02" in losses.judge(found).line
    for result in found:
        if result.case["model"] == "DDPM" and result.case["name"] == "Adam-mini":
            result.found["score"] = [0.05]
    assert losses.judge(found).held


@pytest.mark.parametrize("kind", [Vision, Graph])
def test_table_6_in_small(kind: type[OnPar], tmp_path: Path) -> None:
    experiment = kind(seeds=1, steps=2)
    run(experiment, tmp_path, False, QUIET)
    path = tmp_path / f"{experiment.name}.json"
    record = json.loads(path.read_text())
    assert path.with_suffix(".png").stat().st_size > 10_000
    assert record["environment"].keys() >= set(experiment.libraries)
    for result in record["results"]:
        assert result["found"]["step"] == [1, 2]
        assert all(0 < score < 101 for score in result["found"]["score"])
    first = [result for result in record["results"] if result["case"]["name"] == "AdamW"]

    record["results"] = record["results"][1:]  # as if it had been stopped: the first case is measured again
    path.write_text(json.dumps(record))
    run(experiment, tmp_path, False, QUIET)
    again = [result for result in json.loads(path.read_text())["results"] if result["case"]["name"] == "AdamW"]
    assert [result["found"] for result in again] == [result["found"] for result in first]


def test_what_is_held_out_is_not_trained_on() -> None:
    train, labels, held_out, held_out_labels = digits()
    assert len(train) + len(held_out) == len(labels) + len(held_out_labels) == 1797
    assert -1 == train.min() < train.max() == 1

    task = GCN(seed=0)
    assert len(task.known) == 10 * LABELLED
    assert task.held_out.sum() == 1797 - 10 * LABELLED
    assert not task.held_out[task.known].any()


@pytest.mark.parametrize("most", [0, 1, 2, 7, 8, 100])
def test_the_largest_batch_is_found(most: int) -> None:
    tried = []

    def fits(batch: int) -> bool:
        tried.append(batch)
        return batch <= most

    assert largest(fits) == most
    assert len(tried) == len(set(tried)) <= 2 * most.bit_length() + 1


def test_throughput_says_what_this_machine_can_tell(tmp_path: Path) -> None:
    experiment = Throughput(batch=1, rounds=2)
    (result,) = measured(experiment)
    rates = [one["tokens_per_second"] for one in result.found["same batch"].values()]
    assert [len(found) for found in rates] == [2, 2]
    assert min(map(min, rates)) > 0
    assert torch.cuda.is_available() or experiment.judge([result]).held is None

    def bars(adamw: int, ours: int, rate: float) -> Result:
        both = {"AdamW": (adamw, 100.0 if adamw else 0.0), "Adam-mini": (ours, rate)}
        found = {n: {"batch": b, "tokens_per_second": [r, r], "peak_bytes": 10**9} for n, (b, r) in both.items()}
        return Result(result.case, {"same batch": found, "largest batch": found}, 0.0)

    assert experiment.judge([bars(2, 4, 150.0)]).held
    assert "+50.0% tokens/s" in experiment.judge([bars(2, 4, 150.0)]).line
    assert not experiment.judge([bars(2, 4, 90.0)]).held
    assert not experiment.judge([bars(4, 4, 150.0)]).held
    assert experiment.judge([bars(0, 4, 90.0)]).held  # AdamW doesn't fit at all
