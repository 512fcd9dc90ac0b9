"""DeepSpeed ZeRO by itself: stages, settings and models, against one process."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable
from typing import Any

import deepspeed
import fsdp2
import torch
import torch.distributed as dist
import workers
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from peft import LoraConfig, get_peft_model
from torch import nn

from adam_mini_plugins import AdamMini, partition
from adam_mini_plugins.memory import measure

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
# An operator for inference on one machine, which takes minutes to compile and is not needed.
deepspeed.comm.torch.build_shm_op = lambda: None


def config(stage: int, offload: bool = False, clip: float = 0.0, **settings: Any) -> dict[str, Any]:
    """A config of DeepSpeed's; settings that are no sections of it are `zero_optimization`'s."""
    sections = {name: settings.pop(name) for name in ("bf16", "data_types") if name in settings}
    zero = {"stage": stage, "reduce_bucket_size": 2**16, "allgather_bucket_size": 2**16, **settings}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": workers.SAMPLES // int(os.environ["WORLD_SIZE"]),
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": clip,
        **sections,
    }


def start(model: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any]) -> Any:
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    assert engine.zero_optimization_stage() == settings["zero_optimization"]["stage"]
    return engine


def train(engine: Any, data: list[torch.Tensor], part: slice) -> None:
    for ids in data:
        engine.backward(engine(input_ids=ids[part], labels=ids[part]).loss)
        engine.step()


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Casts parameters alone: DeepSpeed leaves buffers, as those of rotary embeddings, in float32."""
    for p in model.parameters():
        p.data = p.data.to(dtype)
    return model


def train_masters(model: nn.Module, make: Callable[[nn.Module], torch.optim.Optimizer]) -> nn.Module:
    """What engines do in bfloat16, in one process: gradients of a bfloat16 copy, steps of float32 masters."""
    masters = cast(cast(model, torch.bfloat16), torch.float32)
    copied = cast(copy.deepcopy(masters), torch.bfloat16)
    optimizer = make(masters)
    for ids in workers.batches():
        copied.zero_grad()
        copied(input_ids=ids, labels=ids).loss.backward()
        for master, p in zip(masters.parameters(), copied.parameters(), strict=True):
            master.grad = p.grad.float()
        optimizer.step()
        with torch.no_grad():
            for master, p in zip(masters.parameters(), copied.parameters(), strict=True):
                p.copy_(master)
    return masters


def trained(weights: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weights[name] for name, p in model.named_parameters() if p.requires_grad}


def adam_mini(model: nn.Module) -> torch.optim.Optimizer:
    return AdamMini(workers.decayed(model), lr=1e-3, partition=partition(model))


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(workers.decayed(model), lr=1e-3)


def compare(build: Callable[[], nn.Module], settings: dict[str, Any], in_parts: bool = False) -> dict[str, Any]:
    """Trains a model in one process and in DeepSpeed, with AdamMini and with AdamW.

    Args:
        build: Makes the model, always the same.
        settings: DeepSpeed's config.
        in_parts: Whether ZeRO-3 cuts the model before an optimizer is made.
    """
    figures: dict[str, Any] = {}
    state_bytes = {}
    in_bfloat16 = "bf16" in settings
    for name, make in (("adam_mini", adam_mini), ("adamw", adamw)):
        alone = build()
        before = workers.weights(alone)
        if in_bfloat16:
            alone = train_masters(alone, make)
        else:
            workers.train(alone, make(alone), workers.batches(), clip=settings["gradient_clipping"] or None)
        model = build()
        if in_parts:
            deepspeed.zero.Init(module=model, config_dict_or_path=copy.deepcopy(settings))
            assert {tuple(p.shape) for p in model.parameters()} == {(0,)}
        optimizer = make(model)
        engine = start(model, optimizer, copy.deepcopy(settings))
        with workers.floats_reduced() as floats:
            # In bfloat16 every process sees all of it: else gradients are rounded before they are added up.
            train(engine, workers.batches(), slice(None) if in_bfloat16 else workers.of_rank())
        after = trained(workers.weights(model), model)
        figures[name] = workers.distance(trained(workers.weights(alone), alone), after)
        figures[f"{name} moved"] = workers.distance(trained(before, alone), after)
        flats = list(optimizer.state)
        assert all(p.dtype == torch.float32 and p.ndim == 1 for p in flats)
        figures["flat tensors"] = len(flats)
        figures["by BF16_Optimizer"] = isinstance(engine.optimizer, BF16_Optimizer)
        memory = measure(optimizer)
        state_bytes[name] = memory.state_bytes
        if name == "adam_mini":
            figures["steps"] = sorted({float(state["step"]) for state in optimizer.state.values()})
            figures["reductions"], figures["floats reduced"] = len(floats), max(floats, default=0)
            figures["as measured"] = memory.state_bytes / memory.adamw_state_bytes
        engine.destroy()
    figures["share"] = state_bytes["adam_mini"] / state_bytes["adamw"]
    return figures


def llama(**options: Any) -> nn.Module:
    return workers.cut_llama(num_hidden_layers=1, **options)


def tied() -> nn.Module:
    return llama(tie_word_embeddings=True)


def wide() -> nn.Module:
    return workers.llama(hidden_size=192, intermediate_size=512, head_dim=10, num_hidden_layers=1)


def lora() -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(llama(), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))


def gpt2() -> nn.Module:
    """GPT-2 but for the biases of queries and keys, whose gradients are nothing but rounding."""
    model = fsdp2.gpt2().float()
    for name, p in model.named_parameters():
        p.requires_grad_(not name.endswith("c_attn.bias"))
    return model


class Scaled(nn.Module):
    """A model whose only trained vector is so short that the last processes get none of it."""

    def __init__(self) -> None:
        super().__init__()
        self.model = llama()
        for p in self.model.parameters():
            p.requires_grad_(p.ndim > 1)
        self.scale = nn.Parameter(torch.ones(2))

    def forward(self, **batch: torch.Tensor) -> Any:
        output = self.model(**batch)
        output.loss = output.loss * self.scale.prod()
        return output


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "1": (wide, {"stage": 1, "clip": 0.5}),
    "1, experts, offload": (fsdp2.experts, {"stage": 1, "offload": True}),
    "1, empty parts": (Scaled, {"stage": 1}),
    "2": (wide, {"stage": 2}),
    "2, tied, offload": (tied, {"stage": 2, "offload": True, "clip": 0.5}),
    "2, LoRA": (lora, {"stage": 2}),
    "2, Conv1D": (gpt2, {"stage": 2}),
    "2, aligned": (llama, {"stage": 2, "parameter_alignment": True}),
    "3": (wide, {"stage": 3}),
    "3, sub-groups, offload": (llama, {"stage": 3, "offload": True, "sub_group_size": 1000, "clip": 0.5}),
    "3, fused, in parts": (fsdp2.phi3, {"stage": 3}),
    "3, LoRA": (lora, {"stage": 3}),
    "3, empty parts": (Scaled, {"stage": 3}),
    "3, tied, experts": (lambda: fsdp2.experts(tie_word_embeddings=True), {"stage": 3}),
}
IN_BFLOAT16: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "1, bfloat16": (llama, {"stage": 1, "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}),
    "2, bfloat16, offload": (llama, {"stage": 2, "offload": True, "bf16": {"enabled": True}}),
    "3, bfloat16": (llama, {"stage": 3, "bf16": {"enabled": True}}),
}


def figures() -> dict[str, Any]:
    # On two processes the mean of equal gradients is exact.
    cases = {**CASES, **IN_BFLOAT16} if dist.get_world_size() == 2 else CASES
    found: dict[str, Any] = {"refused": refused()}
    for name, (build, settings) in cases.items():
        found[name] = compare(build, config(**settings), in_parts=name == "3, fused, in parts")
    return found


def refused() -> dict[str, str]:
    """What AdamMini says to settings that it can't follow, at the first step and before anything has changed."""
    return {"round robin": message(2, round_robin_gradients=True)}


def message(stage: int, **settings: Any) -> str:
    model = llama()
    return said(start(model, adam_mini(model), config(stage, **settings)), model)


def said(engine: Any, model: nn.Module) -> str:
    before = workers.weights(model)
    try:
        train(engine, workers.batches(1), workers.of_rank())
    except RuntimeError as error:
        assert workers.distance(workers.weights(model), before) == 0.0
        return str(error)
    finally:
        engine.destroy()
    return "not refused"
