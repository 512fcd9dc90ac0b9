"""``adam-mini plan``: what training a model will take, for Adam-mini beside other optimizers."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any

import torch

from ..planning import Prediction, predict
from . import sources
from .support import CommandError, console, need, print_json, save_figure, unit_for

# The dtype of weights, and with them of gradients; under autocast both stay float32.
SCHEMES = {"fp32": torch.float32, "bf16": torch.bfloat16, "bf16-mixed": torch.float32}

MEANING = """\
dtype schemes:
  fp32        weights, gradients and state in float32
  bf16        weights, gradients and, where the optimizer follows them, state in bfloat16
  bf16-mixed  autocast: weights, gradients and state stay float32, the same bytes as fp32; what it makes
              smaller is activations, and during a forward it adds bfloat16 copies of weights

Not counted: activations, buffers, temporary copies, what the allocator keeps in reserve."""


# Parts of a bar: of a prediction, its label, its colour and that of the figure on it.
PARTS = (
    ("weights", "weights", "#cfd8e3", "#33475b"),
    ("gradients", "gradients", "#9db2ca", "#33475b"),
    ("state", "optimizer state", "#e4672f", "white"),
)


def add_parser(commands: Any) -> None:
    """Adds the command to those of ``adam-mini``."""
    parser = commands.add_parser(
        "plan",
        help="predict the bytes of weights, gradients and optimizer state, without loading a weight",
        description="Predicts what training a model takes, for Adam-mini beside other optimizers, to the byte.",
        epilog=f"{MEANING}\n\nexample: adam-mini plan llama-3-70b --dtype bf16 --shards 8 --plot plan.png",
    )
    sources.add_options(parser)
    parser.add_argument("--dtype", choices=SCHEMES, default="fp32", help="dtype scheme (default: fp32)")
    parser.add_argument(
        "--shards",
        metavar="N",
        type=sources.positive,
        default=1,
        help="processes over which parameters are cut along their first axis, as FSDP2 does; the bytes are those "
        "of the fullest (default: 1)",
    )
    parser.add_argument("--state-dtype", metavar="DTYPE", help="dtype of Adam-mini's momentum (default: the weights')")
    parser.add_argument("--json", action="store_true", help="print the bytes as JSON")
    parser.add_argument("--plot", metavar="FILE", help="write a stacked bar chart, as PNG, PDF or SVG by its name")
    parser.set_defaults(execute=execute)


def execute(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    model, blocks = sources.load(arguments, SCHEMES[arguments.dtype])
    try:
        predictions = predict(model, blocks, shards=arguments.shards, state_dtype=arguments.state_dtype)
    except ValueError as error:
        raise CommandError(str(error)) from error
    about = sources.describe(arguments.source, model)
    if arguments.plot:
        save_figure(chart(about, _settings(arguments), predictions), arguments.plot)
    setting = {"dtype": arguments.dtype, "shards": arguments.shards, "lora_rank": arguments.lora}
    if arguments.json:
        print_json({"model": about, **setting, "unit": "bytes", "optimizers": [p.as_dict() for p in predictions]})
    else:
        console().print(*table(sources.headline(about), _settings(arguments), predictions), sep="\n")


def _settings(arguments: argparse.Namespace) -> str:
    parts = [arguments.dtype]
    if arguments.lora:
        parts.append(f"LoRA of rank {arguments.lora}")
    if arguments.state_dtype:
        parts.append(f"Adam-mini's momentum in {arguments.state_dtype}")
    if arguments.shards > 1:
        parts.append(f"the fullest of {arguments.shards} shards")
    return ", ".join(parts)


def table(headline: str, settings: str, predictions: Sequence[Prediction]) -> list[Any]:
    """The figures for people: a headline and a table."""
    tables, box = need("rich.table"), need("rich.box")
    unit, size = unit_for(max(p.total for p in predictions))
    adamw = predictions[1].state
    shown = tables.Table(box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("optimizer")
    for head in ("weights", "gradients", "state", "total"):
        shown.add_column(f"{head}\n({unit})", justify="right")
    shown.add_column("state,\nof AdamW's", justify="right")
    shown.add_column("as in", style="dim")
    for i, p in enumerate(predictions):
        figures = [f"{number / size:,.2f}" for number in (p.weights, p.gradients, p.state, p.total)]
        shown.add_row(p.optimizer, *figures, f"{p.state / adamw:.2%}", p.implementation, style="" if i else "bold")
    return [headline, f"{settings}; {unit} = 10^{math.log10(size):.0f} bytes; activations not counted", shown]


def chart(model: dict[str, Any], settings: str, predictions: Sequence[Prediction]) -> Any:
    """The figures as stacked bars.

    Returns:
        A ``matplotlib.figure.Figure``.
    """
    figures = need("matplotlib.figure")
    unit, size = unit_for(max(p.total for p in predictions))
    figure = figures.Figure(figsize=(8, 4.1), layout="constrained")
    axes = figure.add_subplot()
    names = [p.optimizer for p in predictions]
    longest = max(p.total for p in predictions) / size
    left = [0.0] * len(predictions)
    for part, label, colour, text in PARTS:
        widths = [getattr(p, part) / size for p in predictions]
        bars = axes.barh(names, widths, left=left, height=0.66, color=colour, edgecolor="white", label=label)
        inside = [f"{w:,.1f}" if w > 0.07 * longest else "" for w in widths]
        axes.bar_label(bars, inside, label_type="center", color=text, fontsize=9)
        left = [a + b for a, b in zip(left, widths)]
    for row, p in enumerate(predictions):
        thin = p.state / size <= 0.07 * longest  # too thin for its figure to stand inside
        end = f"{p.total / size:,.1f}" + (f"  (state {p.state / size:,.2f})" if thin else "")
        axes.annotate(end, (left[row], row), (6, 0), textcoords="offset points", va="center", weight="bold")
    axes.invert_yaxis()
    axes.margins(x=0.14, y=0.03)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.set_xlabel(f"{unit}, activations not counted")
    axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 0.99), ncols=3, frameon=False, fontsize=9.5)
    title, _, size_of_it = sources.headline(model).partition(", ")
    axes.text(0, 1.2, title, transform=axes.transAxes, fontsize=12, weight="bold")
    axes.text(0, 1.125, f"{size_of_it}; {settings}", transform=axes.transAxes, fontsize=9, color="#5a6572")
    return figure
