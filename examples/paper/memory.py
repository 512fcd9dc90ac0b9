"""Table 1: the bytes of optimizer state, from the shapes of the paper's own models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from adam_mini_plugins import partition
from adam_mini_plugins.planning import predict

from .frame import Case, Experiment, Result, Verdict, flag
from .plots import WIDTH

PAPER = {  # gigabytes of AdamW and of Adam-mini in the paper's Table 1
    "gpt2-xl": (12.48, 6.24),
    "tinyllama-1.1b": (8.80, 4.40),
    "llama-2-7b": (53.92, 26.96),
    "llama-2-13b": (104.16, 52.08),
}
CLOSE = 0.01  # how far a share may be from a half


@dataclass(frozen=True)
class Memory(Experiment):
    """What ``adam-mini plan`` says, float32, no weight loaded. The paper's Llama 2-1B has the size of TinyLlama."""

    name = "memory"
    shows = "Table 1"
    claim = "Adam-mini holds half of AdamW's optimizer state"

    models: tuple[str, ...] = flag(tuple(PAPER), "presets, names on the hub or config.json, as for adam-mini plan")

    def cases(self) -> list[Case]:
        """A model each."""
        return [{"model": model} for model in self.models]

    def measure(self, case: Case) -> dict[str, Any]:
        """Parameters, and bytes of state by optimizer."""
        from adam_mini_plugins.cli.sources import build  # with transformers

        model = build(case["model"])
        predictions = predict(model, partition(model))
        parameters = sum(p.numel() for p in model.parameters())
        return {"parameters": parameters, "state": {one.optimizer: one.state for one in predictions}}

    def draw(self, results: Sequence[Result]) -> Figure:
        """Bars beside each other, with the paper's figure as a mark."""
        figure, axes = plt.subplots(figsize=(WIDTH, 3.2), layout="constrained")
        for number, (optimizer, colour) in enumerate((("AdamW", "C0"), ("Adam-mini", "C5"))):
            sizes = [result.found["state"][optimizer] / 1e9 for result in results]
            places = [place + 0.38 * number for place in range(len(results))]
            bars = axes.bar(places, sizes, width=0.36, color=colour, label=optimizer)
            axes.bar_label(bars, [f"{size:.2f}" for size in sizes], padding=5, fontsize=8)
            known = [
                (place, PAPER[result.case["model"]][number])
                for place, result in zip(places, results)
                if result.case["model"] in PAPER
            ]
            axes.plot(*zip(*known), "k_", ms=22, label="the paper's figure" if number else None) if known else None
        names = [f"{result.case['model']}\n{result.found['parameters'] / 1e9:.2f}B parameters" for result in results]
        axes.set_xticks([place + 0.19 for place in range(len(results))], names)
        axes.set(title="Optimizer state, float32", ylabel="gigabytes ($10^9$ bytes)")
        axes.legend(frameon=False)
        return figure

    def judge(self, results: Sequence[Result]) -> Verdict:
        """A half, to a hundredth, for every model."""
        shares = {r.case["model"]: r.found["state"]["Adam-mini"] / r.found["state"]["AdamW"] for r in results}
        said = ", ".join(f"{model} {share:.2%}" for model, share in shares.items())
        return Verdict(all(abs(share - 0.5) < CLOSE for share in shares.values()), f"of AdamW's state: {said}")
