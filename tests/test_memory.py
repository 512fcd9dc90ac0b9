"""What the measuring function and the callback say, against sums done by hand."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from adam_mini_plugins.callbacks.hf import OptimizerMemoryCallback
from test_hf import arguments, trainer_for
from torch import nn

from adam_mini_plugins import AdamMini
from adam_mini_plugins.memory import measure


def stepped(optimizer: torch.optim.Optimizer, model: nn.Module) -> torch.optim.Optimizer:
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer


def test_adam_minis_state_to_the_byte() -> None:
    model = nn.Sequential(nn.Linear(10, 6), nn.Linear(6, 4).bfloat16())
    memory = measure(stepped(AdamMini.for_model(model, scheme="hessian"), model))
    momentum = 4 * (60 + 6) + 2 * (24 + 4)
    second_moment = (6 + 6) + (4 + 4)  # a number a row, and one for each element of a bias
    assert memory.state_bytes == momentum + 4 * second_moment + 4 * 4
    assert memory.adamw_state_bytes == 2 * momentum + 4 * 4
    assert memory.second_moment_scalars == second_moment
    assert memory.saved_fraction == pytest.approx(1 - memory.state_bytes / memory.adamw_state_bytes)


@pytest.mark.parametrize("options", [{"foreach": False}, {"fused": True}])
def test_adamw_is_predicted_to_the_byte(options: dict[str, bool]) -> None:
    model = nn.Sequential(nn.Linear(10, 6), nn.Linear(6, 4).bfloat16())
    memory = measure(stepped(torch.optim.AdamW(model.parameters(), **options), model))
    assert memory.state_bytes == memory.adamw_state_bytes
    assert memory.saved_fraction == 0


def test_shared_storage_counts_once_and_other_optimizers_are_no_trouble() -> None:
    model = nn.Linear(10, 6, bias=False)
    momentum = measure(stepped(torch.optim.SGD(model.parameters(), momentum=0.9), model))
    assert (momentum.state_bytes, momentum.second_moment_scalars) == (240, 0)
    plain = measure(stepped(torch.optim.SGD(model.parameters()), model))
    assert (plain.state_bytes, plain.adamw_state_bytes, plain.saved_fraction) == (0, 0, 0.0)
    optimizer = stepped(torch.optim.AdamW(model.parameters()), model)
    state = optimizer.state[model.weight]
    both = torch.zeros(2, 6, 10)
    state["exp_avg"], state["exp_avg_sq"] = both[0], both[1]
    assert measure(optimizer).state_bytes == 2 * 240 + 4


def test_the_callback_measures_after_the_first_step_and_logs_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    memory = OptimizerMemoryCallback()
    trainer = trainer_for("llama", arguments(tmp_path), callbacks=[memory])
    with caplog.at_level(logging.INFO, "adam_mini_plugins"):
        trainer.train()
    measured = measure(trainer.optimizer)
    assert memory.memory == measured
    assert measured.state_bytes < 0.53 * measured.adamw_state_bytes
    logs = [log for log in trainer.state.log_history if "optimizer/state_bytes" in log]
    assert [log["step"] for log in logs] == [2]
    assert logs[0].items() >= measured.metrics().items()
    assert [r.message for r in caplog.records if "optimizer state" in r.message] == [
        f"optimizer state: {measured.metrics()}"
    ]


def test_the_callback_compares_adamw_with_itself(tmp_path: Path) -> None:
    memory = OptimizerMemoryCallback()
    trainer_for("llama", arguments(tmp_path, optim="adamw_torch"), callbacks=[memory]).train()
    assert memory.memory is not None
    assert memory.memory.state_bytes == memory.memory.adamw_state_bytes
