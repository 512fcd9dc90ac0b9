"""Parameters and states placed in a way that can't be trained or loaded: what is said, before anything has changed."""

from __future__ import annotations

from typing import Any

import refused
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

from adam_mini_plugins import AdamMini


def module(weight: torch.Tensor) -> tuple[nn.Module, AdamMini]:
    """A module of one parameter, all of it a block, and its optimizer."""
    holder = nn.Module()
    holder.weight = nn.Parameter(weight)
    return holder, AdamMini.for_model(holder, rules=[("weight", "tensor")])


def step(weight: torch.Tensor) -> AdamMini:
    holder, optimizer = module(weight)
    holder.weight.grad = torch.ones_like(holder.weight)
    optimizer.step()
    return optimizer


def partial(mesh: Any) -> str:
    """Of the parameter each process has a part of a sum."""
    holder, optimizer = module(DTensor.from_local(torch.ones(6, 2), mesh, [Partial()], run_check=False))
    holder.weight.grad = torch.ones_like(holder.weight)
    said = refused.message(optimizer.step)
    assert not optimizer.state
    assert torch.equal(holder.weight.to_local(), torch.ones(6, 2))
    return said


def figures() -> dict[str, str]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    sharded = step(distribute_tensor(torch.ones(6, 2), mesh, [Shard(0)])).state_dict()
    plain = step(torch.ones(6, 2))
    found = {"partial": partial(mesh), "sharded into plain": refused.message(lambda: plain.load_state_dict(sharded))}
    two_dimensions = init_device_mesh("cpu", (1, dist.get_world_size()))
    other = step(distribute_tensor(torch.ones(6, 2), two_dimensions, [Shard(0), Shard(0)]))
    return {**found, "another mesh": refused.message(lambda: other.load_state_dict(sharded))}
