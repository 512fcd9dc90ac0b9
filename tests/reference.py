"""Adam-mini as the paper's Algorithm 2 writes it: slow, in float64, one block at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def adam_mini_reference(
    param: Tensor,
    grads: Sequence[Tensor],
    block_index: Tensor,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    maximize: bool = False,
) -> Tensor:
    """The parameter after a step for each gradient, in float64.

    Args:
        param: The parameter before the first step.
        grads: Its gradients, step by step.
        block_index: The block of every element, broadcastable to the parameter's shape.
    """
    beta1, beta2 = betas
    blocks = block_index.expand(param.shape).flatten().tolist()
    members = {b: [i for i, of in enumerate(blocks) if of == b] for b in sorted(set(blocks))}
    p = param.double().flatten().tolist()
    m = [0.0] * len(p)
    v = dict.fromkeys(members, 0.0)
    for step, grad in enumerate(grads, start=1):
        g = grad.double().flatten().tolist()
        if maximize:
            g = [-x for x in g]
        for block, elements in members.items():
            v[block] = (1 - beta2) * math.fsum(g[i] * g[i] for i in elements) / len(elements) + beta2 * v[block]
            v_hat = v[block] / (1 - beta2**step)
            for i in elements:
                p[i] = p[i] - lr * weight_decay * p[i]
                m[i] = (1 - beta1) * g[i] + beta1 * m[i]
                m_hat = m[i] / (1 - beta1**step)
                p[i] = p[i] - lr * m_hat / (math.sqrt(v_hat) + eps)
    return torch.tensor(p, dtype=torch.float64).view(param.shape)
