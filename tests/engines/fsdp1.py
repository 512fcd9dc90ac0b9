"""FSDP1 with `use_orig_params=True`, by torch itself: against one process, and its checkpoints."""

from __future__ import annotations

import copy
import functools
from typing import Any

import fsdp2
import torch
import torch.distributed as dist
import workers
from torch import nn
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel,
    ShardedOptimStateDictConfig,
    ShardedStateDictConfig,
    ShardingStrategy,
    StateDictType,
)

WRAP = functools.partial(FullyShardedDataParallel, use_orig_params=True, device_id=torch.device("cpu"))
KINDS = {
    "full": (StateDictType.FULL_STATE_DICT, FullStateDictConfig(), FullOptimStateDictConfig(offload_to_cpu=False)),
    "sharded": (StateDictType.SHARDED_STATE_DICT, ShardedStateDictConfig(), ShardedOptimStateDictConfig()),
}


def shard(model: nn.Module, **options: Any) -> nn.Module:
    layers = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    for i, layer in enumerate(layers):
        layers[i] = WRAP(layer, **options)
    return WRAP(model, **options)


def llama() -> nn.Module:
    return workers.cut_llama(num_hidden_layers=1)


def resumed(kind: str) -> dict[str, float]:
    """How far training that is resumed in the middle ends from training that is not."""
    before, after = workers.batches(3), workers.batches(2, first=3)
    found = {}
    for name, make in workers.MAKERS.items():
        model = shard(llama())
        optimizer = make(model)
        workers.train(model, optimizer, before, workers.of_rank())
        with FullyShardedDataParallel.state_dict_type(model, *KINDS[kind]):
            saved = copy.deepcopy((model.state_dict(), FullyShardedDataParallel.optim_state_dict(model, optimizer)))
        workers.train(model, optimizer, after, workers.of_rank())
        second = shard(llama())
        again = make(second)
        with FullyShardedDataParallel.state_dict_type(second, *KINDS[kind]):
            second.load_state_dict(saved[0])
            again.load_state_dict(FullyShardedDataParallel.optim_state_dict_to_load(second, again, saved[1]))
        workers.train(second, again, after, workers.of_rank())
        found[name] = workers.distance(workers.weights(second), workers.weights(model))
    return found


def figures() -> dict[str, Any]:
    found: dict[str, Any] = {
        "llama": workers.compare(lambda: workers.llama(hidden_size=192, intermediate_size=512, head_dim=10), shard),
        "cut": workers.compare(llama, shard),
        "tied": workers.compare(lambda: workers.cut_llama(num_hidden_layers=1, tie_word_embeddings=True), shard),
        "conv1d": workers.compare(fsdp2.gpt2, shard),
    }
    if dist.get_world_size() > 2:
        found["not sharded"] = workers.compare(llama, lambda m: shard(m, sharding_strategy=ShardingStrategy.NO_SHARD))
        found["experts"] = workers.compare(fsdp2.experts, shard)
        found["fused"] = workers.compare(fsdp2.phi3, shard)
    return {**found, "resumed": {kind: resumed(kind) for kind in KINDS}}
