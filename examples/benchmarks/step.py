"""Times one optimizer step of Adam-mini beside torch's AdamW, and measures state and extra memory.

    python examples/benchmarks/step.py --millions 25 --dtype float32 --threads 1

All optimizers step the parameters of the same Llama with the same random gradients, by turns in one process,
so that what disturbs the machine disturbs them all. A ratio of times is the median, over rounds, of the time
in a round divided by fused AdamW's in the same round. Where the published package ``adam-mini`` is installed,
it takes part. Where other work shares the machine, ``--threads 1`` gives the steadiest figures.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler writes when it starts and stops

import torch
from torch import nn
from torch.autograd.profiler_util import MEMORY_EVENT_NAME
from torch.optim import AdamW, Optimizer
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

import adam_mini_plugins
from adam_mini_plugins import AdamMini
from adam_mini_plugins.memory import measure

BASELINE = "AdamW, fused"


@dataclass
class Contestant:
    """An optimizer with parameters of its own, and what was measured of it."""

    name: str
    optimizer: Optimizer
    state_bytes: int = 0
    extra_bytes: int = 0
    seconds: list[float] = field(default_factory=list)

    @property
    def parameters(self) -> list[torch.Tensor]:
        """All parameters, in the model's order."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], formatter_class=formatter)
    device = str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else "cpu"
    parser.add_argument("--millions", type=float, default=25, help="parameters of the model, about, in millions")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of all parameters")
    parser.add_argument("--device", default=device, help="where the parameters lie")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of a step on a CPU")
    parser.add_argument("--rounds", type=int, default=20, help="timed steps of each optimizer, at least 2")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    return parser.parse_args()


def llama_config(millions: float) -> LlamaConfig:
    """A Llama of 8 layers and about so many parameters; two query heads share a key head."""
    vocabulary, layers, head_dim = 16_000, 8, 64

    def intermediate(width: int) -> int:
        return -(-8 * width // (3 * 256)) * 256

    def excess(width: int) -> float:
        layer = 3 * width**2 + 3 * width * intermediate(width)
        return abs(2 * vocabulary * width + layers * layer - millions * 1e6)

    width = min(range(2 * head_dim, 16_384, 2 * head_dim), key=excess)
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=intermediate(width),
        num_hidden_layers=layers,
        num_attention_heads=width // head_dim,
        num_key_value_heads=width // head_dim // 2,
    )


def contestants(config: LlamaConfig, device: str, dtype: torch.dtype) -> list[Contestant]:
    """The optimizers, each with a model of its own, and the same gradients for all."""
    makers: dict[str, Callable[[nn.Module], Optimizer]] = {
        BASELINE: lambda model: AdamW(model.parameters(), fused=True),
        "AdamW, foreach": lambda model: AdamW(model.parameters(), foreach=True),
        "AdamW, for-loop": lambda model: AdamW(model.parameters(), foreach=False, fused=False),
        "AdamMini": AdamMini.for_model,
    }
    if find_spec("adam_mini"):
        import adam_mini

        heads = {"n_heads": config.num_attention_heads, "n_kv_heads": config.num_key_value_heads}
        options = {"weight_decay": 0.01, "dim": config.hidden_size, "verbose": False, **heads}
        name = f"adam-mini {version('adam-mini')}"
        makers[name] = lambda model: adam_mini.Adam_mini(model.named_parameters(), **options)

    grads: list[torch.Tensor] = []
    entries = []
    for name, make in makers.items():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).to(device, dtype)
        grads = grads or [torch.randn_like(parameter) * 1e-2 for parameter in model.parameters()]
        for parameter, grad in zip(model.parameters(), grads):
            parameter.grad = grad
        entries.append(Contestant(name, make(model)))
    return entries


def extra_bytes(step: Callable[[], Any], device: torch.device) -> int:
    """The most bytes that a step holds at once beyond what was held before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    # The raw events, every allocation and release: the profiler's tables hold net amounts, which have no peak.
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == MEMORY_EVENT_NAME]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def now(device: torch.device) -> float:
    """The time, once all that was started before is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def run(entries: list[Contestant], rounds: int) -> None:
    """Measures memory at the third step, when all state is there, then times the contestants by turns."""
    device = entries[0].parameters[0].device
    for entry in entries:
        for _ in range(2):
            entry.optimizer.step()
        entry.extra_bytes = extra_bytes(entry.optimizer.step, device)
        entry.state_bytes = measure(entry.optimizer).state_bytes
    for _ in range(rounds):
        for entry in random.sample(entries, len(entries)):  # so that none always follows the same other
            began = now(device)
            entry.optimizer.step()
            entry.seconds.append(now(device) - began)


def figures(entry: Contestant, baseline: Contestant) -> dict[str, Any]:
    """What was measured of a contestant, and its ratios to fused AdamW."""
    ratios = [own / other for own, other in zip(entry.seconds, baseline.seconds)]
    return {
        "optimizer": entry.name,
        "state_bytes": entry.state_bytes,
        "state_ratio": entry.state_bytes / baseline.state_bytes,
        "step_ms": 1e3 * statistics.median(entry.seconds),
        "step_ratio": statistics.median(ratios),
        "step_ratio_quartiles": statistics.quantiles(ratios, n=4)[::2],
        "extra_bytes_per_parameter": entry.extra_bytes / sum(p.numel() for p in entry.parameters),
    }


def environment(args: argparse.Namespace, parameters: int) -> dict[str, Any]:
    """The machine, the versions and the setting that the figures hold for."""
    info = Path("/proc/cpuinfo")
    cpus = re.findall(r"model name\s*: (.+)", info.read_text()) if info.exists() else []
    gpus = [torch.cuda.get_device_name()] if args.device.startswith("cuda") else []
    return {
        "machine": (gpus + cpus + [platform.machine()])[0],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "adam_mini_plugins": adam_mini_plugins.__version__,
        "dtype": args.dtype,
        "parameters": parameters,
        "rounds": args.rounds,
    }


def main() -> None:
    """Runs the benchmark and prints a Markdown table."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    entries = contestants(llama_config(args.millions), args.device, getattr(torch, args.dtype))
    facts = environment(args, sum(p.numel() for p in entries[0].parameters))
    print(", ".join(f"{key} {value}" for key, value in facts.items()), end="\n\n", flush=True)
    run(entries, args.rounds)

    rows = [figures(entry, entries[0]) for entry in entries]
    print("| optimizer | state, MB | ratio | step, ms | ratio (quartiles) | extra memory at the peak, B/parameter |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for r in rows:
        quartiles = "-".join(f"{ratio:.2f}" for ratio in r["step_ratio_quartiles"])
        memory, duration = f"{r['state_bytes'] / 1e6:.1f} | {r['state_ratio']:.3f}", f"{r['step_ms']:.1f}"
        extra = f"{r['extra_bytes_per_parameter']:.3f}"
        print(f"| {r['optimizer']} | {memory} | {duration} | {r['step_ratio']:.2f} ({quartiles}) | {extra} |")
    if args.json:
        args.json.write_text(json.dumps({"environment": facts, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
