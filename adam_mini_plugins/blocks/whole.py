"""The whole shapes of parameters of which a process holds only a part, or nothing."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

_WRAPPED = "_fsdp_wrapped_module"
_FSDP1_HANDLES: WeakIdKeyDictionary = WeakIdKeyDictionary()


def fsdp1_handle(parameter: Tensor) -> Any:
    """By what FSDP1 has flattened a parameter; ``None`` if it has not, or its model has not been partitioned since."""
    reference = _FSDP1_HANDLES.get(parameter)
    return reference() if reference else None


def fsdp1_place(parameter: Tensor, handle: Any) -> int:
    """Which one it is of the parameters that are flattened with it."""
    return next(i for i, p in enumerate(handle.flat_param._params) if p is parameter)


def whole_shape(parameter: Tensor) -> torch.Size:
    """A parameter's shape, the whole one where DeepSpeed ZeRO-3 or FSDP1 have left a part or nothing in its place."""
    handle = fsdp1_handle(parameter)
    if handle is not None:
        return handle.flat_param._shapes[fsdp1_place(parameter, handle)]
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


@contextmanager
def as_built(model: nn.Module) -> Iterator[nn.Module]:
    """A model as it was before an engine had it: parameters with their whole shapes, no module wrapped by FSDP1.

    What parameters hold meanwhile is one number over and over, so that it takes no memory.
    """
    wrappers = [m for m in model.modules() if _WRAPPED in m._modules]
    parents = [(m, name, child) for m in model.modules() for name, child in m._modules.items() if child in wrappers]
    for wrapper in wrappers:
        handle: Any = vars(wrapper).get("_handle")  # none where all parameters are another wrapper's
        for p in (handle.flat_param._params or ()) if handle else ():  # none where use_orig_params=False
            _FSDP1_HANDLES[p] = weakref.ref(handle)
    cut = [p for p in model.parameters() if p.shape != whole_shape(p)]
    held = [p.data for p in cut]
    try:
        for parent, name, child in parents:
            parent._modules[name] = child._modules[_WRAPPED]
        for p in cut:
            p.data = p.data.new_zeros(()).expand(whole_shape(p))
        yield model._modules[_WRAPPED] if model in wrappers else model  # type: ignore[misc]
    finally:
        for p, data in zip(cut, held):
            p.data = data
        for parent, name, child in parents:
            parent._modules[name] = child
