"""Parameters as an optimizer is given them: which one each is, and what would make a step of it go wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .blocks import Layout, Partition
from .blocks.whole import fsdp1_handle, whole_shape
from .flat import Flat

HOW_TO_PARTITION = (
    "pass partition=adam_mini_plugins.partition(model), or build the optimizer with AdamMini.for_model(model, ...)"
)
_ENGINES = (
    "AdamMini trains with DistributedDataParallel, FSDP2, tensor parallelism and DeepSpeed ZeRO: use FSDP2 "
    "(fully_shard in torch, fsdp_version: 2 in accelerate, ModelParallelStrategy in Lightning)"
)


def trainable_parameters(model: nn.Module) -> list[tuple[str, Tensor]]:
    """The parameters of a model that are not frozen, by name.

    Raises:
        ValueError: There are none.
    """
    named = list(model.named_parameters())
    trainable: list[tuple[str, Tensor]] = [(name, p) for name, p in named if p.requires_grad]
    if not trainable:
        raise ValueError(
            f"{type(model).__name__} has no parameter to train: all {len(named)} are frozen. Call requires_grad_(True) "
            "on what is to be trained; with PEFT, load the adapter with is_trainable=True"
        )
    return trainable


def check_ordered(params: Any) -> None:
    """Raises a ``TypeError`` for parameters in no order."""
    if isinstance(params, set | frozenset):
        raise TypeError("parameters need an order that is the same in every run; got a set: pass a list")


def identify(member: Tensor | tuple[str, Tensor], partition: Partition) -> tuple[str, Tensor, str]:
    """A parameter's name, itself, and its blocks as text (none while it is frozen and unknown).

    Args:
        member: The parameter, or its name and itself.
        partition: The blocks of the model that it is of.

    Raises:
        TypeError: It is no pair of a name and a tensor, or complex.
        ValueError: It is no leaf, or the partition doesn't know it, or by another shape.
    """
    if isinstance(member, tuple) and not (len(member) == 2 and isinstance(member[0], str)):
        raise TypeError(f"a named parameter is a pair (name, tensor), got {[type(part).__name__ for part in member]}")
    given, parameter = member if isinstance(member, tuple) else (None, member)
    if not isinstance(parameter, Tensor):
        raise TypeError(
            f"optimizer can only optimize Tensors, got {type(parameter).__name__}: pass tensors or (name, tensor) "
            "pairs, of a mapping its items()"
        )
    # Which tensor it is counts for more than what it is called: wrappers prefix names.
    name = partition.name_of(parameter) or given
    _check_engine(name, parameter)
    described = f"a tensor of shape {tuple(parameter.shape)}" if name is None else repr(name)
    if parameter.is_complex():
        raise TypeError(f"AdamMini does not support complex parameters: {described} is {parameter.dtype}")
    if not (parameter.is_leaf or parameter.retains_grad):
        raise ValueError(
            f"can't optimize a non-leaf Tensor: {described} is the result of an operation; pass what it is made of"
        )
    entry = partition.get(name) if name is not None else None
    if entry is None:
        if not parameter.requires_grad and parameter.grad is None:
            return given or name or "", parameter, ""
        reason = partition.left_out.get(name or "", "")
        raise ValueError(
            f"the partition does not know {described}{': ' + reason if reason else ''}; was it made from another "
            f"model, or before this parameter was added? Once the model is complete, {HOW_TO_PARTITION}; to add "
            "to an optimizer that exists, first set optimizer.partition = partition(model); a library that steps "
            "copies of parameters needs their names, as docs/offload.md has it"
        )
    shape = whole_shape(parameter)
    if entry.shape != shape:
        raise ValueError(
            f"{described} has shape {tuple(shape)}, but {tuple(entry.shape)} in the partition, which "
            f"is another model's or was made before a resize: {HOW_TO_PARTITION}"
        )
    return given or entry.name, parameter, str(entry.layout)


def names_of(group: dict[str, Any], flats: Mapping[Tensor, Flat]) -> list[str]:
    """What to call each tensor of a group: its name, or what it holds."""
    return [str(flats[p]) if p in flats else name for p, name in zip(group["params"], group["param_names"])]


def check_parameters(group: dict[str, Any], flats: Mapping[Tensor, Flat]) -> None:
    """Raises where a step would go wrong, before anything has changed and before processes wait for each other."""
    params, names = group["params"], group["param_names"]
    if all(p in flats for p in params):
        return  # among them groups without a tensor: ZeRO-3 steps one part of one group at a time
    if len(params) != len(names):
        raise RuntimeError(
            f"a parameter group holds {len(params)} tensors for {len(names)} names: an engine has merged or cut them, "
            f"as FSDP1 does. {_ENGINES}"
        )
    for parameter, name, blocks in zip(params, names, group["blocks"]):
        if parameter in flats:
            continue
        grad = parameter.grad
        if grad is not None and grad.is_sparse:
            raise RuntimeError(
                f"AdamMini does not support sparse gradients, got one for {name}: build the layer with sparse=False"
            )
        _check_engine(name, parameter)
        if not blocks and grad is not None:
            raise RuntimeError(
                f"{name} of shape {tuple(parameter.shape)} has a gradient but no blocks: it was frozen, and is "
                f"unknown to the partition. {HOW_TO_PARTITION}"
            )
        # Without a gradient too: an engine may have left this process none of the tensor.
        if blocks and not Layout.parse(blocks).fits(parameter.shape):
            raise RuntimeError(
                f"{name} has shape {tuple(parameter.shape)}, which its blocks {blocks!r} don't fit: it was resized "
                "(then call optimizer.repartition(partition(model))), or an engine has flattened it, as FSDP1 does. "
                f"{_ENGINES}"
            )


def _check_engine(name: str | None, parameter: Tensor) -> None:
    """Raises for a parameter that an engine has flattened so that its blocks can't be told."""
    if hasattr(parameter, "_is_flat_param") or (hasattr(parameter, "_fsdp_flattened") and not fsdp1_handle(parameter)):
        raise RuntimeError(
            f"{name} has been flattened and cut by FSDP1 (FullyShardedDataParallel), and its blocks can't be told; "
            "with use_orig_params=True they can, where partition and AdamMini are made from the wrapped model. "
            f"{_ENGINES}"
        )
