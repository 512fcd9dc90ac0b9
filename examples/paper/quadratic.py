"""Figure 4: on a quadratic with three dense blocks, one good rate a block beats a rate for each coordinate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor

from .frame import Case, Experiment, Result, Verdict, flag, spread
from .plots import WIDTH, band, heat
from .spectra import adam_preconditioner, eigenvalues

CHOICES = ((1.0, 2.0, 3.0), (99.0, 100.0, 101.0), (4998.0, 4999.0, 5000.0))  # of each block's eigenvalues
TITLES = {"single": "one optimal rate", "adam": "Adam", "blockwise": "optimal rate a block"}
LINES = {"single": {"color": "C2", "ls": "-."}, "adam": {"color": "C0"}, "blockwise": {"color": "C5", "ls": "--"}}
BLOCKS = range(1, len(CHOICES) + 1)
FLOOR = 1e-12  # of the relative loss in the picture


@dataclass(frozen=True)
class Quadratic(Experiment):
    """The quadratic of the paper's appendix E.2.

    Adam has beta1 = 0 and beta2 = 1, as there: its ``v`` is the square of the first gradient. All three methods have
    the optimal constant rate, ``2 / (largest + smallest)`` eigenvalue, Adam's of its preconditioned Hessian.
    Where a coordinate's first gradient happens to be next to nothing, its rate is huge for good, and all others are
    small: that is what spreads Adam's curves.
    """

    name = "quadratic"
    shows = "Figure 4"
    claim = "optimal rates a block beat Adam, and inside each block one optimal rate does"

    seeds: int = flag(10, "number of random problems")
    steps: int = flag(1000, "gradient steps")
    size: int = flag(30, "coordinates a block")

    def cases(self) -> list[Case]:
        """A problem a seed."""
        return [{"size": self.size, "steps": self.steps, "seed": seed} for seed in range(self.seeds)]

    def measure(self, case: Case) -> dict[str, Any]:
        """Of each problem and method the contraction of a step, and the loss over that at the start."""
        generator = torch.Generator().manual_seed(case["seed"])
        blocks = [_random_block(choice, case["size"], generator) for choice in CHOICES]
        start = torch.randn(len(CHOICES) * case["size"], generator=generator, dtype=torch.float64)
        steps = _shown(case["steps"])
        found: dict[str, Any] = {"steps": steps}
        blockwise = torch.cat([_optimal(block) for block in blocks])
        problems = {"whole": (torch.block_diag(*blocks), start)}
        problems |= {f"block {n}": pair for n, pair in enumerate(zip(blocks, start.split(case["size"])), 1)}
        for name, (hessian, at) in problems.items():
            rates = {"single": _optimal(hessian), "adam": _optimal(hessian, adam_preconditioner(hessian @ at))}
            if name == "whole":
                rates["blockwise"] = blockwise
            found[name] = {method: _descend(hessian, rate, at, steps) for method, rate in rates.items()}
        return found

    def draw(self, results: Sequence[Result]) -> Figure:
        """The Hessian and the training curves, of the whole and of each block."""
        figure = plt.figure(figsize=(WIDTH, 5.6), layout="constrained")
        top, bottom = figure.subfigures(2, 1)
        axes = dict(zip(("hessian", "whole"), top.subplots(1, 2)))
        axes |= zip((f"block {n}" for n in BLOCKS), bottom.subplots(1, len(BLOCKS), sharey=True))
        generator = torch.Generator().manual_seed(results[0].case["seed"])
        blocks = [_random_block(choice, results[0].case["size"], generator) for choice in CHOICES]
        hessian = torch.block_diag(*blocks).abs()
        image = heat(axes["hessian"], hessian.clamp(min=1e-2).log10())
        figure.colorbar(image, ax=axes["hessian"], label="log10 of the absolute value")
        axes["hessian"].set(title="Hessian", xlabel="coordinate", ylabel="coordinate")
        for name, axis in axes.items():
            if name == "hessian":
                continue
            for method in results[0].found[name]:
                curves = [[max(v, FLOOR) for v in r.found[name][method]["loss"]] for r in results]
                band(axis, [s + 1 for s in results[0].found["steps"]], curves, TITLES[method], **LINES[method])
            axis.set(xscale="log", yscale="log", title=f"Loss, {'whole problem' if name == 'whole' else name}")
            axis.set(xlabel="step + 1", ylim=(FLOOR / 3, 3))
            axis.grid(alpha=0.25)
        for name in ("whole", "block 1"):
            axes[name].set_ylabel(f"loss / loss at the start,\nnone below {FLOOR:g} shown")
        figure.legend(*axes["whole"].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
        return figure

    def judge(self, results: Sequence[Result]) -> Verdict:
        """Slower contraction and higher loss at the end of what is said to be worse, in every problem of every seed."""

        def ahead(result: Result, problem: str, better: str, worse: str) -> bool:
            one, other = (result.found[problem][method] for method in (better, worse))
            return one["contraction"] < other["contraction"] and one["loss"][-1] <= other["loss"][-1]

        claimed = [("whole", "blockwise", "adam"), *((f"block {n}", "single", "adam") for n in BLOCKS)]
        held = all(ahead(result, *order) for result in results for order in claimed)
        said = {
            name: spread((r.found[problem][method]["contraction"] for r in results), ".4f")
            for name, problem, method in (
                ("Adam", "whole", "adam"),
                ("rates a block", "whole", "blockwise"),
                ("Adam in block 1", "block 1", "adam"),
                ("one rate there", "block 1", "single"),
            )
        }
        line = ", ".join(f"{name} {figures}" for name, figures in said.items())
        also = sum(ahead(result, "whole", "adam", "single") for result in results)
        return Verdict(
            held,
            f"{'in' if held else 'not in'} all of {len(results)} seeds; share of the error that a step leaves: {line}. "
            f"On the whole Adam beats one rate in {also} of {len(results)}",
        )


def _random_block(choice: tuple[float, ...], size: int, generator: torch.Generator) -> Tensor:
    """A dense positive definite matrix whose eigenvalues are drawn from a few."""
    values = torch.tensor(choice, dtype=torch.float64)[torch.randint(len(choice), (size,), generator=generator)]
    basis, triangle = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    basis = basis * triangle.diagonal().sign()  # uniform over rotations
    return basis * values @ basis.T


def _optimal(hessian: Tensor, shape: Tensor | None = None) -> Tensor:
    """Rates of a given shape, by default all equal, at the scale that contracts the most."""
    shape = torch.ones(len(hessian), dtype=hessian.dtype) if shape is None else shape
    values = eigenvalues(hessian, shape)
    return shape * 2 / (values[0] + values[-1])


def _descend(hessian: Tensor, rates: Tensor, start: Tensor, steps: Sequence[int]) -> dict[str, Any]:
    """The factor by which a step shrinks the error at least, and the relative loss after so many steps."""
    values = eigenvalues(hessian, rates)
    at, losses = start.clone(), []
    for step in range(steps[-1] + 1):
        if step in steps:
            losses.append((at @ hessian @ at).item())
        at -= rates * (hessian @ at)
    return {"contraction": (1 - values).abs().max().item(), "loss": [loss / losses[0] for loss in losses]}


def _shown(steps: int) -> list[int]:
    """Some twenty steps a power of ten, from 0 to the last."""
    return sorted({0, steps, *(round(10 ** (k / 20)) for k in range(1, 200) if 10 ** (k / 20) < steps)})
