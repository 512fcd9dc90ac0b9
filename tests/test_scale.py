"""What the simulation at scale counts is what each process would find, and its figures are those in the docs."""

from __future__ import annotations

import json
import math
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_layout import layouts, shape_for
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from adam_mini_plugins import Layout
from adam_mini_plugins.sharding import find_cuts

sys.path.append(str(Path(__file__).parents[1] / "examples" / "benchmarks"))

import scale

ROOT = Path(__file__).parents[1]
RECORD = json.loads((ROOT / "docs" / "scale.json").read_text())


def owners_by_block(layout: Layout, owner: torch.Tensor) -> list[set[int]]:
    """For each block, the processes that have an element of it."""
    block = layout.block_index(owner.shape).expand(owner.shape).reshape(-1)
    found: list[set[int]] = [set() for _ in range(layout.num_blocks)]
    for of_element, process in zip(block.tolist(), owner.reshape(-1).tolist()):
        found[of_element].add(process)
    return found


@given(layouts(), st.integers(0, 40), st.integers(1, 30))
def test_blocks_cut_by_slices_are_those_with_elements_in_several(layout: Layout, start: int, length: int) -> None:
    shape = shape_for(layout)
    owner = (torch.arange(math.prod(shape)).view(shape) + start) // length
    expected = sum(len(processes) > 1 for processes in owners_by_block(layout, owner))
    assert scale.slices_cut(layout, shape, start, length) == expected


PLACEMENTS = [
    ((2, 2), (Shard(0), Replicate())),
    ((2, 2), (Shard(0), Shard(1))),
    ((3, 2), (_StridedShard(0, split_factor=2), Shard(0))),
    ((2, 4), (_StridedShard(0, split_factor=4), Shard(0))),
    ((4,), (Shard(0),)),
    ((3,), (Shard(1),)),
    ((1, 3), (Shard(0), Shard(1))),
]


@pytest.mark.parametrize(("mesh", "placed"), PLACEMENTS, ids=str)
@pytest.mark.parametrize(
    "text", ["0: 12", "0: (12)", "0: 4 (3)", "0: 2 (6)", "0: 3 | (2) + 3 | 2", "0,1: 12", "0,1: (12)"]
)
def test_blocks_cut_on_a_mesh_are_those_that_several_processes_have(
    text: str, mesh: tuple[int, ...], placed: tuple[Any, ...]
) -> None:
    layout = Layout.parse(text)
    shape = (12, 5) if layout.axes == (0,) else (4, 3, 5)
    holders: dict[int, set[tuple[int, ...]]] = {}
    most = 0
    for at in product(*map(range, mesh)):
        # Processes that have copies of one another hold a block together only if each has part of it.
        part = rows_and_columns(shape, mesh, placed, at)
        block = layout.block_index(shape).expand(shape)[part]
        distinct = tuple(0 if p.is_replicate() else i for i, p in zip(at, placed))
        for number in block.unique().tolist():
            holders.setdefault(number, set()).add(distinct)
        cuts = find_cuts(layout, shape, mesh, at, placed, torch.device("cpu"))
        most = max(most, len(cuts.reduced) if cuts else 0)
    assert scale.blocks_cut(layout, shape, mesh, placed) == sum(len(found) > 1 for found in holders.values())
    of_0 = find_cuts(layout, shape, mesh, (0,) * len(mesh), placed, torch.device("cpu"))
    if "|" not in text:  # in the models, what is interleaved is cut along its rows alone
        assert (len(of_0.reduced) if of_0 else 0) == most  # process 0 stands for the one that sends most


def rows_and_columns(
    shape: tuple[int, ...], mesh: tuple[int, ...], placed: tuple[Any, ...], at: tuple[int, ...]
) -> Any:
    """An index of what a process of a mesh has, cut by the dimension of tensor parallelism first."""
    held = [torch.arange(size) for size in shape]
    for size, placement, coordinate in reversed([*zip(mesh, placed, at)]):
        if not placement.is_replicate():
            length = math.ceil(len(held[placement.dim]) / size)
            held[placement.dim] = held[placement.dim][coordinate * length : (coordinate + 1) * length]
    return torch.meshgrid(*held, indexing="ij")


def test_small_numbers_of_processes_again() -> None:
    for name in scale.MODELS:
        again = {(f.engine, f.ranks): f for f in scale.simulate(name, ranks=(8,))}
        recorded = [scale.Figures(**row) for row in RECORD["models"][name]["figures"]]
        assert {f.engine for f in recorded} == set(scale.COLOURS)
        assert [f for f in recorded if f.ranks == 8] == list(again.values())
        assert max(f.ranks for f in recorded) == 16_384


def test_state_is_half_of_adamws_and_little_is_sent_for_it() -> None:
    for of_model in RECORD["models"].values():
        for figures in (scale.Figures(**row) for row in of_model["figures"]):
            assert figures.state_bytes <= 0.51 * figures.adamw_state_bytes
            if figures.engine != "TP 8 x FSDP2":
                assert figures.all_reduced <= 2e-4 * figures.gradients


def test_the_tables_in_the_docs_are_those_of_the_record() -> None:
    assert scale.tables(RECORD) in (ROOT / "docs" / "engines" / "scale.md").read_text()
