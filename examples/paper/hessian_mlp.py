"""Figure 3: the Hessian of a small MLP is close to block-diagonal, a block a neuron, all along its training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from adam_mini_plugins.hessian import hessian_of_rows

from .frame import Case, Experiment, Result, Verdict, flag, spread
from .plots import WIDTH, heat


@dataclass(frozen=True)
class HessianMLP(Experiment):
    """The MLP of the paper's appendix E.2, trained by Adam to tell two noisy points apart: its first layer."""

    name = "hessian-mlp"
    shows = "Figure 3"
    claim = "along training, the Hessian's mass lies inside the neurons' blocks"

    seeds: int = flag(5, "number of data sets and initial weights")
    inputs: int = flag(64, "inputs")
    width: int = flag(16, "neurons")
    samples: int = flag(100, "samples of both classes together")
    steps: int = flag(500, "steps of Adam; the Hessian is taken at the start, after 1, a half and all of them")
    lr: float = flag(1e-4, "learning rate")

    def cases(self) -> list[Case]:
        """A training a seed."""
        sizes = {"inputs": self.inputs, "width": self.width, "samples": self.samples}
        return [{**sizes, "steps": self.steps, "lr": self.lr, "seed": seed} for seed in range(self.seeds)]

    def measure(self, case: Case) -> dict[str, Any]:
        """At each of four steps: the mean absolute second derivative by pair of neurons, accuracy and loss."""
        generator = torch.Generator().manual_seed(case["seed"])
        x, y = _two_classes(case["samples"], case["inputs"], generator)
        torch.manual_seed(case["seed"])
        hidden = nn.Linear(case["inputs"], case["width"], bias=False, dtype=torch.float64)
        model = nn.Sequential(hidden, nn.Tanh(), nn.Linear(case["width"], 1, bias=False, dtype=torch.float64))
        optimizer = torch.optim.Adam(model.parameters(), lr=case["lr"])
        neurons = torch.arange(case["width"])[:, None]
        found: dict[str, Any] = {"step": sorted({0, 1, case["steps"] // 2, case["steps"]}), "coupling": []}
        found |= {"accuracy": [], "loss": []}
        for step in range(case["steps"] + 1):
            logits = model(x)[:, 0]
            loss = binary_cross_entropy_with_logits(logits, y)
            if step in found["step"]:
                mass = hessian_of_rows(binary_cross_entropy_with_logits(model(x)[:, 0], y), hidden.weight, neurons)
                found["coupling"].append((mass / case["inputs"] ** 2).tolist())
                found["accuracy"].append(((logits > 0) == (y > 0.5)).double().mean().item())
                found["loss"].append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return found

    def draw(self, results: Sequence[Result]) -> Figure:
        """The first seed's Hessian by pair of neurons at each step."""
        found = results[0].found
        figure, axes = plt.subplots(1, len(found["step"]), figsize=(WIDTH, 2.7), layout="constrained")
        for axis, step, coupling in zip(axes, found["step"], found["coupling"]):
            values = torch.tensor(coupling)
            image = heat(axis, (values / values.max()).clamp(min=1e-4).log10(), vmin=-4, vmax=0)
            axis.set(title=f"step {step}\n{inside(values):.0%} inside neurons", xlabel="neuron")
        axes[0].set_ylabel("neuron")
        figure.colorbar(image, ax=axes, label="log10 of |d2 loss| by pair\nof neurons, largest = 0", shrink=0.8)
        return figure

    def judge(self, results: Sequence[Result]) -> Verdict:
        """A pair inside a neuron holds more than one across, at each of the steps of every seed."""
        width = results[0].case["width"]
        shares = [[inside(torch.tensor(coupling)) for coupling in result.found["coupling"]] for result in results]
        held = all(share > 0.5 for seed in shares for share in seed)
        steps = results[0].found["step"]
        said = ", ".join(f"{spread(share, '.0%')} at step {step}" for step, share in zip(steps, zip(*shares)))
        accuracy = min(result.found["accuracy"][-1] for result in results)
        return Verdict(
            held,
            f"share of the mass inside neurons {said}, where {1 / width:.1%} would lie without structure; accuracy at "
            f"the end at least {accuracy:.0%}",
        )


def inside(mass: Tensor) -> float:
    """The share of a matrix's sum that is on its diagonal."""
    return (mass.diagonal().sum() / mass.sum()).item()


def _two_classes(samples: int, inputs: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Normal clouds of deviation 0.5 around two random points of the cube of side 10."""
    y = torch.arange(samples) % 2
    centres = 10 * torch.rand(2, inputs, generator=generator, dtype=torch.float64)
    noise = torch.randn(samples, inputs, generator=generator, dtype=torch.float64)
    return centres[y] + 0.5 * noise, y.double()
