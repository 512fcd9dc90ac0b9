"""Principle 1, measured: how a model's exact Hessian couples the rows of its tensors (the paper's Figure 7).

The blocks of Adam-mini are the smallest dense sub-blocks of the Hessian. Which those are in a new architecture can be
seen on a small instance of it: :func:`measure_hessian` takes the second derivatives of a loss with respect to each
tensor and sums their absolute values over pairs of rows. Rows of one block are coupled to one another, and to the
rows of other blocks much less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .blocks import Layout, Partition

CHUNK = 16  # rows of a Hessian that are computed at once: few, so that they stay in the cache
LARGEST = 20_000  # elements of a tensor whose Hessian is taken: 400 million second derivatives
DROP = 1.5  # where the coupling nowhere falls by more, the tensor is one dense block


@dataclass(frozen=True)
class Level:
    """One way to group the rows of a tensor, and what the Hessian says of it.

    Args:
        name: ``"neuron"``, ``"head"`` or ``"tensor"``.
        blocks: The number of groups.
        inside: The share of the Hessian's absolute mass that lies inside the groups, 0 to 1.
        area: The share of the Hessian's elements that lie there: what ``inside`` would be without structure.
        coupling: The mean absolute second derivative between rows that this grouping unites and the one before it
            keeps apart, in units of that inside a row; for ``"neuron"`` it is 1.
    """

    name: str
    blocks: int
    inside: float
    area: float
    coupling: float


@dataclass(frozen=True)
class HessianBlocks:
    """The Hessian of one tensor, or of one of its slices where several are fused.

    Args:
        name: The parameter's name.
        role: Its role in the partition.
        layout: The blocks that the partition gives these rows.
        mass: The absolute second derivatives, summed over pairs of rows: (rows, rows), float64.
        levels: Rows alone, rows by heads, and all rows together.
    """

    name: str
    role: str
    layout: Layout
    mass: Tensor
    levels: tuple[Level, ...]

    @property
    def densest(self) -> str:
        """The level at whose border the coupling falls the most: the smallest dense sub-block."""
        falls = {
            inner.name: inner.coupling / max(outer.coupling, torch.finfo(torch.float64).tiny)
            for inner, outer in zip(self.levels, self.levels[1:])
        }
        name = max(falls, key=lambda level: falls[level], default="tensor")
        return name if falls and falls[name] > DROP else "tensor"

    @property
    def chosen(self) -> str:
        """The level that the partition has taken; ``"other"`` if it is none of them."""
        return next((level.name for level in self.levels if level.blocks == self.layout.num_blocks), "other")


def hessian_of_rows(loss: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
    """Sums the absolute second derivatives of a loss over pairs of a weight's rows.

    Args:
        loss: A scalar with its graph.
        weight: A leaf that the loss depends on.
        rows: LongTensor, broadcastable to the weight's shape: the row of every element.

    Returns:
        (rows, rows) in float64: entry ``i, j`` is the sum over all elements of row ``i`` and all of row ``j``.

    Raises:
        RuntimeError: An operation behind the loss can't be differentiated twice.
    """
    (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
    row_of = rows.expand(weight.shape).flatten()
    size, number = weight.numel(), int(rows.max()) + 1
    mass = torch.zeros(number, number, dtype=torch.float64)
    for elements in torch.arange(size).split(CHUNK):
        picked = torch.zeros(len(elements), size, dtype=weight.dtype)
        picked[torch.arange(len(elements)), elements] = 1
        (second,) = torch.autograd.grad(
            gradient, weight, picked.view(-1, *weight.shape), retain_graph=True, is_grads_batched=True
        )
        by_row = torch.zeros(len(elements), number, dtype=torch.float64)
        by_row.index_add_(1, row_of, second.detach().abs().reshape(len(elements), size).double())
        mass.index_add_(0, row_of[elements], by_row)
    return mass


def measure_hessian(
    model: nn.Module, loss: Callable[[], Tensor], partition: Partition, names: Iterable[str] | None = None
) -> list[HessianBlocks]:
    """Measures how the Hessian couples the rows of a small model's matrices. The model is left as it is.

    It takes a backward pass for each element: a model of some ten thousand parameters takes a minute.

    Args:
        model: A model on the CPU, in float32 or float64, with an attention that can be differentiated twice.
        loss: Computes the loss on one batch, the same at every call.
        partition: The model's blocks.
        names: The parameters to measure; by default all that are matrices and require a gradient.

    Returns:
        An entry for each tensor in the model's order, and for each slice of a fused one.

    Raises:
        ValueError: A tensor has more than 20,000 elements, or no such name.
    """
    parameters = dict(model.named_parameters())
    if names is None:
        names = [n for n, p in parameters.items() if p.requires_grad and p.numel() > max(p.shape, default=1)]
    found = []
    for name in names:
        weight, entry = parameters.get(name), partition.get(name)
        if weight is None or entry is None:
            raise ValueError(f"the model or its partition has no parameter {name!r}")
        if weight.numel() > LARGEST:
            raise ValueError(
                f"{name} has {weight.numel():,} elements, and its Hessian the square of that: measure a smaller "
                f"instance of the model, with at most {LARGEST:,} elements a tensor, or leave it out of names="
            )
        shape = entry.layout.state_shape(weight.shape)
        rows = torch.arange(entry.layout.rows).view(shape)
        with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
            mass = hessian_of_rows(loss(), weight, rows)
        for role, layout, members in _slices(entry.role, entry.layout):
            part = mass[members][:, members]
            levels = _levels(part, _head_size(partition, name))
            found.append(HessianBlocks(name, role, layout, part, levels))
    return found


def _slices(role: str, layout: Layout) -> list[tuple[str, Layout, Tensor]]:
    """The slices of a fused tensor: the role of each, its blocks and its rows."""
    if len(layout.grids) == 1:
        return [(role, layout, torch.arange(layout.rows))]
    index = torch.arange(layout.rows)
    parts = [Layout(layout.axes, (grid,)) for grid in layout.grids]
    names = [f"{role}[{number}]" for number in range(len(parts))]
    return [(name, part, rows.flatten()) for name, part, (_, rows) in zip(names, parts, layout.split(index))]


def _head_size(partition: Partition, name: str) -> int:
    """Rows of a head in the attention that is nearest to a parameter by its name, 0 if there is none."""
    heads = [e for e in partition.values() if e.role in ("query", "key", "fused") and e.layout.grids[0].merged[-1]]
    if not heads:
        return 0

    def shared(other: str) -> int:
        return sum(a == b for a, b in zip(name.split("."), other.split(".")))

    nearest = max(heads, key=lambda entry: shared(entry.name))
    return nearest.layout.grids[0].sizes[-1]


def _levels(mass: Tensor, head: int) -> tuple[Level, ...]:
    """Rows, groups of as many rows as a head has where they divide the tensor, and the whole."""
    rows = torch.arange(len(mass))
    groups = {"neuron": rows}
    if head > 1 and len(rows) % head == 0 and len(rows) > head:
        groups["head"] = rows // head
    groups["tensor"] = torch.zeros_like(rows)
    total, own, before, levels = mass.sum(), mass.diagonal().mean(), None, []
    for name, group in groups.items():
        together = group[:, None] == group
        united = together if before is None else together & ~before
        coupling = (mass[united].mean() / own).item() if united.any() else 0.0
        inside, area = (mass[together].sum() / total).item(), together.double().mean().item()
        levels.append(Level(name, int(group.max()) + 1, inside, area, coupling))
        before = together
    return tuple(levels)
