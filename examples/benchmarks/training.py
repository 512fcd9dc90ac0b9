"""Times a whole training step in transformers' Trainer, in tokens a second, and measures the peak of its memory.

    python examples/benchmarks/training.py            # writes docs/training.json, in about two minutes
    python examples/benchmarks/training.py --quick    # tiny, in seconds: does it run?

Each optimizer trains the same small Llama on the same random tokens. The optimizers take turns, a few steps each, and
figures are medians over turns. The peak is of one step: what forward pass, backward pass and optimizer hold at once
beyond weights and optimizer state.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import report
import torch
from step import llama_config
from torch import nn
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import adam_mini_plugins.hf  # noqa: F401

BASELINE = "adamw_torch_fused"
OPTIMIZERS = {
    BASELINE: {"optim": "adamw_torch_fused"},
    "adamw_torch": {"optim": "adamw_torch"},
    "adafactor": {"optim": "adafactor"},
    "adam_mini": {"optim": "adam_mini"},
    "adam_mini, in_backward=true": {"optim": "adam_mini", "optim_args": "in_backward=true"},
}


class Clock(TrainerCallback):
    """Notes how long each step takes, from the first forward pass to the end of the optimizer's step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Starts."""
        self.began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Stops."""
        self.seconds.append(time.perf_counter() - self.began)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], formatter_class=formatter)
    parser.add_argument("--millions", type=float, default=25, help="parameters of the model, about, in millions")
    parser.add_argument("--tokens", type=int, default=128, help="of a sequence; one sequence is a step")
    parser.add_argument("--steps", type=int, default=5, help="of a turn; the first does not count")
    parser.add_argument("--turns", type=int, default=5, help="of each optimizer")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="on a CPU")
    parser.add_argument("--output-dir", type=Path, default=Path("docs"), help="where training.json goes")
    parser.add_argument("--quick", action="store_true", help="a tiny model, one turn of three steps")
    return parser.parse_args(argv)


def model_of(millions: float) -> nn.Module:
    """A Llama with random weights, the same each time."""
    torch.manual_seed(0)
    return LlamaForCausalLM(llama_config(millions))


def train(millions: float, data: list[dict[str, torch.Tensor]], steps: int, options: dict[str, Any]) -> Clock:
    """One turn of one optimizer."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=1,
            max_grad_norm=0.0,
            learning_rate=1e-4,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_strategy="no",
            use_cpu=not torch.accelerator.is_available(),
            **options,
        )
        Trainer(model_of(millions), args, train_dataset=data, callbacks=[clock]).train()
    return clock


def peak(millions: float, batch: dict[str, torch.Tensor], options: dict[str, Any]) -> int:
    """The most bytes that a training step holds at once, beyond weights and state."""
    device = report.default_device()
    model = model_of(millions).to(device)
    batch = {key: value[None].to(device) for key, value in batch.items()}
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(folder, max_grad_norm=0.0, use_cpu=device == "cpu", report_to="none", **options)
        optimizer = Trainer(model, args).create_optimizer()

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    return report.peak_bytes(step, device)


def main(argv: list[str] | None = None) -> None:
    """Runs the benchmark, prints a Markdown table and writes the figures."""
    args = parse_arguments(argv)
    if args.quick:
        args.millions, args.tokens, args.steps, args.turns = 0.01, 8, 3, 1
    threads_before = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    vocabulary = llama_config(args.millions).vocab_size
    ids = torch.randint(vocabulary, (args.steps, args.tokens), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in ids]
    turns: dict[str, list[float]] = {name: [] for name in OPTIMIZERS}
    for _ in range(args.turns):
        for name in random.sample(list(OPTIMIZERS), len(OPTIMIZERS)):
            clock = train(args.millions, data, args.steps, OPTIMIZERS[name])
            turns[name].append(statistics.median(clock.seconds[1:]))
    parameters = sum(p.numel() for p in model_of(args.millions).parameters())
    rows = []
    for name, seconds in turns.items():
        ratios = [own / other for own, other in zip(seconds, turns[BASELINE])]
        rows.append(
            {
                "optimizer": name,
                "tokens_per_second": round(args.tokens / statistics.median(seconds), 1),
                "time_ratio": round(statistics.median(ratios), 4),
                "peak_bytes_per_parameter": round(peak(args.millions, data[0], OPTIMIZERS[name]) / parameters, 3),
            }
        )
    torch.set_num_threads(threads_before)
    facts = report.environment(report.default_device())
    setting = {"parameters": parameters, "tokens": args.tokens, "threads": args.threads, "turns": args.turns}
    print(", ".join(f"{key} {value}" for key, value in {**facts, **setting}.items()), end="\n\n")
    header = [
        "optimizer",
        "tokens/s",
        "time, ratio to adamw_torch_fused",
        "peak besides weights and state, B/parameter",
    ]
    cells = [
        [row["optimizer"], *(f"{row[key]:{form}}" for key, form in zip(list(row)[1:], (".0f", ".2f", ".2f")))]
        for row in rows
    ]
    print(report.table(header, cells))
    report.write(args.output_dir / "training.json", {"environment": facts, "setting": setting, "rows": rows})


if __name__ == "__main__":
    main()
