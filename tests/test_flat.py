"""Slices of flattened tensors fall into boxes, and what all processes add to a block's mean square is that mean."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_layout import layouts, shape_for
from torch import Tensor, distributed

from adam_mini_plugins import Layout, sharding
from adam_mini_plugins import flat as flat_tensors
from adam_mini_plugins.flat import Flat, Piece, find_boxes, find_shares
from adam_mini_plugins.flat import block_means as block_means_of
from adam_mini_plugins.update import adam_mini


@given(st.lists(st.integers(1, 4), max_size=4), st.data())
def test_the_boxes_of_a_slice_have_its_elements_in_order(shape: list[int], data: st.DataObject) -> None:
    numel = math.prod(shape)
    start = data.draw(st.integers(0, numel))
    stop = data.draw(st.integers(start, numel))
    elements = torch.arange(numel).view(shape)
    boxes = list(find_boxes(tuple(shape), start, stop))
    found = [elements[tuple(slice(*extent) for extent in box)] for box in boxes]
    assert [int(e) for box in found for e in box.flatten()] == list(range(start, stop))
    assert all(box.numel() for box in found)
    assert len(boxes) <= max(2 * len(shape) - 1, 1)


def pieces_of(tensors: Sequence[tuple[Layout, tuple[int, ...]]], bounds: Sequence[int], process: int) -> list[Piece]:
    """What a process has of tensors that lie end to end and are cut at bounds."""
    pieces, first = [], 0
    begin, end = bounds[process], bounds[process + 1]
    for number, (layout, shape) in enumerate(tensors):
        numel = math.prod(shape)
        start, stop = (min(max(bound - first, 0), numel) for bound in (begin, end))
        pieces.append(Piece(str(number), layout, shape, start, stop - start, max(first - begin, 0)))
        first += numel
    return pieces


def block_means(layout: Layout, grad: Tensor) -> Tensor:
    """For each element the mean square over its block, added up element by element."""
    index = layout.block_index(grad.shape).expand(grad.shape)
    means = torch.stack([grad[index == block].square().mean() for block in range(layout.num_blocks)])
    return means[index]


@given(st.lists(layouts(), min_size=1, max_size=3), st.integers(1, 4), st.data())
def test_shares_of_all_processes_add_up_to_the_block_means(
    chosen: list[Layout], processes: int, data: st.DataObject
) -> None:
    tensors = [(layout, shape_for(layout)) for layout in chosen]
    numel = sum(math.prod(shape) for _, shape in tensors)
    cuts = sorted(data.draw(st.lists(st.integers(0, numel), min_size=processes - 1, max_size=processes - 1)))
    bounds = [0, *cuts, numel]
    whole = torch.arange(1.0, 1 + numel, dtype=torch.float64)
    parts = whole.split([math.prod(shape) for _, shape in tensors])
    expected = torch.cat(
        [block_means(layout, part.view(shape)).flatten() for (layout, shape), part in zip(tensors, parts)]
    )
    held = [pieces_of(tensors, bounds, process) for process in range(processes)]
    slices = [[(p[i].start, p[i].start + p[i].length) for p in held] for i in range(len(tensors))]

    flats = [Flat(pieces, group=None) for pieces in held]
    shares = [find_shares(pieces, slices) for pieces in held]
    grads = [whole[start:stop] for start, stop in pairwise(bounds)]
    means = [flat.add_to_means(grad, part, grad.dtype) for flat, grad, part in zip(flats, grads, shares)]
    assert len({part.reduced for part in shares}) == 1
    sums = torch.zeros(shares[0].reduced, dtype=torch.float64)
    for part, of_process in zip(shares, means):
        sums[part.at] += of_process[part.here]
    for flat, part, grad, of_process, wanted in zip(
        flats, shares, grads, means, expected.split([len(g) for g in grads])
    ):
        of_process[part.here] = sums[part.at]
        found = torch.full_like(grad, math.nan)
        for box, g, view, mean in zip(flat.boxes, flat.views(grad), flat.views(found), flat.spread(of_process, part)):
            if mean is None:  # its rows tell their blocks' means by themselves
                mean = g.square().mean([axis for axis in (0, 1) if axis not in box.piece.layout.axes], keepdim=True)
            assert mean.shape == box.state_shape
            view.copy_(mean.expand(view.shape))
        torch.testing.assert_close(found, wanted)
        assert sum(flat.rows) == flat.num_rows


def test_no_more_is_added_up_than_blocks_are_cut() -> None:
    def reduced(text: str, shape: tuple[int, ...], processes: int) -> int:
        layout, numel = Layout.parse(text), math.prod(shape)
        bounds = [numel * process // processes for process in range(processes + 1)]
        pieces = pieces_of([(layout, shape)], bounds, 0)
        return find_shares(pieces, [list(pairwise(bounds))]).reduced

    assert reduced("0: 32 (64)", (2048, 64), 32) == 0  # a head a process
    assert reduced("0: 32 (64)", (2048, 64), 64) == 32  # half a head a process
    assert reduced("0: 32 (64)", (2048, 64), 3) == 2  # cuts inside heads 10 and 21
    assert reduced("0: 1000", (1000, 64), 8) == 0
    assert reduced("0: 1000", (1000, 64), 7) == 6  # each cut inside a row
    assert reduced("1: 1000", (64, 1000), 7) == 1000
    assert reduced("0,1: 20", (4, 5, 3), 4) == 0
    assert reduced("0: (5)", (5,), 2) == 1
    assert reduced("0: 5", (5,), 2) == 0


def test_second_moments_are_one_for_each_row_of_each_box() -> None:
    pieces = [
        Piece("matrix", Layout.each_row(4), (4, 5), 3, 14, 0),  # 2 elements of row 0, 2 rows, 2 elements of row 3
        Piece("columns", Layout.each_row(5, (1,)), (4, 5), 3, 14, 14),
        Piece("empty", Layout.each_row(4), (4, 5), 0, 0, 0),
        Piece("vector", Layout.whole(7), (7,), 2, 3, 30),  # two elements before it are padding
    ]
    flat = Flat(pieces, group=None)
    assert [box.shape for box in flat.boxes] == [(1, 2), (2, 5), (1, 2)] * 2 + [(3,)]
    assert [box.state_shape for box in flat.boxes] == [(1, 1), (2, 1), (1, 1), (1, 2), (1, 5), (1, 2), (3,)]
    assert [box.offset for box in flat.boxes] == [0, 2, 12, 14, 16, 26, 30]
    assert [box.stands_alone for box in flat.boxes] == [False, True] + [False] * 5
    assert flat.num_rows == 16


def test_slices_that_miss_or_repeat_elements_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def gathered(others: tuple[int, int]) -> Flat:
        def all_gather(tensors: list[Tensor], mine: Tensor, group: None) -> None:
            tensors[0].copy_(mine)
            tensors[1].copy_(torch.tensor([others]))

        for name, fake in {
            "all_gather": all_gather,
            "get_world_size": lambda group: 2,
            "get_backend_config": lambda group: "cpu:gloo",
        }.items():
            monkeypatch.setattr(distributed, name, fake)
        return Flat([Piece("w", Layout.each_row(4), (4, 5), 0, 8, 0)], group=None)

    assert gathered((8, 12)).shares(torch.device("cpu")).reduced == 1
    for others in ((8, 11), (7, 13), (0, 8), (9, 11)):
        with pytest.raises(RuntimeError, match=r"slices of w of shape \(4, 5\) on 2 processes are .* whole once"):
            gathered(others).shares(torch.device("cpu"))


class Processes:
    """Threads that stand for the processes of a group, and what they send one another."""

    def __init__(self, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.sent, self.lengths = count, {}, []
        self.barrier, self.thread = threading.Barrier(count, timeout=20), threading.local()
        there = SimpleNamespace(
            all_gather=self.all_gather,
            all_reduce=self.all_reduce,
            get_world_size=lambda group: count,
            get_backend_config=lambda group: "cpu:gloo",
        )
        monkeypatch.setattr(flat_tensors, "distributed", there)
        monkeypatch.setattr(sharding, "distributed", there)

    def exchanged(self, mine: Tensor) -> list[Tensor]:
        self.sent[self.thread.rank] = mine.clone()
        self.barrier.wait()
        everyone = [self.sent[rank] for rank in range(self.count)]
        self.barrier.wait()
        return everyone

    def all_gather(self, tensors: list[Tensor], mine: Tensor, group: None) -> None:
        for tensor, sent in zip(tensors, self.exchanged(mine)):
            tensor.copy_(sent)

    def all_reduce(self, tensor: Tensor, group: None) -> None:
        self.lengths.append(len(tensor))
        tensor.copy_(torch.stack(self.exchanged(tensor)).sum(0))

    def run(self, act: Callable[[int], Any]) -> list[Any]:
        def of(rank: int) -> Any:
            self.thread.rank = rank
            return act(rank)

        with ThreadPoolExecutor(self.count) as pool:
            return list(pool.map(of, range(self.count)))


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_a_step_of_boxes_on_several_processes_is_the_step_of_the_tensors(
    processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = [
        (Layout.parse("0: 3 (10)"), (30, 4)),  # heads
        (Layout.parse("0: (7)"), (7,)),  # a norm
        (Layout.parse("0: 2 | (4) + 2 | 3"), (14, 5)),  # by heads keys and values
        (Layout.parse("1: 6"), (5, 6)),  # Conv1D
        (Layout.parse("0,1: 6"), (2, 3, 4)),  # experts
        (Layout.parse("0: 5"), (5,)),  # a bias
    ]
    numel = sum(math.prod(shape) for _, shape in tensors)
    generator = torch.Generator().manual_seed(0)
    values, grad = (torch.randn(numel, generator=generator) for _ in range(2))
    options = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1, "eps": 1e-8, "maximize": False}

    def step(params: list[Tensor], grads: list[Tensor], layouts: list[Layout], means: list[Any]) -> None:
        second_moments = [torch.zeros(layout.state_shape(p.shape)) for layout, p in zip(layouts, params)]
        steps = [torch.tensor(0.0) for _ in params]
        adam_mini(
            params, grads, [torch.zeros_like(p) for p in params], second_moments, steps, layouts, means, **options
        )

    def parts(tensor: Tensor) -> list[Tensor]:
        cut = tensor.split([math.prod(shape) for _, shape in tensors])
        return [part.view(shape) for part, (_, shape) in zip(cut, tensors)]

    expected = values.clone()
    step(parts(expected), parts(grad), [layout for layout, _ in tensors], [None] * len(tensors))

    bounds = [numel * rank // processes for rank in range(processes + 1)]
    group = Processes(processes, monkeypatch)

    def of_process(rank: int) -> Tensor:
        flat = Flat(pieces_of(tensors, bounds, rank), group=None)
        mine, of_grad = (tensor[bounds[rank] : bounds[rank + 1]].clone() for tensor in (values, grad))
        (means,) = block_means_of([(flat, of_grad, torch.float32, mine.device)])
        step(flat.views(mine), flat.views(of_grad), flat.layouts, means)
        return mine

    torch.testing.assert_close(torch.cat(group.run(of_process)), expected, rtol=1e-6, atol=1e-6)
    # Cut at 140: inside the keys of a head. At 93 and 186: inside the last head, and inside a row of values.
    assert group.lengths == {1: [], 2: [1] * 2, 3: [2] * 3}[processes]


def test_a_process_without_a_gradient_adds_nothing_and_takes_part(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Processes(2, monkeypatch)

    def of_process(rank: int) -> Any:
        flat = Flat([Piece("w", Layout.whole(4), (4,), 2 * rank, 2, 0)], group=None)
        return block_means_of([(flat, torch.full((2,), 3.0) if rank else None, torch.float32, torch.device("cpu"))])

    for ((means,),) in group.run(of_process):
        assert means.tolist() == [4.5, 4.5]
