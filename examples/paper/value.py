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
    """Trainings of several lengths with either partition. The paper sees the change near 10,000 steps."""

    name = "value"
    shows = "Appendix C.5"
    claim = "value as a whole is better in short trainings, by neuron in long ones"

    steps: int = flag(800, "steps of the longest training")
    lengths: int = flag(4, "how many lengths, each half of the one before")
    lr: float = flag(1e-3, "peak learning rate")

    def lasting(self) -> list[int]:
        """The lengths in steps, the shortest first."""
        return [self.steps // 2**n for n in reversed(range(self.lengths))]

    def cases(self) -> list[Case]:
        """A training a seed, a length and a choice."""
        return [
            {**self.base(seed), "steps": steps, "lr": self.lr, "name": name}
            for seed in range(self.seeds)
            for steps in self.lasting()
            for name in ("AdamW", BY_NEURON, WHOLE)
        ]

    def measure(self, case: Case) -> dict[str, Any]:
        """Losses and spikes."""
        return train(lambda model: [optimizer(case["name"], model, case["lr"])], case)

    def draw(self, results: Sequence[Result]) -> Figure:
        """The loss less AdamW's, over the number of steps."""
        figure, axes = plt.subplots(figsize=(WIDTH, 3.4), layout="constrained")
        for name, label, colour in ((BY_NEURON, "by neuron", "C5"), (WHOLE, "as a whole", "C3")):
            for number, steps in enumerate(self.lasting()):
                gap = self._gap(results, name, "AdamW", steps)
                middle = median(gap)
                error = [[middle - min(gap)], [max(gap) - middle]]
                style = {"color": colour, "marker": "o", "capsize": 3, "label": None if number else f"value {label}"}
                axes.errorbar(steps * (0.98 if name == WHOLE else 1.02), middle, error, **style)
        axes.axhline(0, color="black", lw=0.8, ls=":")
        axes.set(xscale="log", xlabel="steps of the training", ylabel="final loss less AdamW's (nats/token)")
        axes.set_xticks(self.lasting(), map(str, self.lasting()), minor=False)
        axes.minorticks_off()
        axes.set_title("Value by neuron and as a whole")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
        return figure

    def judge(self, results: Sequence[Result]) -> Verdict:
        """At the least number of steps the whole ends lower, at the most the neurons."""
        gaps = {steps: self._gap(results, BY_NEURON, WHOLE, steps) for steps in self.lasting()}
        held = median(gaps[self.lasting()[0]]) > 0 > median(gaps[self.lasting()[-1]])
        said = ", ".join(f"{spread(gap, '+.4f')} at {steps} steps" for steps, gap in gaps.items())
        return Verdict(held, f"loss by neuron less that as a whole: {said}")

    @staticmethod
    def _gap(results: Sequence[Result], name: str, base: str, steps: int) -> list[float]:
        found = {(r.case["name"], r.case["seed"]): last(r) for r in results if r.case["steps"] == steps}
        return [loss - found[base, seed] for (which, seed), loss in found.items() if which == name]
