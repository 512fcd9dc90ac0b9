"""What the benchmarks share: the machine that figures hold for, Markdown tables, peak memory, and the clock."""

from __future__ import annotations

import json
import os
import platform
import re
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler writes when it starts and stops

import torch
from torch.autograd.profiler_util import MEMORY_EVENT_NAME
from torch.profiler import ProfilerActivity, profile

PACKAGES = ("torch", "adam-mini-plugins", "transformers", "adam-mini", "pytorch-optimizer", "torchao")


def default_device() -> str:
    """The accelerator, where there is one."""
    return str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else "cpu"


def environment(device: str) -> dict[str, Any]:
    """The machine and the versions that figures hold for."""
    info = Path("/proc/cpuinfo")
    cpus = re.findall(r"model name\s*: (.+)", info.read_text()) if info.exists() else []
    gpus = [torch.cuda.get_device_name()] if device.startswith("cuda") else []
    facts = {"machine": (gpus + cpus + [platform.machine()])[0], "cores": os.cpu_count()}
    facts["python"] = platform.python_version()
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            continue
    return facts


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, the first column to the left and all others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write(path: Path, figures: dict[str, Any]) -> None:
    """Writes figures as JSON, the folder included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures, indent=1) + "\n")


def now(device: str) -> float:
    """The time, once all that was started before is done."""
    if device != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def peak_bytes(act: Callable[[], Any], device: str) -> int:
    """The most bytes that are held at once during an act beyond those held before it."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        act()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        act()
    # The raw events, every allocation and release: the profiler's tables hold net amounts, which have no peak.
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == MEMORY_EVENT_NAME]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
