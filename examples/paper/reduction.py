"""Figure 15: the mean of the squared gradients of a block, against other numbers that could stand for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from adam_mini_plugins import AdamMini
from adam_mini_plugins.blocks import Layout

from .frame import Result, Verdict, flag, spread
from .llama import BETAS, WEIGHT_DECAY, Comparison, adamw


def _scattered(how: str) -> Callable[[Tensor, Tensor, int], Tensor]:
    def reduce(values: Tensor, index: Tensor, number: int) -> Tensor:
        return values.new_zeros(number).scatter_reduce_(0, index, values, how, include_self=False)

    return reduce


def _two_norm(values: Tensor, index: Tensor, number: int) -> Tensor:
    return _scattered("sum")(values.square(), index, number).sqrt()


REDUCTIONS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "mean": _scattered("mean"),
    "max": _scattered("amax"),
    "min": _scattered("amin"),
    "1-norm": _scattered("sum"),
    "2-norm": _two_norm,
}


class ReducedAdamMini(AdamMini):
    """Adam-mini with another number in place of the mean of a block's squared gradients, on one process.

    Args:
        *args: As for :class:`AdamMini`.
        reduction: A name from ``REDUCTIONS``; with ``"mean"`` it is Adam-mini.
        **options: As for :class:`AdamMini`.
    """

    def __init__(self, *args: Any, reduction: str, **options: Any) -> None:
        self.reduction = REDUCTIONS[reduction]
        super().__init__(*args, **options)

    def _planned(self, groups: Any, plans: Any) -> None:
        """Has every step find out what to do anew, which asks for the means of blocks."""

    def _reduced(self, groups: Any) -> tuple[dict[Tensor, Tensor], dict[Tensor, Any]]:
        grads, means = super()._reduced(groups)
        for group in groups:
            for p, blocks in zip(group["params"], group["blocks"]):
                if p.grad is not None:
                    means[p] = self._of_blocks(p.grad, Layout.parse(blocks))
        return grads, means

    def _of_blocks(self, grad: Tensor, layout: Layout) -> Tensor:
        index = layout.block_index(grad.shape).to(grad.device)
        values = self.reduction(grad.square().flatten(), index.expand(grad.shape).flatten(), layout.num_blocks)
        return values[index]


@dataclass(frozen=True)
class Reduction(Comparison):
    """The paper's blocks with each reduction. A norm grows with the block's size, so that its rate shrinks."""

    name = "reduction"
    shows = "Figure 15"
    claim = "the mean of a block's v trains better than its maximum, minimum, 1-norm or 2-norm"

    steps: int = flag(100, "optimizer steps of a training")
    reductions: tuple[str, ...] = flag(tuple(REDUCTIONS), "which of them, the one that is claimed to be best first")

    def names(self) -> tuple[str, ...]:
        """AdamW and the reductions."""
        return ("AdamW", *self.reductions)

    def build(self, name: str, model: nn.Module, lr: float) -> Optimizer:
        """AdamW, or Adam-mini with that reduction."""
        if name == "AdamW":
            return adamw(model, lr)
        return ReducedAdamMini.for_model(model, lr=lr, betas=BETAS, weight_decay=WEIGHT_DECAY, reduction=name)

    def judge(self, results: Sequence[Result]) -> Verdict:
        """Each at its best learning rate, the mean ends lowest in every seed."""
        best = {name: self.best(results, name) for name in self.names()}
        first, *others = self.reductions
        held = all(a < b for other in others for a, b in zip(best[first], best[other]))
        said = ", ".join(f"{name} {spread(losses, '.3f')}" for name, losses in best.items())
        return Verdict(held, f"loss after {self.steps} steps at the best of {len(self.lrs)} rates: {said}")
