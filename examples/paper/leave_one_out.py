"""Figure 6: one tensor's rates, a rate an element in Adam, replaced by one rate that was searched for."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import nn
from torch.optim import Optimizer

from .frame import Case, Result, Verdict, flag, median, spread
from .llama import BETAS, LlamaExperiment, batches, last, train
from .plots import WIDTH

ON_PAR = 0.002  # of the loss
PARTS = tuple(f"self_attn.{part}_proj" for part in "qkvo") + tuple(
    f"mlp.{part}_proj" for part in ("gate", "up", "down")
)


@dataclass(frozen=True)
class LeaveOneOut(LlamaExperiment):
    """Adam for all tensors but one, which has momentum and one rate, under the same cosine.

    The one rate is searched on a grid of factors of Adam's first: the learning rate over the root mean square of the
    tensor's first gradient. One factor is chosen for all seeds, so that the search can't fit a seed's luck.
    """

    name = "leave-one-out"
    shows = "Figure 6"
    claim = "Adam with one searched rate for a left-out tensor is on par with Adam or better"

    steps: int = flag(150, "optimizer steps of a training")
    blocks: int = flag(3, "how many tensors are tried, chosen at random")
    lr: float = flag(3e-3, "Adam's peak learning rate")
    factors: tuple[float, ...] = flag((0.3, 1.0, 3.0, 10.0), "the grid")
    layers: int = flag(2, "layers of the model, to choose tensors from")

    def tensors(self) -> list[str]:
        """The tensors that are left out, one at a time."""
        names = [f"model.layers.{layer}.{part}.weight" for layer in range(self.layers) for part in PARTS]
        names += ["model.embed_tokens.weight", "lm_head.weight"]
        return random.Random(0).sample(names, self.blocks)

    def cases(self) -> list[Case]:
        """Adam, and each tensor with each factor, a seed."""
        tried = [("", 0.0), *((tensor, factor) for tensor in self.tensors() for factor in self.factors)]
        return [
            {**self.base(seed), "lr": self.lr, "tensor": tensor, "factor": factor}
            for seed in range(self.seeds)
            for tensor, factor in tried
        ]

    def measure(self, case: Case) -> dict[str, Any]:
        """Losses and spikes."""
        return train(lambda model: left_out(model, case), case)

    def draw(self, results: Sequence[Result]) -> Figure:
        """The final loss less Adam's over the factor, a line a tensor."""
        figure, axes = plt.subplots(figsize=(WIDTH, 3.6), layout="constrained")
        for number, tensor in enumerate(self.tensors()):
            gaps = [self._gap(results, tensor, factor) for factor in self.factors]
            middle = [median(gap) for gap in gaps]
            error = [[m - min(g) for m, g in zip(middle, gaps)], [max(g) - m for m, g in zip(middle, gaps)]]
            style = {
                "color": f"C{(0, 5, 3, 4, 2, 1)[number % 6]}",
                "marker": "osD^vP"[number % 6],
                "capsize": 3,
                "ls": ("-", "--", "-.", ":")[number % 4],
            }
            axes.errorbar(self.factors, middle, error, label=_short(tensor), **style)
        axes.axhline(0, color="black", lw=0.8, ls=":")
        axes.set(
            xscale="log", xlabel="the left-out tensor's rate, in units of Adam's first", title="One tensor left out"
        )
        axes.set_ylabel("final loss less Adam's (nats/token)")
        axes.set_xticks(self.factors, [f"{factor:g}" for factor in self.factors])
        axes.minorticks_off()
        axes.grid(alpha=0.25)
        figure.legend(loc="outside lower center", frameon=False, ncols=4)
        return figure

    def judge(self, results: Sequence[Result]) -> Verdict:
        """At its best factor, every left-out tensor ends no higher than Adam, to 0.2% of the loss."""
        adam = [last(r) for r in results if not r.case["tensor"]]
        gaps = {(t, f): self._gap(results, t, f) for t in self.tensors() for f in self.factors}
        best = [min((key for key in gaps if key[0] == t), key=lambda key: median(gaps[key])) for t in self.tensors()]
        held = all(median(gaps[key]) <= ON_PAR * median(adam) for key in best)
        said = ", ".join(f"{_short(tensor)} {spread(gaps[tensor, f], '+.3f')} at rate {f:g}" for tensor, f in best)
        return Verdict(held, f"Adam's loss {spread(adam, '.3f')}; at the best rate, less that: {said}")

    @staticmethod
    def _gap(results: Sequence[Result], tensor: str, factor: float) -> list[float]:
        adam = {r.case["seed"]: last(r) for r in results if not r.case["tensor"]}
        chosen = [r for r in results if (r.case["tensor"], r.case["factor"]) == (tensor, factor)]
        return [last(r) - adam[r.case["seed"]] for r in chosen]


def _short(tensor: str) -> str:
    """A tensor's name without what all have in common."""
    return ".".join(part for part in tensor.split(".") if part not in ("model", "self_attn", "mlp", "weight"))


def left_out(model: nn.Module, case: Case) -> list[Optimizer]:
    """Adam for all tensors but the one left out, and gradient descent with Adam's momentum for that."""
    parameters = dict(model.named_parameters())
    optimizers: list[Optimizer] = []
    if case["tensor"]:
        if case["tensor"] not in parameters:
            raise SystemExit(f"the model has no {case['tensor']}: --layers must be those of --size {case['size']}")
        tensor = parameters.pop(case["tensor"])
        batch = next(batches(case))
        (gradient,) = torch.autograd.grad(model(batch, labels=batch).loss, tensor)
        rate = case["factor"] * case["lr"] / gradient.square().mean().sqrt().item()
        optimizers.append(torch.optim.SGD([tensor], lr=rate, momentum=BETAS[0], dampening=1 - BETAS[0]))
    return [torch.optim.Adam(parameters.values(), lr=case["lr"], betas=BETAS), *optimizers]
