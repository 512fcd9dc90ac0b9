"""Figures 8 and 9: heads and neurons against one block a tensor, and against one block for the embedding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from adam_mini_plugins import AdamMini

from .frame import Result, Verdict, flag, median, spread
from .llama import BETAS, WEIGHT_DECAY, Comparison, adamw

EMBEDDING, HEAD, QUERY, KEY = "model.embed_tokens.weight", "lm_head.weight", "*.q_proj.weight", "*.k_proj.weight"
PAPER = "the paper's"
PARTITIONS: dict[str, dict[str, Any]] = {
    PAPER: {},
    "a block a tensor": {"scheme": "tensor"},
    "one for embedding and head": {"rules": [(EMBEDDING, "tensor"), (HEAD, "tensor")]},
    "one for the embedding": {"rules": [(EMBEDDING, "tensor")]},
    "one for the head": {"rules": [(HEAD, "tensor")]},
    "embedding and head element-wise": {"rules": [(EMBEDDING, "element"), (HEAD, "element")]},
    "query and key by neuron": {"rules": [(QUERY, "neuron"), (KEY, "neuron")]},
    "value as a whole": {"value": "whole"},
}


def optimizer(name: str, model: nn.Module, lr: float) -> Optimizer:
    """AdamW, or Adam-mini with one of the partitions."""
    if name == "AdamW":
        return adamw(model, lr)
    if name not in PARTITIONS:
        raise SystemExit(f"--blocks {name!r}: choose from {', '.join(map(repr, PARTITIONS))}")
    return AdamMini.for_model(model, lr=lr, betas=BETAS, weight_decay=WEIGHT_DECAY, **PARTITIONS[name])


@dataclass(frozen=True)
class PartitionAblation(Comparison):
    """The paper's blocks beside coarser ones, at the same learning rates; more partitions by ``--blocks``.

    The paper trains for 50,000 steps and more. In so few as here the coarser blocks lead at first, by the more the
    lower the rate, and the picture shows the lead shrink as the training goes on.
    """

    name = "partition"
    shows = "Figures 8, 9"
    claim = "the paper's blocks train better and with fewer spikes than coarser ones"

    blocks: tuple[str, ...] = flag(tuple(PARTITIONS)[:3], "the partitions, the one that is claimed to be best first")

    def names(self) -> tuple[str, ...]:
        """AdamW and the partitions."""
        return ("AdamW", *self.blocks)

    def build(self, name: str, model: nn.Module, lr: float) -> Optimizer:
        """AdamW, or Adam-mini with blocks of that name."""
        return optimizer(name, model, lr)

    def judge(self, results: Sequence[Result]) -> Verdict:
        """Each at its best learning rate, every other partition ends higher in every seed, with no fewer spikes."""
        first, *others = self.blocks
        best = {name: self.best(results, name) for name in self.names()}
        spikes = {n: sum(r.found["spikes"] for r in results if r.case["name"] == n) for n in self.names()}
        held = all(a < b for other in others for a, b in zip(best[first], best[other]))
        held = held and all(spikes[other] >= spikes[first] for other in others)
        lower = [f"{lr:g}" for lr in self.lrs if any(self._lower(results, other, lr) for other in others)]
        said = "; ".join(f"{name} {spread(losses, '.3f')}, {spikes[name]}" for name, losses in best.items())
        more = f". A coarser one ends lower at {' and '.join(lower)}" if lower else ""
        return Verdict(held, f"loss at the best of {len(self.lrs)} rates, spikes: {said}{more}")

    def _lower(self, results: Sequence[Result], other: str, lr: float) -> bool:
        """Whether another partition has the lower median at a learning rate."""
        return median(self.finals(results, other, lr)) < median(self.finals(results, self.blocks[0], lr))
