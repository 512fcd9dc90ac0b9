"""What the measuring function and the callback say, against sums done by hand."""

from __future__ import annotations

import csv
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_hf import arguments, trainer_for
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from transformers import TrainerCallback

from adam_mini_plugins import AdamMini
from adam_mini_plugins.callbacks.hf import OptimizerMemoryCallback
from adam_mini_plugins.memory import measure, report


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
    assert (plain.state_bytes, plain.adamw_state_bytes, plain.saved_fraction) == (0, 2 * 240 + 4, 1.0)
    optimizer = stepped(torch.optim.AdamW(model.parameters()), model)
    state = optimizer.state[model.weight]
    both = torch.zeros(2, 6, 10)
    state["exp_avg"], state["exp_avg_sq"] = both[0], both[1]
    assert measure(optimizer).state_bytes == 2 * 240 + 4


def test_state_that_parameters_share_counts_once_and_several_optimizers_together() -> None:
    one, other = nn.Linear(10, 6, bias=False), nn.Linear(6, 4, bias=False)
    first, second = (stepped(torch.optim.AdamW(m.parameters()), m) for m in (one, other))
    together = measure(first, second)
    assert together.state_bytes == together.adamw_state_bytes == 2 * (240 + 96) + 2 * 4
    table = torch.arange(256.0)  # such as the levels of 8-bit state
    for optimizer, model in ((first, one), (second, other)):
        optimizer.state[model.weight]["levels"] = table
    assert measure(first, second).state_bytes == together.state_bytes + 1024
    frozen = nn.Linear(3, 3).requires_grad_(False)
    first.add_param_group({"params": frozen.parameters()})
    assert measure(first).parameters == 60


def test_a_tensor_subclass_counts_with_the_tensors_inside() -> None:
    model = nn.Linear(10, 6, bias=False)
    optimizer = stepped(torch.optim.AdamW(model.parameters()), model)
    optimizer.state[model.weight]["exp_avg_sq"] = TwoTensor(torch.zeros(6, 10), torch.zeros(6, 10))
    memory = measure(optimizer)
    assert memory.state_bytes == 240 + 2 * 240 + 4
    assert memory.second_moment_scalars == 60


def test_offloaded_state_is_told_apart() -> None:
    model = nn.Linear(10, 6, bias=False)
    optimizer = stepped(torch.optim.AdamW(model.parameters()), model)
    optimizer.state[model.weight]["exp_avg"] = torch.zeros(6, 10, device="meta")  # stands for another device
    memory = measure(optimizer)
    assert memory.bytes_by_device == {"cpu": 240 + 4, "meta": 240}
    rows = [line.split("|") for line in memory.table("state").splitlines() if "|" in line]
    assert [[cell.strip() for cell in row] for row in rows][:3] == [
        ["state", "484 B"], ["on cpu", "244 B"], ["on meta", "240 B"]
    ]  # fmt: skip


class Holder:
    """A wrapper that shows nothing of the optimizer that it holds but its groups."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.param_groups, self.state = optimizer, optimizer.param_groups, {}


@pytest.mark.parametrize("wrap", [Holder, lambda o: Holder(Holder(o)), lambda o: Accelerator(cpu=True).prepare(o)])
def test_a_wrapped_optimizer_is_measured_as_it_is(wrap: Any) -> None:
    model = nn.Linear(10, 6)
    optimizer = stepped(AdamMini.for_model(model), model)
    assert measure(wrap(optimizer)) == measure(optimizer)
    assert measure(optimizer).state_bytes == 4 * (66 + 12 + 2)


def test_lightnings_wrapper_is_measured_as_it_is() -> None:
    wrapper = pytest.importorskip("lightning.pytorch.core.optimizer", reason="the lightning extra is not installed")
    model = nn.Linear(10, 6)
    optimizer = stepped(torch.optim.AdamW(model.parameters()), model)
    assert measure(wrapper.LightningOptimizer(optimizer)) == measure(optimizer)


# Bytes of state of a matrix of 128 x 128 and second moments, from what each package says of its formats.
OTHERS: dict[str, tuple[str, str, int, int]] = {
    # A byte a number and moment, a float32 for each 256 of them, two tables of 256 float32.
    "8-bit AdamW": ("bitsandbytes", "AdamW8bit", 2 * (16384 + 4 * 64) + 2 * 1024, 16384),
    "8-bit Lion": ("bitsandbytes", "Lion8bit", 16384 + 4 * 64 + 1024, 0),
    # The same, and a count. Four bits are half a byte, with a scale for each 128 numbers and a table of 16.
    "torchao, 8 bits": ("torchao", "AdamW8bit", 2 * (16384 + 4 * 64 + 1024) + 4, 16384),
    "torchao, 4 bits": ("torchao", "AdamW4bit", 2 * (8192 + 4 * 128 + 64) + 4, 16384),
    "Adafactor": ("torch", "Adafactor", 4 * (128 + 128) + 4, 256),
    "RMSprop": ("torch", "RMSprop", 4 * 16384 + 4, 16384),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_optimizers_to_the_byte(name: str) -> None:
    package, optimizer, expected, second_moments = OTHERS[name]
    pytest.importorskip(package, reason=f"{package}, which takes long to install, is not there")
    module = pytest.importorskip(f"{package}.optim")
    model = nn.Linear(128, 128, bias=False)
    memory = measure(stepped(getattr(module, optimizer)(model.parameters()), model))
    assert (memory.state_bytes, memory.second_moment_scalars) == (expected, second_moments)
    assert memory.adamw_state_bytes == 2 * 4 * 16384 + 4


def test_the_table() -> None:
    model = nn.Linear(1000, 600, bias=False)
    table = measure(stepped(AdamMini.for_model(model), model)).table("Memory of the optimizer's state")
    assert table.splitlines() == [
        "Memory of the optimizer's state",
        "-------------------------------",
        "state              |  2.4 MB",
        "AdamW's would be   |  4.8 MB",
        "saved              |   49.9%",
        "parameters trained | 600,000",
        "second moments     |     600",
        "-------------------------------",
    ]


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
    assert logs[0].items() >= report(measured, torch.device("cpu")).items()
    assert logs[0]["optimizer/state_bytes_all_ranks"] == measured.state_bytes
    assert [r.message for r in caplog.records if "Memory" in r.message] == [
        measured.table("Memory of the optimizer's state")
    ]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard holds: for each name, steps and values."""
    (events,) = folder.rglob("events.out.tfevents*")
    log = EventAccumulator(str(events)).Reload()
    return {tag: [(e.step, e.value) for e in log.Scalars(tag)] for tag in log.Tags()["scalars"]}


def test_tensorboard_has_the_metrics_of_a_trainer_of_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    memory = OptimizerMemoryCallback()
    options = arguments(tmp_path, report_to="tensorboard", disable_tqdm=False)
    trainer_for("llama", options, callbacks=[memory]).train()
    logged = scalars(tmp_path / "logs")
    assert len(logged["train/loss"]) == 3
    metrics = report(memory.memory, torch.device("cpu"))
    assert len(metrics) == 5
    for name, value in metrics.items():
        assert logged[f"train/{name}"] == [(2, pytest.approx(value))]
    assert capsys.readouterr().out.count(memory.memory.table("Memory of the optimizer's state")) == 1


def test_what_has_changed_is_logged_again(tmp_path: Path) -> None:
    class Thaw(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
            model.model.norm.requires_grad_(state.global_step >= 2)

    memory = OptimizerMemoryCallback()
    trainer = trainer_for("llama", arguments(tmp_path), callbacks=[memory, Thaw()])
    trainer.train()
    logs = [log for log in trainer.state.log_history if "optimizer/state_bytes" in log]
    assert [log["step"] for log in logs] == [2, 4]
    norm = 4 * 48 + 4 * 48 + 4  # a momentum and a second moment a row, and a count
    assert logs[1]["optimizer/state_bytes"] - logs[0]["optimizer/state_bytes"] == norm


@pytest.mark.parametrize("manual", [False, True])
def test_lightnings_loggers_have_the_metrics(manual: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("lightning", reason="the lightning extra is not installed")
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
    from test_lightning import FORMS, built, fit

    from adam_mini_plugins.callbacks.lightning import OptimizerMemoryMonitor
    from adam_mini_plugins.lightning import AdamMiniOptimizer

    module, monitor = built(*FORMS["two lists of two" if manual else "cosine"]), OptimizerMemoryMonitor()
    loggers = [TensorBoardLogger(tmp_path / "board"), CSVLogger(tmp_path / "csv", flush_logs_every_n_steps=1)]
    with caplog.at_level(logging.INFO):
        trainer = fit(module, AdamMiniOptimizer(), monitor, logger=loggers, log_every_n_steps=2)
    assert monitor.memory == measure(*trainer.optimizers)
    trained = [p for o in trainer.optimizers for group in o.param_groups for p in group["params"]]
    assert monitor.memory.adamw_state_bytes == sum(8 * p.numel() + 4 for p in trained)
    metrics = report(monitor.memory, torch.device("cpu"))
    written = scalars(tmp_path / "board")
    (file,) = (tmp_path / "csv").rglob("metrics.csv")
    rows = list(csv.DictReader(file.open()))
    for name, value in metrics.items():
        assert written[name] == [(0, pytest.approx(value))]
        assert [(int(row["step"]), float(row[name])) for row in rows if row[name]] == [(0, value)]
    assert len(written["loss"]) == 3
    table = monitor.memory.table("Memory of the optimizers' state")
    assert [r.message for r in caplog.records if "Memory of" in r.message] == ["\n" + table]


def test_the_callback_compares_adamw_with_itself(tmp_path: Path) -> None:
    memory = OptimizerMemoryCallback()
    trainer_for("llama", arguments(tmp_path, optim="adamw_torch"), callbacks=[memory]).train()
    assert memory.memory is not None
    assert memory.memory.state_bytes == memory.memory.adamw_state_bytes
