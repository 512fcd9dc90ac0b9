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
    """The paper's blocks beside coarser ones, at the same learning rates; more partitions by ``--blocks``."""

    name = "partition"
    shows = "Figures 8, 9"
    claim = "the paper's blocks train better and with fewer spikes than coarser ones"

    steps: int = flag(400, "optimizer steps of a training")
    blocks: tuple[str, ...] = flag(tuple(PARTITIONS)[:3], "the partitions, the one that is claimed to be best first")

    def names(self) -> tuple[str, ...]:
        """AdamW and the partitions."""
        return ("AdamW", *self.blocks)

    def build(self, name: str, model: nn.Module, lr: float) -> Optimizer:
        """AdamW, or Adam-mini with blocks of that name."""
        return optimizer(name, model, lr)

    def judge(self, results: Sequence[Result]) -> Verdict:
        """Every other partition ends higher at the seed's median, at every learning rate, with no fewer spikes."""
        first, *others = self.blocks
        said, held = [], True
        spikes = {n: sum(r.found["spikes"] for r in results if r.case["name"] == n) for n in self.names()}
        for lr in self.lrs:
            base = self.finals(results, first, lr)
            reference = self.finals(results, "AdamW", lr)
            gaps = [f"AdamW {spread((a - b for a, b in zip(reference, base)), '+.3f')}"]
            for other in others:
                gap = [a - b for a, b in zip(self.finals(results, other, lr), base)]
                held = held and median(gap) > 0 and spikes[other] >= spikes[first]
                gaps.append(f"{other} {spread(gap, '+.3f')}")
            said.append(f"at {lr:g} {first} {spread(base, '.3f')}; less that, {', '.join(gaps)}")
        counts = ", ".join(f"{name} {count}" for name, count in spikes.items())
        return Verdict(held, f"loss after {self.steps} steps {'; '.join(said)}; spikes: {counts}")
