"""Table 6, graphs: a graph convolution net and a graph attention net that label the nodes of one graph."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from .frame import flag
from .on_par import DEVICE, OnPar, Task

NEIGHBOURS, LABELLED = 8, 5  # edges from a node; nodes of each class whose label is known
WIDTH, DROPOUT = 64, 0.5


@lru_cache(maxsize=1)
def graph() -> tuple[Tensor, Tensor, Tensor]:
    """Scikit-learn's 1797 digits: (n, 64) pixels, (2, m) edges to the nearest others and back, (n,) labels."""
    from sklearn.datasets import load_digits
    from sklearn.neighbors import kneighbors_graph

    found = load_digits()
    near = kneighbors_graph(found.data, NEIGHBOURS)
    edges = torch.tensor(np.array((near + near.T).nonzero()), dtype=torch.long)
    pixels = torch.tensor(found.data, dtype=torch.float32) / 16
    return pixels.to(DEVICE), edges.to(DEVICE), torch.tensor(found.target).to(DEVICE)


class Nodes(Task):
    """Semi-supervised: the whole graph is seen, a few labels are known, those of all other nodes are held out."""

    metric, sign, lr, weight_decay = "held-out accuracy (%)", 1, 1e-2, 5e-4

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        *_, labels = graph()
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).to(DEVICE)
        self.known = torch.cat([order[labels[order] == label][:LABELLED] for label in labels.unique()])
        self.held_out = torch.ones_like(labels, dtype=torch.bool).index_fill(0, self.known, False)

    def loss(self) -> Tensor:
        """Cross entropy of the nodes whose labels are known."""
        pixels, edges, labels = graph()
        return functional.cross_entropy(self.model(pixels, edges)[self.known], labels[self.known])

    def score(self) -> float:
        """Per cent."""
        pixels, edges, labels = graph()
        right = self.model(pixels, edges).argmax(1) == labels
        return 100 * right[self.held_out].double().mean().item()


class GCN(Nodes):
    """Kipf and Welling 2016."""

    def build(self) -> nn.Module:
        """Two layers."""
        from torch_geometric import nn as layers

        return layers.GCN(64, WIDTH, 2, 10, dropout=DROPOUT)


class GAT(Nodes):
    """Velickovic et al. 2017."""

    def build(self) -> nn.Module:
        """Two layers of eight heads."""
        from torch_geometric import nn as layers

        return layers.GAT(64, WIDTH, 2, 10, dropout=DROPOUT, heads=8)


@dataclass(frozen=True)
class Graph(OnPar):
    """Nodes are scikit-learn's digits, edges go to the eight nearest; of 1797 labels 50 are known."""

    name = "graph"
    claim = "on graph nets Adam-mini is on par with AdamW or better"
    libraries = ("scikit-learn", "torch-geometric")
    tasks = {"GCN": GCN, "GAT": GAT}

    seeds: int = flag(5, "number of initial weights and of what is dropped out")
