"""Flat tensors that hold slices of parameters: boxes of those slices, and block means by one reduction.

Some engines flatten parameters, lay them end to end and cut what comes out wherever the processes'
shares end. A contiguous slice of a flattened tensor is a few *boxes* of it (of a matrix at most three:
the end of a row, whole rows, the beginning of a row), and each box is a view of the flat tensor in
which the axes of a layout mean what they always mean. So a step on a flat tensor is the step of its
boxes. Second moments are one number for each row of each box, end to end like the boxes. Where
a block lies in several boxes or on several processes, each adds its share to the block's mean square; one
all-reduce adds up the shares of blocks that lie on several processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from .blocks import Layout
from .sharding import add_up
from .update import row_squares

Extent = tuple[int, int]  # from one position of an axis up to another


class Piece(NamedTuple):
    """A contiguous slice of a flattened parameter, which may be empty.

    Args:
        name: The parameter's name.
        layout: Its blocks.
        shape: Its whole shape.
        start: The first element of the slice in the whole, flattened parameter.
        length: How many elements follow from there.
        offset: Where in the flat tensor the first of them lies.
    """

    name: str
    layout: Layout
    shape: tuple[int, ...]
    start: int
    length: int
    offset: int


class Box(NamedTuple):
    """A part of a piece that is regular: an extent of each axis of the parameter.

    Args:
        piece: The piece that it is a part of.
        extents: What it has of each axis.
        offset: Where in the flat tensor its first element lies.
    """

    piece: Piece
    extents: tuple[Extent, ...]
    offset: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Its extents along the axes of the parameter."""
        return tuple(stop - start for start, stop in self.extents)

    @property
    def state_shape(self) -> tuple[int, ...]:
        """The shape of its second moments, one a row."""
        return self.piece.layout.state_shape(self.shape)

    @property
    def stands_alone(self) -> bool:
        """Whether its rows are blocks of their own and here from end to end, so that it needs no other box."""
        layout, shape = self.piece.layout, self.piece.shape
        across = (axis for axis in range(len(shape)) if axis not in layout.axes)
        return layout.is_each_row and all(self.extents[axis] == (0, shape[axis]) for axis in across)


def find_boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[Extent, ...]]:
    """The boxes of a slice of a flattened tensor, in order: together they have its elements in their order.

    Args:
        shape: The tensor's shape.
        start: The first element of the slice.
        stop: The element after its last.
    """
    if start >= stop:
        return
    if not shape:
        yield ()
        return
    inner = math.prod(shape[1:])
    first, into = divmod(start, inner)
    last, beyond = divmod(stop, inner)
    if first == last:
        yield from (((first, first + 1), *box) for box in find_boxes(shape[1:], into, beyond))
        return
    if into:
        yield from (((first, first + 1), *box) for box in find_boxes(shape[1:], into, inner))
        first += 1
    if first < last:
        yield ((first, last), *((0, size) for size in shape[1:]))
    yield from (((last, last + 1), *box) for box in find_boxes(shape[1:], 0, beyond))


def boxes_of(piece: Piece) -> list[Box]:
    """The boxes of a piece, in order."""
    found, offset = [], piece.offset
    for extents in find_boxes(piece.shape, piece.start, piece.start + piece.length):
        found.append(Box(piece, extents, offset))
        offset += math.prod(found[-1].shape)
    return found


def block_numbers(layout: Layout, shape: tuple[int, ...], boxes: Sequence[tuple[Extent, ...]]) -> Tensor:
    """The block of each row of some boxes of a tensor, box after box.

    Args:
        layout: The tensor's blocks.
        shape: Its whole shape.
        boxes: What each box has of each axis.
    """
    index = layout.block_index(shape)
    parts = []
    for extents in boxes:
        # Along the axes that don't number rows the index has extent 1.
        rows = (slice(*extent) if axis in layout.axes else slice(None) for axis, extent in enumerate(extents))
        parts.append(index[tuple(rows)].reshape(-1))
    return torch.cat(parts) if parts else index.new_empty(0)


@dataclass
class Shares:
    """Which boxes' rows add up to the means of which blocks, and which of these lie on several processes.

    Args:
        boxes: The boxes, by their place among all.
        order: Their rows, those of each block next to each other.
        lengths: How many rows of each block are here.
        block: For each row, in the order of boxes, its block among those that are here.
        sizes: How many elements each of these blocks has in the whole parameter.
        here: Those of them that lie on several processes.
        at: Their places among the numbers that processes add up.
        reduced: How many numbers these are, the same on all processes.
    """

    boxes: list[int]
    order: Tensor
    lengths: Tensor
    block: Tensor
    sizes: Tensor
    here: Tensor
    at: Tensor
    reduced: int

    def to(self, device: torch.device) -> Shares:
        """The same, with its index on a device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return Shares(**{**vars(self), **moved})


def find_shares(pieces: Sequence[Piece], slices: Sequence[Sequence[Extent]]) -> Shares:
    """Which blocks take more than one box, for one process.

    Args:
        pieces: The pieces of this process, one for each parameter.
        slices: For each parameter the slices of it that all processes have, in the order of processes, each
            from its first element up to one.
    """
    boxes, numbers, blocks, sizes, here, at = [], 0, [], [], [], []
    known = reduced = 0
    for piece, of_processes in zip(pieces, slices):
        layout, shape = piece.layout, piece.shape
        mine = boxes_of(piece)
        together = [(numbers + i, box) for i, box in enumerate(mine) if not box.stands_alone]
        numbers += len(mine)
        cut = _cut_blocks(layout, shape, of_processes)
        number = block_numbers(layout, shape, [box.extents for _, box in together])
        present, block = number.unique(return_inverse=True)
        boxes += [i for i, _ in together]
        blocks.append(block + known)
        sizes.append(_block_sizes(layout, shape)[present])
        is_cut = torch.isin(present, cut)
        here.append(torch.nonzero(is_cut).flatten() + known)
        at.append(torch.searchsorted(cut, present[is_cut]) + reduced)
        known += len(present)
        reduced += len(cut)
    block = torch.cat(blocks)
    return Shares(
        boxes=boxes,
        order=block.argsort(stable=True),
        lengths=block.bincount(minlength=known),
        block=block,
        sizes=torch.cat(sizes),
        here=torch.cat(here),
        at=torch.cat(at),
        reduced=reduced,
    )


def _cut_blocks(layout: Layout, shape: tuple[int, ...], slices: Sequence[Extent]) -> Tensor:
    """The blocks that lie on more than one process, in ascending order."""
    touched = torch.zeros(layout.num_blocks, dtype=torch.long)
    for start, stop in slices:
        touched[block_numbers(layout, shape, list(find_boxes(shape, start, stop))).unique()] += 1
    return torch.nonzero(touched > 1).flatten()


def _block_sizes(layout: Layout, shape: tuple[int, ...]) -> Tensor:
    """The number of elements of each block."""
    rows = layout.block_index(shape).flatten().bincount(minlength=layout.num_blocks)
    return rows * (math.prod(shape) // max(layout.rows, 1))


class Flat:
    """What a flat tensor holds.

    Args:
        pieces: A piece of each parameter that its engine has laid out with it, on all processes in the same
            order; empty where this process has none of it.
        group: The processes that have the rest of these parameters.
        state_by_element: Whether whatever saves its state takes it that all of it has the flat tensor's shape.
    """

    def __init__(self, pieces: Sequence[Piece], group: Any, state_by_element: bool = False) -> None:
        self.pieces = tuple(pieces)
        self.group = group
        self.state_by_element = state_by_element
        self._shares: Shares | None = None

    @cached_property
    def boxes(self) -> list[Box]:
        """The boxes of all pieces."""
        return [box for piece in self.pieces for box in boxes_of(piece)]

    def __str__(self) -> str:
        return (
            f"the flat tensor of {', '.join(piece.name for piece in self.pieces[:3])}{', ...' * (len(self.pieces) > 3)}"
        )

    @property
    def num_rows(self) -> int:
        """The number of second moments of all boxes."""
        return sum(self.rows)

    @property
    def layouts(self) -> list[Layout]:
        """The blocks of each box's parameter."""
        return [box.piece.layout for box in self.boxes]

    @cached_property
    def rows(self) -> list[int]:
        """The number of second moments of each box."""
        return [math.prod(box.state_shape) for box in self.boxes]

    def views(self, flat: Tensor) -> list[Tensor]:
        """Each box's part of the flat tensor, or of another of its shape."""
        return [flat.narrow(0, box.offset, math.prod(box.shape)).view(box.shape) for box in self.boxes]

    def second_moments(self, exp_avg_sq: Tensor) -> list[Tensor]:
        """Each box's part of the second moments."""
        return [part.view(box.state_shape) for box, part in zip(self.boxes, exp_avg_sq.split(self.rows))]

    def by_element(self, exp_avg_sq: Tensor, numel: int) -> Tensor:
        """Second moments one an element of the flat tensor, from those one a row."""
        whole = exp_avg_sq.new_zeros(numel)
        for view, part in zip(self.views(whole), self.second_moments(exp_avg_sq)):
            view.copy_(part.expand_as(view))
        return whole

    def by_row(self, whole: Tensor) -> Tensor:
        """Second moments one a row, from those one an element, which are equal inside a row."""
        parts = []
        for box, view in zip(self.boxes, self.views(whole)):
            parts.append(view[tuple(slice(size) for size in box.state_shape)].reshape(-1))
        return torch.cat(parts) if parts else whole[:0]

    def shares(self, device: torch.device) -> Shares:
        """Which blocks take more than one box. All processes of the group have to call it."""
        if self._shares is None:
            self._shares = find_shares(self.pieces, self._of_processes(device))
        if self._shares.order.device != device:
            self._shares = self._shares.to(device)
        return self._shares

    def add_to_means(self, grad: Tensor, shares: Shares, dtype: torch.dtype) -> Tensor:
        """What a gradient here adds to the mean square of each block of ``shares``."""
        views = self.views(grad)
        squares = [row_squares(views[i], self.boxes[i].piece.layout.axes, dtype).view(-1) for i in shares.boxes]
        rows = torch.cat(squares) if squares else grad.new_empty(0, dtype=dtype)
        # Added up in the same order in every run, which adding at an index would not be on every device.
        return torch.segment_reduce(rows[shares.order], "sum", lengths=shares.lengths, unsafe=True) / shares.sizes

    def spread(self, means: Tensor, shares: Shares) -> list[Tensor | None]:
        """Gives each row of each box the mean of its block, ``None`` to boxes that stand alone."""
        parts = means[shares.block].split([self.rows[i] for i in shares.boxes])
        of_box = dict(zip(shares.boxes, parts))
        return [of_box[i].view(box.state_shape) if i in of_box else None for i, box in enumerate(self.boxes)]

    def _of_processes(self, device: torch.device) -> list[list[Extent]]:
        """The slices of each parameter that the processes have.

        Raises:
            RuntimeError: Together they aren't the parameter.
        """
        mine = torch.tensor(
            [(piece.start, piece.length) for piece in self.pieces], device=_reachable(self.group, device)
        )
        everyone = [torch.empty_like(mine) for _ in range(distributed.get_world_size(self.group))]
        distributed.all_gather(everyone, mine, group=self.group)
        found = []
        for piece, held in zip(self.pieces, torch.stack(everyone, dim=1).tolist()):
            slices = [(start, start + length) for start, length in held]
            parts = sorted(part for part in slices if part[0] < part[1])
            bounds = [0, *(bound for part in parts for bound in part), math.prod(piece.shape)]
            if bounds[::2] != bounds[1::2]:
                raise RuntimeError(
                    f"the slices of {piece.name} of shape {piece.shape} on {len(slices)} processes are {slices}, which "
                    "don't make it whole once: it was laid out in a way that AdamMini does not know"
                )
            found.append(slices)
        return found


def block_means(members: Sequence[tuple[Flat, Tensor | None, torch.dtype, torch.device]]) -> list[list[Tensor | None]]:
    """Means of squares over each row's block, for boxes that can't tell by themselves.

    All processes of the flat tensors' groups have to call it with theirs in the same order; on some of them
    gradients may be missing.

    Args:
        members: Flat tensors: what they hold, the gradient, and the dtype and device of their second moments.

    Returns:
        For each of them and each of its boxes a tensor of ``box.state_shape``, or ``None`` where the box's
        rows are whole blocks.
    """
    found = []
    for flat, grad, dtype, device in members:
        shares = flat.shares(device)
        means = torch.zeros(len(shares.sizes), dtype=dtype, device=device)
        found.append((flat, shares, means if grad is None else flat.add_to_means(grad, shares, dtype)))
    _reduce(found)
    return [flat.spread(means, shares) for flat, shares, means in found]


def _reduce(members: Sequence[tuple[Flat, Shares, Tensor]]) -> None:
    """Adds up, in place, the shares in blocks that lie on several processes: one all-reduce a process group."""
    groups: dict[Any, list[tuple[Shares, Tensor]]] = {}
    for flat, shares, means in members:
        if shares.reduced:
            groups.setdefault(flat.group, []).append((shares, means))
    for group, of_group in groups.items():
        parts = []
        for shares, means in of_group:
            part = means.new_zeros(shares.reduced).index_copy_(0, shares.at, means[shares.here])
            parts.append(part.to(_reachable(group, part.device)))
        for (shares, means), sums in zip(of_group, add_up(parts, group)):
            means[shares.here] = sums.to(means)[shares.at]


def _reachable(group: Any, device: torch.device) -> torch.device:
    """The device itself, or one that the processes of a group can send from: state may be offloaded to the CPU."""
    reached = [pair.partition(":")[0] for pair in distributed.get_backend_config(group).split(",")]
    return device if device.type in reached else torch.device(reached[0])
