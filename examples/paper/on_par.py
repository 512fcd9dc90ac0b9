"""What the rows of Table 6 have in common: the same training with AdamW and with Adam-mini, and held-out scores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from adam_mini_plugins import AdamMini

from .frame import Case, Experiment, Result, Verdict, flag, median, spread
from .plots import WIDTH, band

ADAMW, OURS = "AdamW", "Adam-mini"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EVALUATIONS, WARMUP = 10, 0.05


class Task(ABC):
    """A model with its data; hyper-parameters are chosen for AdamW and are Adam-mini's too."""

    metric: ClassVar[str]  # as an axis says it
    sign: ClassVar[int]  # +1 where more is better, -1 where less is
    lr: ClassVar[float]
    weight_decay: ClassVar[float] = 0.01

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.batches = torch.Generator().manual_seed(seed)
        self.model = self.build().to(DEVICE)

    @abstractmethod
    def build(self) -> nn.Module:
        """The model with its initial weights."""

    @abstractmethod
    def loss(self) -> Tensor:
        """Of the next batch."""

    @abstractmethod
    def score(self) -> float:
        """Of what was held out, in evaluation mode."""


@dataclass(frozen=True)
class OnPar(Experiment):
    """Trains each model with both optimizers, everything else being the same; cosine schedule after a short rise."""

    shows = "Table 6"
    tasks: ClassVar[dict[str, type[Task]]]

    seeds: int = flag(3, "number of initial weights and orders of the data")
    steps: int = flag(200, "optimizer steps of a training")

    def cases(self) -> list[Case]:
        """A training a seed, a model and an optimizer."""
        return [
            {"model": model, "name": name, "steps": self.steps, "seed": seed}
            for seed in range(self.seeds)
            for model in self.tasks
            for name in (ADAMW, OURS)
        ]

    def measure(self, case: Case) -> dict[str, Any]:
        """Held-out scores along the training."""
        from transformers import get_cosine_schedule_with_warmup

        task, steps = self.tasks[case["model"]](case["seed"]), case["steps"]
        given: dict[str, Any] = {"lr": task.lr, "weight_decay": task.weight_decay}
        optimizer: Optimizer
        if case["name"] == ADAMW:
            optimizer = AdamW(task.model.parameters(), **given)
        else:
            optimizer = AdamMini.for_model(task.model, **given)
        schedule = get_cosine_schedule_with_warmup(optimizer, round(WARMUP * steps), steps)
        found: dict[str, list[float]] = {"step": [], "score": []}
        for step in range(1, steps + 1):
            task.model.train()
            task.loss().backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if step % max(1, steps // EVALUATIONS) == 0 or step == steps:
                task.model.eval()
                with torch.no_grad():
                    found["score"].append(task.score())
                found["step"].append(step)
        return found

    def draw(self, results: Sequence[Result]) -> Figure:
        """Scores over steps, a panel a model."""
        size = (WIDTH, 3.2)
        figure, axes = plt.subplots(1, len(self.tasks), figsize=size, layout="constrained", squeeze=False)
        for axis, (model, task) in zip(axes[0], self.tasks.items()):
            for name, style in ((ADAMW, {"color": "C0", "ls": "--"}), (OURS, {"color": "C5"})):
                found = [r.found for r in results if r.case["model"] == model and r.case["name"] == name]
                band(axis, found[0]["step"], [one["score"] for one in found], name, **style)
            axis.set(title=model, xlabel="optimizer step", ylabel=task.metric)
            # From what the worst has after a quarter of the steps: what comes before would hide the rest.
            early = [
                task.sign * r.found["score"][len(r.found["score"]) // 4] for r in results if r.case["model"] == model
            ]
            axis.set_ylim(**{"bottom" if task.sign > 0 else "top": task.sign * min(early)})
            axis.grid(alpha=0.25)
        axes[0][0].legend(frameon=False)
        return figure

    def judge(self, results: Sequence[Result]) -> Verdict:
        """Of each model the median difference of the last scores is no worse than AdamW's seeds differ."""
        said, held = [], True
        for model, task in self.tasks.items():
            ends = {
                name: [r.found["score"][-1] for r in results if r.case["model"] == model and r.case["name"] == name]
                for name in (ADAMW, OURS)
            }
            gap = [ours - adamw for adamw, ours in zip(ends[ADAMW], ends[OURS])]
            between = max(ends[ADAMW]) - min(ends[ADAMW])
            worse = -task.sign * median(gap)
            held = held and worse <= between
            said.append(
                f"{model} {task.metric}: AdamW {spread(ends[ADAMW], '.4g')}, Adam-mini {spread(ends[OURS], '.4g')}, "
                f"difference by seed {spread(gap, '+.2g')} where AdamW's seeds differ by {between:.2g}"
            )
        return Verdict(held, "; ".join(said))
