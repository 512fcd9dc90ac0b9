"""A partition as a table that fits a screen."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .partition import Partition

HEADS = ("name", "shape", "role", "blocks", "why")
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def render(partition: Partition) -> str:
    """The table behind ``print(partition)``: name, shape, role, blocks, why; a line a kind of tensor."""
    tensors = list(partition.values())
    elements = sum(t.shape.numel() for t in tensors)
    title = (
        f"{partition.scheme} partition: {len(tensors):,} tensors, {elements:,} elements, "
        f"{partition.num_blocks():,} blocks"
    )
    lines = [title, *_columns([HEADS, *rows(partition)], right=3)]
    lines += [f"left out while frozen: {name}: {reason}" for name, reason in fold(partition.left_out.items())]
    return "\n".join(lines)


def rows(partition: Partition) -> list[tuple[str, ...]]:
    """The cells under :data:`HEADS`, a row a kind of tensor: layers that are alike share it."""
    cells = (
        (t.name, "x".join(map(str, t.shape)) or "scalar", t.role, f"{t.num_blocks:,}", t.why, str(t.layout))
        for t in partition.values()
    )
    return [row[: len(HEADS)] for row in fold(cells)]


def fold(rows: Iterable[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """One row for those that differ in nothing but the numbers in their names, which come first, in order."""
    names: dict[tuple[str, ...], list[str]] = {}
    for name, *cells in rows:
        names.setdefault((_NUMBER.sub("*", name), *cells), []).append(name)
    return [(_shared_name(alike), *cells) for (_, *cells), alike in names.items()]


def _shared_name(names: Sequence[str]) -> str:
    """One name for tensors whose names differ in their numbers: ``layers.0-31.mlp.weight``."""
    numbers = [[int(n) for n in _NUMBER.findall(name)] for name in names]
    columns = iter([_ranges(sorted(set(column))) for column in zip(*numbers)])
    return _NUMBER.sub(lambda _: next(columns), names[0])


def _ranges(numbers: Sequence[int]) -> str:
    """``[0, 1, 2, 5]`` as ``"0-2,5"``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    text = ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"[{text}]" if len(runs) > 1 else text


def _columns(rows: Sequence[Sequence[str]], right: int) -> list[str]:
    """Rows of text in aligned columns; column number ``right`` is aligned to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(w) if i == right else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    ]
