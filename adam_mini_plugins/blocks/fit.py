"""The closed form of a row-to-block map that is known row by row."""

from __future__ import annotations

import operator
from collections.abc import Hashable, Sequence
from itertools import accumulate, groupby, pairwise

import torch

from .layout import Grid, Layout

Digits = list[tuple[int, bool]]  # sizes of a grid and whether they are merged, fastest axis first


def fit_layout(kinds: Sequence[str], blocks: Sequence[Hashable], axis: int) -> Layout | None:
    """Finds the layout of rows whose blocks are known one by one.

    Args:
        kinds: What each row is, such as ``"query"``: rows of a kind make up a slice.
        blocks: The block that each row lies in.
        axis: The tensor's axis that numbers the rows.

    Returns:
        The layout, or ``None`` where the rows follow no regular pattern.
    """
    runs = [(kind, len(list(rows))) for kind, rows in groupby(kinds)]
    period = next(p for p in _divisors(len(runs)) if runs == runs[:p] * (len(runs) // p))
    turns, width = len(runs) // period, sum(size for _, size in runs[:period])
    found: list[tuple[Digits, Digits]] = []
    first = 0
    for _, size in runs[:period]:
        rows = [blocks[turn * width + first + i] for turn in range(turns) for i in range(size)]
        digits = _digits(rows, (size, turns))
        if digits is None:
            return None
        found.append(digits)
        first += size
    borders = sorted({border for _, outer in found for border in _borders(outer)})
    if any(larger % smaller for smaller, larger in pairwise(borders)):
        return None
    grids = []
    for inner, outer in found:
        sizes, merged = zip(*reversed(inner + _split(outer, borders)))
        grids.append(Grid(sizes, merged))
    layout = Layout((axis,), tuple(grids), interleave=len(borders))
    return layout if _same_blocks(layout, blocks) else None


def _borders(digits: Digits) -> list[int]:
    """How many rows there are up to the end of each digit."""
    return list(accumulate((size for size, _ in digits), operator.mul))


def _split(digits: Digits, borders: list[int]) -> Digits:
    """The same digits, cut at more borders."""
    ends = _borders(digits)
    merged = [next(flag for end, (_, flag) in zip(ends, digits) if border <= end) for border in borders]
    return [(border // before, flag) for border, before, flag in zip(borders, [1, *borders], merged)]


def _digits(blocks: list[Hashable], extents: tuple[int, int]) -> tuple[Digits, Digits] | None:
    """Writes a row's number in digits such that its block depends on some of them, and on nothing else.

    No digit goes across the border between the inner and the outer extent.
    """
    found: tuple[Digits, Digits] = ([], [])
    for digits, extent in zip(found, extents):
        rest = extent
        while rest > 1:
            size, merged = next(
                (
                    (n, merged)
                    for merged in (True, False)
                    for n in _divisors(rest)[:0:-1]
                    if _is_digit(blocks, n, merged)
                ),
                (1, False),
            )
            if size == 1:
                return None
            digits.append((size, merged))
            blocks = [chunk[0] if merged else chunk for chunk in _chunks(blocks, size)]
            rest //= size
    found[0].extend([] if found[0] else [(1, False)])
    return found


def _is_digit(blocks: list[Hashable], size: int, merged: bool) -> bool:
    chunks = _chunks(blocks, size)
    if merged:
        return all(len(set(chunk)) == 1 for chunk in chunks)
    different = set(chunks)
    return len(set().union(*different)) == size * len(different)  # each distinct inside, and disjoint or equal


def _chunks(blocks: list[Hashable], size: int) -> list[tuple[Hashable, ...]]:
    return [tuple(blocks[i : i + size]) for i in range(0, len(blocks), size)]


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _same_blocks(layout: Layout, blocks: Sequence[Hashable]) -> bool:
    """Whether two rows share a block in the layout exactly where they do in the list."""
    index = layout.block_index(torch.Size([1] * layout.axes[0] + [len(blocks)])).flatten().tolist()
    return len(set(zip(index, blocks))) == len(set(index)) == len(set(blocks))
