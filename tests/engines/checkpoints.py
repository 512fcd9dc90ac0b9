"""Checkpoints of training under FSDP2: saved and loaded by whatever way torch has, on as many processes or others."""

from __future__ import annotations

import copy
import io
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import workers
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from adam_mini_plugins import AdamMini, partition

BEFORE, AFTER = workers.batches(3), workers.batches(2, first=3)
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


def model_and_optimizer(shard: bool = True, lr: float = 1e-3) -> tuple[nn.Module, AdamMini]:
    """A Llama with a frozen embedding; vectors and matrices in groups of their own, as trainers do."""
    model = workers.cut_llama(num_hidden_layers=1)
    model.model.embed_tokens.requires_grad_(False)
    if shard:
        fully_shard(model.model.layers[0])
        fully_shard(model)
    return model, AdamMini(workers.decayed(model), lr=lr, partition=partition(model))


def one_process() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """One process's state in the middle, and its weights at the end."""
    model, optimizer = model_and_optimizer(shard=False)
    workers.train(model, optimizer, BEFORE)
    middle = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    workers.train(model, optimizer, AFTER)
    return middle, workers.weights(model)


def save(folder: Path, model: nn.Module, optimizer: AdamMini) -> None:
    """Writes a checkpoint that any number of processes can load."""
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)


def load(folder: Path, model: nn.Module, optimizer: AdamMini) -> None:
    """Reads one."""
    weights, state = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)


def through_a_file(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def end(model: nn.Module, optimizer: AdamMini, sharded: bool = True) -> dict[str, torch.Tensor]:
    """The weights after the second half of the training."""
    for group in optimizer.param_groups:
        assert group["lr"] == 1e-3
    workers.train(model, optimizer, AFTER, workers.of_rank() if sharded else slice(None))
    return workers.weights(model)


def figures() -> dict[str, float]:
    """Differences from uninterrupted training, by how it was resumed."""
    folder, processes = Path(os.environ["CHECKPOINTS"]), dist.get_world_size()
    middle, of_one = one_process()
    model, optimizer = model_and_optimizer()
    workers.train(model, optimizer, BEFORE, workers.of_rank())
    save(folder / f"from {processes}", model, optimizer)
    weights, state = get_state_dict(model, optimizer)
    own = copy.deepcopy(({k: v.to_local().clone() for k, v in weights.items()}, optimizer.state_dict()))
    full = through_a_file(get_state_dict(model, optimizer, options=FULL)) if dist.get_rank() == 0 else None
    if dist.get_rank() > 0:
        get_state_dict(model, optimizer, options=FULL)  # puts it together on process 0
    uninterrupted = end(model, optimizer)
    found = {"uninterrupted, from one process": workers.distance(uninterrupted, of_one)}

    model, optimizer = model_and_optimizer(lr=123.0)
    load(folder / f"from {processes}", model, optimizer)
    parts = {entry: value for state in optimizer.state.values() for entry, value in state.items()}
    assert isinstance(parts["exp_avg_sq"], DTensor)
    found["sharded"] = workers.distance(end(model, optimizer), uninterrupted)

    model, optimizer = model_and_optimizer(lr=123.0)
    for name, parameter in model.state_dict().items():
        parameter.to_local().copy_(own[0][name])
    optimizer.load_state_dict(own[1])
    found["state_dict"] = workers.distance(end(model, optimizer), uninterrupted)

    model, optimizer = model_and_optimizer(lr=123.0)
    weights, state = copy.deepcopy(full) or ({}, {})  # torch puts parts in their place
    from_0 = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, weights, options=from_0)
    set_optimizer_state_dict(model, optimizer, state, options=from_0)
    found["full"] = workers.distance(end(model, optimizer), uninterrupted)

    model, optimizer = model_and_optimizer(lr=123.0)
    load_whole(model, middle["model"])
    optimizer.load_state_dict(through_a_file(middle["optimizer"]))
    found["one process's state_dict"] = workers.distance(end(model, optimizer), of_one)

    if full is not None:
        model, optimizer = model_and_optimizer(shard=False, lr=123.0)
        set_state_dict(model, optimizer, model_state_dict=full[0], optim_state_dict=full[1])
        found["full, into one process"] = workers.distance(end(model, optimizer, sharded=False), of_one)

    return {**found, **resharded(folder, of_one)}


def resharded(folder: Path, of_one: dict[str, torch.Tensor]) -> dict[str, float]:
    """Differences from one process after resuming what other numbers of processes have saved."""
    found = {}
    processes = dist.get_world_size() if dist.is_initialized() else 1
    for checkpoint in sorted(folder.glob("from *")):
        if checkpoint.name != f"from {processes}":
            model, optimizer = model_and_optimizer(shard=processes > 1, lr=123.0)
            load(checkpoint, model, optimizer)
            found[checkpoint.name] = workers.distance(end(model, optimizer, sharded=processes > 1), of_one)
    return found


def load_whole(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Gives a sharded model the weights of a whole one, each process its part."""
    for name, parameter in model.state_dict().items():
        part = distribute_tensor(weights[name], parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.copy_(part)
