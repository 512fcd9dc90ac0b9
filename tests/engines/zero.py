"""DeepSpeed ZeRO by itself: stages, models and settings, against one process."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import deepspeed
import fsdp2
import torch
import torch.distributed as dist
import workers
from deepspeed.utils import safe_get_full_fp32_param
from torch import nn

from adam_mini_plugins.memory import measure

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)


def config(stage: int, offload: bool = False, bf16: bool = False, clip: float = 0.0, **zero: Any) -> dict[str, Any]:
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": workers.SAMPLES // dist.get_world_size(),
        "zero_optimization": {"stage": stage, **zero},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": bf16},
        "gradient_clipping": clip,
    }


def engine_of(model: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any]) -> Any:
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    assert engine.zero_optimization_stage() == settings["zero_optimization"]["stage"]
    return engine


def train(engine: Any, data: list[torch.Tensor], watch: Any = None) -> None:
    for ids in data:
        part = ids[workers.of_rank()]
        engine.backward(engine(input_ids=part, labels=part).loss)
        engine.step()


def ends(model: nn.Module) -> dict[str, torch.Tensor]:
    """The float32 weights that the engine keeps, whole."""
    return {name: safe_get_full_fp32_param(p) for name, p in model.named_parameters() if p.requires_grad}


def compare(build: Callable[[], nn.Module], settings: dict[str, Any]) -> dict[str, Any]:
    """Trains a model in one process and in DeepSpeed, with AdamMini and with AdamW."""
    figures: dict[str, Any] = {}
    state_bytes = {}
    for name, make in workers.MAKERS.items():
        alone = build()
        start = workers.weights(alone)
        workers.train(alone, make(alone), workers.batches(), clip=settings["gradient_clipping"] or None)
        model = build()
        optimizer = make(model)
        engine = engine_of(model, optimizer, settings)
        with workers.floats_reduced() as floats:
            train(engine, workers.batches())
        end = ends(model)
        alone_end = {k: v for k, v in workers.weights(alone).items() if k in end}
        figures[name] = workers.distance(alone_end, end)
        figures[f"{name} moved"] = workers.distance(start, workers.weights(alone))
        state_bytes[name] = measure(optimizer).state_bytes
        if name == "adam_mini":
            print(sum(floats), len(floats), measure(optimizer))
        engine.destroy()
    figures["share"] = state_bytes["adam_mini"] / state_bytes["adamw"]
    return figures


def llama() -> nn.Module:
    return workers.cut_llama(num_hidden_layers=1)


def figures() -> dict[str, Any]:
    found = {}
    for stage in (1, 2, 3):
        found[f"{stage}"] = compare(llama, config(stage))
        print(stage, found)
        found[f"{stage} offload"] = compare(llama, config(stage, offload=True, clip=0.5))
        print(stage, found)
    print(found)
    return found
