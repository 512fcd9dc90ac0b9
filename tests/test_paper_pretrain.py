"""The paper's trainings in small: rivals, sizes, and blocks of one's own; judged on made-up losses."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny import llama

import adam_mini_plugins

sys.path.insert(0, str(Path(__file__).parents[1]))
from examples.paper.frame import Case, Experiment, Result, run
from examples.paper.parity import BY_CHANNEL, RULES, Parity
from examples.paper.partition import PAPER
from examples.paper.pretrain import CUSTOMARY, OURS, REFERENCE, Pretrain, build
from examples.paper.scaling import Scaling, count, steps

QUIET = Console(quiet=True)


def found(experiment: Experiment, loss: Any) -> list[Result]:
    """Results as they would be if a case's last loss were what the function says."""
    return [
        Result(case, {"validation": [[0, 6.0], [4, loss(case)]], "spikes": 0, "parameters": 1_000}, 0.0)
        for case in experiment.cases()
    ]


def test_each_runs_from_its_flags_to_its_verdict_and_goes_on(text: str, tmp_path: Path) -> None:
    small = {"seeds": 1, "dataset": text}
    experiments = (
        Pretrain(**small, steps=2, factors=(1.0,), beta1s=(0.8,), beta2s=(0.95,), epsilons=(1e-8,)),
        Scaling(**small, sizes=("micro",), tokens_per_parameter=(0.01, 0.02)),
        Parity(**small, size="micro", steps=8, lengths=2, lrs=(1e-2,)),
    )
    for experiment in experiments:
        run(experiment, tmp_path / "out", False, QUIET)
        path = tmp_path / "out" / f"{experiment.name}.json"
        record = json.loads(path.read_text())
        assert [result["case"] for result in record["results"]] == experiment.cases()
        assert (tmp_path / "out" / f"{experiment.name}.png").stat().st_size > 10_000
        losses = [result["found"]["validation"] for result in record["results"]]
        assert all(loss[-1][1] < loss[0][1] for loss in losses)

        # What was measured is taken from the file, the rest is measured to the same loss as before.
        kept, lost = record["results"][:-1], record["results"][-1]
        kept[0]["found"]["validation"][-1][1] = 1.25
        path.write_text(json.dumps({**record, "results": kept}))
        run(experiment, tmp_path / "out", False, QUIET)
        again = [result["found"]["validation"] for result in json.loads(path.read_text())["results"]]
        assert again[0][-1][1] == 1.25
        assert again[1:] == [*losses[1:-1], lost["found"]["validation"]]


def test_all_have_as_many_rates_and_what_is_changed_is_one_thing() -> None:
    experiment = Pretrain()
    assert {len(experiment.tried(name)) for name in CUSTOMARY} == {5}
    base = experiment.tried(OURS)[2]
    assert base == {"name": OURS, "lr": 0.005, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8}
    changed = experiment.changed(OURS)
    assert changed["beta2 0.999"] == {**base, "beta2": 0.999}
    assert [sum(base[key] != case[key] for key in base) for case in changed.values()].count(1) == len(changed) - 1
    with pytest.raises(SystemExit, match="SGD"):
        replace(experiment, optimizers=("SGD",)).cases()


def test_an_optimizer_gets_the_settings_of_its_case() -> None:
    model = llama()
    for name in CUSTOMARY:
        case = {"name": name, "lr": 0.25, "beta1": 0.7, "beta2": 0.8, "eps": 1e-5}
        (group,) = build(case, model).param_groups
        assert group["lr"] == 0.25
        assert group.get("weight_decay") == (None if name == "SM3" else 0.1)
        if name in (REFERENCE, OURS):
            assert (tuple(group["betas"]), group["eps"]) == ((0.7, 0.8), 1e-5)


def test_the_claim_of_the_pre_training_holds_where_all_its_parts_do() -> None:
    experiment = Pretrain(seeds=3)

    def losses(case: Case, ours: float = 4.01, rival: float = 4.2, sensitive: float = 0.1) -> float:
        best = {REFERENCE: 4.0, OURS: ours}.get(case["name"], rival)
        rate = case["lr"] / (experiment.lr * CUSTOMARY[case["name"]])
        return best + sensitive * (case["name"] == OURS) * (case.get("eps") == 1e-6) + 0.2 * (rate < 0.9)

    verdict = experiment.judge(found(experiment, losses))
    assert verdict.held
    assert verdict.line.index("AdamW 4.000") < verdict.line.index("Adam-mini 4.010") < verdict.line.index("Lion 4.200")
    assert not experiment.judge(found(experiment, lambda case: losses(case, ours=4.03))).held
    assert not experiment.judge(found(experiment, lambda case: losses(case, rival=4.005))).held
    assert not experiment.judge(found(experiment, lambda case: losses(case, sensitive=0.3))).held

    falling = experiment.judge(found(experiment, lambda case: 4 - case["lr"]))
    assert "Lion 3.994*" in falling.line  # the largest rate is the best: no optimum was seen


def test_the_claim_of_the_scaling_holds_where_each_size_is_on_par() -> None:
    experiment = Scaling(sizes=("micro", "mini"))

    def losses(case: Case, gap: float = 0.01) -> float:
        longest = case["tokens_per_parameter"] == 1.5
        return 4.0 + (case["name"] == PAPER) * (gap if longest and case["size"] == "mini" else 0.004 if longest else 1)

    verdict = experiment.judge(found(experiment, losses))
    assert verdict.held
    assert f"{PAPER} +25.0% to +0.1%, +25.0% to +0.2%; {BY_CHANNEL} +0.0%" in verdict.line
    assert not experiment.judge(found(experiment, lambda case: losses(case, gap=0.03))).held


def test_parity_is_that_of_the_longest_training_at_every_rate() -> None:
    experiment = Parity(steps=800, lrs=(1e-3, 1e-2))

    def losses(case: Case, gap: float = 0.01) -> float:
        late, large = case["steps"] == 800, case["lr"] == 1e-2
        above = (gap if large else 0.0) if late else 1.0
        return 4.0 + {PAPER: above, BY_CHANNEL: 0.005 if large else 0.0}.get(case["name"], 0.0)

    verdict = experiment.judge(found(experiment, losses))
    assert verdict.held
    assert f"{PAPER} +0.0%, +0.2%" in verdict.line
    assert "no worse than the paper's in 6 of 6" in verdict.line
    verdict = experiment.judge(found(experiment, lambda case: losses(case, gap=0.03)))
    assert not verdict.held
    assert "in 5 of 6" in experiment.judge(found(experiment, lambda case: losses(case, gap=0.001))).line


def test_sizes_are_counted_without_building_them() -> None:
    sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2}
    assert count("tiny") == sum(
        p.numel() for p in llama(**sizes, num_attention_heads=4, num_key_value_heads=4).parameters()
    )
    assert round(count("39M") / 1e6) == 39
    assert steps("39M", 1.02e9) == pytest.approx(7_800, rel=0.01)  # the paper's Table 9


def test_no_rule_has_more_blocks_than_the_papers_but_the_element_wise_one() -> None:
    model = llama(vocab_size=11, hidden_size=8)
    blocks = {name: adam_mini_plugins.partition(model, rules=rules(model)) for name, rules in RULES.items()}
    numbers = {name: found.num_blocks() for name, found in blocks.items()}
    assert numbers["head by channel"] == numbers[PAPER] - 11 + 8
    assert numbers[BY_CHANNEL] == numbers[PAPER] - 2 * 11 + 2 * 8
    assert [name for name in numbers if numbers[name] > numbers[PAPER]] == ["embedding and head element-wise"]
    index = blocks[BY_CHANNEL].block_index("lm_head.weight")
    torch.testing.assert_close(index.expand(11, 8), torch.arange(8).expand(11, 8))
