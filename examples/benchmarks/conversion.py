"""AdamW turned into Adam-mini in the middle of a run: does the loss jump?

    python examples/benchmarks/conversion.py

The model and data of examples/pretrain.py. For each seed AdamW trains to step t; from there four trainings go on
over the same batches: AdamW as before, Adam-mini taken over from it (`AdamMini.from_adamw`), AdamW after being
Adam-mini for a moment (`.to_adamw()`), and, for comparison, an Adam-mini that starts without AdamW's state.
Everything else is the same. Takes about four minutes on one core.

Measured: the held-out loss after each of the first steps and some later ones, less that of AdamW at the same seed
and step; beside it the standard deviation of AdamW's own held-out loss between the seeds, of the variances of all
these steps: those of single steps tell little, as few lines may happen to meet. In nats per token.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot as plt
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.optim import AdamW, Optimizer
from transformers import LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
import pretrain

from adam_mini_plugins import AdamMini, partition

OPTIONS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
ADAMW = "AdamW"
CONVERTED = "Adam-mini, taken over from AdamW"
BACK = "AdamW, after being Adam-mini"
FRESH = "Adam-mini, without AdamW's state"
BRANCHES: dict[str, Callable[[AdamW, LlamaForCausalLM], Optimizer]] = {
    ADAMW: lambda adamw, model: adamw,
    CONVERTED: lambda adamw, model: AdamMini.from_adamw(adamw, partition(model)),
    BACK: lambda adamw, model: AdamMini.from_adamw(adamw, partition(model)).to_adamw(),
    FRESH: lambda adamw, model: AdamMini(model.named_parameters(), partition=partition(model), **OPTIONS),
}
MEASURED = (1, 2, 3, 4, 6, 8, 10, 15, 20, 30, 40, 60, 80, 100)  # steps after the conversion
FIRST = 4  # of them, those at which a jump would show; what comes later is another way of training
OUT = Path(__file__).parents[2] / "docs"


def held_out_loss(model: LlamaForCausalLM, sequences: Tensor) -> float:
    """Nats per token."""
    with torch.no_grad():
        return model(**pretrain.collate(list(sequences))).loss.item()


def step(model: LlamaForCausalLM, optimizer: Optimizer, sequences: Tensor) -> None:
    """One step on a batch."""
    optimizer.zero_grad()
    model(**pretrain.collate(list(sequences))).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def run(seed: int, args: argparse.Namespace, tokenizer: Any, train: Tensor, held_out: Tensor) -> dict[str, list[Any]]:
    """The held-out losses of all branches at one seed: pairs of the steps since the conversion and the loss."""
    model = pretrain.build_model(argparse.Namespace(**{**vars(args), "seed": seed}), tokenizer)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    batches = train[order][: args.steps * args.batch_size].view(args.steps, args.batch_size, -1)
    adamw = AdamW(model.named_parameters(), **OPTIONS)
    for number, batch in enumerate(batches[: args.before]):
        adamw.param_groups[0]["lr"] = OPTIONS["lr"] * min(1.0, (number + 1) / args.warmup)
        step(model, adamw, batch)
    losses: dict[str, list[Any]] = {}
    for branch, convert in BRANCHES.items():
        own, running = copy.deepcopy((model, adamw))  # together: the copy's parameters are its model's
        optimizer = convert(running, own)
        losses[branch] = [(0, held_out_loss(own, held_out))]
        for number, batch in enumerate(batches[args.before :], start=1):
            step(own, optimizer, batch)
            if number in MEASURED or number == args.after:
                losses[branch].append((number, held_out_loss(own, held_out)))
    return losses


def summary(losses: list[dict[str, list[Any]]]) -> dict[str, Any]:
    """Per branch what differs from AdamW at the same seed and step, beside AdamW's own deviation between seeds."""
    steps = [number for number, _ in losses[0][ADAMW]]
    adamw = [[loss for _, loss in of_seed[ADAMW]] for of_seed in losses]
    at_steps = list(zip(*adamw))
    deviation = statistics.fmean(map(statistics.variance, at_steps)) ** 0.5
    of_branches = {}
    for branch in BRANCHES:
        if branch != ADAMW:
            of_seeds = [[loss - at for (_, loss), at in zip(of[branch], own)] for of, own in zip(losses, adamw)]
            largest = [max(map(abs, at)) for at in zip(*of_seeds)]
            of_branches[branch] = {
                "largest_at_first": max(at for number, at in zip(steps, largest) if number <= FIRST),
                "largest": max(largest),
                "largest_at_step": steps[largest.index(max(largest))],
                "largest_over_deviation": max(largest) / deviation,
                "mean_at_end": statistics.fmean(of_seed[-1] for of_seed in of_seeds),
                "of_each_seed": of_seeds,
            }
    return {
        "steps": steps,
        "deviation_between_seeds": deviation,
        "deviation_at_each_step": list(map(statistics.stdev, at_steps)),
        "branches": of_branches,
    }


def plot(result: dict[str, Any], path: Path) -> None:
    """Differences from AdamW after the conversion, a line a seed; shaded, AdamW's own deviation between seeds."""
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    steps, deviation = result["steps"], result["deviation_between_seeds"]
    axes.axhspan(-deviation, deviation, color="0.9", label="standard deviation of AdamW between seeds")
    for (branch, of_branch), colour in zip(result["branches"].items(), pretrain.COLOURS):
        for number, line in enumerate(of_branch["of_each_seed"]):
            axes.plot(steps, line, color=colour, linewidth=1.2, label=None if number else branch)
    axes.axhline(0, color="0.4", linewidth=0.8)
    axes.set(
        ylim=(-4 * deviation, 4 * deviation),  # what starts without state goes far beyond
        xticks=steps[:1] + steps[4:],
        xlabel="steps since the conversion",
        ylabel="held-out loss less AdamW's\n(nats per token)",
    )
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Trains at each seed, prints the table, writes figures and plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--before", type=int, default=60, help="steps of AdamW before the conversion")
    parser.add_argument("--after", type=int, default=40, help="steps after it")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for conversion.json and conversion.png")
    given = parser.parse_args()
    own = {"dataset": None, "glob": ["*.py"], "seed": 0, "eval_sequences": 16, "batch_size": 4, "warmup": 10}
    steps = given.before + given.after
    args = argparse.Namespace(**{**asdict(pretrain.SIZES["demo"]), **own, **vars(given), "steps": steps})
    torch.set_num_threads(1)
    plt.switch_backend("Agg")
    args.output_dir = Path("runs/conversion")
    args.output_dir.mkdir(parents=True, exist_ok=True)

    tokenizer, train, held_out = pretrain.load_data(args)
    losses = [run(seed, args, tokenizer, train, held_out) for seed in range(args.seeds)]
    result = summary(losses)
    table = Table(
        "after step t",
        f"largest, first {FIRST} steps",
        "largest, all steps",
        "over AdamW's deviation",
        "mean at the end",
    )
    for branch, of in result["branches"].items():
        largest = f"{of['largest']:.4f} at t + {of['largest_at_step']}"
        over, end = f"{of['largest_over_deviation']:.2f}", f"{of['mean_at_end']:+.4f}"
        table.add_row(branch, f"{of['largest_at_first']:.4f}", largest, over, end)
    Console(width=120).print(table)
    plot(result, args.out / "conversion.png")
    record = {"environment": pretrain.environment(), "arguments": vars(args), **result, "held_out_loss": losses}
    (args.out / "conversion.json").write_text(json.dumps(record, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
