"""``adam-mini inspect --hessian``: the exact Hessian of a tiny instance of a model, and which blocks it shows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..blocks import partition
from ..hessian import HessianBlocks, measure_hessian
from .picture import COLOURS, layer_of
from .support import CommandError, need

STEPS, LEARNING_RATE = 20, 1e-3  # away from the symmetry of the first weights
MATRICES = ("query", "key", "value", "fused", "linear")


def measure(model: nn.Module, batch: dict[str, Any]) -> list[HessianBlocks]:
    """Trains a tiny model for some steps on its batch and measures the matrices of one layer.

    Raises:
        CommandError: The model's loss can't be differentiated twice.
    """
    blocks = partition(model)
    _, entries = layer_of(blocks)
    names = [entry.name for entry in entries if entry.role in MATRICES]
    if not names:
        raise CommandError("no layer of this model has a matrix of attention or of an MLP to measure")
    loss = _loss_of(model, batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    for _ in range(STEPS):
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
    try:
        return measure_hessian(model, loss, blocks, names)
    except (RuntimeError, ValueError) as error:
        raise CommandError(f"the Hessian of {type(model).__name__} can't be taken: {error}") from error


def _loss_of(model: nn.Module, batch: dict[str, Any]) -> Callable[[], Tensor]:
    """The loss of next tokens for a causal language model; cross-entropy to drawn targets for any other."""
    generator = torch.Generator().manual_seed(0)
    targets: dict[torch.Size, Tensor] = {}

    def loss() -> Tensor:
        output = model(**batch)
        scores = getattr(output, "logits", None)
        scores = next(v for v in output.values() if isinstance(v, Tensor)) if scores is None else scores
        scores = scores.flatten(0, -2)
        shape = scores.shape
        if shape not in targets:
            targets[shape] = torch.randint(shape[-1], shape[:1], generator=generator)
        return functional.cross_entropy(scores, targets[shape])

    return loss


def record(report: list[HessianBlocks]) -> list[dict[str, Any]]:
    """The figures for machines; shares are of the Hessian's absolute mass, couplings in units of a row's own."""
    return [
        {
            "name": one.name,
            "role": one.role,
            "rows": len(one.mass),
            "levels": {level.name: {"inside": level.inside, "coupling": level.coupling} for level in one.levels},
            "densest": one.densest,
            "chosen": one.chosen,
        }
        for one in report
    ]


def table(report: list[HessianBlocks]) -> list[Any]:
    """The figures for people."""
    tables, box, text = need("rich.table"), need("rich.box"), need("rich.text")
    shown = tables.Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("name", "role", "inside neurons", "inside heads", "in a head", "elsewhere", "densest", "blocks"):
        shown.add_column(title, overflow="fold")
    for one in report:
        levels = {level.name: level for level in one.levels}
        head = levels.get("head")
        cells = (
            f"{levels['neuron'].inside:.2f}",
            f"{head.inside:.2f}" if head else "",
            f"{head.coupling:.2f}" if head else "",
            f"{levels['tensor'].coupling:.2f}",
            one.densest,
            text.Text(one.chosen, "green" if one.chosen == one.densest else "bold red"),
        )
        shown.add_row(text.Text(one.name), text.Text(one.role, COLOURS[one.role.partition("[")[0]]), *cells)
    return [
        shown,
        "Shares of the Hessian's absolute mass; couplings of different rows, in units of a row's own. Blocks should "
        "end where the coupling falls the most.",
    ]


def draw(title: str, report: list[HessianBlocks]) -> Any:
    """Each tensor's rows against its rows, the darker the more mass, lines between heads (the paper's Figure 7)."""
    plt, colors = need("matplotlib.pyplot"), need("matplotlib.colors")
    columns = min(4, len(report))
    lines = math.ceil(len(report) / columns)
    figure, grid = plt.subplots(
        lines, columns, figsize=(3.1 * columns, 3.3 * lines + 0.6), squeeze=False, layout="constrained"
    )
    for axes in grid.flat[len(report) :]:
        axes.set_axis_off()
    for axes, one in zip(grid.flat, report):
        top = one.mass.max().item()
        norm = colors.LogNorm(vmin=top * 3e-3, vmax=top)
        axes.imshow(one.mass.clamp_min(top * 3e-3), cmap="magma_r", norm=norm, interpolation="nearest")
        rows, levels = len(one.mass), {level.name: level for level in one.levels}
        if "head" in levels:
            size = rows / levels["head"].blocks
            for border in range(1, levels["head"].blocks):
                for line in (axes.axhline, axes.axvline):
                    line(border * size - 0.5, color="#2667d9", lw=0.5, alpha=0.6)
        axes.set_title(f"{_short(one.name)}\n{one.role}, densest: {one.densest}", fontsize=9)
        axes.set_xticks([0, rows - 1])
        axes.set_yticks([0, rows - 1])
        axes.tick_params(labelsize=7)
    figure.suptitle(title, fontsize=11)
    return figure


def _short(name: str) -> str:
    return ".".join(name.removesuffix(".weight").split(".")[-2:])
