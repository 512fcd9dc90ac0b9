"""Gradient descent on a quadratic ``w @ H @ w / 2`` with one rate a coordinate, and what decides its speed.

Adam, one rate, and one rate a block are the same linear iteration ``w <- w - rates * (H @ w)`` with other rates.
"""

from __future__ import annotations

import torch
from torch import Tensor


def eigenvalues(hessian: Tensor, rates: Tensor | None = None) -> Tensor:
    """The eigenvalues of ``diag(rates) @ hessian``, in rising order.

    They are those of the symmetric ``sqrt(rates) * hessian * sqrt(rates)``, so that they are real.

    Args:
        hessian: (..., d, d), symmetric.
        rates: (..., d), positive.
    """
    if rates is not None:
        root = rates.sqrt()
        hessian = root[..., :, None] * hessian * root[..., None, :]
    return torch.linalg.eigvalsh(hessian)


def condition(hessian: Tensor, rates: Tensor | None = None) -> Tensor:
    """The condition number of ``diag(rates) @ hessian``: its largest over its smallest singular value."""
    return torch.linalg.cond(hessian if rates is None else rates[..., :, None] * hessian)


def adam_preconditioner(gradient: Tensor) -> Tensor:
    """``D_Adam``, one over the root of ``v``, where ``v`` is the square of this gradient."""
    return 1 / gradient.abs()
