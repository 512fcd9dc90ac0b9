"""Appendix C.5: the value projection by neuron for long trainings, as a whole for short ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from .frame import Case, Result, Verdict, flag, median, spread
from .llama import LlamaExperiment, last, train
from .partition import PAPER, optimizer
from .plots import WIDTH

BY_NEURON, WHOLE = PAPER, "value as a whole"


@dataclass(frozen=True)
class Value(LlamaExperiment):
    """Trainings of several lengths with either partition, each with a cosine of its own.

    The paper sees the change between 10,000 and 50,000 steps, far beyond these: what can be seen here is in which
    direction the difference goes as trainings grow longer.
    """

    name = "value"
    shows = "Appendix C.5"
    claim = "value as a whole is better in short trainings, by neuron in long ones"

    steps: int = flag(400, "steps of the longest training")
    lengths: int = flag(3, "how many lengths, each half of the one before")
    lr: float = flag(3e-3, "peak learning rate")

    def lasting(self) -> list[int]:
        """The lengths in steps, the shortest first."""
        return [self.steps // 2**n for n in reversed(range(self.lengths))]

    def cases(self) -> list[Case]:
        """A training a seed, a length and a choice."""
        return [
            {**self.base(seed), "steps": steps, "lr": self.lr, "name": name}
            for seed in range(self.seeds)
            for steps in self.lasting()
            for name in (BY_NEURON, WHOLE)
        ]

    def measure(self, case: Case) -> dict[str, Any]:
        """Losses and spikes."""
        return train(lambda model: [optimizer(case["name"], model, case["lr"])], case)

    def draw(self, results: Sequence[Result]) -> Figure:
        """The loss by neuron less that as a whole, over the number of steps."""
        figure, axes = plt.subplots(figsize=(WIDTH, 3.2), layout="constrained")
        gaps = [self._gap(results, steps) for steps in self.lasting()]
        middle = [median(gap) for gap in gaps]
        error = [[m - min(gap) for m, gap in zip(middle, gaps)], [max(gap) - m for m, gap in zip(middle, gaps)]]
        axes.errorbar(self.lasting(), middle, error, color="C0", marker="o", capsize=4, label="median and range")
        for steps, gap in zip(self.lasting(), gaps):
            axes.plot([steps] * len(gap), gap, "_", color="C5", ms=10, label=None if steps != self.steps else "a seed")
        axes.axhline(0, color="black", lw=0.8, ls=":")
        axes.set(xscale="log", xlabel="optimizer steps of the training", title="Value by neuron or as a whole")
        axes.set_ylabel("final loss by neuron less\nthat as a whole (nats/token)")
        axes.set_xticks(self.lasting(), map(str, self.lasting()), minor=False)
        axes.minorticks_off()
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
        return figure

    def judge(self, results: Sequence[Result]) -> Verdict:
        """At the least number of steps the whole ends lower, at the most the neurons."""
        gaps = {steps: self._gap(results, steps) for steps in self.lasting()}
        held = median(gaps[self.lasting()[0]]) > 0 > median(gaps[self.lasting()[-1]])
        said = ", ".join(f"{spread(gap, '+.4f')} at {steps} steps" for steps, gap in gaps.items())
        return Verdict(held, f"loss by neuron less that as a whole: {said}")

    @staticmethod
    def _gap(results: Sequence[Result], steps: int) -> list[float]:
        by_neuron, whole = (
            [last(r) for r in results if r.case["steps"] == steps and r.case["name"] == name]
            for name in (BY_NEURON, WHOLE)
        )
        return [one - other for one, other in zip(by_neuron, whole)]
