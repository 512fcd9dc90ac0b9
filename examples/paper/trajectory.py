"""Figure 10 c: how far other optimizers' weights are from AdamW's at the same step, data and initial weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim import Optimizer

from adam_mini_plugins import AdamMini

from .frame import Case, Result, Verdict, flag, median, spread
from .llama import BETAS, LlamaExperiment, train
from .plots import WIDTH, band

OURS = "Adam-mini"


def _rivals() -> dict[str, Callable[[nn.Module, float], Optimizer]]:
    """The optimizers at one learning rate, without weight decay; momentum 0.9 where it isn't the default."""
    import pytorch_optimizer as library
    from transformers import Adafactor

    fixed = {"scale_parameter": False, "relative_step": False}
    return {
        "AdamW": lambda model, lr: torch.optim.AdamW(model.parameters(), lr=lr, betas=BETAS, weight_decay=0),
        OURS: lambda model, lr: AdamMini.for_model(model, lr=lr, betas=BETAS, weight_decay=0),
        "Adafactor": lambda model, lr: Adafactor(model.parameters(), lr=lr, beta1=BETAS[0], **fixed),
        "CAME": lambda model, lr: library.CAME(model.parameters(), lr=lr),
        "SM3": lambda model, lr: library.SM3(model.parameters(), lr=lr, momentum=BETAS[0]),
        "Lion": lambda model, lr: library.Lion(model.parameters(), lr=lr),
        "LAMB": lambda model, lr: library.Lamb(model.parameters(), lr=lr),
    }


@dataclass(frozen=True)
class Trajectory(LlamaExperiment):
    """The paper's: learning rate 1e-5 for all, constant. SM3's gradient sums never decay, so that it all but stops.

    Adafactor starts further off, as its momentum isn't corrected for starting at zero, but then comes closer than
    Adam-mini, likely because its averages over rows and over columns keep more of AdamW's v than one mean a block.
    CAME divides by the root of averages that aren't corrected either, so that its first steps are far larger.
    """

    name = "trajectory"
    shows = "Figure 10 c"
    claim = "Adam-mini stays closer to AdamW's path than other memory-efficient optimizers"

    steps: int = flag(200, "optimizer steps of a training")
    lr: float = flag(1e-5, "learning rate")
    checkpoints: int = flag(10, "how many weights are compared along a training")
    optimizers: tuple[str, ...] = flag((OURS, "Adafactor", "CAME", "SM3", "Lion", "LAMB"), "which are compared")

    def cases(self) -> list[Case]:
        """An optimizer a seed."""
        own = {"lr": self.lr, "checkpoints": self.checkpoints}
        return [{**self.base(seed), **own, "name": name} for seed in range(self.seeds) for name in self.optimizers]

    def measure(self, case: Case) -> dict[str, Any]:
        """At each checkpoint the distance to AdamW's weights, and AdamW's to where it started."""
        shared = tuple((key, value) for key, value in case.items() if key != "name")
        reference, weights = _adamw(shared), _path(case["name"], case)
        every = case["steps"] // case["checkpoints"]
        return {
            "step": [every * n for n in range(1, len(weights))],
            "distance": [(one - other).norm().item() for one, other in zip(weights[1:], reference[1:])],
            "travelled": [(one - reference[0]).norm().item() for one in reference[1:]],
        }

    def draw(self, results: Sequence[Result]) -> Figure:
        """Distances over steps."""
        figure, axes = plt.subplots(figsize=(WIDTH, 3.6), layout="constrained")
        for number, name in enumerate(self.optimizers):
            found = [result.found for result in results if result.case["name"] == name]
            style = {
                "color": f"C{(5, 3, 4, 0, 1, 2)[number % 6]}",
                "marker": "osD^vP"[number % 6],
                "ms": 4,
                "ls": ("-", "--", "-.", ":")[number % 4],
            }
            band(axes, found[0]["step"], [_relative(one) for one in found], name, **style)
        axes.set(title="Distance to AdamW's weights", xlabel="optimizer step", yscale="log")
        axes.set_ylabel("Euclidean, over the distance\nthat AdamW has gone")
        axes.grid(alpha=0.25)
        figure.legend(loc="outside lower center", frameon=False, ncols=6)
        return figure

    def judge(self, results: Sequence[Result]) -> Verdict:
        """Adam-mini's last distance is the least in every seed."""
        ends = {
            name: [_relative(result.found)[-1] for result in results if result.case["name"] == name]
            for name in self.optimizers
        }
        held = all(one < other for name in ends if name != OURS for one, other in zip(ends[OURS], ends[name]))
        said = ", ".join(f"{name} {spread(ends[name], '.2f')}" for name in sorted(ends, key=lambda n: median(ends[n])))
        return Verdict(held, f"distance to AdamW over the one that it has gone, after {self.steps} steps: {said}")


def _relative(found: dict[str, Any]) -> list[float]:
    return [distance / gone for distance, gone in zip(found["distance"], found["travelled"])]


@lru_cache(maxsize=1)
def _adamw(case: Iterable[tuple[str, Any]]) -> list[Tensor]:
    return _path("AdamW", dict(case))


def _path(name: str, case: Case) -> list[Tensor]:
    """All weights as a vector, at the start and at each checkpoint."""
    every, weights = case["steps"] // case["checkpoints"], []

    def keep(step: int, model: nn.Module) -> None:
        if step % every == 0:
            weights.append(nn.utils.parameters_to_vector(model.parameters()).detach().cpu().clone())

    train(lambda model: [_rivals()[name](model, case["lr"])], case, schedule="constant", watch=keep)
    return weights
