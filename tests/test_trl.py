"""Every stable trainer of TRL trains with `optim="adam_mini"`, all of the model and LoRA alike, and so does its CLI."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from test_hf import inner
from transformers import TrainerCallback

trl = pytest.importorskip("trl", reason="the trl extra is not installed")
peft = pytest.importorskip("peft", reason="the peft extra is not installed")
import trl_zoo  # noqa: E402  after the check that TRL is there

from adam_mini_plugins import AdamMini  # noqa: E402


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trl_zoo.save(tmp_path_factory.mktemp("model"))


class Gradients(TrainerCallback):
    """Counts for each parameter's name the steps that found a gradient."""

    def __init__(self) -> None:
        self.steps: Counter[str] = Counter()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.steps.update(name for name, p in model.named_parameters() if p.grad is not None)


def test_every_stable_trainer_of_the_installed_trl_is_tried_or_has_a_reason() -> None:
    assert trl_zoo.exported() <= {*trl_zoo.CASES, *trl_zoo.LEFT_OUT}
    assert not {*trl_zoo.CASES} & {*trl_zoo.LEFT_OUT}
    assert {*trl_zoo.NOT_IN_THIS_TRL} <= {"Distillation"}  # which came after the first release that works


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", trl_zoo.CASES)
def test_a_trainer_trains(name: str, adapted: bool, model_folder: Path, tmp_path: Path) -> None:
    trainer = trl_zoo.trainer(name, model_folder, tmp_path, trl_zoo.lora(name) if adapted else None)
    start = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    gradients = Gradients()
    trainer.add_callback(gradients)
    result = trainer.train()

    optimizer = inner(trainer)
    assert isinstance(optimizer, AdamMini)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == trl_zoo.STEPS
    assert all(math.isfinite(value) for log in logs for value in log.values() if isinstance(value, float))
    assert all(log["grad_norm"] > 0 for log in logs)
    assert math.isfinite(result.training_loss)

    parameters = dict(trainer.model.named_parameters())
    trained = {n for n, p in parameters.items() if p.requires_grad}
    assert gradients.steps == dict.fromkeys(trained, trl_zoo.STEPS)
    assert {n for n, p in parameters.items() if p in optimizer.state} == trained
    assert len(optimizer.state) == len(trained)
    assert all(optimizer.state[parameters[n]]["step"] == trl_zoo.STEPS for n in trained)
    assert {n for n, p in parameters.items() if not torch.equal(p, start[n])} == trained
    if adapted:
        copies = {n for n in trained if "lora_" not in n}
        copied = {n.partition(".modules_to_save.")[0].rpartition(".")[2] for n in copies}
        assert copied == {*trl_zoo.CASES[name].lora.get("modules_to_save", [])}
    else:
        assert trained == {*parameters}

    for layer, heads in (("q_proj", zoo.HEADS), ("k_proj", zoo.KEY_HEADS)):
        (tensor,) = (n for n in trained if f"layers.1.self_attn.{layer}" in n and "lora_A" not in n)
        assert optimizer.partition.num_blocks(tensor) == heads
        by_head = optimizer.state[parameters[tensor]]["exp_avg_sq"].view(heads, zoo.WIDE_HEAD)
        assert (by_head == by_head[:, :1]).all()
        assert by_head[:, 0].unique().numel() == heads


@pytest.mark.parametrize("name", [name for name in ("DPO", "GRPO", "RLOO") if name in trl_zoo.CASES])
def test_an_adapter_that_is_trained_on_is_compared_with_a_frozen_copy_of_it(
    name: str, model_folder: Path, tmp_path: Path
) -> None:
    student = peft.get_peft_model(trl_zoo.model(), trl_zoo.lora(name, init_lora_weights=False))
    trainer = trl_zoo.trainer(name, model_folder, tmp_path, student=student)
    start = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    assert isinstance(inner(trainer), AdamMini)
    parameters = dict(trainer.model.named_parameters())
    trained = {n for n, p in parameters.items() if p in inner(trainer).state}
    assert trained == {n for n in parameters if "lora_" in n and n.endswith(".default.weight")}
    assert {n for n, p in parameters.items() if not torch.equal(p, start[n])} == trained
    assert {n.replace(".default.", ".ref.") for n in trained} == {n for n in parameters if ".ref." in n}


def test_a_lora_run_resumed_in_the_middle_ends_bit_for_bit_where_an_uninterrupted_one_ends(
    model_folder: Path, tmp_path: Path
) -> None:
    def run(folder: str, checkpoint: str | None = None) -> Any:
        trainer = trl_zoo.trainer(
            "SFT",
            model_folder,
            tmp_path / folder,
            trl_zoo.lora("SFT", lora_dropout=0.1),
            max_steps=4,
            save_strategy="steps",
            save_steps=2,
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer

    whole = run("whole")
    assert isinstance(inner(whole), AdamMini)
    halfway = tmp_path / "whole" / "checkpoint-2"
    resumed = run("resumed", str(halfway))
    assert resumed.state.global_step == 4
    ends = dict(whole.model.named_parameters())
    assert ends.keys() == dict(resumed.model.named_parameters()).keys()
    for name, p in resumed.model.named_parameters():
        assert torch.equal(p, ends[name]), name
        state, expected = inner(resumed).state.get(p, {}), inner(whole).state.get(ends[name], {})
        assert state.keys() == expected.keys() == ({"step", "exp_avg", "exp_avg_sq"} if p.requires_grad else set())
        assert all(torch.equal(value, expected[key]) for key, value in state.items()), name
    finals = inner(whole).state_dict()["state"]
    halves = torch.load(halfway / "optimizer.pt", weights_only=True)["state"]
    assert {int(state["step"]) for state in halves.values()} == {2}
    assert not any(torch.equal(state["exp_avg"], halves[i]["exp_avg"]) for i, state in finals.items())


@pytest.mark.parametrize(
    ("optim_args", "message"),
    [
        ("values=whole", "optim_args has 'values', which .* does not know; it knows scheme, value, state_dtype"),
        ("value=rows", "value must be one of 'neuron', 'whole', got 'rows'"),
    ],
)
def test_wrong_optim_args_are_errors_before_training(
    optim_args: str, message: str, model_folder: Path, tmp_path: Path
) -> None:
    trainer = trl_zoo.trainer("SFT", model_folder, tmp_path, optim_args=optim_args)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


def adam_mini_run(*program: str, rows: list[trl_zoo.Row], model: Path, folder: Path) -> dict[str, Any]:
    """Two steps of one of TRL's programs on data in a folder; what its checkpoint says of the optimizer."""
    (folder / "data").mkdir()
    (folder / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {
        "--optim": "adam_mini",
        "--optim_args": "state_dtype=bfloat16",
        "--model_name_or_path": str(model),
        "--dataset_name": str(folder / "data"),
        "--output_dir": str(folder / "out"),
        "--max_steps": "2",
        "--save_steps": "2",
        "--per_device_train_batch_size": "2",
        "--report_to": "none",
    }
    line = [*program, *(word for option in options.items() for word in option), "--use_cpu"]
    done = subprocess.run(
        [sys.executable, "-m", "adam_mini_plugins", "run", *line],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(folder / "cache")},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "out" / "checkpoint-2" / "optimizer.pt", weights_only=True)


def assert_adam_minis(saved: dict[str, Any]) -> None:
    named = {
        name: (blocks, saved["state"][i])
        for group in saved["param_groups"]
        for name, blocks, i in zip(group["param_names"], group["blocks"], group["params"], strict=True)
    }
    query, state = named["model.layers.0.self_attn.q_proj.weight"]
    assert query == f"0: {zoo.HEADS} ({zoo.WIDE_HEAD})"
    assert state["exp_avg"].dtype == torch.bfloat16
    assert state["exp_avg_sq"].shape == (zoo.HEADS * zoo.WIDE_HEAD, 1)
    assert all(state["step"] == 2 for _, state in named.values())


def test_a_script_of_trls_runs_with_it(model_folder: Path, tmp_path: Path) -> None:
    program = ("-m", "trl.scripts.sft")
    assert_adam_minis(adam_mini_run(*program, rows=trl_zoo.CHATS, model=model_folder, folder=tmp_path))


@pytest.mark.skipif(os.name == "nt", reason="installed commands are not Python scripts there")
def test_trls_command_runs_with_it_through_accelerates_launcher(model_folder: Path, tmp_path: Path) -> None:
    command = shutil.which("trl", path=str(Path(sys.executable).parent))
    assert command
    assert_adam_minis(adam_mini_run(command, "reward", rows=trl_zoo.PREFERENCES, model=model_folder, folder=tmp_path))
