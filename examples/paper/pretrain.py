"""Figures 9, 10 and 12 b: AdamW, Adam-mini and its rivals at rates that were tuned alike; betas and eps changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn
from torch.optim import Optimizer

from adam_mini_plugins import AdamMini

from .frame import Case, Result, Verdict, flag, median
from .llama import BETAS, WEIGHT_DECAY, LlamaExperiment, last, point, train
from .plots import WIDTH, band

OURS, REFERENCE = "Adam-mini", "AdamW"
ON_PAR = 0.005  # of the loss
EPS = 1e-8
# The customary rate of each, as a multiple of AdamW's.
CUSTOMARY = {REFERENCE: 1.0, OURS: 1.0, "Adafactor": 1.0, "CAME": 1.0, "SM3": 20.0, "Lion": 0.2, "LAMB": 2.0}
STYLES = {
    name: {"color": f"C{(0, 5, 3, 4, 2, 1, 6)[n]}", "ls": ("-", "--", "-.", ":")[n % 4]}
    for n, name in enumerate(CUSTOMARY)
}


def build(case: Case, model: nn.Module) -> Optimizer:
    """A case's optimizer; what isn't AdamW or Adam-mini has its library's own betas, but momentum 0.9 throughout."""
    import pytorch_optimizer as library
    from transformers import Adafactor

    lr, parameters = case["lr"], model.parameters()
    decay = {"lr": lr, "weight_decay": WEIGHT_DECAY}
    fixed = {"scale_parameter": False, "relative_step": False}

    def adams() -> dict[str, Any]:
        return {**decay, "betas": (case["beta1"], case["beta2"]), "eps": case["eps"]}

    builders: dict[str, Callable[[], Optimizer]] = {
        REFERENCE: lambda: torch.optim.AdamW(parameters, **adams()),
        OURS: lambda: AdamMini.for_model(model, **adams()),
        "Adafactor": lambda: Adafactor(parameters, beta1=BETAS[0], **decay, **fixed),
        "CAME": lambda: library.CAME(parameters, **decay),
        "SM3": lambda: library.SM3(parameters, lr=lr, momentum=BETAS[0]),
        "Lion": lambda: library.Lion(parameters, **decay),
        "LAMB": lambda: library.Lamb(parameters, **decay),
    }
    return builders[case["name"]]()


@dataclass(frozen=True)
class Pretrain(LlamaExperiment):
    """Each optimizer has the same number of rates around its customary one, with all seeds; the best median counts.

    AdamW and Adam-mini also have their betas and eps changed, one at a time, at the customary rate. The paper's 39M
    with 100M tokens, where a GPU is at hand: ``--size 39M --lr 6e-4 --steps 800 --dataset FOLDER``.
    """

    name = "pretrain"
    shows = "Figures 9, 10, 12 b, Table 5"
    claim = "Adam-mini is on par with AdamW, better than the other memory-efficient optimizers, and not more sensitive"

    size: str = flag("mini", "the model: mini, tiny, or one of examples/pretrain.py's (demo, 39M, 67M, ...)")
    steps: int = flag(200, "optimizer steps of a training")
    lr: float = flag(5e-3, "AdamW's customary peak rate; the others' are fixed multiples of it")
    factors: tuple[float, ...] = flag(
        (0.16, 0.4, 1.0, 2.5, 6.25), "the rates that are tried, in units of the customary one"
    )
    optimizers: tuple[str, ...] = flag(tuple(CUSTOMARY), "which are trained; AdamW and Adam-mini always are")
    beta1s: tuple[float, ...] = flag((0.8,), "tried besides 0.9")
    beta2s: tuple[float, ...] = flag((0.9, 0.999), "tried besides 0.95")
    epsilons: tuple[float, ...] = flag((1e-6,), "tried besides 1e-8")

    def names(self) -> list[str]:
        """The optimizers, AdamW and Adam-mini first."""
        if unknown := set(self.optimizers) - CUSTOMARY.keys():
            raise SystemExit(f"--optimizers {' '.join(sorted(unknown))}: choose from {', '.join(CUSTOMARY)}")
        return [name for name in CUSTOMARY if name in {REFERENCE, OURS, *self.optimizers}]

    def tried(self, name: str) -> list[Case]:
        """An optimizer at each of its rates, the customary betas and eps where it has them."""
        adams = {"beta1": BETAS[0], "beta2": BETAS[1], "eps": EPS} if name in (REFERENCE, OURS) else {}
        return [{"name": name, "lr": float(f"{self.lr * CUSTOMARY[name] * f:.3g}"), **adams} for f in self.factors]

    def changed(self, name: str) -> dict[str, Case]:
        """AdamW or Adam-mini with one thing changed at a time, by what it is; the first is as it was."""
        settings = [("lr", case["lr"]) for case in self.tried(name)]
        settings += [(key, x) for key, xs in zip(("beta1", "beta2", "eps"), self._others()) for x in xs]
        base = {**self.tried(name)[0], "lr": self.lr}
        return {f"{key} {value:g}": {**base, key: value} for key, value in settings}

    def cases(self) -> list[Case]:
        """A training a seed, an optimizer and a setting."""
        settings = [case for name in self.names() for case in self.tried(name)]
        settings += [case for name in (REFERENCE, OURS) for case in self.changed(name).values()]
        apart = [case for number, case in enumerate(settings) if case not in settings[:number]]
        return [{**self.base(seed), **case} for seed in range(self.seeds) for case in apart]

    def measure(self, case: Case) -> dict[str, Any]:
        """Losses and spikes."""
        return train(lambda model: [build(case, model)], case)

    def draw(self, results: Sequence[Result]) -> Figure:
        """Validation losses at the best rates; beside them, what a change of a setting does."""
        figure, (curves, settings) = plt.subplots(1, 2, figsize=(WIDTH, 4), width_ratios=(1.1, 1), layout="constrained")
        for name in sorted(self.names(), key=lambda name: median(self._best(results, name)[1])):
            best, finals = self._best(results, name)
            found = [r.found["validation"][1:] for r in results if best.items() <= r.case.items()]
            losses = [[point(loss) for _, loss in one] for one in found]
            label = f"{name}, lr {best['lr']:g}: {median(finals):.3f}"
            band(curves, [step for step, _ in found[0]], losses, label, **STYLES[name])
        curves.set(title="At the best of the rates", xlabel="optimizer step", ylabel="validation loss (nats/token)")
        curves.legend(frameon=False, fontsize=7.5)
        curves.grid(alpha=0.25)
        for shift, name, marker in ((-0.13, REFERENCE, "o"), (0.13, OURS, "s")):
            self._dots(settings, results, name, shift, marker)
        labels = list(self.changed(OURS))
        settings.set_yticks(range(len(labels)), labels)
        settings.invert_yaxis()
        settings.set(title="One setting changed", xlabel="final loss (nats/token)")
        settings.legend(frameon=False, fontsize=8, loc="lower right")
        settings.grid(alpha=0.25)
        return figure

    def judge(self, results: Sequence[Result]) -> Verdict:
        """At the best medians Adam-mini is at most 0.5% above AdamW and below all others; its range is no wider."""
        best = {name: median(self._best(results, name)[1]) for name in self.names()}
        ranges = {}
        for name in (REFERENCE, OURS):
            medians = [median(self._finals(results, case)) for case in self.changed(name).values()]
            ranges[name] = max(medians) - min(medians)
        par = best[OURS] <= (1 + ON_PAR) * best[REFERENCE]
        beaten = all(best[OURS] <= best[name] for name in best if name != REFERENCE)
        order = ", ".join(
            f"{name} {best[name]:.3f}{'*' if self._at_edge(results, name) else ''}"
            for name in sorted(best, key=best.get)
        )
        wide = ", ".join(f"{name} {width:.2f}" for name, width in ranges.items())
        line = f"loss after {self.steps} steps at the best of {len(self.factors)} rates (* an outermost one): {order}"
        return Verdict(par and beaten and ranges[OURS] <= ranges[REFERENCE], f"{line}; range over settings: {wide}")

    def _others(self) -> tuple[tuple[float, ...], ...]:
        return self.beta1s, self.beta2s, self.epsilons

    def _dots(self, axes: Axes, results: Sequence[Result], name: str, shift: float, marker: str) -> None:
        for number, case in enumerate(self.changed(name).values()):
            finals = self._finals(results, case)
            middle = median(finals)
            error = [[middle - min(finals)], [max(finals) - middle]]
            style = {"color": STYLES[name]["color"], "marker": marker, "capsize": 3, "ls": "none"}
            axes.errorbar(middle, number + shift, xerr=error, label=None if number else name, **style)

    def _best(self, results: Sequence[Result], name: str) -> tuple[Case, list[float]]:
        tried = [(case, self._finals(results, case)) for case in self.tried(name)]
        return min(tried, key=lambda pair: median(pair[1]))

    def _at_edge(self, results: Sequence[Result], name: str) -> bool:
        rates = [case["lr"] for case in self.tried(name)]
        return len(rates) > 1 and self._best(results, name)[0]["lr"] in (min(rates), max(rates))

    @staticmethod
    def _finals(results: Sequence[Result], case: Case) -> list[float]:
        return [last(r) for r in results if case.items() <= r.case.items()]
