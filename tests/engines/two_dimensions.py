"""Tensor parallelism inside FSDP2, by torch itself."""

from __future__ import annotations

from typing import Any

import tensor_parallel
import torch.distributed as dist
import workers
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


def figures() -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("dp", "tp"))
    dp = mesh["dp"]

    def shard(model: nn.Module) -> None:
        tensor_parallel.parallelize(model, mesh["tp"])
        for layer in model.model.layers:
            fully_shard(layer, mesh=dp)
        fully_shard(model, mesh=dp)

    part = slice(dp.get_local_rank(), None, dp.size())
    return {
        "llama": workers.compare(tensor_parallel.model, shard, part=part),
        "any placement": tensor_parallel.any_placement(mesh),
        "uncut": tensor_parallel.uncut(mesh),
    }
