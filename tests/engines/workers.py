"""What worker scripts share: models, batches, training, and distances from one process."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import transformers
import zoo
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from adam_mini_plugins import AdamMini, Partition, partition, sharding
from adam_mini_plugins.blocks.whole import whole_shape
from adam_mini_plugins.memory import measure

STEPS = 5
SAMPLES, TOKENS = 6, 8  # as many for each of 2 as of 3 processes
OPTIONS = {"lr": 1e-3, "weight_decay": 0.1}


def llama(**options: Any) -> nn.Module:
    """A Llama; that of the zoo unless told otherwise."""
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**zoo.DECODER, **options})).train()


def cut_llama(**options: Any) -> nn.Module:
    """A Llama whose heads and rows no number of processes divides: 3 heads and 1 key head of 10 rows, 97 tokens."""
    return llama(num_attention_heads=3, num_key_value_heads=1, head_dim=10, **options)


def batches(steps: int = STEPS, first: int = 0) -> list[Tensor]:
    """The whole batches of a training, the same in every process."""
    return [
        torch.randint(3, 97, (SAMPLES, TOKENS), generator=torch.Generator().manual_seed(step))
        for step in range(first, first + steps)
    ]


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Iterable[Tensor],
    part: slice = slice(None),
    watch: Any = None,
    clip: float | None = None,
) -> None:
    """Trains on a part of each batch; `watch` is a context for the optimizer's steps."""
    for ids in data:
        optimizer.zero_grad()
        model(input_ids=ids[part], labels=ids[part]).loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        with watch or nullcontext():
            optimizer.step()


def of_rank() -> slice:
    """This process's part of a batch."""
    return slice(dist.get_rank(), None, dist.get_world_size())


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together from all processes; of parameters in DeepSpeed's hands the float32 values."""
    if tensor.requires_grad and (hasattr(tensor, "_hp_mapping") or hasattr(tensor, "_z3_optimizer")):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(tensor).detach()
    if hasattr(tensor, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A model's whole weights, by their names in one process."""
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model):
            return weights(model.module)
    # DistributedDataParallel holds the model as a module of its own.
    names = (
        (name.replace("_fsdp_wrapped_module.", "").removeprefix("module."), p) for name, p in model.named_parameters()
    )
    return {name: whole(p).clone() for name, p in names}


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference of an element."""
    assert one.keys() == other.keys()
    return max((float((one[name] - other[name]).abs().max()) for name in one), default=0.0)


def adam_mini(model: nn.Module, blocks: Partition | None = None) -> AdamMini:
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return AdamMini(named, partition=blocks or partition(model), **OPTIONS)


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **OPTIONS)


def decayed(model: nn.Module) -> list[dict[str, Any]]:
    """The groups that trainers make: vectors without decay. An adapter has none."""
    named = [(name, p, whole_shape(p)) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [(name, p) for name, p, shape in named if len(shape) > 1], "weight_decay": 0.1},
        {"params": [(name, p) for name, p, shape in named if len(shape) == 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


MAKERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {"adam_mini": adam_mini, "adamw": adamw}


def swapped(model: nn.Module, shard: Callable[[nn.Module], None], make: Callable[..., Any]) -> torch.optim.Optimizer:
    """An optimizer that was made before its model was sharded, as accelerate does it."""
    optimizer = make(model)
    names = {p: name for name, p in model.named_parameters()}
    groups = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
    shard(model)
    parameters = dict(model.named_parameters())
    for group, members in zip(optimizer.param_groups, groups):
        group["params"] = [parameters[name] for name in members]
    return optimizer


def compare(
    build: Callable[[], nn.Module],
    shard: Callable[[nn.Module], nn.Module | None],
    part: slice | None = None,
    swap: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Trains a model in one process and sharded, with AdamMini and with AdamW.

    Args:
        build: Makes the model, always the same.
        shard: Shards it in place, or returns it wrapped.
        part: This process's part of a batch.
        swap: Makes the optimizer before it is sharded.
        **options: For `train`.
    """
    figures: dict[str, Any] = {}
    state_bytes = {}
    for name, make in MAKERS.items():
        alone = build()
        start = weights(alone)
        if dist.get_rank() == 0:
            train(alone, make(alone), batches(), **options)
        sharded = build()
        if swap:
            optimizer = swapped(sharded, shard, make)
        else:
            sharded = shard(sharded) or sharded
            optimizer = make(sharded)
        watch = Watch()
        with floats_reduced() as floats:
            train(sharded, optimizer, batches(), part or of_rank(), watch, **options)
        end = weights(sharded)
        if dist.get_rank() == 0:
            figures[name] = distance(weights(alone), end)
            figures[f"{name} moved"] = distance(start, weights(alone))
        state_bytes[name] = measure(optimizer).state_bytes
        figures[f"{name} calls"] = watch.calls
        if name == "adam_mini":
            figures["floats reduced"] = max(floats, default=0)
    parts = [p for p in sharded.parameters() if isinstance(p, DTensor)]
    figures["placements"] = sorted({str(tuple(p.placements)) for p in parts})
    figures["flattened"] = sum(p.ndim < q.ndim for p, q in zip(sharded.parameters(), alone.parameters()))
    figures["empty parts"] = sum(not p.to_local().numel() for p in parts)
    figures["share"] = state_bytes["adam_mini"] / state_bytes["adamw"]
    return figures


class Watch:
    """Notes which collectives each step of an optimizer calls."""

    def __init__(self) -> None:
        self.calls: list[dict[str, int]] = []

    def __enter__(self) -> None:
        self.mode = CommDebugMode()
        self.mode.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.mode.__exit__(*error)
        self.calls.append({str(op): count for op, count in self.mode.get_comm_counts().items()})


@contextmanager
def floats_reduced() -> Iterator[list[int]]:
    """The lengths of what AdamMini adds up over processes."""
    seen: list[int] = []
    original = sharding.distributed.all_reduce

    def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(tensor.numel())
        return original(tensor, *args, **kwargs)

    with mock.patch.object(sharding, "distributed", SimpleNamespace(all_reduce=all_reduce)):
        yield seen


def worst(figures: Any) -> Any:
    """Figures of all processes as one, numbers by the largest; some have only process 0's."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, figures)
    return _worst(everyone)


def _worst(of_each: list[Any]) -> Any:
    first = of_each[0]
    if isinstance(first, dict):
        return {key: _worst([figures[key] for figures in of_each if key in figures]) for key in first}
    return max(of_each) if isinstance(first, int | float) else first


def arguments() -> list[str]:
    """What the test that launched this script passed to it."""
    return sys.argv[2:]


def report(figures: dict[str, Any]) -> None:
    """Hands the figures to the test that launched this script."""
    figures = worst(figures)
    if dist.get_rank() == 0:
        (Path(sys.argv[1]) / "figures.json").write_text(json.dumps(figures))
    dist.barrier()
    dist.destroy_process_group()
    # Without the interpreter's own end, in which threads of the libraries at work here sometimes abort the process.
    sys.stdout.flush()
    os._exit(0)
