"""The door into transformers: what `optim="adam_mini"` does in a Trainer."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from torch import nn
from transformers import (
    HfArgumentParser,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)

import adam_mini_plugins
import adam_mini_plugins.hf as door
from adam_mini_plugins import AdamMini, PartitionError


class Batches(torch.utils.data.Dataset):
    """The samples of a zoo case's batch, many times over and shuffled in their tokens."""

    def __init__(self, batch: zoo.Batch, samples: int = 24) -> None:
        size = len(next(iter(batch.values())))
        self.samples = [
            {key: value[i % size].roll(i, -1) if value.dim() > 1 else value[i % size] for key, value in batch.items()}
            for i in range(samples)
        ]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return self.samples[i]


def arguments(folder: Path, cls: type = TrainingArguments, **options: Any) -> TrainingArguments:
    defaults = {
        "optim": "adam_mini",
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "per_device_train_batch_size": 2,
        "max_steps": 6,
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    return cls(output_dir=str(folder), **{**defaults, **options})


def trainer_for(name: str, args: TrainingArguments, cls: type[Trainer] = Trainer, **options: Any) -> Trainer:
    model, batch = zoo.CASES[name].build()
    return cls(model=model, args=args, train_dataset=Batches(batch), **options)


def inner(trainer: Trainer) -> torch.optim.Optimizer:
    """The optimizer inside accelerate's wrapper."""
    return getattr(trainer.optimizer, "optimizer", trainer.optimizer)


@pytest.mark.parametrize("name", ["qwen3-head_dim", "gpt2", "t5"])
def test_a_run_resumed_in_the_middle_ends_bit_for_bit_where_an_uninterrupted_one_ends(
    name: str, tmp_path: Path
) -> None:
    seq2seq = {"cls": Seq2SeqTrainingArguments} if name == "t5" else {}
    trainer_cls = Seq2SeqTrainer if name == "t5" else Trainer
    saving = {"save_strategy": "steps", "save_steps": 3}

    whole = trainer_for(name, arguments(tmp_path / "whole", **saving, **seq2seq), trainer_cls)
    start = {k: v.clone() for k, v in whole.model.state_dict().items()}
    whole.train()
    assert isinstance(inner(whole), AdamMini)
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    resumed = trainer_for(name, arguments(tmp_path / "resumed", **seq2seq), trainer_cls)
    resumed.train(resume_from_checkpoint=str(checkpoint))

    assert resumed.state.global_step == 6
    ends = whole.model.state_dict()
    for key, value in resumed.model.state_dict().items():
        assert torch.equal(value, ends[key]), key
    assert any(not torch.equal(start[key], ends[key]) for key in start)
    for p, q in zip(whole.model.parameters(), resumed.model.parameters()):
        for key, value in inner(whole).state[p].items():
            assert torch.equal(value, inner(resumed).state[q][key])
    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    assert set(saved["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}


def test_everything_but_the_optimizer_is_as_for_adamw_torch(tmp_path: Path) -> None:
    options = {"adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-5, "lr_scheduler_type": "cosine"}
    ours = trainer_for("gpt2", arguments(tmp_path, **options))
    theirs = trainer_for("gpt2", arguments(tmp_path, **options, optim="adamw_torch"))
    for trainer in (ours, theirs):
        trainer.create_optimizer_and_scheduler(num_training_steps=6)
    names = {p: n for n, p in ours.model.named_parameters()} | {p: n for n, p in theirs.model.named_parameters()}
    for mine, other in zip(inner(ours).param_groups, inner(theirs).param_groups, strict=True):
        for option in ("lr", "betas", "eps", "weight_decay", "maximize"):
            assert mine[option] == other[option], option
        assert [names[p] for p in mine["params"]] == [names[p] for p in other["params"]]
        assert mine["param_names"] == [names[p] for p in mine["params"]]
    assert inner(ours).param_groups[0]["betas"] == (0.8, 0.9)
    ours.train(), theirs.train()
    rates = [[log["learning_rate"] for log in t.state.log_history if "learning_rate" in log] for t in (ours, theirs)]
    assert rates[0] == rates[1]
    assert len(set(rates[0])) == 3


def test_optim_args_reach_the_partition_and_the_state(tmp_path: Path) -> None:
    trainer = trainer_for("llama", arguments(tmp_path, optim_args="value=whole, state_dtype=bfloat16"))
    trainer.train()
    optimizer = inner(trainer)
    value = trainer.model.model.layers[0].self_attn.v_proj.weight
    assert optimizer.partition.num_blocks("model.layers.0.self_attn.v_proj.weight") == 1
    assert optimizer.state[value]["exp_avg"].dtype == torch.bfloat16
    tensor = trainer_for("llama", arguments(tmp_path, optim_args="scheme=tensor")).create_optimizer()
    assert tensor.partition.scheme == "tensor"


@pytest.mark.parametrize(
    ("optim_args", "message"),
    [
        (
            "values=whole",
            "optim_args has 'values', which .* does not know; it knows scheme, value, state_dtype,",
        ),
        ("value=rows", "value must be one of 'neuron', 'whole', got 'rows'"),
        ("scheme=none", "scheme must be one of 'auto', 'hessian', 'tensor', got 'none'"),
        ("state_dtype=int8", "state_dtype must be a floating-point dtype .*, got 'int8'"),
    ],
)
def test_wrong_optim_args_are_errors_before_training(optim_args: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        trainer_for("llama", arguments(tmp_path, optim_args=optim_args)).train()


def test_a_model_whose_blocks_cannot_be_told_is_an_error_before_training(tmp_path: Path) -> None:
    trainer = trainer_for("llama", arguments(tmp_path))
    trainer.model.model.layers[0].self_attn.head_dim = 9
    with pytest.raises(PartitionError, match="48 rows are not 6 heads of 9 rows"):
        trainer.train()


def test_a_model_that_is_not_transformers_own(tmp_path: Path) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            out = self.layer(x).squeeze(-1)
            return {"loss": (out - labels).square().mean(), "logits": out}

    data = Batches({"x": torch.randn(8, 3), "labels": torch.randn(8)})
    trainer = Trainer(Plain(), arguments(tmp_path), train_dataset=data)
    trainer.train()
    assert inner(trainer).partition.scheme == "tensor"


def test_without_a_model_it_says_so() -> None:
    with pytest.raises(ValueError, match='optim="adam_mini" needs the model'):
        Trainer.get_optimizer_cls_and_kwargs(TrainingArguments("x", optim="adam_mini", use_cpu=True))


def test_an_adamw_checkpoint_is_refused_with_the_way_out(tmp_path: Path) -> None:
    trainer_for("llama", arguments(tmp_path, optim="adamw_torch", save_strategy="steps", save_steps=3)).train()
    with pytest.raises(ValueError, match="not AdamMini's but Adam's or AdamW's"):
        trainer_for("llama", arguments(tmp_path)).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_training_arguments_save_load_print_and_parse(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    assert args.to_dict()["optim"] == json.loads(args.to_json_string())["optim"] == "adam_mini"
    assert "ADAM_MINI" in str(args)
    assert dataclasses.replace(args, learning_rate=1.0).optim == args.optim
    line = ["--output_dir", str(tmp_path), "--optim", "adam_mini", "--optim_args", "value=whole", "--use_cpu"]
    (parsed,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(line)
    assert parsed.optim == "adam_mini"
    (read,) = HfArgumentParser(TrainingArguments).parse_dict(args.to_dict())
    assert read.optim == "adam_mini"
    with pytest.raises(ValueError, match=r"adam_maxi is not a valid OptimizerNames, .*'adam_mini'"):
        arguments(tmp_path, optim="adam_maxi")


def test_saved_arguments_load_in_a_process_that_has_not_registered(tmp_path: Path) -> None:
    torch.save(arguments(tmp_path), tmp_path / "training_args.bin")
    code = "import sys, torch; print(torch.load(sys.argv[1], weights_only=False).optim.value)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "training_args.bin")], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "adam_mini"


def test_registering_again_changes_nothing() -> None:
    from transformers.training_args import OptimizerNames

    before = list(OptimizerNames)
    member = OptimizerNames("adam_mini")
    adam_mini_plugins.register()
    door.register()
    assert list(OptimizerNames) == before
    assert before.count(member) == 1
    assert OptimizerNames("adam_mini") is OptimizerNames.ADAM_MINI is OptimizerNames["ADAM_MINI"] is member


def test_a_transformers_without_a_table_of_optimizers_names_the_versions_that_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "transformers.trainer_optimizer", None)
    with pytest.raises(RuntimeError, match=r"to transformers \d.*; transformers>=5\.2 works: pip install"):
        door.register()


def test_mixed_precision_and_accumulation(tmp_path: Path) -> None:
    trainer = trainer_for("llama", arguments(tmp_path, bf16=True, gradient_accumulation_steps=2, max_grad_norm=0.5))
    result = trainer.train()
    assert result.training_loss > 0
    assert all(state["step"] == 6 for state in inner(trainer).state.values())


def test_frozen_weights_cost_nothing(tmp_path: Path) -> None:
    trainer = trainer_for("llama", arguments(tmp_path))
    trainer.model.model.requires_grad_(False)
    trainer.train()
    assert list(inner(trainer).state) == [trainer.model.lm_head.weight]
