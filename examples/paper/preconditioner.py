"""Figure 5: Adam's preconditioner helps where a block is close to diagonal, and harms where it is dense."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor

from .frame import Case, Experiment, Result, Verdict, flag, median, spread
from .plots import WIDTH
from .spectra import adam_preconditioner, condition

BINS = 10  # of tau, from 0 to 1
FALLS = -0.9  # the rank correlation over bins at which r is said to fall


@dataclass(frozen=True)
class Preconditioner(Experiment):
    """The random matrices of the paper's appendix E.2.

    A matrix has the eigenvalues ``(kappa, 1, ..., 1)`` and a basis that turns in all planes have made, by a fraction
    of random angles: 0 is diagonal. The fractions are cubes, so that there are matrices of every tau. Medians, where
    the paper has means: ``1 / |x|`` for a normal ``x``, which the condition number is made of, has no finite mean.

    Among dense matrices tau does not decide: turned by the full angles the basis is uneven again (few coordinates
    have all of the first eigenvector), tau is a little higher and r the highest. A bin holds matrices of both kinds.
    """

    name = "preconditioner"
    shows = "Figure 5"
    claim = "r = kappa(D_Adam H) / kappa(H) falls as tau, the share of the diagonal, rises"

    seeds: int = flag(3, "number of sets of angles and points")
    dimensions: tuple[int, ...] = flag((10, 20, 50, 100), "dimensions, at the first condition number")
    kappas: tuple[float, ...] = flag(
        (500.0, 10.0, 100.0, 1000.0), "condition numbers; all but the first at --dimension"
    )
    dimension: int = flag(50, "dimension for the other condition numbers")
    angles: int = flag(4, "sets of angles a seed (the paper: 40)")
    fractions: int = flag(30, "fractions of the angles (the paper: 50)")
    points: int = flag(6, "points that Adam's v is taken at (the paper: 100)")

    def cases(self) -> list[Case]:
        """A family of matrices a dimension, a condition number and a seed."""
        sizes = {"angles": self.angles, "fractions": self.fractions, "points": self.points}
        pairs = [(d, self.kappas[0]) for d in self.dimensions]
        pairs += [(self.dimension, kappa) for kappa in self.kappas if (self.dimension, kappa) not in pairs]
        return [{"d": d, "kappa": kappa, **sizes, "seed": seed} for d, kappa in pairs for seed in range(self.seeds)]

    def measure(self, case: Case) -> dict[str, Any]:
        """Of each fraction, from the diagonal matrix on, the median of tau and r."""
        d, kappa = case["d"], case["kappa"]
        generator = torch.Generator().manual_seed(case["seed"])
        uniform = torch.rand(case["angles"], d, d, generator=generator, dtype=torch.float64)
        theta = (uniform - 0.5) * math.pi
        x = torch.randn(case["angles"], case["points"], d, generator=generator, dtype=torch.float64)
        taus, ratios = [], []
        for step in range(case["fractions"] + 1):
            first = rotation(theta * (step / case["fractions"]) ** 3)[:, :, 0]
            # Q diag(kappa, 1, ..., 1) Q^T, with one eigenvalue apart from the rest.
            hessian = torch.eye(d, dtype=torch.float64) + (kappa - 1) * first[:, :, None] * first[:, None, :]
            share = hessian.diagonal(dim1=1, dim2=2).abs().sum(1) / hessian.abs().sum((1, 2))
            gradient = x @ hessian
            ratio = condition(hessian[:, None], adam_preconditioner(gradient)) / kappa
            taus.append(share.median().item())
            ratios.append(ratio.median().item())
        return {"tau": taus, "r": ratios}

    def draw(self, results: Sequence[Result]) -> Figure:
        """The ratio over tau, a line a dimension and a line a condition number."""
        figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.6), sharey=True, layout="constrained")
        panels = (
            (axes[0], "d", "kappa", self.kappas[0], f"Dimension d, at kappa(H) = {self.kappas[0]:g}", "d = {:g}"),
            (axes[1], "kappa", "d", self.dimension, f"Condition number, at d = {self.dimension}", "kappa(H) = {:g}"),
        )
        for axis, varied, fixed, value, title, label in panels:
            family = _settings(result for result in results if result.case[fixed] == value)
            for number, members in enumerate(family[setting] for setting in sorted(family)):
                style = {"color": f"C{(0, 5, 3, 4, 2, 1)[number % 6]}", "marker": "osD^vP"[number % 6]}
                name = label.format(members[0].case[varied])
                axis.plot(*zip(*_binned(members)), label=name, lw=1.6, ms=5, **style)
                for member in members:
                    axis.plot(member.found["tau"], member.found["r"], ls="", ms=2, alpha=0.4, **style)
            axis.axhline(1, color="black", lw=0.8, ls=":")
            axis.set(yscale="log", title=title, xlabel="tau, the diagonal's share of H (1: diagonal)")
            axis.grid(alpha=0.25)
            axis.legend(frameon=False, fontsize=8, ncols=2)
        axes[0].set_ylabel("r = kappa(D H) / kappa(H)")
        return figure

    def judge(self, results: Sequence[Result]) -> Verdict:
        """The rank correlation of tau and r over bins of tau: below the bound for most families, as the paper says."""
        families = {setting: _binned(members) for setting, members in _settings(results).items()}
        falls = {setting: _rank_correlation(pairs) for setting, pairs in families.items()}
        others = [f"d {d} kappa {kappa:g}: {value:.2f}" for (d, kappa), value in falls.items() if value > FALLS]
        fallen = len(falls) - len(others)
        held = 2 * fallen > len(falls)
        dense, diagonal = (spread(pairs[at][1] for pairs in families.values()) for at in (0, -1))
        line = f"rank correlation of r and tau {FALLS} or less in {fallen} of {len(falls)} families"
        line += f" (not in {', '.join(others)})" if others else ""
        return Verdict(held, f"{line}; r is {dense} where tau is least, {diagonal} where H is diagonal")


def rotation(theta: Tensor) -> Tensor:
    """The product of rotations in all planes ``i < j``, each taking the rows that the ones before have left.

    Args:
        theta: (n, d, d), the angles in radians; those with ``i < j`` count.

    Returns:
        (n, d, d), orthogonal.
    """
    number, d, _ = theta.shape
    basis = torch.eye(d, dtype=theta.dtype).repeat(number, 1, 1)
    cos, sin = theta.cos()[..., None], theta.sin()[..., None]
    for i in range(d):
        for j in range(i + 1, d):
            one, other = basis[:, i].clone(), basis[:, j].clone()
            basis[:, i] = cos[:, i, j] * one + sin[:, i, j] * other
            basis[:, j] = cos[:, i, j] * other - sin[:, i, j] * one
    return basis


def _settings(results: Iterable[Result]) -> dict[tuple[int, float], list[Result]]:
    """The results of all seeds by dimension and condition number."""
    found: dict[tuple[int, float], list[Result]] = {}
    for result in results:
        found.setdefault((result.case["d"], result.case["kappa"]), []).append(result)
    return found


def _binned(results: Sequence[Result]) -> list[tuple[float, float]]:
    """Median tau and r of the bins of tau that aren't empty."""
    bins: dict[int, list[tuple[float, float]]] = {}
    for result in results:
        for tau, ratio in zip(result.found["tau"], result.found["r"]):
            bins.setdefault(min(int(tau * BINS), BINS - 1), []).append((tau, ratio))
    return [(median(tau for tau, _ in bins[n]), median(ratio for _, ratio in bins[n])) for n in sorted(bins)]


def _rank_correlation(pairs: Sequence[tuple[float, float]]) -> float:
    """Spearman's, of values without ties."""
    return torch.corrcoef(torch.tensor(pairs).T.argsort(1).argsort(1).double())[0, 1].item()
