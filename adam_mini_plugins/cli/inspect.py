"""``adam-mini inspect``: the blocks of a model as a table, as JSON, or as a picture of one layer.

With ``--verify`` and ``--hessian`` a tiny instance of the architecture is built and asked.
"""

from __future__ import annotations

import argparse
from typing import Any

from ..blocks import Partition
from ..blocks.table import HEADS, fold, rows
from . import sources
from .picture import COLOURS, draw, layer_of
from .support import console, need, print_json, save_figure


def add_parser(commands: Any) -> None:
    """Adds the command to those of ``adam-mini``."""
    parser = commands.add_parser(
        "inspect",
        help="show which blocks a model has and why, without loading a weight",
        description="Shows the partition of a model: the blocks of each tensor, and the fact that decided.",
        epilog="example: adam-mini inspect llama-3-70b --plot blocks.png",
    )
    sources.add_options(parser)
    parser.add_argument("--json", action="store_true", help="print every tensor as JSON")
    parser.add_argument("--plot", metavar="FILE", help="write a picture of one layer, as PNG, PDF or SVG by its name")
    parser.add_argument(
        "--layer", metavar="NAME", help="the layer to draw, as model.layers.0 (default: the first of the commonest)"
    )
    tiny = parser.add_mutually_exclusive_group()
    tiny.add_argument(
        "--verify",
        action="store_true",
        help="build a tiny instance of this architecture and see whether the blocks of every query and key are what "
        "its attention does; status 1 if one is not",
    )
    tiny.add_argument(
        "--hessian",
        action="store_true",
        help="take the exact Hessian of a tiny instance and show how much of it lies inside heads and neurons",
    )
    parser.set_defaults(execute=execute)


def execute(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    if arguments.verify:
        _verify(arguments)
    elif arguments.hessian:
        _hessian(arguments)
    else:
        _inspect(arguments)


def _verify(arguments: argparse.Namespace) -> None:
    from . import verify

    model, batch = sources.tiny(arguments.source)
    verdicts = verify.verify(model, batch)
    if arguments.json:
        print_json({"model": sources.describe(arguments.source, model), "verdicts": verify.record(verdicts)})
    else:
        headline = sources.headline(sources.describe(f"a tiny instance of {arguments.source}", model))
        console().print(headline, *verify.table(verdicts), sep="\n")
    if not verify.all_right(verdicts):
        raise SystemExit(1)


def _hessian(arguments: argparse.Namespace) -> None:
    from . import curvature

    model, batch = sources.tiny(arguments.source)
    report = curvature.measure(model, batch)
    if arguments.plot:
        save_figure(curvature.draw(f"The Hessian of a tiny {type(model).__name__}", report), arguments.plot)
    if arguments.json:
        print_json({"model": sources.describe(arguments.source, model), "tensors": curvature.record(report)})
    else:
        headline = sources.headline(sources.describe(f"a tiny instance of {arguments.source}", model))
        console().print(headline, *curvature.table(report), sep="\n")


def _inspect(arguments: argparse.Namespace) -> None:
    model, blocks = sources.load(arguments)
    about = sources.describe(arguments.source, model)
    if arguments.plot:
        layer, tensors = layer_of(blocks, arguments.layer)
        title = f"{about['source']} ({about['class']}): the blocks of {layer or 'all tensors'}"
        save_figure(draw(title, tensors, layer), arguments.plot)
    if arguments.json:
        print_json({"model": about, **record(blocks)})
    else:
        console().print(*table(sources.headline(about), blocks), sep="\n")


def record(blocks: Partition) -> dict[str, Any]:
    """The partition for machines; a tensor's ``layout`` reads back with ``Layout.parse``."""
    tensors = [
        {
            "name": entry.name,
            "shape": list(entry.shape),
            "role": entry.role,
            "blocks": entry.num_blocks,
            "layout": str(entry.layout),
            "why": entry.why,
        }
        for entry in blocks.values()
    ]
    return {
        "scheme": blocks.scheme,
        "blocks": blocks.num_blocks(),
        "tensors": tensors,
        "left_out": blocks.left_out,
    }


def table(headline: str, blocks: Partition) -> list[Any]:
    """The partition for people: a headline, a table with a line a kind of tensor, and what was left out."""
    tables, box, text = need("rich.table"), need("rich.box"), need("rich.text")
    shown = tables.Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for head in HEADS:
        shown.add_column(head, justify="right" if head == "blocks" else "left", overflow="fold")
    for name, shape, role, number, why in rows(blocks):
        shown.add_row(text.Text(name), shape, text.Text(role, COLOURS[role]), number, text.Text(why, "dim"))
    counts = f"{blocks.scheme} partition: {len(blocks):,} tensors, {blocks.num_blocks():,} blocks"
    left_out = [text.Text(f"left out while frozen: {name}: {why}") for name, why in fold(blocks.left_out.items())]
    return [headline, counts, shown, *left_out]
