"""AdamW's state and groups as AdamMini's and back, and AdamMini's own where blocks or parameters have changed.

One function does the arithmetic, :func:`block_means`: whatever a second moment holds a value for (an
element, a row, a block of other blocks), it is spread over the parameter and averaged over each block.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import ConstantLR

from . import sharding
from .blocks import Layout, Partition
from .optimizer import AdamMini
from .options import NEW_OPTIONS
from .state_dicts import foreign
from .update import second_moment_dtype

# How torch computes the step, and which update it is: none of it is left once the step is AdamMini's.
_DROPPED = ("amsgrad", "capturable", "decoupled_weight_decay", "differentiable", "foreach", "fused")
# What a fused AdamW leaves on itself for gradient scalers and for its own checks.
_MARKS = ("_step_supports_amp_scaling", "_need_device_dtype_check_for_fused")
# What AdamMini's groups have and AdamW's have not.
_OURS = ("blocks", "param_names", "params", "state_dtype", *NEW_OPTIONS)
# What an AdamMini knows of its parameters besides its groups and state.
_HELD = ("partition", "_made_with", "_flats", "_plans")


def is_adam(optimizer: Optimizer) -> bool:
    """Whether an optimizer is torch's Adam or AdamW itself; a class derived from them may step otherwise."""
    return type(optimizer) in (Adam, AdamW)


def adam_mini_(optimizer: Optimizer, partition: Partition, *, state_dtype: torch.dtype | str | None = None) -> AdamMini:
    """Turns torch's Adam or AdamW into AdamMini, in place: it is the same object afterwards.

    Whatever holds the optimizer goes on to hold it: learning-rate schedulers, nested ones too,
    attributes of the user's, hooks. Its groups stay the same dictionaries, with their learning rate,
    betas, epsilon, decay, ``maximize``, names and whatever others keep in them. In the middle of a run
    its state goes over as in :func:`from_adamw`, the momentum without a copy.

    Args:
        optimizer: An Adam or AdamW.
        partition: The blocks, from :func:`adam_mini_plugins.partition` of the model.
        state_dtype: The momentum's dtype, as for :class:`AdamMini`.

    Raises:
        TypeError: It is another optimizer.
        ValueError: Its ``step`` has been replaced, a group has an option that AdamMini has no equal to,
            or holds a parameter that the partition doesn't know. The optimizer is as it was.
    """
    step = vars(optimizer).get("step")
    if step is not None and getattr(step, "__wrapped__", step) is not type(optimizer).step:
        raise ValueError(
            f"the step of this {type(optimizer).__name__} has been replaced by {getattr(step, '__qualname__', step)}, "
            "which converting it would undo: replace it afterwards"
        )
    new = _taken_over(optimizer, partition, state_dtype)  # whatever is wrong is an error here

    _become(optimizer, new)
    vars(optimizer).update(defaults=new.defaults)
    for mark in _MARKS:
        vars(optimizer).pop(mark, None)
    optimizer.__class__ = AdamMini
    if vars(optimizer).pop("step", None) is not None:
        # A scheduler has put a wrapper around AdamW's step, to warn where steps come in the wrong order. This one
        # puts it around AdamMini's, and multiplies the learning rates by 1.
        ConstantLR(optimizer, factor=1.0)
    return cast(AdamMini, optimizer)


def from_adamw(
    adamw: Optimizer | dict[str, Any],
    partition: Partition,
    *,
    params: Iterable[Any] | None = None,
    state_dtype: torch.dtype | str | None = None,
) -> AdamMini:
    """As :meth:`AdamMini.from_adamw`."""
    if isinstance(adamw, Optimizer):
        if params is not None:
            raise ValueError(f"params are those of the {type(adamw).__name__}: leave params= out")
        new = _taken_over(adamw, partition, state_dtype)
        for state in new.state.values():  # AdamW is left as it was, and may make steps of its own
            state["exp_avg"] = state["exp_avg"].clone()
        return new
    if params is None:
        raise ValueError(
            "a state dict has no parameters: pass params= as they were given to the AdamW that saved it, in the same "
            "groups and order, such as params=model.named_parameters()"
        )
    new = AdamMini(params, partition=partition, state_dtype=state_dtype)
    new.load_state_dict(take_over_adamw(new, adamw))
    return new


def _taken_over(optimizer: Optimizer, partition: Partition, state_dtype: torch.dtype | str | None) -> AdamMini:
    """An AdamMini with the groups and the state of an Adam or AdamW, with which it shares the momentum."""
    if not is_adam(optimizer):
        raise TypeError(f"only torch's Adam and AdamW can become AdamMini, got {type(optimizer).__name__}")
    kind = type(optimizer).__name__
    groups = [
        {
            **_hyperparameters(group, f"parameter group {number} of this {kind}", isinstance(optimizer, AdamW)),
            "params": list(zip(group["param_names"], group["params"])) if "param_names" in group else group["params"],
        }
        for number, group in enumerate(optimizer.param_groups)
    ]
    new = AdamMini(groups, partition=partition, state_dtype=state_dtype)
    if optimizer.state:
        new.load_state_dict(take_over_adamw(new, optimizer.state_dict()))
    return new


def take_over_adamw(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state dict of AdamW's as one of AdamMini's; AdamMini's own comes back as it is.

    It is a hook: ``optimizer.register_load_state_dict_pre_hook(take_over_adamw)`` makes an AdamMini
    resume from checkpoints of either.

    Args:
        optimizer: The AdamMini that is to load the state.
        state_dict: What ``AdamW.state_dict()`` returned for the same parameters in the same groups.

    Raises:
        ValueError: The state is neither's, doesn't fit a parameter, or has an option that AdamMini has no equal to.
    """
    saved_groups = state_dict["param_groups"]
    if all("blocks" in group for group in saved_groups):
        return state_dict
    if not all({"exp_avg", "exp_avg_sq", "step"} <= set(state) for state in state_dict["state"].values()):
        raise ValueError(foreign(state_dict))
    lengths = [[len(group["params"]) for group in groups] for groups in (saved_groups, optimizer.param_groups)]
    if lengths[0] != lengths[1]:
        raise ValueError(
            f"the AdamW state has parameter groups of {lengths[0]} parameters, this optimizer of {lengths[1]}: build "
            "it with the same groups"
        )
    groups, states = [], {}
    for number, (group, saved) in enumerate(zip(optimizer.param_groups, saved_groups)):
        kept = _hyperparameters(saved, f"parameter group {number} of the AdamW state", decoupled=True)
        ours = {key: group[key] for key in _OURS if key != "params"}
        groups.append({**kept, **ours, "params": saved["params"]})
        for key, *member in zip(saved["params"], group["params"], group["param_names"], group["blocks"]):
            if key in state_dict["state"]:
                states[key] = _state(state_dict["state"][key], *member)
    return {**state_dict, "state": states, "param_groups": groups}


def _state(state: dict[str, Any], parameter: Tensor, name: str, blocks: str) -> dict[str, Any]:
    """AdamW's state of one parameter as AdamMini's."""
    if not blocks:
        raise ValueError(
            f"{name} has a state, but no blocks: it is frozen, and unknown to the partition; make the partition while "
            "it is trainable, or say with rules= what its blocks are"
        )
    for entry in ("exp_avg", "exp_avg_sq"):
        if state[entry].shape != parameter.shape:
            raise ValueError(
                f"{entry} of {name} has shape {tuple(state[entry].shape)} in the AdamW state, but the parameter "
                f"{tuple(parameter.shape)}: are the parameters in the order in which they were saved?"
            )
    means = block_means(sharding.whole(state["exp_avg_sq"]), parameter, Layout.parse(blocks))
    return {"step": torch.tensor(float(state["step"])), "exp_avg": state["exp_avg"], "exp_avg_sq": means}


def block_means(second_moment: Tensor, parameter: Tensor, layout: Layout) -> Tensor:
    """The mean of a second moment over each block.

    Args:
        second_moment: Anything that broadcasts against the parameter: AdamW's, of its shape, or one value a row.
        parameter: The parameter.
        layout: The blocks to average over.

    Returns:
        A tensor of ``layout.state_shape(parameter.shape)``, equal inside every block, in the dtype of a new state.
    """
    dtype = second_moment_dtype(parameter)
    shape = parameter.shape
    # Along an axis of extent 1 all are equal, and so is their mean, to the bit.
    inside = [axis for axis, size in enumerate(second_moment.shape) if size > 1 and axis not in layout.axes]
    rows = second_moment.mean(inside, keepdim=True, dtype=dtype) if inside else second_moment.to(dtype)
    return layout.block_mean(rows.expand(layout.state_shape(shape))).contiguous()


def to_adamw(optimizer: AdamMini, **options: Any) -> AdamW:
    """As :meth:`AdamMini.to_adamw`."""
    groups = [
        {
            **{key: value for key, value in group.items() if key not in _OURS},
            **options,
            "params": list(zip(group["param_names"], group["params"])),
        }
        for group in optimizer.param_groups
    ]
    new = AdamW(groups, **options)
    saved, state_dict = optimizer.state_dict(), new.state_dict()
    for group, saved_group in zip(optimizer.param_groups, saved["param_groups"]):
        for parameter, blocks, key in zip(group["params"], group["blocks"], saved_group["params"]):
            state = saved["state"].get(key)
            if state:
                spread = sharding.whole(state["exp_avg_sq"]).expand(parameter.shape).contiguous()
                state_dict["state"][key] = {
                    "step": state["step"].clone(),
                    "exp_avg": state["exp_avg"].clone(),
                    "exp_avg_sq": sharding.placed(spread, parameter, Layout.parse(blocks)),
                }
    new.load_state_dict(state_dict)
    return new


def repartition(optimizer: AdamMini, partition: Partition) -> None:
    """As :meth:`AdamMini.repartition`."""
    groups = [
        {
            **{key: value for key, value in group.items() if key not in ("blocks", "param_names")},
            "params": [
                (name, _successor(parameter, name, optimizer.partition, partition))
                for name, parameter in zip(group["param_names"], group["params"])
            ],
        }
        for group in optimizer.param_groups
    ]
    new = AdamMini(groups, partition=partition)
    state_dict = new.state_dict()
    for old, group, packed in zip(optimizer.param_groups, new.param_groups, state_dict["param_groups"]):
        columns = (old["params"], old["blocks"], group["params"], group["param_names"], group["blocks"])
        for key, before, had, parameter, name, blocks in zip(packed["params"], *columns):
            state = optimizer.state.get(before)
            if state:
                state_dict["state"][key] = _moved(state, had, parameter, name, blocks)
    new.load_state_dict(state_dict)  # whatever is wrong is an error here, or before

    _become(optimizer, new)


def _become(optimizer: Optimizer, new: AdamMini) -> None:
    """Gives an optimizer the groups, blocks and state of another; its groups stay the same dictionaries."""
    for group, converted in zip(optimizer.param_groups, new.param_groups):
        group.clear()
        group.update(converted)
    kept = {name: value for name, value in vars(new).items() if name in _HELD}
    vars(optimizer).update(kept, state=new.state)


def _successor(parameter: Tensor, name: str, before: Partition, after: Partition) -> Tensor:
    """The tensor that a model has now where it had this one: often this one."""
    if after.name_of(parameter) is not None:
        return parameter
    successor = after.parameter(before.name_of(parameter) or name)
    return parameter if successor is None else successor


def _moved(state: dict[str, Any], had: str, parameter: Tensor, name: str, blocks: str) -> dict[str, Any]:
    """State of a parameter with other blocks or of another extent along one axis.

    What is new along it starts with no momentum and with the mean of the second moments along that axis. Zero,
    beside a step count of many steps, would leave the bias correction out: at the default betas the first steps
    would be up to 7 times too long.
    """
    exp_avg, exp_avg_sq = state["exp_avg"], state["exp_avg_sq"]
    if exp_avg.shape != parameter.shape:
        axis = _changed_axis(exp_avg.shape, parameter, name)
        exp_avg = _extended(sharding.whole(exp_avg), axis, parameter.shape[axis], torch.zeros(()))
        exp_avg_sq = sharding.whole(exp_avg_sq)
        if exp_avg_sq.shape[axis] > 1:
            mean = exp_avg_sq.mean(axis, keepdim=True)
            exp_avg_sq = _extended(exp_avg_sq, axis, parameter.shape[axis], mean)
    if had != blocks:
        exp_avg_sq = block_means(sharding.whole(exp_avg_sq), parameter, Layout.parse(blocks))
    return {**state, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}


def _changed_axis(before: torch.Size, parameter: Tensor, name: str) -> int:
    after = parameter.shape
    changed = [axis for axis, (old, new) in enumerate(zip(before, after)) if old != new]
    if len(before) != len(after) or len(changed) != 1:
        raise ValueError(
            f"{name} had shape {tuple(before)} and has {tuple(after)}: state can be carried over where one extent has "
            "changed, as the vocabulary's; build a new optimizer, or give this tensor a group of its own"
        )
    return changed[0]


def _extended(value: Tensor, axis: int, size: int, fill: Tensor) -> Tensor:
    """A tensor cut off along an axis, or extended with what ``fill`` broadcasts to."""
    kept = value.narrow(axis, 0, min(size, value.shape[axis]))
    missing = list(value.shape)
    missing[axis] = size - kept.shape[axis]
    return torch.cat([kept, fill.to(value).expand(missing)], dim=axis)


def _hyperparameters(group: dict[str, Any], where: str, decoupled: bool) -> dict[str, Any]:
    """What AdamMini's groups have of a parameter group of Adam's or AdamW's.

    Args:
        group: The group, an optimizer's or a state dict's.
        where: What it is called in an error.
        decoupled: Whether the decay is AdamW's; what newer versions of torch keep in the group counts for more.

    Raises:
        ValueError: The group has an option that AdamMini has no equal to.
    """
    for option in ("amsgrad", "differentiable"):
        if group.get(option):
            raise ValueError(f"{where} has {option}=True, which AdamMini does not have: set {option}=False")
    if group["weight_decay"] and not group.get("decoupled_weight_decay", decoupled):
        raise ValueError(
            f"{where} has weight_decay={group['weight_decay']}, which Adam adds to the gradient and AdamMini, as "
            "AdamW, takes off the weights: use torch.optim.AdamW, with a decay that suits it, or weight_decay=0"
        )
    return {key: value for key, value in group.items() if key not in (*_DROPPED, *_OURS)}
