"""AdamW's parameter groups as AdamMini's, and an optimizer that is AdamW turned into AdamMini where it stands."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import ConstantLR

from .blocks import Partition
from .optimizer import AdamMini

# How torch computes the step, and which update it is: none of it is left once the step is AdamMini's.
_DROPPED = ("amsgrad", "capturable", "decoupled_weight_decay", "differentiable", "foreach", "fused")
# What a fused AdamW leaves on itself for gradient scalers and for its own checks.
_MARKS = ("_step_supports_amp_scaling", "_need_device_dtype_check_for_fused")


def is_adam(optimizer: Optimizer) -> bool:
    """Whether an optimizer is torch's Adam or AdamW itself; a class derived from them may step otherwise."""
    return type(optimizer) in (Adam, AdamW)


def adam_mini_(optimizer: Optimizer, partition: Partition, *, state_dtype: torch.dtype | str | None = None) -> AdamMini:
    """Turns torch's Adam or AdamW into AdamMini, in place: it is the same object afterwards.

    Whatever holds the optimizer goes on to hold it: learning-rate schedulers, nested ones too,
    attributes of the user's, hooks. Its groups stay the same dictionaries, with their learning rate,
    betas, epsilon, decay, ``maximize``, names and whatever others keep in them.

    Args:
        optimizer: An Adam or AdamW that has not made a step.
        partition: The blocks, from :func:`adam_mini_plugins.partition` of the model.
        state_dtype: The momentum's dtype, as for :class:`AdamMini`.

    Raises:
        TypeError: It is another optimizer.
        ValueError: It has made a step, its ``step`` has been replaced, a group has an option that
            AdamMini has no equal to, or holds a parameter that the partition doesn't know. The
            optimizer is as it was.
    """
    if not is_adam(optimizer):
        raise TypeError(f"only torch's Adam and AdamW can become AdamMini, got {type(optimizer).__name__}")
    if optimizer.state:
        raise ValueError(
            f"this {type(optimizer).__name__} holds the state of {len(optimizer.state)} parameters, which AdamMini "
            "can't go on from: convert it before its first step, or before a state is loaded into it"
        )
    step = vars(optimizer).get("step")
    if step is not None and getattr(step, "__wrapped__", step) is not type(optimizer).step:
        raise ValueError(
            f"the step of this {type(optimizer).__name__} has been replaced by {getattr(step, '__qualname__', step)}, "
            "which converting it would undo: replace it afterwards"
        )
    groups = [adam_mini_group(optimizer, number) for number in range(len(optimizer.param_groups))]
    new = AdamMini(groups, partition=partition, state_dtype=state_dtype)  # whatever is wrong is an error here

    for group, converted in zip(optimizer.param_groups, new.param_groups):
        group.clear()
        group.update(converted)
    vars(optimizer).update(defaults=new.defaults, partition=partition, _made_with=new._made_with, _flats=new._flats)
    for mark in _MARKS:
        vars(optimizer).pop(mark, None)
    optimizer.__class__ = AdamMini
    if vars(optimizer).pop("step", None) is not None:
        # A scheduler has put a wrapper around AdamW's step, to warn where steps come in the wrong order. This one
        # puts it around AdamMini's, and multiplies the learning rates by 1.
        ConstantLR(optimizer, factor=1.0)
    return cast(AdamMini, optimizer)


def adam_mini_group(optimizer: Optimizer, number: int) -> dict[str, Any]:
    """A parameter group of Adam's or AdamW's with AdamMini's options in place of theirs.

    Args:
        optimizer: An Adam or AdamW.
        number: Which of its groups.

    Raises:
        ValueError: The group has an option that AdamMini has no equal to.
    """
    group = optimizer.param_groups[number]
    where = f"parameter group {number} of this {type(optimizer).__name__} has"
    for option in ("amsgrad", "differentiable"):
        if group.get(option):
            raise ValueError(f"{where} {option}=True, which AdamMini does not have: set {option}=False")
    decoupled = isinstance(optimizer, AdamW) or group.get("decoupled_weight_decay", False)
    if group["weight_decay"] and not decoupled:
        raise ValueError(
            f"{where} weight_decay={group['weight_decay']}, which Adam adds to the gradient and AdamMini, as AdamW, "
            "takes off the weights: use torch.optim.AdamW, with a decay that suits it, or weight_decay=0"
        )
    named = zip(group["param_names"], group["params"]) if "param_names" in group else group["params"]
    kept = {key: value for key, value in group.items() if key not in (*_DROPPED, "param_names")}
    return {**kept, "params": list(named)}
