"""``adam-mini inspect --verify``: are a model's blocks what its attention does? A tiny instance of it is asked."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ..blocks import Layout, PartitionError, partition
from ..blocks.geometry import GeometryError
from ..blocks.partition import TensorBlocks
from ..blocks.probe import Probe, ProbeError, probe_model
from ..blocks.table import fold
from .support import CommandError, need

RIGHT, WRONG, UNSEEN, SHARED = "right", "wrong", "not seen", "right (shared)"
COLOURS = {RIGHT: "green", SHARED: "green", WRONG: "bold red", UNSEEN: "yellow"}


@dataclass(frozen=True)
class Verdict:
    """What the attention of a tiny instance says of one tensor's blocks.

    Args:
        name: The tensor's name.
        role: Its role in the partition.
        blocks: The blocks that structure gives it.
        seen: Those that its attention has been seen to have; empty if none has been.
        verdict: ``"right"``; ``"right (shared)"`` for rows of a latent that all heads share, by output neuron;
            ``"wrong"``; ``"not seen"`` for what only structure knows as a query or key.
    """

    name: str
    role: str
    blocks: str
    seen: str
    verdict: str


def verify(model: nn.Module, batch: Any) -> list[Verdict]:
    """Compares the blocks of every query and key tensor with what a model's attention does.

    Args:
        model: A model with weights.
        batch: What it runs on, as for :func:`adam_mini_plugins.partition`'s ``probe``.

    Raises:
        CommandError: The model can't be partitioned or run.
    """
    try:
        blocks, probe = partition(model), probe_model(model, batch)
    except (PartitionError, ProbeError) as error:
        raise CommandError(str(error)) from error
    found = []
    for name, parameter in model.named_parameters():
        entry = blocks.get(name)
        if entry is not None and (probe.heads.get(parameter) or entry.role in ("query", "key", "fused")):
            seen = _seen(probe, parameter, entry)
            if seen or entry.role != "value":
                found.append(Verdict(name, entry.role, str(entry.layout), *_compare(entry, seen)))
    return found


def _seen(probe: Probe, parameter: nn.Parameter, entry: TensorBlocks) -> Layout | str | None:
    try:
        slices = probe.cut(parameter, entry.layout.axes[0], "neuron")
    except GeometryError as error:
        return str(error)
    return slices.layout if slices else None


def _compare(entry: TensorBlocks, seen: Layout | str | None) -> tuple[str, str]:
    if seen is None:
        return "", UNSEEN if entry.role in ("query", "key", "fused") else RIGHT
    if isinstance(seen, str):
        return seen, WRONG
    told, does = (layout.block_index(entry.shape).expand(entry.shape).flatten() for layout in (entry.layout, seen))
    pairs = torch.stack([told, does]).unique(dim=1)
    if pairs.shape[1] == len(told.unique()) == len(does.unique()):
        return str(seen), RIGHT
    # Where one key for all heads comes out of a latent's projection, its rows are those of a latent all the same.
    latent = entry.role == "linear" and entry.layout.is_each_row and seen.grids[-1].num_blocks == 1
    return str(seen), SHARED if latent else WRONG


def record(verdicts: list[Verdict]) -> list[dict[str, str]]:
    """The verdicts for machines."""
    return [asdict(verdict) for verdict in verdicts]


def table(verdicts: list[Verdict]) -> list[Any]:
    """The verdicts for people, a line a kind of tensor, and what they come to."""
    tables, box, text = need("rich.table"), need("rich.box"), need("rich.text")
    shown = tables.Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for head in ("name", "role", "blocks", "seen in attention", ""):
        shown.add_column(head, overflow="fold")
    for name, role, blocks, seen, verdict in fold(tuple(asdict(v).values()) for v in verdicts):
        shown.add_row(text.Text(name), role, blocks, seen, text.Text(verdict, COLOURS[verdict]))
    counts = {kind: sum(v.verdict == kind for v in verdicts) for kind in COLOURS}
    summary = ", ".join(f"{number} {kind}" for kind, number in counts.items() if number)
    return [shown, f"query and key tensors: {summary or 'none'}"]


def all_right(verdicts: list[Verdict]) -> bool:
    """Whether there is a tensor to judge, and none that is wrong or has not been seen."""
    return bool(verdicts) and all(v.verdict in (RIGHT, SHARED) for v in verdicts)
