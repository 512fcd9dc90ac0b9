"""Times a step of AdamMini, AdamW and other optimizers on tensors of many sizes and dtypes, and measures its memory.

    python examples/benchmarks/step.py            # all of it, in some minutes; writes docs/step.{json,md,png}
    python examples/benchmarks/step.py --cases "50M float32" "LoRA float32" --threads 1
    python examples/benchmarks/step.py --quick    # tiny, in seconds: does it run?

All optimizers of a case step tensors of the same shapes with the same random gradients, by turns in one process, so
that what disturbs the machine disturbs them all. A ratio of times is the median, over rounds, of the time in a round
divided by fused AdamW's in the same round. Slow ones take part in fewer rounds, three at least. Peers take part where
they are installed: `pip install adam-mini pytorch-optimizer torchao`.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import report
import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from transformers import LlamaConfig, LlamaForCausalLM

from adam_mini_plugins import AdamMini
from adam_mini_plugins.memory import measure

BASELINE = "AdamW, fused"
OURS = ("AdamMini", "AdamMini, fused=False")


@dataclass(frozen=True)
class Case:
    """Tensors to step.

    Args:
        millions: Parameters of a Llama, about, in millions; 0 for 300 matrices of 8 x 512, as of LoRA.
        dtype: Of parameters and gradients.
        peers: Whether other packages take part, and torch's slower forms.
        compiled: Whether one that compiles a kernel for each shape does, too.
    """

    millions: float
    dtype: torch.dtype
    peers: bool = True
    compiled: bool = False


CASES = {
    "1M float32": Case(1, torch.float32),
    "10M float32": Case(10, torch.float32, peers=False),
    "50M float32": Case(50, torch.float32, compiled=True),
    "300M float32": Case(300, torch.float32, peers=False),
    "50M bfloat16": Case(50, torch.bfloat16),
    "50M float16": Case(50, torch.float16, peers=False),
    "LoRA float32": Case(0, torch.float32),
    "LoRA bfloat16": Case(0, torch.bfloat16),
}


@dataclass
class Contestant:
    """An optimizer with parameters of its own, and what was measured of it."""

    name: str
    optimizer: Optimizer
    parameters: list[nn.Parameter]
    state_bytes: int = 0
    extra_bytes: int = 0
    rounds: int = 0
    seconds: list[float] = field(default_factory=list)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], formatter_class=formatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="which tensors", metavar="CASE")
    parser.add_argument("--device", default=report.default_device(), help="where they lie")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="threads of a step on a CPU")
    parser.add_argument("--rounds", type=int, default=25, help="timed steps of each optimizer, at least 3")
    parser.add_argument("--seconds", type=float, default=2.5, help="after which a slow optimizer sits out, each case")
    parser.add_argument("--output-dir", type=Path, default=Path("docs"), help="where step.json, step.md, step.png go")
    parser.add_argument("--quick", action="store_true", help="a hundredth of the sizes, three rounds")
    return parser.parse_args(argv)


def llama_config(millions: float) -> LlamaConfig:
    """A Llama of 8 layers and about so many parameters; two query heads share a key head."""
    vocabulary, layers, head_dim = int(min(16_000, 4_000 * millions)) + 96, 8, 64 if millions >= 10 else 32

    def intermediate(width: int) -> int:
        return -(-8 * width // (3 * 64)) * 64

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


def build(case: Case, device: str) -> nn.Module:
    """A model that has the tensors of a case, with random weights that are the same each time."""
    torch.manual_seed(0)
    with torch.device("meta"):
        if case.millions:
            model: nn.Module = LlamaForCausalLM(llama_config(case.millions))
        else:
            model = nn.ModuleList(nn.Linear(512, 8, bias=False) for _ in range(300))
    model = model.to(case.dtype).to_empty(device=device)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    return model


def makers(case: Case) -> dict[str, Callable[[nn.Module], Optimizer]]:
    """The optimizers of a case by name."""
    scheme = "hessian" if case.millions else "tensor"
    rules = () if case.millions else (("*", "neuron"),)
    found: dict[str, Callable[[nn.Module], Optimizer]] = {
        BASELINE: lambda model: AdamW(model.parameters(), fused=True),
        OURS[0]: lambda model: AdamMini.for_model(model, scheme=scheme, rules=rules),
        OURS[1]: lambda model: AdamMini.for_model(model, scheme=scheme, rules=rules, fused=False),
    }
    if not case.peers:
        return found
    found["AdamW, foreach"] = lambda model: AdamW(model.parameters(), foreach=True)
    found["AdamW, for-loop"] = lambda model: AdamW(model.parameters(), foreach=False, fused=False)
    from transformers import Adafactor

    found["Adafactor, transformers"] = lambda model: Adafactor(
        model.parameters(), lr=1e-3, scale_parameter=False, relative_step=False
    )
    if find_spec("adam_mini"):
        from adam_mini import Adam_mini

        def published(model: nn.Module) -> Optimizer:
            config = getattr(model, "config", LlamaConfig())
            heads = {"n_heads": config.num_attention_heads, "n_kv_heads": config.num_key_value_heads}
            return Adam_mini(model.named_parameters(), dim=config.hidden_size, verbose=False, **heads)

        found["Adam_mini, adam-mini"] = published
    if find_spec("pytorch_optimizer"):
        import pytorch_optimizer

        def other(model: nn.Module) -> Optimizer:
            config = getattr(model, "config", LlamaConfig())
            heads, groups = config.num_attention_heads, config.num_key_value_heads
            sizes = {"num_embeds": config.hidden_size, "num_heads": heads, "num_query_groups": groups}
            return pytorch_optimizer.AdamMini(model, lr=1e-3, **sizes)

        found["AdamMini, pytorch-optimizer"] = other
        found["Lion, pytorch-optimizer"] = lambda model: pytorch_optimizer.Lion(model.parameters(), lr=1e-4)
    if case.compiled and find_spec("torchao"):
        from torchao.optim import AdamW8bit

        found["AdamW8bit, torchao"] = lambda model: AdamW8bit(model.parameters())
    return found


def contestants(case: Case, device: str) -> list[Contestant]:
    """The optimizers of a case, each with parameters of its own, and the same gradients for all."""
    grads: list[torch.Tensor] = []
    entries = []
    for name, make in makers(case).items():
        model = build(case, device)
        grads = grads or [torch.randn_like(parameter) * 1e-2 for parameter in model.parameters()]
        for parameter, grad in zip(model.parameters(), grads):
            parameter.grad = grad
        entries.append(Contestant(name, make(model), list(model.parameters())))
    return entries


def warm_up(entries: list[Contestant], device: str, rounds: int, seconds: float) -> None:
    """Makes all state, measures memory, and finds how many rounds each contestant takes part in."""
    for entry in entries:
        entry.optimizer.step()
        began = report.now(device)
        entry.optimizer.step()
        took = report.now(device) - began
        entry.rounds = max(3, min(rounds, int(seconds / took)))
        entry.extra_bytes = report.peak_bytes(entry.optimizer.step, device)
        entry.state_bytes = measure(entry.optimizer).state_bytes


def run(entries: list[Contestant], device: str) -> None:
    """Times the contestants by turns."""
    for entry in entries:
        entry.seconds = []
    for number in range(max(entry.rounds for entry in entries)):
        taking_part = [entry for entry in entries if number < entry.rounds or entry.name == BASELINE]
        for entry in random.sample(taking_part, len(taking_part)):  # so that none always follows the same other
            began = report.now(device)
            entry.optimizer.step()
            entry.seconds.append(report.now(device) - began)


def figures(case: str, threads: int, entry: Contestant, baseline: Contestant) -> dict[str, Any]:
    """What was measured of a contestant, and its ratios to fused AdamW."""
    ratios = [own / other for own, other in zip(entry.seconds, baseline.seconds)]
    bytes_of_parameters = sum(p.numel() * p.element_size() for p in entry.parameters)
    return {
        "case": case,
        "threads": threads,
        "optimizer": entry.name,
        "parameters": sum(p.numel() for p in entry.parameters),
        "tensors": len(entry.parameters),
        "rounds": len(entry.seconds),
        "step_ms": round(1e3 * statistics.median(entry.seconds), 4),
        "step_ratio": round(statistics.median(ratios), 4),
        "step_ratio_quartiles": [round(ratio, 4) for ratio in statistics.quantiles(ratios, n=4)[::2]],
        "state_bytes": entry.state_bytes,
        "state_ratio": round(entry.state_bytes / baseline.state_bytes, 4),
        "extra_bytes": entry.extra_bytes,
        "extra_fraction": round(entry.extra_bytes / bytes_of_parameters, 6),
    }


def tables(rows: list[dict[str, Any]]) -> str:
    """For each number of threads the ratios of times; then what memory was taken."""
    names = list(dict.fromkeys(row["optimizer"] for row in rows))
    cases = list(dict.fromkeys(row["case"] for row in rows))
    found = {(row["threads"], row["optimizer"], row["case"]): row for row in rows}

    def part(threads: int, text: Callable[[dict[str, Any]], str]) -> str:
        cells = [
            [name, *(text(found[threads, name, case]) if (threads, name, case) in found else "" for case in cases)]
            for name in names
        ]
        return report.table(["", *cases], cells)

    threads = list(dict.fromkeys(row["threads"] for row in rows))
    timed = [
        f"Time of a step, ratio to fused AdamW, threads: {n}\n\n" + part(n, lambda row: f"{row['step_ratio']:.2f}")
        for n in threads
    ]
    memory = "State, ratio to AdamW's; peak of what a step takes besides, of the parameters' bytes\n\n"
    memory += part(threads[0], lambda row: f"{row['state_ratio']:.3f}; {row['extra_fraction']:.2%}")
    return "\n\n".join([*timed, memory])


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """The ratios of times on a logarithmic axis, a panel for each case, of the least number of threads."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    threads = min(row["threads"] for row in rows)
    cases = list(dict.fromkeys(row["case"] for row in rows))
    figure, panels = pyplot.subplots(len(cases), 1, figsize=(7, 1 + 1.5 * len(cases)), sharex=True, squeeze=False)
    for case, panel in zip(cases, panels[:, 0]):
        shown = [row for row in rows if (row["case"], row["threads"]) == (case, threads)][::-1]
        colors = ["C0" if row["optimizer"] in OURS else "0.75" for row in shown]
        bars = panel.barh([row["optimizer"] for row in shown], [row["step_ratio"] for row in shown], color=colors)
        panel.bar_label(bars, [f"{row['step_ratio']:.2f}" for row in shown], padding=2, fontsize=7)
        panel.axvline(1, color="black", linewidth=0.8)
        panel.set_xscale("log")
        panel.set_title(case, fontsize=9, loc="left")
        panel.tick_params(labelsize=7)
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1, 0].set_xlabel(f"time of a step / fused AdamW's, threads: {threads}")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> None:
    """Runs the benchmark, prints Markdown tables, and writes figures and a plot."""
    args = parse_arguments(argv)
    facts = report.environment(args.device)
    facts_line = ", ".join(f"{key} {value}" for key, value in facts.items())
    print(facts_line, flush=True)
    rows = []
    for name in args.cases:
        case = CASES[name]
        if args.quick:
            case = Case(case.millions / 100, case.dtype, case.peers)
        entries = contestants(case, args.device)
        threads_before = torch.get_num_threads()
        for number, threads in enumerate(args.threads):
            torch.set_num_threads(threads)
            if number == 0:
                warm_up(entries, args.device, 3 if args.quick else args.rounds, args.seconds)
            run(entries, args.device)
            rows += [figures(name, threads, entry, entries[0]) for entry in entries]
        torch.set_num_threads(threads_before)
        print(f"measured {name}", flush=True)
    report.write(args.output_dir / "step.json", {"environment": facts, "rows": rows})
    (args.output_dir / "step.md").write_text(f"{facts_line}\n\n{tables(rows)}\n")
    print(f"\n{tables(rows)}")
    plot(rows, args.output_dir / "step.png")


if __name__ == "__main__":
    main()
