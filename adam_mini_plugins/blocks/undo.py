"""A model run and put back as it was."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Runs what it is around in evaluation mode and puts everything back: modes, buffers, attributes, randomness."""
    attributes = [(module, _snapshot(vars(module))) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    held = {id(g): g for m in model.modules() for g in vars(m).values() if isinstance(g, torch.Generator)}
    generators = [(generator, generator.get_state()) for generator in held.values()]
    differentiated = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    python = random.getstate()
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy else None
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type not in ("cpu", "meta")})
    kind = next((p.device.type for p in model.parameters() if p.device.type not in ("cpu", "meta")), "cuda")
    with torch.random.fork_rng(devices, device_type=kind):
        try:
            model.eval()
            yield
        finally:
            for module, held_before in attributes:
                _restore(vars(module), held_before)
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
            for generator, state in generators:
                generator.set_state(state)
            for parameter, requires_grad, gradient in differentiated:
                parameter.requires_grad_(requires_grad)
                parameter.grad = gradient
            random.setstate(python)
            if numpy:
                numpy.random.set_state(numpy_state)


_Copies = dict[str, tuple[Any, Any]]


def _snapshot(attributes: dict[str, Any]) -> _Copies:
    """Every attribute, and a copy of those that are collections."""
    return {
        name: (value, value.copy() if isinstance(value, dict | list | set) else None)
        for name, value in attributes.items()
    }


def _restore(attributes: dict[str, Any], before: _Copies) -> None:
    attributes.clear()
    for name, (value, copy) in before.items():
        attributes[name] = value
        if isinstance(value, list):
            value[:] = copy
        elif copy is not None:
            value.clear()
            value.update(copy)
