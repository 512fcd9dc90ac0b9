"""What training at scale takes: optimizer state a process, blocks cut, and what is sent for them, from shapes alone.

    python examples/benchmarks/scale.py

For Llama 3 70B and DeepSeek-V3 (671B, a mixture of experts) on 8 to 16,384 processes. Nothing is allocated and no
process is started: the blocks are those of the model's partition, and which of them an engine cuts is counted
exactly, by the function that the optimizer asks at its step (FSDP2, tensor parallelism) or from the slices that
DeepSpeed makes. It writes docs/scale.json, docs/scale.png and the tables in docs/engines/scale.md, in a minute.

What it takes for granted: float32 parameters (or float32 masters of bfloat16 ones) and state; FSDP2 cuts along the
first axis, and stacks of experts along their output neurons once there are more processes than experts; tensor
parallelism is over 8 processes, as the model's own plan has it, with FSDP2 around it; ZeRO has two groups of
parameters, matrices and vectors. A ring sends what it reduces in bfloat16 once (reduce-scatter of the gradients) and
what AdamMini adds up in float32 twice (all-reduce). Figures of state and of bytes are those of process 0, which has
no less than any other.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib import pyplot as plt
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

import adam_mini_plugins
from adam_mini_plugins import Layout, Partition, partition
from adam_mini_plugins.blocks import TensorBlocks
from adam_mini_plugins.cli import sources
from adam_mini_plugins.memory import adamw_state_bytes
from adam_mini_plugins.planning import adam_mini_state_bytes
from adam_mini_plugins.sharding import find_cuts

DOCS = Path(__file__).parents[2] / "docs"
MODELS = {"llama-3-70b": "Llama 3 70B", "deepseek-v3": "DeepSeek-V3 671B"}
TENSOR_PARALLEL = 8
RANKS = sorted(n * 2**power for n, most in ((8, 11), (12, 10)) for power in range(most + 1))
IN_TABLE = (8, 64, 512, 2048, 16384)
GRADIENT, SUM, STEP = torch.bfloat16.itemsize, torch.float32.itemsize, torch.float32.itemsize
COLOURS = {"FSDP2": "#0072B2", "TP 8 x FSDP2": "#E69F00", "ZeRO-1, 2": "#009E73", "ZeRO-3": "#CC79A7"}  # Okabe, Ito


class Parameter(NamedTuple):
    """A parameter of a model.

    Args:
        shape: Its shape.
        blocks: Its blocks.
        style: How the model's own plan cuts it for tensor parallelism, if it does.
    """

    shape: tuple[int, ...]
    blocks: TensorBlocks
    style: str | None

    @property
    def layout(self) -> Layout:
        """How its elements fall into blocks."""
        return self.blocks.layout


@dataclass
class Figures:
    """What one process has and sends at a step, the fullest one.

    Args:
        engine: What cuts the parameters.
        ranks: Over how many processes.
        state_bytes: Bytes of AdamMini's state on this process.
        adamw_state_bytes: Bytes of AdamW's.
        blocks_cut: Blocks that lie on several processes, of the whole model.
        floats: Numbers that this process adds up with others, along all dimensions of the mesh.
        all_reduced: Bytes that it sends for that.
        gradients: Bytes that it sends for the reduce-scatter of the gradients.
    """

    engine: str
    ranks: int
    state_bytes: int = 0
    adamw_state_bytes: int = 0
    blocks_cut: int = 0
    floats: int = 0
    all_reduced: int = 0
    gradients: int = 0

    def add_floats(self, count: int, processes: int) -> None:
        """Counts an all-reduce of so many floats: a ring sends each of them on twice, all but one part in so many."""
        self.floats += count
        self.all_reduced += 2 * count * SUM * (processes - 1) // processes


def parameters(model: nn.Module, blocks: Partition) -> list[Parameter]:
    """All parameters, in the model's order."""
    plan = {re.compile(re.escape(name).replace(r"\*", r"\d+")): style for name, style in model.tp_plan.items()}

    def style(name: str) -> str | None:
        owners = (name, name.removesuffix(".weight"))
        return next((style for pattern, style in plan.items() if any(map(pattern.fullmatch, owners))), None)

    return [Parameter(tuple(p.shape), blocks[name], style(name)) for name, p in model.named_parameters()]


# --- FSDP2 and tensor parallelism --------------------------------------------------------------------


def by_fsdp2(members: Sequence[Parameter], ranks: int) -> Figures:
    """Each tensor cut along an axis."""
    return of_mesh("FSDP2", members, (ranks,), lambda p: (Shard(fsdp_axis(p, ranks)),))


def by_two_dimensions(members: Sequence[Parameter], ranks: int) -> Figures:
    """Tensor parallelism inside FSDP2."""
    mesh = (ranks // TENSOR_PARALLEL, TENSOR_PARALLEL)
    return of_mesh("TP 8 x FSDP2", members, mesh, lambda p: placements(p, mesh))


def fsdp_axis(parameter: Parameter, ranks: int) -> int:
    """The axis along which FSDP2 cuts: the first, but for experts that are fewer than processes."""
    return int(len(parameter.shape) == 3 and parameter.shape[0] < ranks)


def placements(parameter: Parameter, mesh: tuple[int, int]) -> tuple[Any, Any]:
    """How a tensor is placed on a mesh of FSDP's and tensor parallelism's dimension."""
    axis, style = fsdp_axis(parameter, mesh[0]), parameter.style
    if style is None:
        return Shard(axis), Replicate()
    last = len(parameter.shape) - 1  # of a matrix, and of each in a stack of them: rows, columns
    inner = last if style == "rowwise" else last - 1  # an embedding is cut by its tokens, whatever that is called
    return _StridedShard(axis, split_factor=mesh[1]) if axis == inner else Shard(axis), Shard(inner)


def of_mesh(
    engine: str, members: Iterable[Parameter], mesh: tuple[int, ...], place: Callable[[Parameter], tuple[Any, ...]]
) -> Figures:
    """The figures of parameters that are DTensors."""
    figures = Figures(engine, math.prod(mesh))
    # Layers that are alike are counted once.
    for (shape, layout, style), (parameter, count) in distinct(members).items():
        del style
        placed = place(parameter)
        part = torch.empty(largest_part(shape, mesh, placed), device="meta")
        figures.state_bytes += count * adam_mini_state_bytes(part, parameter.blocks)
        figures.adamw_state_bytes += count * adamw_state_bytes(part)
        figures.gradients += count * gradient_bytes(shape, mesh, placed)
        figures.blocks_cut += count * blocks_cut(layout, shape, mesh, placed)
        cuts = find_cuts(layout, shape, mesh, (0,) * len(mesh), placed, torch.device("cpu"))
        for dim in cuts.dims if cuts else ():
            figures.add_floats(count * len(cuts.reduced), mesh[dim])
    return figures


def distinct(members: Iterable[Parameter]) -> dict[Any, tuple[Parameter, int]]:
    """Parameters that are cut alike, and how many there are of each."""
    keys = {(p.shape, p.layout, p.style): p for p in members}
    counts = Counter((p.shape, p.layout, p.style) for p in members)
    return {key: (parameter, counts[key]) for key, parameter in keys.items()}


def largest_part(shape: tuple[int, ...], mesh: tuple[int, ...], placed: tuple[Any, ...]) -> list[int]:
    """The shape that process 0 has."""
    part = list(shape)
    for size, placement in reversed([*zip(mesh, placed)]):  # tensor parallelism cuts first
        if not placement.is_replicate():
            part[placement.dim] = math.ceil(part[placement.dim] / size)
    return part


def gradient_bytes(shape: tuple[int, ...], mesh: tuple[int, ...], placed: tuple[Any, ...]) -> int:
    """Bytes that a process sends to have its part of a gradient summed over FSDP's dimension, the first."""
    ranks = mesh[0]
    of_group = largest_part(shape, (1, *mesh[1:]), placed)
    return math.prod(of_group) * GRADIENT * (ranks - 1) // ranks


def blocks_cut(layout: Layout, shape: tuple[int, ...], mesh: tuple[int, ...], placed: tuple[Any, ...]) -> int:
    """How many blocks of a tensor lie on several processes."""
    cpu = torch.device("cpu")
    cuts = find_cuts(layout, shape, mesh, (0,) * len(mesh), placed, cpu)
    if cuts is None:
        return 0
    sharded = [dim for dim, p in enumerate(placed) if not p.is_replicate() and mesh[dim] > 1]
    if any(placed[dim].dim not in layout.axes for dim in sharded):
        return layout.num_blocks  # across the columns, every block
    # Processes that don't add up with one another have different blocks.
    apart = [range(mesh[dim]) if dim in sharded and dim not in cuts.dims else range(1) for dim in range(len(mesh))]
    found = (find_cuts(layout, shape, mesh, at, placed, cpu) for at in product(*apart))
    return sum(len(cuts.reduced) for cuts in found if cuts is not None) if cuts.dims else 0


# --- DeepSpeed ZeRO ------------------------------------------------------------------------------------


def by_zero_1(members: Sequence[Parameter], ranks: int) -> Figures:
    """ZeRO-1 and 2: all tensors of a group end to end, cut into as many slices as processes."""
    figures = Figures("ZeRO-1, 2", ranks)
    for group in ([p for p in members if len(p.shape) > 1], [p for p in members if len(p.shape) == 1]):
        add_slices(figures, [(p, 1) for p in group], ranks)
    return figures


def by_zero_3(members: Sequence[Parameter], ranks: int) -> Figures:
    """ZeRO-3: each tensor cut into as many slices as processes."""
    figures = Figures("ZeRO-3", ranks)
    for parameter, count in distinct(members).values():
        add_slices(figures, [(parameter, count)], ranks)
    return figures


def add_slices(figures: Figures, members: Sequence[tuple[Parameter, int]], ranks: int) -> None:
    """Adds tensors that lie end to end and are cut as a whole; of each as many as given, each of which is cut so."""
    ends = torch.tensor([math.prod(p.shape) for p, _ in members]).cumsum(0)
    length = math.ceil(int(ends[-1]) / ranks)
    count = members[0][1]
    here, start = count * length, 0
    state = here * SUM
    for (parameter, _), end in zip(members, ends.tolist()):
        cut = slices_cut(parameter.layout, parameter.shape, start, length)
        figures.blocks_cut += count * cut
        figures.add_floats(count * cut, ranks)
        if start < length:  # process 0 has some of it
            width = math.prod(parameter.shape) // parameter.layout.rows
            state += count * (math.ceil((min(end, length) - start) / width) * SUM + STEP)
        start = end
    figures.state_bytes += state
    figures.adamw_state_bytes += 2 * here * SUM + count * STEP
    figures.gradients += count * int(ends[-1]) * GRADIENT * (ranks - 1) // ranks


def slices_cut(layout: Layout, shape: tuple[int, ...], start: int, length: int) -> int:
    """How many blocks of a tensor lie on several of the slices that a sequence of tensors is cut into.

    Args:
        layout: The tensor's blocks.
        shape: Its shape.
        start: Which element of the sequence is its first.
        length: The elements of each slice.
    """
    leading = layout.axes == tuple(range(len(layout.axes)))
    if layout.is_each_row and leading:
        # A row is cut where a slice ends inside it, once or more often.
        width = math.prod(shape) // layout.rows
        end = start + math.prod(shape)
        bounds = torch.arange(min(-(-start // length) * length, end), end, length) - start
        return len((bounds[bounds % width > 0] // width).unique())
    # Slices follow one another: a block lies on one of them if its first and its last element do.
    strides = torch.empty(shape, device="meta").stride()
    first = torch.zeros(1, dtype=torch.long)
    for axis in layout.axes:
        first = (first[:, None] + torch.arange(shape[axis]) * strides[axis]).flatten()
    last = first + sum((shape[axis] - 1) * strides[axis] for axis in range(len(shape)) if axis not in layout.axes)
    block = layout.block_index(shape).reshape(-1)

    def slice_of(elements: Tensor, which: str) -> Tensor:
        extreme = elements.new_zeros(layout.num_blocks)
        return (extreme.scatter_reduce_(0, block, elements, which, include_self=False) + start) // length

    return int((slice_of(first, "amin") != slice_of(last, "amax")).sum())


# --- the report ----------------------------------------------------------------------------------------

ENGINES = (by_fsdp2, by_two_dimensions, by_zero_1, by_zero_3)


def simulate(name: str, ranks: Sequence[int] = RANKS) -> list[Figures]:
    """The figures of a model by engine and number of processes."""
    model = sources.build(name)
    members = parameters(model, partition(model))
    return [
        engine(members, count)
        for engine in ENGINES
        for count in ranks
        if engine is not by_two_dimensions or count % TENSOR_PARALLEL == 0
    ]


def tables(record: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines: list[str] = []
    for name, title in MODELS.items():
        of_model = record["models"][name]
        heads = ("processes", "state, MB", "AdamW's", "ratio", "blocks cut", "floats added up", "bytes sent for them")
        lines += [
            f"**{title}**: {of_model['parameters']:,} parameters, {of_model['blocks']:,} blocks", "",
            f"| engine | {' | '.join(heads)} | of the gradients' |", f"| --- |{' ---: |' * (len(heads) + 1)}",
        ]  # fmt: skip
        for row in of_model["figures"]:
            if row["ranks"] in IN_TABLE:
                f = Figures(**row)
                share = f"{f.all_reduced / f.gradients:.1e}" if f.all_reduced and f.gradients else "0"
                share = "no reduce-scatter" if not f.gradients else share
                state = f"{f.state_bytes / 1e6:,.1f} | {f.adamw_state_bytes / 1e6:,.1f}"
                ratio, cut = f"{f.state_bytes / f.adamw_state_bytes:.4f}", f"{f.blocks_cut:,} | {f.floats:,}"
                cells = (f.engine, f"{f.ranks:,}", state, ratio, cut, f"{f.all_reduced:,}", share)
                lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def write_between_markers(path: Path, text: str) -> None:
    """Puts text between the markers of a Markdown file."""
    before, begin, rest = path.read_text().partition("<!-- figures -->\n")
    _, end, after = rest.partition("<!-- end of figures -->")
    if not begin or not end:
        raise SystemExit(f"{path} has no <!-- figures --> and <!-- end of figures --> on lines of their own")
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}")


def plot(record: dict[str, Any], path: Path) -> None:
    """Draws, for each model, state a process and bytes sent for blocks beside those sent for gradients."""
    style = {"font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10}
    with plt.rc_context(style):
        figure, panels = plt.subplots(2, 2, figsize=(8, 6.6), sharex=True, layout="constrained")
        for (state, sent), (name, title) in zip(panels, MODELS.items()):
            of_model = [Figures(**row) for row in record["models"][name]["figures"]]
            by_engine = {e: [f for f in of_model if f.engine == e] for e in COLOURS}
            fsdp2 = by_engine["FSDP2"]
            ranks = [f.ranks for f in fsdp2]
            state.plot(ranks, [f.adamw_state_bytes / 1e9 for f in fsdp2], "--", color="#555555", label="AdamW")
            state.plot(ranks, [f.state_bytes / 1e9 for f in fsdp2], color="#D55E00", lw=2, label="Adam-mini")
            state.set(title=f"{title}: state a process (FSDP2)", ylabel="GB")
            sent.plot(
                ranks,
                [f.gradients / 1e6 for f in fsdp2],
                "--",
                color="#555555",
                label="gradients' reduce-scatter (FSDP2)",
            )
            for (engine, found), mark in zip(by_engine.items(), "osD^"):
                points = [(f.ranks, f.all_reduced / 1e6) for f in found if f.all_reduced]
                sent.plot(*zip(*points), color=COLOURS[engine], marker=mark, ms=3.5, lw=1.3, label=engine)
            sent.set(title=f"{title}: sent for cut blocks", ylabel="MB a process and step")
            for axes in (state, sent):
                axes.set_xscale("log", base=2)
                axes.set_yscale("log")
                axes.grid(alpha=0.25)
        for axes in panels[1]:
            axes.set(xlabel="processes", xticks=[8, 64, 512, 4096, 16384])
            axes.set_xticklabels(["8", "64", "512", "4,096", "16,384"])
        panels[0][0].legend(frameon=False)
        handles, labels = panels[0][1].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside lower center", ncols=5, frameon=False, columnspacing=1.2, fontsize=9
        )
        figure.savefig(path, dpi=160)
        plt.close(figure)


def main() -> None:
    """Counts, and writes record, plot and tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--docs", type=Path, default=DOCS, help="the folder to write to")
    docs = parser.parse_args().docs
    plt.switch_backend("Agg")
    models = {}
    for name in MODELS:
        model = sources.build(name)
        facts = {"parameters": sum(p.numel() for p in model.parameters()), "blocks": partition(model).num_blocks()}
        models[name] = {**facts, "figures": [asdict(figures) for figures in simulate(name)]}
    environment = {"adam_mini_plugins": adam_mini_plugins.__version__, "torch": torch.__version__}
    record = {"environment": environment, "tensor_parallel": TENSOR_PARALLEL, "models": models}
    (docs / "scale.json").write_text(json.dumps(record, indent=1) + "\n")
    plot(record, docs / "scale.png")
    write_between_markers(docs / "engines" / "scale.md", tables(record))
    print(tables(record))


if __name__ == "__main__":
    main()
