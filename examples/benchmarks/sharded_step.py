"""Times one optimizer step under FSDP2: AdamMini's beside AdamW's, and where AdamMini's goes.

    torchrun --nproc-per-node 2 examples/benchmarks/sharded_step.py --millions 25

As examples/benchmarks/step.py: the parameters of one Llama, the same random gradients for all, by turns in the same
processes, a ratio being the median over rounds of the time in a round divided by fused AdamW's in the same. All
processes wait for one another before each step; the times are process 0's. A thread a process.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import report
import step as one_process
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.optim import AdamW, Optimizer
from transformers import LlamaForCausalLM

from adam_mini_plugins import AdamMini, optimizer, sharding
from adam_mini_plugins.kernels import Plan
from adam_mini_plugins.memory import measure

# Parts of AdamMini's step, from the outermost in: what is called, and what it is that takes time there.
PARTS = {
    "checks": (optimizer, "check_parameters"),
    "sums of cut blocks": (sharding, "gradients_and_means"),
    "all-reduce": (sharding.distributed, "all_reduce"),
    "arithmetic": (Plan, "step"),
    "plans": (Plan, "__init__"),
}
INSIDE = {"all-reduce": "sums of cut blocks"}


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], formatter_class=formatter)
    parser.add_argument("--millions", type=float, default=25, help="parameters of the model, about, in millions")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of all parameters")
    parser.add_argument("--rounds", type=int, default=20, help="timed steps of each optimizer, at least 2")
    parser.add_argument("--profile", action="store_true", help="print the functions that AdamMini's step spends it in")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    return parser.parse_args()


def contestants(millions: float, dtype: torch.dtype) -> list[one_process.Contestant]:
    """The optimizers, each with a sharded model of its own, and gradients that are the same for all."""
    makers: dict[str, Callable[[nn.Module], Optimizer]] = {
        one_process.BASELINE: lambda model: AdamW(model.parameters(), fused=True),
        "AdamW, foreach": lambda model: AdamW(model.parameters(), foreach=True),
        "AdamMini": AdamMini.for_model,
    }
    entries = []
    for name, make in makers.items():
        torch.manual_seed(0)
        model = LlamaForCausalLM(one_process.llama_config(millions)).to(dtype)
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        torch.manual_seed(1)
        for parameter in model.parameters():
            parameter.grad = parameter.detach().clone()
            parameter.grad.to_local().normal_(std=1e-2)
        entries.append(one_process.Contestant(name, make(model), list(model.parameters())))
    return entries


@contextmanager
def watched(seconds: dict[str, float]) -> Iterator[None]:
    """Adds up the time in each part of a step."""

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[part] = seconds.get(part, 0.0) + time.perf_counter() - began

        return call

    with ExitStack() as stack:
        for part, (module, name) in PARTS.items():
            stack.enter_context(mock.patch.object(module, name, timed(part, getattr(module, name))))
        yield


def run(entries: list[one_process.Contestant], rounds: int) -> list[dict[str, float]]:
    """Times the contestants by turns; the parts of AdamMini's steps, each exclusive of what is inside it."""
    order = random.Random(0)  # the same in all processes
    parts = []
    for number in range(rounds + 2):
        for entry in order.sample(entries, len(entries)):
            seconds: dict[str, float] = {}
            dist.barrier()
            with watched(seconds):
                began = time.perf_counter()
                entry.optimizer.step()
                elapsed = time.perf_counter() - began
            if number >= 2:  # state is made in the first, and what is cut is found out
                entry.seconds.append(elapsed)
                if entry.name == "AdamMini":
                    for inner, outer in INSIDE.items():
                        seconds[outer] -= seconds.get(inner, 0.0)
                    parts.append({**seconds, "the rest": elapsed - sum(seconds.values())})
    return parts


def main() -> None:
    """Runs the benchmark; process 0 prints Markdown tables."""
    args = parse_arguments()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    entries = contestants(args.millions, getattr(torch, args.dtype))
    parts = run(entries, args.rounds)
    for entry in entries:
        entry.state_bytes = measure(entry.optimizer).state_bytes
    if args.profile:
        profile(entries[-1].optimizer)
    if dist.get_rank() == 0:
        facts = report.environment("cpu")
        facts |= {"processes": dist.get_world_size(), "engine": "FSDP2, gloo", "tensors": len(entries[0].parameters)}
        rows = [one_process.figures(f"{args.millions:g}M {args.dtype}", 1, entry, entries[0]) for entry in entries]
        medians = {part: 1e3 * statistics.median(found.get(part, 0.0) for found in parts) for part in parts[0]}
        show(facts, rows, medians)
        if args.json:
            record = {"environment": facts, "rows": rows, "adam_mini_parts_ms": medians}
            args.json.write_text(json.dumps(record, indent=2) + "\n")
    dist.barrier()
    dist.destroy_process_group()


def show(facts: dict[str, Any], rows: list[dict[str, Any]], parts: dict[str, float]) -> None:
    """Prints the tables."""
    print(", ".join(f"{key} {value}" for key, value in facts.items()), end="\n\n")
    print("| optimizer | state of process 0, MB | ratio | step, ms | ratio (quartiles) |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for row in rows:
        quartiles = "-".join(f"{ratio:.2f}" for ratio in row["step_ratio_quartiles"])
        state, duration = f"{row['state_bytes'] / 1e6:.1f} | {row['state_ratio']:.3f}", f"{row['step_ms']:.1f}"
        print(f"| {row['optimizer']} | {state} | {duration} | {row['step_ratio']:.2f} ({quartiles}) |")
    print("\n| part of AdamMini's step | ms |\n| --- | ---: |")
    for part, milliseconds in parts.items():
        print(f"| {part} | {milliseconds:.2f} |")


def profile(adam_mini: Optimizer) -> None:
    """Prints the functions that take most of ten steps, on process 0."""
    import cProfile
    import pstats

    profiler = cProfile.Profile()
    for _ in range(10):
        dist.barrier()
        profiler.enable()
        adam_mini.step()
        profiler.disable()
    if dist.get_rank() == 0:
        for key in ("cumulative", "tottime"):
            pstats.Stats(profiler).strip_dirs().sort_stats(key).print_stats(30)


if __name__ == "__main__":
    main()
