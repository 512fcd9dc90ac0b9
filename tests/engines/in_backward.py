"""Steps in the backward pass over processes: FSDP2 against one process, and what is refused."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import workers
from fsdp2 import shard
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from adam_mini_plugins.backward import AdamMiniInBackward


def build() -> nn.Module:
    return workers.cut_llama(num_hidden_layers=1)


def in_backward(model: nn.Module) -> AdamMiniInBackward:
    return AdamMiniInBackward.for_model(model, **workers.OPTIONS)


def gradients_left(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[int]:
    """How many gradients each step finds."""
    counts: list[int] = []
    optimizer.register_step_pre_hook(lambda *_: counts.append(sum(p.grad is not None for p in model.parameters())))
    return counts


def trained(made: str) -> dict[str, Any]:
    alone, sharded = build(), build()
    workers.train(alone, workers.adam_mini(alone), workers.batches())
    if made == "after":
        shard(sharded)
        optimizer = in_backward(sharded)
    else:
        optimizer = workers.swapped(sharded, shard, in_backward)
    start, counts = workers.weights(sharded), gradients_left(sharded, optimizer)
    workers.train(sharded, optimizer, workers.batches(), workers.of_rank())
    end = workers.weights(sharded)
    return {
        "distance": workers.distance(workers.weights(alone), end),
        "moved": workers.distance(start, end),
        "gradients left": counts,
    }


def refused_by_ddp() -> str:
    model = build()
    wrapped, optimizer = DistributedDataParallel(model), in_backward(model)
    start, ids = workers.weights(model), workers.batches(1)[0][workers.of_rank()]
    try:
        wrapped(input_ids=ids, labels=ids).loss.backward()
    except RuntimeError as error:
        assert workers.distance(start, workers.weights(model)) == 0.0
        assert not optimizer.state
        return str(error)
    return "not refused"


def figures() -> dict[str, Any]:
    dist.barrier()
    return {
        "made after": trained("after"),
        "made before": trained("before"),
        "ddp": refused_by_ddp(),
    }
