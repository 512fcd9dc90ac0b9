"""Which block each element of one tensor lies in.

Every block that Adam-mini uses is a set of *rows*: positions along one axis of the tensor (or, in a
stack of expert matrices, along two), each with everything behind it. So a tensor's blocks are the
axes that number its rows and a map from rows to blocks, and the mean over a block is a sum over each
row (the only pass over the tensor) followed by a tiny sum over rows.

The map is kept in closed form, a few small integers whatever the size of the tensor: it can be
stored with an optimizer's ``param_groups``, compared, printed, and read back from its text.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """Rows laid out on a grid; the blocks are the cells left when the merged axes are summed out.

    Args:
        sizes: Extents of the grid, slowest axis first.
        merged: For each axis of the grid, whether positions along it share a block.

    Its text is einops-like, merged axes in parentheses: ``"32 (64)"`` is 32 blocks of 64 consecutive
    rows, ``"4096"`` one block a row, ``"(4096)"`` one block.
    """

    sizes: tuple[int, ...]
    merged: tuple[bool, ...]

    @property
    def rows(self) -> int:
        """The number of rows on the grid."""
        return math.prod(self.sizes)

    @property
    def num_blocks(self) -> int:
        """The number of blocks that they fall into."""
        return math.prod(s for s, merged in zip(self.sizes, self.merged) if not merged)

    @property
    def merged_axes(self) -> tuple[int, ...]:
        """The axes along which positions share a block."""
        return tuple(axis for axis, merged in enumerate(self.merged) if merged)

    def __str__(self) -> str:
        return " ".join(f"({s})" if merged else str(s) for s, merged in zip(self.sizes, self.merged))

    @classmethod
    def parse(cls, text: str) -> Grid:
        """Reads a grid back from its text."""
        tokens = re.findall(r"\(\d+\)|\d+", text)
        sizes = tuple(int(token.strip("()")) for token in tokens)
        return cls(sizes, tuple(token.startswith("(") for token in tokens))


class Span(NamedTuple):
    """Blocks that follow one another, of as many rows each.

    Args:
        start: The first row of the first block.
        blocks: How many blocks.
        size: The rows of each of them, which follow one another, too.
    """

    start: int
    blocks: int
    size: int


@dataclass(frozen=True)
class Layout:
    """The blocks of one tensor.

    Args:
        axes: The tensor's axes that number its rows: ``(0,)`` for the ``(out, in)`` weight of
            ``nn.Linear``, ``(1,)`` for the ``(in, out)`` weight of transformers' ``Conv1D``,
            ``(0, 1)`` for a stack of expert matrices ``(experts, out, in)``, all of them where each
            element is a block, ``()`` for a scalar.
        grids: The rows, in slices that follow one another; slice ``i`` is laid out on ``grids[i]``.
        interleave: The number of leading axes that the grids have in common, along which the slices
            take turns. 0: each slice comes once, as a whole. 1, as where every head holds its query,
            key and value rows together: the first slice's rows of head 0, the second slice's rows of
            head 0, ..., then those of head 1.

    Its text, which :meth:`parse` reads back, is ``"axes: grid + grid"``; with the interleaved axes
    set off by ``|``: ``"0: 8 | (64) + 8 | (64) + 8 | 64"``.
    """

    axes: tuple[int, ...]
    grids: tuple[Grid, ...]
    interleave: int = 0

    def __post_init__(self) -> None:
        shared = {grid.sizes[: self.interleave] for grid in self.grids}
        if len(shared) != 1:
            raise ValueError(f"interleaved grids must share their first {self.interleave} axes, got {shared}")

    @classmethod
    def each_row(cls, rows: int, axes: tuple[int, ...] = (0,)) -> Layout:
        """One block a row: a token, an output neuron."""
        return cls(axes, (Grid((rows,), (False,)),))

    @classmethod
    def whole(cls, rows: int, axes: tuple[int, ...] = (0,)) -> Layout:
        """One block for all rows."""
        return cls(axes, (Grid((rows,), (True,)),))

    @classmethod
    def groups(cls, count: int, size: int, axes: tuple[int, ...] = (0,)) -> Layout:
        """``count`` blocks of ``size`` consecutive rows: heads."""
        return cls(axes, (Grid((count, size), (False, True)),))

    @classmethod
    def elements(cls, shape: tuple[int, ...]) -> Layout:
        """One block an element, which is AdamW."""
        return cls.each_row(math.prod(shape), tuple(range(len(shape))))

    @property
    def rows(self) -> int:
        """The number of rows of the tensor."""
        return sum(grid.rows for grid in self.grids)

    @property
    def num_blocks(self) -> int:
        """The number of blocks of the tensor."""
        return sum(grid.num_blocks for grid in self.grids)

    @cached_property
    def is_each_row(self) -> bool:
        """Whether each row is a block of its own, so that nothing is left to sum over rows."""
        return self.num_blocks == self.rows

    @cached_property
    def spans(self) -> tuple[Span, ...] | None:
        """All rows, from the first to the last, as runs of blocks; ``None`` where the rows of a block lie apart."""
        outer, found, start = self.interleave, [], 0
        for grid in self.grids:
            # Consecutive rows are the positions along the last axes; the slices of another turn come in between.
            inner = [merged for size, merged in zip(grid.sizes[outer:], grid.merged[outer:]) if size > 1]
            if inner != sorted(inner) or (self._turns > 1 and any(grid.merged[:outer])):
                return None
        for _ in range(self._turns):
            for grid in self.grids:
                pairs = list(zip(grid.sizes, grid.merged))[outer:]
                span = Span(start, *(math.prod(s for s, merged in pairs if merged is kind) for kind in (False, True)))
                found.append(span)
                start += span.blocks * span.size
        return tuple(found)

    def state_shape(self, shape: torch.Size | tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a second moment that holds one value a row: it broadcasts against ``shape``."""
        return tuple(size if axis in self.axes else 1 for axis, size in enumerate(shape))

    def fits(self, shape: torch.Size | tuple[int, ...]) -> bool:
        """Whether a tensor of this shape has this layout's axes and number of rows."""
        return max(self.axes, default=-1) < len(shape) and math.prod(self.state_shape(shape)) == self.rows

    def stacked(self, count: int) -> Layout:
        """The blocks of so many tensors of this layout, stacked along a new first axis."""
        grids = tuple(Grid((count, *grid.sizes), (False, *grid.merged)) for grid in self.grids)
        return Layout((0, *(axis + 1 for axis in self.axes)), grids, self.interleave + 1)

    def block_mean(self, row_means: Tensor) -> Tensor:
        """Replaces each row's value by the mean over its block.

        Args:
            row_means: One value a row, any shape with :attr:`rows` elements.

        Returns:
            A tensor of the same shape, equal inside every block.
        """
        if self.is_each_row:
            return row_means
        slices = [
            part.mean(grid.merged_axes, keepdim=True).expand(grid.sizes) if grid.merged_axes else part
            for grid, part in self.split(row_means)
        ]
        return self._join(slices).view(row_means.shape)

    def block_index(self, shape: torch.Size | tuple[int, ...]) -> Tensor:
        """The block of every element of a tensor of this shape.

        Returns:
            LongTensor of :meth:`state_shape`, broadcastable to ``shape``, with values from 0 to
            ``num_blocks - 1``.
        """
        slices, first = [], 0
        for grid in self.grids:
            kept = [1 if merged else size for size, merged in zip(grid.sizes, grid.merged)]
            index = torch.arange(first, first + grid.num_blocks).view(kept)
            slices.append(index.expand(grid.sizes))
            first += grid.num_blocks
        return self._join(slices).view(self.state_shape(shape))

    def split(self, rows: Tensor) -> list[tuple[Grid, Tensor]]:
        """Cuts the rows into the slices, each shaped as its grid."""
        turns = rows.reshape(self._turns, -1)
        widths = [math.prod(grid.sizes[self.interleave :]) for grid in self.grids]
        parts = turns.split(widths, dim=1)
        return [(grid, part.reshape(grid.sizes)) for grid, part in zip(self.grids, parts)]

    def _join(self, slices: list[Tensor]) -> Tensor:
        """Undoes :meth:`split`: all rows, in their order in the tensor."""
        if len(slices) == 1:
            return slices[0].reshape(-1)
        return torch.cat([part.reshape(self._turns, -1) for part in slices], dim=1).reshape(-1)

    @property
    def _turns(self) -> int:
        return math.prod(self.grids[0].sizes[: self.interleave])

    def __str__(self) -> str:
        def text(grid: Grid) -> str:
            outer = Grid(grid.sizes[: self.interleave], grid.merged[: self.interleave])
            inner = Grid(grid.sizes[self.interleave :], grid.merged[self.interleave :])
            return f"{outer} | {inner}" if self.interleave else str(inner)

        return f"{','.join(map(str, self.axes))}: {' + '.join(map(text, self.grids))}"

    @classmethod
    @lru_cache(maxsize=4096)
    def parse(cls, text: str) -> Layout:
        """Reads a layout back from its text."""
        axes, _, grids = text.partition(":")
        parts = grids.split("+")
        outer, bar, _ = parts[0].partition("|")
        return cls(
            axes=tuple(int(axis) for axis in axes.split(",") if axis.strip()),
            grids=tuple(Grid.parse(part) for part in parts),
            interleave=len(outer.split()) if bar else 0,
        )
