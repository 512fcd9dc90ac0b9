"""transformers' Trainer and TRL's SFTTrainer on the CPU, under one engine after another.

The first argument has the engines: `ddp`, `fsdp1`, `fsdp2`, `zero1` to `zero3`, and `launched`, which is FSDP2 as the
file of `accelerate launch` sets it. The others say what to do under each.
"""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed_guide
import torch
import trl_zoo
import workers
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

import adam_mini_plugins.hf  # makes optim="adam_mini" known
from adam_mini_plugins import AdamMini

ENGINES, *WAYS = workers.arguments()
ENGINE = ""  # the one at work
OUTPUT = Path(os.environ["CHECKPOINTS"])
# Processes have the same weights from the start here, and need no GPU to get them from one another.
IN_FSDP1 = {"use_orig_params": True, "sync_module_states": False, "cpu_ram_efficient_loading": False}
IDS = workers.batches(1)[0]  # each step sees all of it, in whatever order
DATA = [{"input_ids": ids, "labels": ids} for ids in IDS]


def arguments(folder: str, cls: type = TrainingArguments, **options: Any) -> Any:
    defaults = {
        "optim": "adam_mini",
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.5,
        "per_device_train_batch_size": len(DATA) // PartialState().num_processes,
        "max_steps": workers.STEPS,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
    }
    if ENGINE != "ddp":
        defaults["accelerator_config"] = {"use_configured_state": True}
    if ENGINE.startswith("zero"):
        import zero  # noqa: F401  (DeepSpeed, set up for a CPU)

        AcceleratorState._reset_state()  # which holds the config of the trainer before
        defaults["deepspeed"] = deepspeed_guide.config(int(ENGINE[-1]))
    if ENGINE.startswith("fsdp"):
        defaults |= {
            "fsdp": True,
            "fsdp_config": {
                "version": int(ENGINE[-1]),
                **(IN_FSDP1 if ENGINE == "fsdp1" else {}),
                "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
                "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
                "state_dict_type": options.pop("state_dict_type", "FULL_STATE_DICT"),
            },
        }
    return cls(output_dir=str(OUTPUT / folder), **{**defaults, **options})


def inner(trainer: Trainer) -> torch.optim.Optimizer:
    optimizer = trainer.optimizer
    while hasattr(optimizer, "optimizer"):  # accelerate's wrapper, DeepSpeed's
        optimizer = optimizer.optimizer
    return optimizer


def decayed(model: nn.Module, make: Any) -> torch.optim.Optimizer:
    """An optimizer in one process, with the groups that Trainer makes."""
    groups = workers.decayed(model)
    if make is AdamMini:
        return AdamMini(groups, lr=1e-3, partition=adam_mini_plugins.partition(model))
    return torch.optim.AdamW(groups, lr=1e-3)


def model() -> nn.Module:
    return workers.cut_llama(num_hidden_layers=1, use_cache=False)


def ends(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The weights by their names in the model itself."""
    if ENGINE == "fsdp1":
        return workers.weights(trainer.model_wrapped)
    return workers.weights(trainer.accelerator.unwrap_model(trainer.model))


def assert_engine(trainer: Trainer) -> None:
    kind = trainer.accelerator.distributed_type
    params = [p for group in inner(trainer).param_groups for p in group["params"]]
    if ENGINE in ("fsdp2", "launched"):
        assert kind == DistributedType.FSDP, kind
        assert trainer.accelerator.is_fsdp2
        assert all(isinstance(p, DTensor) for p in params)
    elif ENGINE == "fsdp1":
        assert kind == DistributedType.FSDP, kind
        assert not trainer.accelerator.is_fsdp2
        assert all(p.ndim == 1 for p in params)
    elif ENGINE.startswith("zero"):
        assert kind == DistributedType.DEEPSPEED, kind
        assert trainer.model_wrapped.zero_optimization_stage() == int(ENGINE[-1])
    else:
        assert kind == DistributedType.MULTI_CPU, kind
        assert isinstance(trainer.model_wrapped, nn.parallel.DistributedDataParallel)
        assert not any(isinstance(p, DTensor) for p in params)


def compared(make_trainer: Callable[[str], Trainer], build: Callable[[], nn.Module]) -> dict[str, float]:
    """Distances from one process, which trains what `build` makes, for AdamMini and AdamW."""
    found: dict[str, float] = {}
    for optim, make in (("adam_mini", AdamMini), ("adamw_torch", torch.optim.AdamW)):
        trainer = make_trainer(optim)
        alone = build()
        alone.load_state_dict(trainer.model.state_dict())
        start = workers.weights(alone)
        workers.train(alone, decayed(alone, make), [IDS] * workers.STEPS, clip=0.5)
        trainer.train()
        assert_engine(trainer)
        assert isinstance(inner(trainer), make)
        name = optim.removesuffix("_torch")
        found[name] = workers.distance(ends(trainer), workers.weights(alone))
        found[f"{name} moved"] = workers.distance(start, workers.weights(alone))
    return found


def plain(optim: str) -> Trainer:
    return Trainer(model(), arguments(optim, optim=optim), train_dataset=DATA)


def with_lora(optim: str) -> Trainer:
    adapted = get_peft_model(model(), lora())
    return Trainer(adapted, arguments(f"lora {optim}", optim=optim), train_dataset=DATA)


def sft(optim: str, config: LoraConfig | None = None) -> SFTTrainer:
    return SFTTrainer(
        model(),
        arguments(f"sft {optim}", SFTConfig, optim=optim),
        train_dataset=Dataset.from_dict({"input_ids": IDS.tolist()}),
        processing_class=trl_zoo.tokenizer(),
        peft_config=config,
    )


def lora() -> LoraConfig:
    # Of A's two rows a third process has none.
    return LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")


def resumed() -> dict[str, float]:
    """How far training that was resumed in the middle ends from training that was not."""
    found = {}
    for kind in ("FULL_STATE_DICT", "SHARDED_STATE_DICT") if ENGINE == "fsdp2" else ("plain",):
        options = {"state_dict_type": kind} if ENGINE == "fsdp2" else {}
        saving = {"save_strategy": "steps", "save_steps": 3, **options}
        trainer = Trainer(model(), arguments(kind, **saving), train_dataset=DATA)
        trainer.train()
        second = Trainer(model(), arguments(f"{kind} resumed", **options), train_dataset=DATA)
        second.train(resume_from_checkpoint=str(OUTPUT / kind / "checkpoint-3"))
        assert second.state.global_step == workers.STEPS
        assert_engine(second)
        found[kind] = workers.distance(ends(trainer), ends(second))
    return found


def main() -> None:
    global ENGINE
    faulthandler.dump_traceback_later(290)
    ways = {
        "trainer": lambda: compared(plain, model),
        "lora": lambda: compared(with_lora, lambda: get_peft_model(model(), lora())),
        "sft": lambda: compared(sft, model),
        "sft, lora": lambda: compared(lambda optim: sft(optim, lora()), lambda: get_peft_model(model(), lora())),
        "resumed": resumed,
    }
    figures = {}
    for ENGINE in ENGINES.split(","):
        set_up()
        figures[ENGINE] = {way: ways[way]() for way in WAYS}
    workers.report(figures)


def set_up() -> None:
    state = PartialState(cpu=True, backend="gloo")
    if ENGINE != "ddp":
        # accelerate takes these engines for a matter of accelerators, and would train DDP on a CPU without a word.
        kind = DistributedType.DEEPSPEED if ENGINE.startswith("zero") else DistributedType.MULTI_GPU
        state._shared_state["distributed_type"] = kind
        state._shared_state["device"] = torch.device("cpu")


main()
