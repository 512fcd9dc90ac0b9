"""Training cut over processes is training in one process, and little is sent for it."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matrix import DOCS, Proves
from test_layout import layouts, shape_for
from torch import Tensor
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from adam_mini_plugins import Layout, PartitionError, partition, sharding
from adam_mini_plugins.sharding import find_cuts

sys.path.append(str(Path(__file__).parent / "engines"))

import checkpoints
import workers
from launch import launch

EXAMPLE = Path(__file__).parents[1] / "examples" / "sharded.py"

# The largest difference of a parameter from one process, after 5 steps.
CLOSE = 1e-6
# The most that state may take of AdamW's.
SHARE = 0.51


@pytest.fixture(scope="module")
def yaml_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file for `accelerate launch` that the guide gives."""
    (text,) = re.findall(r"```yaml\n(.*?)```", (DOCS / "fsdp2.md").read_text(), re.DOTALL)
    path = tmp_path_factory.mktemp("accelerate") / "fsdp2.yaml"
    path.write_text(text)
    return path


def near(figures: dict[str, Any], tolerance: float = CLOSE) -> None:
    """AdamMini ends where one process ends, after steps that could be told from standing still."""
    assert figures["adam_mini"] <= tolerance
    assert figures["adam_mini moved"] > 1e-3
    assert figures["adamw moved"] > 1e-3
    # AdamW, measured in the same way: it has the same data and engine, and its own amplification of rounding.
    assert figures["adamw"] <= 1e-3
    assert figures["adamw calls"] == [{}] * 5


def one_all_reduce(figures: dict[str, Any], floats: int, dimensions: int = 1) -> None:
    """Each step calls one all-reduce for each dimension of the mesh, of so many floats at most."""
    assert figures["adam_mini calls"] == [{"c10d.allreduce_": dimensions}] * 5
    assert figures["floats reduced"] == floats


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where checkpoints of 1, 2 and 3 processes are left: one process's is there from the start."""
    path = tmp_path_factory.mktemp("checkpoints")
    model, optimizer = checkpoints.model_and_optimizer(shard=False)
    workers.train(model, optimizer, checkpoints.BEFORE)
    checkpoints.save(path / "from 1", model, optimizer)
    return path


@pytest.fixture(scope="module")
def on_2(folder: Path) -> dict[str, Any]:
    modules = ("fsdp2", "ddp", "tensor_parallel", "checkpoints", "refused", "placed", "in_backward")
    return launch("native.py", 2, *modules, CHECKPOINTS=str(folder))


@pytest.fixture(scope="module")
def on_3(folder: Path, on_2: dict[str, Any]) -> dict[str, Any]:
    return launch("native.py", 3, "fsdp2", "ddp", "tensor_parallel", "checkpoints", CHECKPOINTS=str(folder))


@pytest.fixture(scope="module")
def on_4() -> dict[str, Any]:
    return launch("native.py", 4, "two_dimensions")


def test_fsdp2_on_3_processes(on_3: dict[str, Any], proves: Proves) -> None:
    figures = dict(on_3["fsdp2"])
    bfloat16 = figures.pop("bfloat16")
    assert bfloat16["adam_mini"] <= 2**-10  # gradients are rounded before they are added up: a few last places
    for of_case in figures.values():
        assert of_case["placements"] == ["(Shard(dim=0),)"]
        near(of_case)
    # 60 rows of queries are cut between heads, 20 of keys inside both heads: 2 for each layer, 1 for each of 5 norms.
    one_all_reduce(figures["llama"], 2 * 2 + 5)
    # A head of keys, 3 norms; the queries' 30 rows fall apart into heads.
    one_all_reduce(figures["tied"], 1 + 3)
    # 60 + 20 + 20 rows are cut at 34 and 68: inside a query head, and inside a key head.
    one_all_reduce(figures["fused, swapped"], 2 + 3)
    # Conv1D's matrices are cut across their columns, so that every block is cut.
    one_all_reduce(figures["conv1d"], 6 + 6 + 48 + 48 + 192 + 48 + 3)
    assert figures["experts"]["empty parts"] == 3  # 4 experts, twice, and the router's 4 rows
    assert figures["llama"]["share"] <= SHARE
    proves("FSDP2, torch", "plain", "tied", "fused", "experts", "bf16", processes=3)
    proves("FSDP2, torch", "state", processes=3, value=f"≤ {SHARE}")
    proves("FSDP2, torch", "collectives", processes=3, value="1")


def test_fsdp2_on_2_processes(on_2: dict[str, Any], proves: Proves) -> None:
    figures = on_2["fsdp2"]
    for of_case in figures.values():
        assert of_case["placements"] == ["(Shard(dim=0),)"]
        near(of_case)
    one_all_reduce(figures["llama"], 5)  # no head is cut
    one_all_reduce(figures["tied"], 1 + 1 + 3)  # the middle one of 3 query heads, the key head
    assert figures["llama"]["share"] <= SHARE
    proves("FSDP2, torch", "plain", "tied", "fused", processes=2)


@pytest.mark.parametrize("processes", [2, 3])
def test_ddp(processes: int, request: pytest.FixtureRequest, proves: Proves) -> None:
    for figures in request.getfixturevalue(f"on_{processes}")["ddp"].values():
        near(figures)
        assert figures["placements"] == []
        assert figures["adam_mini calls"] == [{}] * 5
    proves("DDP, torch", "plain", "tied", processes=processes)
    proves("DDP, torch", "collectives", processes=processes, value="0")


@pytest.mark.parametrize(("processes", "heads_cut"), [(2, 2), (3, 1)])
def test_tensor_parallel(processes: int, heads_cut: int, request: pytest.FixtureRequest, proves: Proves) -> None:
    figures = request.getfixturevalue(f"on_{processes}")["tensor_parallel"]
    near(figures["llama"])
    assert figures["llama"]["placements"] == ["(Shard(dim=0),)", "(Shard(dim=1),)"]
    # Every row of the two rowwise matrices; 3 query heads of 10 rows and one of keys by 2 or by 3 processes.
    one_all_reduce(figures["llama"], 48 + 48 + heads_cut)
    assert max(figures["any placement"].values()) <= CLOSE
    assert figures["uncut"] == {}
    assert figures["missing"] == 1
    proves("tensor parallel, torch", "plain", processes=processes)
    proves("tensor parallel, torch", "collectives", processes=processes, value="1")


def test_tensor_parallelism_of_transformers(tmp_path: Path, proves: Proves) -> None:
    figures = launch("native.py", 2, "transformers_tp", CHECKPOINTS=str(tmp_path))["transformers_tp"]
    for name, rowwise in {"llama": 192 + 192, "experts": 48 + 4 * 48, "tied": 48 + 48}.items():
        near(figures[name])
        one_all_reduce(figures[name], rowwise)  # whole heads on each process, and norms on both
        assert {"(Shard(dim=0),)", "(Shard(dim=1),)"} <= set(figures[name]["placements"])
    assert "(_StridedShard(dim=1, sf=2),)" in figures["experts"]["placements"]  # gate and up, each cut in two
    assert figures["llama"]["share"] <= SHARE
    close_to_one_process(figures["trainer"])
    engine = "tensor parallel, transformers' plan"
    proves(engine, "plain", "experts", "tied", processes=2)
    proves(engine, "state", processes=2, value=f"≤ {SHARE}")
    proves(engine, "collectives", processes=2, value="1")


def test_a_mesh_of_two_dimensions(on_4: dict[str, Any], proves: Proves) -> None:
    figures = on_4["two_dimensions"]
    near(figures["llama"])
    assert figures["llama"]["placements"] == [
        "(Shard(dim=0), Shard(dim=1))", "(Shard(dim=0),)", "(_StridedShard(dim=0, sf=2), Shard(dim=0))"
    ]  # fmt: skip
    # Along the rows' cut 3 + 1 heads and 3 norms. Along the other, half of the rows of the rowwise matrices each.
    one_all_reduce(figures["llama"], 24 + 24 + 3 + 1, dimensions=2)
    assert max(figures["any placement"].values()) <= CLOSE
    assert figures["uncut"] == {}
    proves("tensor parallel x FSDP2, torch", "plain", processes=4)
    proves("tensor parallel x FSDP2, torch", "collectives", processes=4, value="2")


def test_checkpoints(folder: Path, on_2: dict[str, Any], on_3: dict[str, Any], proves: Proves) -> None:
    for figures in (on_2["checkpoints"], on_3["checkpoints"]):
        # On as many processes: sharded by DCP, as each process's own state_dict(), whole from process 0.
        assert [figures[way] for way in ("sharded", "state_dict", "full")] == [0.0, 0.0, 0.0]
        for way in ("uninterrupted, from one process", "one process's state_dict", "full, into one process", "from 1"):
            assert figures[way] <= CLOSE
    assert on_3["checkpoints"]["from 2"] <= CLOSE
    resumed = launch("native.py", 2, "reshard", CHECKPOINTS=str(folder))["reshard"]
    assert sorted(resumed) == ["from 1", "from 3"]
    assert resumed["from 3"] <= CLOSE
    _, of_one = checkpoints.one_process()
    resumed = checkpoints.resharded(folder, of_one)
    assert sorted(resumed) == ["from 2", "from 3"]
    assert max(resumed.values()) <= CLOSE
    for processes in (2, 3):
        proves("FSDP2, torch", "resume", processes=processes)
    proves("FSDP2, torch", "reshard", processes=3, value="1, 2, 3")


# What the matrix calls a way of training with transformers.
FEATURE_OF = {"trainer": "plain", "lora": "lora", "sft": "plain", "sft, lora": "lora"}


@pytest.mark.parametrize(
    ("engine", "processes", "ways"),
    [
        ("fsdp2", 2, ("trainer", "sft, lora", "lora", "resumed")),
        ("fsdp2", 3, ("trainer", "sft, lora", "resumed")),
        ("ddp", 2, ("trainer", "sft", "sft, lora", "resumed")),
        pytest.param("ddp", 3, ("trainer",), marks=pytest.mark.slow),  # torch's own DDP is tried on 3 processes
    ],
)
def test_transformers_and_trl(engine: str, processes: int, ways: Sequence[str], tmp_path: Path, proves: Proves) -> None:
    figures = launch("hf.py", processes, engine, *ways, CHECKPOINTS=str(tmp_path))[engine]
    named = {"fsdp2": "FSDP2", "ddp": "DDP"}[engine]
    kinds = {"fsdp2": ["FULL_STATE_DICT", "SHARDED_STATE_DICT"], "ddp": ["plain"]}[engine]
    assert figures.get("resumed") == (dict.fromkeys(kinds, 0.0) if "resumed" in ways else None)
    for way in FEATURE_OF.keys() & set(ways):
        close_to_one_process(figures[way])
        proves(f"{named}, {'TRL' if way.startswith('sft') else 'Trainer'}", FEATURE_OF[way], processes=processes)
    if "resumed" in ways:
        proves(f"{named}, Trainer", "resume", processes=processes)


def test_accelerate_launch_with_the_guides_file(yaml_file: Path, tmp_path: Path, proves: Proves) -> None:
    launcher = ("accelerate.commands.launch", "--config_file", str(yaml_file), "--mixed_precision", "no")
    figures = launch("hf.py", 2, "launched", "trainer", launcher=launcher, CHECKPOINTS=str(tmp_path))["launched"]
    close_to_one_process(figures["trainer"])
    proves("FSDP2, accelerate launch", "plain", processes=2)


def close_to_one_process(figures: dict[str, float]) -> None:
    assert figures["adam_mini"] <= CLOSE
    assert figures["adam_mini moved"] > 1e-3
    assert figures["adamw"] <= 1e-3
    assert figures["adamw moved"] > 1e-3


LIGHTNING = {
    "ddp": "DDP, Lightning",
    "model parallel": "FSDP2, Lightning",
    "tensor parallel": "tensor parallel, Lightning",
    "two dimensions": "tensor parallel x FSDP2, Lightning",
}


@pytest.mark.parametrize(
    ("processes", "ways"),
    [
        (2, ("ddp", "model parallel", "whole checkpoint", "tensor parallel")),
        pytest.param(3, ("ddp", "model parallel", "whole checkpoint"), marks=pytest.mark.slow),  # as FSDP2 and DDP are
        (4, ("two dimensions",)),
    ],
    ids=["2", "3", "4"],
)
def test_lightning(processes: int, ways: Sequence[str], tmp_path: Path, proves: Proves) -> None:
    figures = launch("lightning_fit.py", processes, *ways, CHECKPOINTS=str(tmp_path))
    assert sorted(figures) == sorted(ways)
    for of_strategy in figures.values():
        assert of_strategy["adam_mini"] <= CLOSE
        assert of_strategy["adam_mini moved"] > 1e-3
        # DDP cuts gradients into other buckets at the first step, and adds three processes up in another order.
        exact = of_strategy.get("adamw resumed", 0.0) == 0.0
        assert of_strategy["adam_mini resumed"] <= (0.0 if exact else CLOSE)
    for name in LIGHTNING.keys() & figures.keys():
        close_to_one_process(figures[name])
        proves(LIGHTNING[name], "plain", "resume", processes=processes)


def test_the_example_goes_on_with_another_number_of_processes(tmp_path: Path) -> None:
    def run(processes: int, steps: int, folder: str) -> dict[str, float]:
        small = ("--steps", str(steps), "--d-model", "48", "--layers", "1", "--seq-len", "16")
        command = ("torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), str(EXAMPLE))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        subprocess.run(
            (sys.executable, "-m", *command, *small, "--output-dir", folder),
            cwd=tmp_path, env=environment, check=True, timeout=150,
        )  # fmt: skip
        return json.loads((tmp_path / folder / "sharded.json").read_text())

    first = run(2, 3, "cut")
    resumed = run(3, 6, "cut")
    alone = run(1, 6, "alone")
    assert [figures["processes"] for figures in (first, resumed, alone)] == [2, 3, 1]
    assert abs(resumed["loss"] - alone["loss"]) <= 1e-5  # some last places of a mean over a batch
    assert first["loss"] - resumed["loss"] > 1e-2  # it learns
    # Cut over three processes there is a count of steps of each tensor on each of them, and no more.
    counts = 12 * 4
    assert resumed["optimizer/state_bytes_all_ranks"] == alone["optimizer/state_bytes_all_ranks"] + 2 * counts
    assert alone["optimizer/state_bytes"] < 0.52 * alone["optimizer/adamw_state_bytes"]


def test_fsdp1_is_refused(on_2: dict[str, Any]) -> None:
    for when, said in on_2["refused"].items():
        assert "use FSDP2 (fully_shard in torch, fsdp_version: 2 in accelerate, ModelParallelStrategy" in said, when
        assert "FSDP1" in said, when


@pytest.mark.parametrize(("made", "left"), [("after", 0), ("before", 12)])
def test_steps_in_the_backward_pass(made: str, left: int, on_2: dict[str, Any]) -> None:
    figures = on_2["in_backward"][f"made {made}"]
    assert figures["distance"] <= CLOSE
    assert figures["moved"] > 1e-3
    # Made before its model was sharded, the optimizer meets the parameters that it trains in its first step.
    assert figures["gradients left"] == [left, 0, 0, 0, 0]


def test_steps_in_the_backward_pass_are_refused_where_gradients_are_averaged_after_it(on_2: dict[str, Any]) -> None:
    said = on_2["in_backward"]["ddp"]
    assert "is that of one of 2 processes: DistributedDataParallel averages gradients after" in said
    assert "Use FSDP2" in said


def test_what_is_not_placed_as_it_must_be_is_refused(on_2: dict[str, Any]) -> None:
    said = on_2["placed"]
    assert "does not train parameters that are placed as P(sum)" in said["partial"]
    for case in ("sharded into plain", "another mesh"):
        assert "the state to load is cut over the processes of DeviceMesh" in said[case]
        assert "torch.distributed.checkpoint.state_dict" in said[case]


def test_tensor_parallelism_by_plain_tensors_is_refused() -> None:
    model = workers.llama()
    model._tp_size = 2  # what older transformers say of it, whose parameters are plain
    for options in ({}, {"scheme": "tensor"}, {"rules": [("*", "tensor")]}):
        with pytest.raises(
            PartitionError, match=r"LlamaForCausalLM has been cut over 2 processes.*upgrade transformers"
        ):
            partition(model, **options)


# --- which blocks are cut, for processes that need not be there -------------------------------------


def parts_of(shape: tuple[int, ...], mesh: tuple[int, ...], placements: Sequence[Any]) -> dict[tuple[int, ...], Tensor]:
    """The element numbers that each process of a mesh holds, cut one dimension of the mesh after another."""
    parts = {(): torch.arange(math.prod(shape)).view(shape)}
    for size, placement in zip(mesh, placements):
        finer = {}
        for coordinate, part in parts.items():
            cut = [part] * size
            if isinstance(placement, Shard):
                chunks = list(part.chunk(size, placement.dim))
                empty = part.narrow(placement.dim, 0, 0)
                cut = chunks + [empty] * (size - len(chunks))
            finer.update({(*coordinate, i): of_process for i, of_process in enumerate(cut)})
        parts = finer
    return parts


@given(layouts(), st.lists(st.integers(1, 3), min_size=1, max_size=3), st.data())
def test_shares_of_all_processes_add_up_to_the_block_means(
    layout: Layout, mesh: list[int], data: st.DataObject
) -> None:
    shape = shape_for(layout)
    placement = st.sampled_from([Replicate(), Shard(0), Shard(1)])
    placements = tuple(data.draw(placement) for _ in mesh)
    grad = torch.arange(1.0, 1 + math.prod(shape), dtype=torch.float64).view(shape)
    expected = layout.block_mean(grad.square().mean([a for a in (0, 1) if a not in layout.axes], keepdim=True))
    parts = parts_of(shape, tuple(mesh), placements)
    device = torch.device("cpu")
    cuts = {c: find_cuts(layout, shape, tuple(mesh), c, placements, device) for c in parts}
    if None in cuts.values():
        # Nothing to add up: rows are blocks and whole, or every process has all of it.
        assert set(cuts.values()) == {None}
        for part in parts.values():
            whole_rows = all(len(part) == 0 or part.shape[a] == shape[a] for a in (0, 1) if a not in layout.axes)
            assert (layout.is_each_row and whole_rows) or part.shape == shape
        return
    shares = {}
    for coordinate, part in parts.items():
        parameter = torch.empty(shape, dtype=torch.float64)
        shares[coordinate] = sharding._share(grad.flatten()[part], parameter, layout, cuts[coordinate])
    for dim in range(len(mesh)):
        summed = {}
        for coordinate, share in shares.items():
            if dim in cuts[coordinate].dims:
                group = [(*coordinate[:dim], i, *coordinate[dim + 1 :]) for i in range(mesh[dim])]
                assert all(torch.equal(cuts[c].reduced, cuts[coordinate].reduced) for c in group)
                share = share.clone()
                for other in group:
                    if other != coordinate:
                        share[cuts[coordinate].reduced] += shares[other][cuts[coordinate].reduced]
            summed[coordinate] = share
        shares = summed
    rows = torch.arange(layout.rows).view(layout.state_shape(shape)).expand(shape).flatten()
    for coordinate, part in parts.items():
        mine = shares[coordinate][cuts[coordinate].first]
        assert len(mine) == math.prod(layout.state_shape(part.shape))
        torch.testing.assert_close(mine, expected.flatten()[cuts[coordinate].rows])
        assert set(rows[part.flatten()].tolist()) <= set(cuts[coordinate].rows.tolist())


def test_no_more_is_added_up_than_blocks_are_cut() -> None:
    def reduced(text: str, shape: tuple[int, ...], processes: int) -> int:
        found = find_cuts(Layout.parse(text), shape, (processes,), (0,), (Shard(0),), torch.device("cpu"))
        return 0 if found is None else len(found.reduced)

    assert reduced("0: 32 (64)", (2048, 64), 32) == 0  # a head a process
    assert reduced("0: 32 (64)", (2048, 64), 64) == 32  # half a head a process
    assert reduced("0: 32 (64)", (2048, 64), 3) == 2  # cuts inside heads 10 and 21
    assert reduced("0: 8 | (64) + 8 | (64) + 8 | 64", (1536, 64), 5) == 3  # at 116, 40, 156 and 80 of 192
    assert reduced("0: 1000", (1000, 64), 7) == 0
    assert reduced("1: 1000", (64, 1000), 7) == 1000


def test_fsdp_inside_tensor_parallelism_cuts_from_the_right() -> None:
    # torch's documentation of _StridedShard has these rows: tensor parallelism halves 8 rows, FSDP each half.
    layout, placements = Layout.whole(8), (_StridedShard(0, split_factor=2), Shard(0))
    for coordinate, rows in {(0, 0): [0, 1], (0, 1): [4, 5], (1, 0): [2, 3], (1, 1): [6, 7]}.items():
        cuts = find_cuts(layout, (8, 3), (2, 2), coordinate, placements, torch.device("cpu"))
        assert cuts.rows.tolist() == rows
        assert (cuts.reduced.tolist(), cuts.dims) == ([0], (0, 1))
