"""transformers' own tensor parallelism, by the model's plan: in a plain loop and through Trainer, on the CPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
import workers
import zoo
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments
from transformers.distributed import DistributedConfig

import adam_mini_plugins.hf  # noqa: F401 (makes optim="adam_mini" known)
from adam_mini_plugins import AdamMini

FOLDER = Path(os.environ["CHECKPOINTS"])
IDS = workers.batches(1)[0]
# Heads and tokens that 2 processes can have as many of.
SIZES = {**zoo.DECODER, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 98}


def llama() -> nn.Module:  # wide, so that what a row takes more is little
    return workers.llama(**{**SIZES, "hidden_size": 192, "intermediate_size": 320})


def experts() -> nn.Module:
    torch.manual_seed(0)
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, num_local_experts=4)).train()


def tied() -> nn.Module:
    return workers.llama(**SIZES, tie_word_embeddings=True)


def cut(build: Callable[[], nn.Module]) -> nn.Module:
    """The model, loaded by each process in part."""
    folder = FOLDER / build.__name__
    if dist.get_rank() == 0:
        build().save_pretrained(folder)
    dist.barrier()
    config = DistributedConfig(tp_size=dist.get_world_size())
    return transformers.AutoModelForCausalLM.from_pretrained(folder, distributed_config=config).train()


def compared(build: Callable[[], nn.Module]) -> dict[str, Any]:
    return workers.compare(build, lambda _: cut(build), part=slice(None))


def trained(optim: str) -> Trainer:
    model = cut(llama)
    arguments = TrainingArguments(
        output_dir=str(FOLDER / "out"), optim=optim, learning_rate=1e-3, weight_decay=0.0, max_grad_norm=0.5,
        lr_scheduler_type="constant", per_device_train_batch_size=len(IDS), max_steps=workers.STEPS, use_cpu=True,
        save_strategy="no", report_to="none", disable_tqdm=True, logging_strategy="no",
        accelerator_config={"use_configured_state": True},
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=[{"input_ids": ids, "labels": ids} for ids in IDS])
    trainer.train()
    return trainer


def by_trainer() -> dict[str, float]:
    state = PartialState(cpu=True, backend="gloo")
    state._shared_state["distributed_type"] = DistributedType.MULTI_GPU  # as for FSDP2, or DDP would wrap it
    state._shared_state["device"] = torch.device("cpu")
    found: dict[str, float] = {}
    for optim, make in (
        ("adam_mini", AdamMini.for_model),
        ("adamw_torch", lambda m, **o: torch.optim.AdamW(m.parameters(), **o)),
    ):
        trainer = trained(optim)
        assert trainer.get_tp_size() == dist.get_world_size()
        assert any(isinstance(p, DTensor) for p in trainer.model.parameters())
        alone = llama()
        start = workers.weights(alone)
        workers.train(alone, make(alone, lr=1e-3, weight_decay=0.0), [IDS] * workers.STEPS, clip=0.5)
        name = optim.removesuffix("_torch")
        found[name] = workers.distance(workers.weights(trainer.model), workers.weights(alone))
        found[f"{name} moved"] = workers.distance(start, workers.weights(alone))
    return found


def figures() -> dict[str, Any]:
    return {"llama": compared(llama), "experts": compared(experts), "tied": compared(tied), "trainer": by_trainer()}
