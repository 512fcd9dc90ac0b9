"""Layouts tile their rows, whatever they are, and survive being written as text."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adam_mini_plugins.blocks import Grid, Layout

sizes = st.integers(1, 4)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Any layout: one or more slices of any grids, in turn or one after another, along one axis or two."""
    shared = tuple(draw(st.lists(sizes, max_size=2)))
    grids = []
    for _ in range(draw(st.integers(1, 3))):
        extents = (*shared, *draw(st.lists(sizes, min_size=1, max_size=3)))
        merged = draw(st.lists(st.booleans(), min_size=len(extents), max_size=len(extents)))
        grids.append(Grid(extents, tuple(merged)))
    return Layout(draw(st.sampled_from([(0,), (1,)])), tuple(grids), len(shared))


def shape_for(layout: Layout) -> tuple[int, ...]:
    return (layout.rows, 3) if layout.axes == (0,) else (3, layout.rows)


@given(layouts())
def test_its_text_reads_back(layout: Layout) -> None:
    assert Layout.parse(str(layout)) == layout


@given(layouts())
def test_blocks_are_numbered_from_zero_without_a_gap(layout: Layout) -> None:
    index = layout.block_index(shape_for(layout))
    assert index.shape == layout.state_shape(shape_for(layout))
    assert sorted(set(index.flatten().tolist())) == list(range(layout.num_blocks))
    assert layout.fits(shape_for(layout))


@given(layouts())
def test_the_block_mean_is_the_mean_over_the_rows_of_a_block(layout: Layout) -> None:
    values = torch.arange(layout.rows, dtype=torch.float64).square().view(layout.state_shape(shape_for(layout)))
    index = layout.block_index(shape_for(layout))
    expected = torch.stack([values[index == block].mean() for block in range(layout.num_blocks)])[index]
    torch.testing.assert_close(layout.block_mean(values), expected)


@given(layouts())
def test_spans_are_runs_of_blocks_of_consecutive_rows(layout: Layout) -> None:
    index = layout.block_index(shape_for(layout)).flatten().tolist()
    if layout.spans is None:
        return
    runs = [range(s.start + b * s.size, s.start + (b + 1) * s.size) for s in layout.spans for b in range(s.blocks)]
    assert [row for run in runs for row in run] == list(range(layout.rows))
    assert len(runs) == layout.num_blocks
    assert all(len({index[row] for row in run}) == 1 for run in runs)


def test_spans_of_what_models_have() -> None:
    assert Layout.parse("0: 8 (64)").spans == ((0, 8, 64),)
    assert Layout.parse("0: 8 (64) + 2 (64) + 128").spans == ((0, 8, 64), (512, 2, 64), (640, 128, 1))
    assert Layout.parse("0: 2 | (2) + 2 | 3").spans == ((0, 1, 2), (2, 3, 1), (5, 1, 2), (7, 3, 1))
    assert Layout.parse("0: (512)").spans == ((0, 1, 512),)
    assert Layout.parse(": ").spans == ((0, 1, 1),)
    assert Layout.parse("0: (64) 8").spans is None  # head fastest


@settings(max_examples=30)
@given(st.lists(sizes, min_size=0, max_size=3))
def test_elements_are_blocks_of_one(shape: list[int]) -> None:
    layout = Layout.elements(tuple(shape))
    assert layout.num_blocks == math.prod(shape)
    assert layout.block_index(tuple(shape)).flatten().tolist() == list(range(math.prod(shape)))


def test_interleaved_slices_take_turns() -> None:
    # Two heads, each with two query rows, one key row and two value rows.
    query, key = Grid((2, 2), (False, True)), Grid((2, 1), (False, True))
    value = Grid((2, 2), (False, False))
    layout = Layout((0,), (query, key, value), interleave=1)
    assert layout.block_index((10, 7)).flatten().tolist() == [0, 0, 2, 4, 5, 1, 1, 3, 6, 7]
    assert str(layout) == "0: 2 | (2) + 2 | (1) + 2 | 2"


def test_slices_one_after_another() -> None:
    layout = Layout((1,), (Grid((2, 2), (False, True)), Grid((3,), (True,)), Grid((2,), (False,))))
    assert layout.block_index((4, 9)).tolist() == [[0, 0, 1, 1, 2, 2, 2, 3, 4]]
    assert str(layout) == "1: 2 (2) + (3) + 2"


def test_a_grid_that_does_not_share_the_interleaved_axes_is_an_error() -> None:
    with pytest.raises(ValueError, match="interleaved grids must share their first 1 axes"):
        Layout((0,), (Grid((2, 2), (False, True)), Grid((3, 2), (False, True))), interleave=1)


@pytest.mark.parametrize("shape", [(5, 4), (4,), (), (4, 4, 4)])
def test_fits_tells_a_tensor_of_another_shape(shape: tuple[int, ...]) -> None:
    layout = Layout.groups(2, 3, (1,))
    assert not layout.fits(shape)
    assert layout.fits((5, 6))
