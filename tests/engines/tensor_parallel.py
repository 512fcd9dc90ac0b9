"""Tensor parallelism by torch itself, and any placement of a tensor."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import workers
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from adam_mini_plugins import AdamMini, Layout

# Activations are whole between layers: heads may then be cut, and rows need not be divisible.
COLWISE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
ROWWISE = ("self_attn.o_proj", "mlp.down_proj")


def colwise() -> ColwiseParallel:
    return ColwiseParallel(output_layouts=Replicate())


def rowwise(**options: Any) -> RowwiseParallel:
    return RowwiseParallel(input_layouts=Replicate(), **options)


def parallelize(model: nn.Module, mesh: Any) -> None:
    for layer in model.model.layers:
        parallelize_module(
            layer, mesh, {**{name: colwise() for name in COLWISE}, **{name: rowwise() for name in ROWWISE}}
        )
    parallelize_module(model, mesh, {"lm_head": colwise(), "model.embed_tokens": rowwise()})


# Layouts and shapes, each tried with every placement on the mesh.
TENSORS: dict[str, tuple[Layout, tuple[int, ...]]] = {
    "rows": (Layout.each_row(7), (7, 5)),
    "columns": (Layout.each_row(5, (1,)), (7, 5)),
    "heads": (Layout.groups(3, 3), (9, 5)),
    "tensor": (Layout.whole(7), (7, 3, 2)),
    "vector": (Layout.whole(5), (5,)),
    "elements": (Layout.elements((5, 2)), (5, 2)),
    "experts": (Layout.each_row(20, (0, 1)), (4, 5, 3)),
    "experts, transposed": (Layout.each_row(12, (0, 2)), (4, 5, 3)),
    "few rows": (Layout.each_row(1), (1, 4)),
    "few columns": (Layout.each_row(4), (4, 1)),
    "interleaved": (Layout.parse("0: 2 | (2) + 2 | (1) + 2 | 2"), (10, 3)),
    "scalar": (Layout.elements(()), ()),
}


def placements_for(shape: tuple[int, ...], dims: int) -> list[tuple[Any, ...]]:
    one: list[Any] = [Replicate(), *(Shard(axis) for axis in range(len(shape)))]
    return [(p,) for p in one] if dims == 1 else [(p, q) for p in one for q in one]


def any_placement(mesh: Any) -> dict[str, Any]:
    """The largest difference from one process for each tensor, over all its placements, after 3 steps."""
    differences: dict[str, Any] = {}
    for name, (layout, shape) in TENSORS.items():
        if mesh.ndim > 1 and name not in ("heads", "tensor", "interleaved"):
            continue
        differences[name] = 0.0
        for number, placements in enumerate(placements_for(shape, mesh.ndim)):
            torch.manual_seed(number)
            start, grads = torch.randn(shape), torch.randn(3, *shape) * 10 ** torch.randn(shape)
            modules = nn.Module(), nn.Module()
            modules[0].weight = nn.Parameter(start.clone())
            modules[1].weight = nn.Parameter(distribute_tensor(start, mesh, placements))
            for module in modules:
                module.optimizer = AdamMini.for_model(module, lr=0.1, rules=[("weight", layout)])
            alone, sharded = modules
            for step, grad in enumerate(grads):
                alone.weight.grad = grad
                sharded.weight.grad = distribute_tensor(grad, mesh, placements)
                if step == 1 and placements == (Replicate(),) * mesh.ndim:
                    # Of a sum that has yet to be added up, each process holds a part.
                    part = grad / mesh.size(0)
                    partial = (Partial(), *placements[1:])
                    sharded.weight.grad = DTensor.from_local(part, mesh, partial, run_check=False)
                for module in modules:
                    module.optimizer.step()
            apart = (workers.whole(sharded.weight) - alone.weight.detach()).abs().max()
            for key in ("exp_avg", "exp_avg_sq"):
                mine = workers.whole(sharded.optimizer.state[sharded.weight][key])
                theirs = alone.optimizer.state[alone.weight][key]
                assert mine.shape == theirs.shape
                torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)
            differences[name] = max(differences[name], float(apart))
    return differences


def missing_gradient(mesh: Any) -> int:
    """A process without a gradient takes part in what the others add up; the number of its steps."""
    module = nn.Module()
    module.weight = nn.Parameter(distribute_tensor(torch.ones(6, 2), mesh, [Shard(0)] * mesh.ndim))
    optimizer = AdamMini.for_model(module, rules=[("weight", "tensor")])
    if dist.get_rank() > 0:
        module.weight.grad = distribute_tensor(torch.ones(6, 2), mesh, [Shard(0)] * mesh.ndim, src_data_rank=None)
    optimizer.step()
    return len(optimizer.state)


def uncut(mesh: Any) -> dict[str, int]:
    """What a step calls where each row, or each head, lies on one process."""
    module = nn.Module()
    count = mesh.size()
    module.rows = nn.Parameter(distribute_tensor(torch.ones(7, 5), mesh, [Shard(0)] * mesh.ndim))
    module.heads = nn.Parameter(distribute_tensor(torch.ones(4 * count, 5), mesh, [Shard(0)] * mesh.ndim))
    module.all_here = nn.Parameter(distribute_tensor(torch.ones(7), mesh, [Replicate()] * mesh.ndim))
    rules = [("rows", "neuron"), ("heads", f"{2 * count} heads"), ("all_here", "tensor")]
    optimizer = AdamMini.for_model(module, rules=rules)
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    watch = workers.Watch()
    with watch:
        optimizer.step()
    return watch.calls[0]


def model() -> nn.Module:
    return workers.cut_llama(num_hidden_layers=1)


def figures() -> dict[str, Any]:
    processes = dist.get_world_size()
    mesh = init_device_mesh("cpu", (processes,), mesh_dim_names=("tp",))
    # All processes see all of a batch.
    found = {"llama": workers.compare(model, lambda model: parallelize(model, mesh), part=slice(None))}
    return {**found, "any placement": any_placement(mesh), "uncut": uncut(mesh), "missing": missing_gradient(mesh)}
