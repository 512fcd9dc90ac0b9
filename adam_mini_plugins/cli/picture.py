"""A picture of one layer: its tensors as rectangles, coloured by block.

Colour runs from light to dark along a tensor and changes at each new block: heads are bands, rows of their own
a smooth run, one block is one colour. Beside each matrix stand some of its rows under the lens. Sides go with
the cube root of the tensor's, so that an embedding of 100,000 tokens fits beside a matrix of 1,000 rows.
"""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from ..blocks import Partition, TensorBlocks
from .support import DPI, CommandError, need

COLOURS = {
    "embedding": "#d6455d",
    "output": "#b5338a",
    "query": "#2667d9",
    "key": "#0f9d8f",
    "value": "#e08a12",
    "fused": "#2f7fa8",
    "linear": "#7a56c9",
    "expert": "#5b6bd6",
    "conv": "#4b9a45",
    "adapter": "#c2572b",
    "bias": "#94795d",
    "vector": "#7c8794",
    "custom": "#8a6d3b",
}

GREY = "#5a6572"
NOTE = (
    "A change of colour is a new block, with a second moment of its own. Magnified beside each matrix: where the "
    "first block ends. Sides are drawn to their cube root."
)

# Inches.
WIDTH, LEAST, MARGIN, HEAD, TEXT = 13.0, 10.0, 0.3, 1.25, 0.51
LARGEST = 1.75  # the largest side inside a layer
LINE = 0.1  # the thickness of a vector
LETTER = 0.056  # of the smallest text
CARD = 0.05  # how far the matrices of a stack stand out behind one another
LENS_GAP, LENS_WIDTH, LENS_ROW, LENS_ROWS = 0.16, 0.5, 0.08, 8

SIDES = ("embedding", "output")  # left and right of all else
THINNEST = 2.0  # pixels of a block that is told from its neighbours
MOST_TENSORS = 40
_NUMBER = re.compile(r"(?:^|\.)\d+(?=\.)")


def layer_of(blocks: Partition, wanted: str | None = None) -> tuple[str, list[TensorBlocks]]:
    """The tensors to draw: one layer's, and the embeddings and output that stand outside all layers.

    Args:
        blocks: The partition.
        wanted: The layer's name; by default the first of the kind that there is most of.

    Returns:
        The layer's name and the tensors; no name and all tensors where no layer is like another.

    Raises:
        CommandError: There is no such layer.
    """
    layers: dict[str, list[TensorBlocks]] = {}
    outside = []
    for entry in blocks.values():
        number = _NUMBER.search(entry.name)
        if number:
            layers.setdefault(entry.name[: number.end()], []).append(entry)
        else:
            outside.append(entry)
    if wanted is not None and wanted not in layers:
        close = difflib.get_close_matches(wanted, layers, n=1, cutoff=0)
        raise CommandError(f"no layer {wanted!r}{f'; the nearest is {close[0]}' if close else ''}")
    kinds = {name: tuple((e.name[len(name) :], e.shape) for e in members) for name, members in layers.items()}
    frequency = Counter(kinds.values())
    if wanted is None and max(frequency.values(), default=0) < 2:
        return "", list(blocks.values())
    # Of kinds as frequent as one another, the one that holds most.
    size = {name: sum(e.shape.numel() for e in members) for name, members in layers.items()}
    name = wanted or max(layers, key=lambda layer: (frequency[kinds[layer]], size[layer]))
    tables = [entry for entry in outside if entry.role in ("embedding", "output") and len(entry.shape) > 1]
    return name, tables + layers[name]


@dataclass(frozen=True)
class Tile:
    """A tensor as it is drawn, lengths in inches.

    Args:
        entry: The tensor and its blocks.
        label: Its name, less what the title says.
        unit: Inches that the cube root of a side is multiplied by.
    """

    entry: TensorBlocks
    label: str
    unit: float

    @cached_property
    def shape(self) -> tuple[int, int]:
        """Its shape as a matrix: the first of a stack of matrices, a kernel with all behind its first axis as one."""
        shape = tuple(self.entry.shape)
        if len(shape) < 2:
            return 1, math.prod(shape)
        if len(shape) > 2 and self.entry.layout.axes in ((), (0,)):
            return shape[0], math.prod(shape[1:])
        return shape[-2], shape[-1]

    @cached_property
    def index(self) -> Tensor:
        """The block of each element of that matrix, with extent 1 along an axis where all are alike."""
        index = self.entry.block_index
        if len(self.entry.shape) < 2:
            return index.reshape(1, -1)
        if len(self.entry.shape) > 2 and self.entry.layout.axes in ((), (0,)):
            return index.reshape(-1, 1)
        while index.ndim > 2:
            index = index[0]
        return index

    @property
    def stacked(self) -> bool:
        """Whether it is a stack of matrices, of which the first is drawn."""
        return len(self.entry.shape) > 2 and self.shape == tuple(self.entry.shape[-2:])

    @property
    def is_line(self) -> bool:
        """Whether it is a vector, drawn as a line."""
        return self.shape[0] == 1

    @property
    def width(self) -> float:
        """Width of the rectangle."""
        return max(LINE, self.unit * self.shape[1] ** (1 / 3))

    @property
    def height(self) -> float:
        """Height of the rectangle."""
        return LINE if self.is_line else max(LINE, self.unit * self.shape[0] ** (1 / 3))

    @property
    def caption(self) -> str:
        """Its shape and number of blocks."""
        number = self.entry.num_blocks
        return f"{' x '.join(map(str, self.entry.shape)) or 'scalar'}, {number:,} block{'s' if number > 1 else ''}"

    @property
    def reason(self) -> str:
        """What its blocks are, less where that was read."""
        return self.entry.why.partition(": ")[0]

    @property
    def room(self) -> tuple[float, float]:
        """Width and height with the text above, the lens beside and a margin."""
        text = LETTER * max(1.5 * len(self.label), 1.15 * len(self.caption), len(self.reason))
        drawn = self.width + (0 if self.is_line else LENS_GAP + LENS_WIDTH)
        height = self.height if self.is_line else max(self.height, LENS_ROWS * LENS_ROW + 0.15)
        return max(text, drawn) + MARGIN, TEXT + height + MARGIN

    def colours(self, pixels: float = math.inf) -> Tensor:
        """The colour of each element of :attr:`index`: lighter or darker by place, every second block paler.

        Args:
            pixels: Pixels along the longer side of the index. Blocks too thin to be told apart on them
                all have the mean of both shades.

        Returns:
            Float64 in 0 to 1, shape ``(*index.shape, 3)``.
        """
        rows, columns = self.index.shape
        along = torch.linspace(0, 1, max(rows, columns), dtype=torch.float64)
        along = along.view(-1, 1).expand(rows, columns) if rows >= columns else along.expand(rows, columns)
        size = self.index.flatten().bincount()
        place = self.index.flatten().bincount(along.flatten()) / size
        thick = size / min(rows, columns) / max(rows, columns) * pixels >= THINNEST
        pale = torch.where(thick, torch.arange(len(size)) % 2, 0.5)[self.index].unsqueeze(-1)
        shade = place[self.index].unsqueeze(-1)
        colour = torch.tensor(_rgb(COLOURS[self.entry.role]), dtype=torch.float64)
        colour = colour + (1 - colour) * 0.35 * (1 - shade) - colour * 0.35 * shade
        return colour + 0.42 * pale * (1 - colour)


def draw(title: str, entries: Sequence[TensorBlocks], layer: str = "") -> Any:
    """Draws tensors: embeddings on the left, outputs on the right, what stands between them in the middle.

    Args:
        title: The picture's title.
        entries: The tensors and their blocks.
        layer: The layer that they are of, which is not repeated in their names.

    Returns:
        A ``matplotlib.figure.Figure``.
    """
    figures, patches = need("matplotlib.figure"), need("matplotlib.patches")
    tiles = _tiles(entries[:MOST_TENSORS], layer)
    left_out = f" The first {MOST_TENSORS} of {len(entries)} tensors." if len(entries) > MOST_TENSORS else ""
    sides = [[tile for tile in tiles if tile.entry.role == role and not tile.is_line] for role in SIDES]
    middle = [tile for tile in tiles if tile not in sides[0] + sides[1]]
    widths = [max((tile.room[0] for tile in side), default=0.0) for side in sides]
    page = max(WIDTH - sum(widths), *(tile.room[0] for tile in middle), 0)
    shelves = _shelves([t for t in middle if not t.is_line], page) + _shelves([t for t in middle if t.is_line], page)
    columns = [[[tile] for tile in sides[0]], shelves, [[tile] for tile in sides[1]]]

    used = [max((sum(tile.room[0] for tile in shelf) for shelf in column), default=0.0) for column in columns]
    width = max(sum(used), LEAST) + 2 * MARGIN
    height = HEAD + max(sum(max(tile.room[1] for tile in shelf) for shelf in column) for column in columns)
    figure = figures.Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    left = MARGIN
    for column, room in zip(columns, used):
        top = HEAD
        for shelf in column:
            across = left
            for tile in shelf:
                _draw_tile(axes, tile, across, top)
                across += tile.room[0]
            top += max(tile.room[1] for tile in shelf)
        left += room
    axes.set(xlim=(0, width), ylim=(height, 0))  # inches, as on paper

    axes.text(MARGIN, 0.34, title, fontsize=14, weight="bold", va="center")
    axes.text(MARGIN, 0.62, NOTE + left_out, fontsize=9, color=GREY, va="center")
    roles = {tile.entry.role for tile in tiles}
    handles = [patches.Patch(color=colour, label=role) for role, colour in COLOURS.items() if role in roles]
    place = {"loc": "center left", "bbox_to_anchor": (MARGIN - 0.08, 0.9), "bbox_transform": axes.transData}
    axes.legend(handles=handles, ncols=len(roles), frameon=False, handlelength=1, columnspacing=1.2, **place)
    return figure


def _tiles(entries: Sequence[TensorBlocks], layer: str) -> list[Tile]:
    """The tensors as they are drawn, the largest side inside a layer so that four matrices fit in a line."""
    inner = [entry for entry in entries if entry.role not in SIDES] or entries
    unit = LARGEST / max(max(Tile(entry, "", 1.0).shape) for entry in inner) ** (1 / 3)
    return [Tile(entry, _label(entry.name, layer), unit) for entry in entries]


def _label(name: str, layer: str) -> str:
    """A name inside its layer, outside of it its last parts, without what all weights are called."""
    short = name.removesuffix(".weight")
    inside = short.removeprefix(f"{layer}.")
    return inside if inside != short else ".".join(short.split(".")[-2:])


def _shelves(tiles: Iterable[Tile], width: float) -> list[list[Tile]]:
    """Tiles in their order, in lines no wider than the page."""
    shelves: list[list[Tile]] = []
    filled = math.inf
    for tile in tiles:
        if filled + tile.room[0] > width + 1e-6:
            shelves.append([])
            filled = 0.0
        shelves[-1].append(tile)
        filled += tile.room[0]
    return shelves


def _draw_tile(axes: Any, tile: Tile, left: float, top: float) -> None:
    """Draws a tensor, the text above it and the lens beside it."""
    for line, (text, style) in enumerate(
        (
            (tile.label, {"fontsize": 8.5, "weight": "bold"}),
            (tile.caption, {"fontsize": 8, "color": GREY}),
            (tile.reason, {"fontsize": 7, "color": GREY}),
        )
    ):
        axes.text(left, top + 0.09 + 0.15 * line, text, va="center", **style)
    top += TEXT
    edge = {"edgecolor": _rgb(COLOURS[tile.entry.role]), "linewidth": 0.8}
    for card in (2, 1) if tile.stacked else ():
        _box(axes, left + CARD * card, top + CARD * card, tile.width, tile.height, facecolor="white", **edge)
    pixels = [round(DPI * side) for side in (tile.height, tile.width)]
    colours = tile.colours(pixels[0] if tile.index.shape[0] > 1 else pixels[1])
    fewer = (min(colours.shape[0], pixels[0]), min(colours.shape[1], pixels[1]))
    pooled = adaptive_avg_pool2d(colours.permute(2, 0, 1), fewer).permute(1, 2, 0)
    box = (left, left + tile.width, top + tile.height, top)
    axes.imshow(pooled.numpy(), extent=box, aspect="auto", interpolation="nearest", zorder=2)
    _box(axes, left, top, tile.width, tile.height, fill=False, zorder=3, **edge)
    if not tile.is_line:
        _draw_lens(axes, tile, left, top)


def _draw_lens(axes: Any, tile: Tile, left: float, top: float) -> None:
    """Draws some rows (or columns, where these are the outputs) around the end of the first block, magnified."""
    colours = tile.colours()
    by_column = colours.shape[1] > colours.shape[0]
    line = colours[0] if by_column else colours[:, 0]
    index = tile.index[0] if by_column else tile.index[:, 0]
    extent = tile.shape[1] if by_column else tile.shape[0]
    if len(line) == 1:  # one block in all
        line, index = line.expand(extent, 3), index.expand(extent)
    shown = min(LENS_ROWS, extent)
    changes = (index.diff() != 0).nonzero()
    first = int(changes[0]) + 1 if len(changes) else 0
    start = max(0, min(first - shown // 2, extent - shown))
    x, y = left + tile.width + LENS_GAP, top
    if not by_column:  # the lens stands beside the rows that it shows
        y += min(tile.height * start / extent, max(0.0, tile.height - shown * LENS_ROW))
        for row, corner in ((start, y), (start + shown, y + shown * LENS_ROW)):
            at = top + tile.height * row / extent
            axes.plot((left + tile.width, x), (at, corner), color=GREY, lw=0.5, zorder=1)
    else:
        for column, corner in ((start, x), (start + shown, x + shown * LENS_ROW)):
            at = left + tile.width * column / extent
            axes.plot((at, corner), (top, y), color=GREY, lw=0.5, zorder=1)
    for i in range(shown):
        colour = tuple(line[start + i].tolist())
        style = {"facecolor": colour, "edgecolor": "white", "linewidth": 0.7, "zorder": 2}
        if by_column:
            _box(axes, x + i * LENS_ROW, y, LENS_ROW, LENS_WIDTH, **style)
        else:
            _box(axes, x, y + i * LENS_ROW, LENS_WIDTH, LENS_ROW, **style)
    below = y + (LENS_WIDTH if by_column else shown * LENS_ROW)
    what = "columns" if by_column else "rows"
    axes.text(x, below + 0.03, f"{what} {start} to {start + shown - 1}", fontsize=6, color=GREY, va="top")


def _box(axes: Any, left: float, top: float, width: float, height: float, **style: Any) -> None:
    axes.add_patch(need("matplotlib.patches").Rectangle((left, top), width, height, **style))


def _rgb(colour: str) -> tuple[float, ...]:
    return tuple(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
