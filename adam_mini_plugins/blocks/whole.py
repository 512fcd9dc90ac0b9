"""The whole shapes of parameters of which a process holds only a part."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def whole_shape(parameter: Tensor) -> torch.Size:
    """A parameter's shape, the whole one where DeepSpeed ZeRO-3 has left none of it in its place."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


@contextmanager
def whole_shapes(model: nn.Module) -> Iterator[None]:
    """Gives all parameters of a model their whole shapes, for whoever reads shapes and nothing else.

    What they hold meanwhile is one number over and over, so that it takes no memory.
    """
    cut = [p for p in model.parameters() if p.shape != whole_shape(p)]
    held = [p.data for p in cut]
    try:
        for p in cut:
            p.data = p.data.new_zeros(()).expand(whole_shape(p))
        yield
    finally:
        for p, data in zip(cut, held):
            p.data = data
