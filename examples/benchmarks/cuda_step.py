"""Times one optimizer step on a CUDA device, beside the bandwidth that a plain copy reaches there.

    python examples/benchmarks/cuda_step.py --millions 1000 --dtype float32

All optimizers step the parameters of one Llama with the same random gradients, by turns, each step between two
CUDA events. A ratio is the median, over rounds, of the time in a round divided by fused AdamW's in the same
round. *Bandwidth* is the least traffic of a step (for AdamW 7 numbers a parameter: gradient in, parameter and both
moments in and out; for Adam-mini 5) by the time, as a share of what ``Tensor.copy_`` reaches in the same run.
Where the published package ``adam-mini`` is installed, it takes part.
"""

from __future__ import annotations

import argparse
import platform
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec

import torch
from torch.optim import AdamW, Optimizer
from transformers import LlamaConfig, LlamaForCausalLM

from adam_mini_plugins import AdamMini, __version__

BASELINE = "AdamW, fused"


@dataclass
class Contestant:
    """An optimizer, the numbers that its step has to move for a parameter, and what was measured."""

    name: str
    optimizer: Optimizer
    traffic: int
    extra_bytes: int = 0
    milliseconds: list[float] = field(default_factory=list)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], formatter_class=formatter)
    parser.add_argument("--millions", type=float, default=1000, help="parameters of the model, about, in millions")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of all parameters")
    parser.add_argument("--rounds", type=int, default=30, help="timed steps of each optimizer")
    return parser.parse_args()


def llama_config(millions: float) -> LlamaConfig:
    """A Llama of width 2048, or 512 if it is to be small, with as many layers as come nearest."""
    width = 2048 if millions >= 300 else 512
    vocabulary, intermediate, head_dim = 16 * width, 11 * width // 4, 64
    layer = 3 * width**2 + 3 * width * intermediate
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=intermediate,
        num_hidden_layers=max(1, round((millions * 1e6 - 2 * vocabulary * width) / layer)),
        num_attention_heads=width // head_dim,
        num_key_value_heads=width // head_dim // 2,
    )


def contestants(model: LlamaForCausalLM) -> list[Contestant]:
    """The optimizers, all on the same parameters: what a step computes doesn't change how long it takes."""
    entries = [
        Contestant(BASELINE, AdamW(model.parameters(), fused=True), 7),
        Contestant("AdamW, foreach", AdamW(model.parameters(), foreach=True), 7),
        Contestant("AdamMini", AdamMini.for_model(model), 5),
        Contestant("AdamMini, eager", AdamMini.for_model(model, fused=False), 5),
    ]
    if find_spec("adam_mini"):
        import adam_mini

        config = model.config
        heads = {"n_heads": config.num_attention_heads, "n_kv_heads": config.num_key_value_heads}
        options = {"weight_decay": 0.01, "dim": config.hidden_size, "verbose": False, **heads}
        published = adam_mini.Adam_mini(model.named_parameters(), **options)
        entries.append(Contestant(f"adam-mini {version('adam-mini')}", published, 5))
    return entries


def milliseconds(work: Callable[[], object]) -> float:
    """How long the device is at it, from an idle device on."""
    began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    began.record()
    work()
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended)


def copy_bandwidth(rounds: int) -> float:
    """Bytes a second that a copy of a gigabyte reads and writes."""
    source = torch.empty(2**28, device="cuda").normal_()
    target = torch.empty_like(source)
    times = [milliseconds(lambda: target.copy_(source)) for _ in range(rounds + 3)][3:]
    return 2e3 * source.nbytes / statistics.median(times)


def run(entries: list[Contestant], rounds: int) -> None:
    """Measures memory at the third step, when all state is there, then times the contestants by turns."""
    for entry in entries:
        for _ in range(2):
            entry.optimizer.step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        entry.optimizer.step()
        entry.extra_bytes = torch.cuda.max_memory_allocated() - before
    for _ in range(rounds):
        for entry in random.sample(entries, len(entries)):  # so that none always follows the same other
            entry.milliseconds.append(milliseconds(entry.optimizer.step))


def main() -> None:
    """Runs the benchmark and prints a Markdown table."""
    args = parse_arguments()
    if not torch.cuda.is_available():
        raise SystemExit(f"cuda_step.py needs a CUDA device, and torch {torch.__version__} finds none here")
    bandwidth = copy_bandwidth(args.rounds)
    with torch.device("cuda"):
        model = LlamaForCausalLM(llama_config(args.millions)).to(getattr(torch, args.dtype))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-2
    parameters = sum(p.numel() for p in model.parameters())
    facts = {
        "device": torch.cuda.get_device_name(),
        "copy, GB/s": f"{bandwidth / 1e9:.0f}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton") if find_spec("triton") else "none",
        "adam_mini_plugins": __version__,
        "dtype": args.dtype,
        "parameters": parameters,
        "tensors": len(list(model.parameters())),
        "rounds": args.rounds,
    }
    print(", ".join(f"{key} {value}" for key, value in facts.items()), end="\n\n", flush=True)

    entries = contestants(model)
    run(entries, args.rounds)
    print("| optimizer | step, ms | ratio | bandwidth | extra memory at the peak, B/parameter |")
    print("| --- | ---: | ---: | ---: | ---: |")
    size = torch.empty((), dtype=getattr(torch, args.dtype)).element_size()
    for entry in entries:
        median = statistics.median(entry.milliseconds)
        ratio = statistics.median(own / other for own, other in zip(entry.milliseconds, entries[0].milliseconds))
        share = 1e3 * entry.traffic * size * parameters / median / bandwidth
        print(f"| {entry.name} | {median:.2f} | {ratio:.2f} | {share:.0%} | {entry.extra_bytes / parameters:.3f} |")


if __name__ == "__main__":
    main()
