"""Times what comes before training: the import, beyond torch's own, and building the optimizer of Llama-2-7B.

    python examples/benchmarks/startup.py            # writes docs/startup.json, in about a minute
    python examples/benchmarks/startup.py --quick    # one round, a small model

Each import is in a process of its own, with bytecode compiled, as an install has it. The model is on the meta device:
building an optimizer reads shapes, modules and the config.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import report
import torch
from torch.optim import AdamW
from transformers import LlamaConfig, LlamaForCausalLM

from adam_mini_plugins import AdamMini

IMPORT = """
import time, torch
began = time.perf_counter()
import adam_mini_plugins
print(time.perf_counter() - began)
"""


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], formatter_class=formatter)
    parser.add_argument("--rounds", type=int, default=9, help="of each measurement")
    parser.add_argument("--output-dir", type=Path, default=Path("docs"), help="where startup.json goes")
    parser.add_argument("--quick", action="store_true", help="one round, a model of one layer")
    return parser.parse_args(argv)


def import_seconds(rounds: int) -> float:
    """The median time that importing the package takes once torch is imported."""
    with tempfile.TemporaryDirectory() as folder:
        env = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
        env["PYTHONPYCACHEPREFIX"] = folder

        def once() -> float:
            done = subprocess.run([sys.executable, "-c", IMPORT], env=env, capture_output=True, text=True, check=True)
            return float(done.stdout)

        once()  # writes the bytecode
        return statistics.median(once() for _ in range(rounds))


def seconds(act: Callable[[], Any], rounds: int) -> float:
    """The median time that something takes."""
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        act()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def main(argv: list[str] | None = None) -> None:
    """Runs the benchmark, prints a Markdown table and writes the figures."""
    args = parse_arguments(argv)
    rounds = 1 if args.quick else args.rounds
    sizes = {"vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 11_008, "num_attention_heads": 32}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1 if args.quick else 32))
    figures = {
        "import_seconds": import_seconds(rounds),
        "build_seconds": seconds(lambda: AdamMini.for_model(model), rounds),
        "build_adamw_seconds": seconds(lambda: AdamW(model.parameters()), rounds),
    }
    parameters = sum(p.numel() for p in model.parameters())
    facts = report.environment("cpu")
    print(", ".join(f"{key} {value}" for key, value in facts.items()), end="\n\n")
    named = {
        "import adam_mini_plugins, torch imported": figures["import_seconds"],
        f"AdamMini for {parameters / 1e9:.1f}B parameters": figures["build_seconds"],
        "AdamW for them": figures["build_adamw_seconds"],
    }
    print(report.table(["", "milliseconds"], [[name, f"{1e3 * value:.1f}"] for name, value in named.items()]))
    rounded = {name: round(value, 5) for name, value in figures.items()}
    report.write(args.output_dir / "startup.json", {"environment": facts, "parameters": parameters, **rounded})


if __name__ == "__main__":
    main()
