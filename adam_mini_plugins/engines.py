"""What engines that flatten parameters leave in an optimizer's groups, and what it holds of which parameter.

DeepSpeed ZeRO takes an optimizer that was made of a model's parameters and puts flat tensors in
their place, float32 and cut over processes. Where a parameter has gone is noted on the parameter itself.
FSDP1 with ``use_orig_params=True`` leaves a slice of a parameter, which may be empty, in its place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, distributed

from .blocks import Layout
from .blocks.whole import fsdp1_handle, fsdp1_place, whole_shape
from .flat import Flat, Piece


class Member(NamedTuple):
    """A parameter that an optimizer was made with.

    Args:
        name: Its name.
        layout: Its blocks; ``None`` if it is frozen and they are unknown.
        parameter: Itself; ``None`` once it is gone.
    """

    name: str
    layout: Layout | None
    parameter: Any


# What engines leave on a parameter: ZeRO-1 and ZeRO-2; ZeRO-3, once it has the optimizer too; FSDP1.
_MARKS = ("_hp_mapping", "_z3_optimizer", "_fsdp_flattened")


def takes_over(parameter: Any) -> bool:
    """Whether an engine has put a parameter into a flat tensor."""
    return any(hasattr(parameter, mark) for mark in _MARKS)


def find_flat(tensor: Tensor, members: Sequence[Member]) -> Flat | None:
    """What a tensor in a group of the optimizer's holds, without asking other processes.

    Args:
        tensor: The tensor.
        members: The parameters that this group was made with.

    Returns:
        ``None`` if it is one of these parameters as it was.

    Raises:
        RuntimeError: It holds none of them, or the engine is set up in a way that can't be followed.
    """
    itself = next((member for member in members if member.parameter is tensor), None)
    if itself is not None:
        return _fsdp1(itself, fsdp1_handle(tensor))
    return _zero(tensor, members)


def _fsdp1(member: Member, handle: Any) -> Flat | None:
    """The engine lays the parameters of a module end to end, cuts that, and leaves a slice of each where it was."""
    frozen = member.layout is None and not member.parameter.requires_grad
    if handle is None or not handle.uses_sharded_strategy or frozen:
        return None
    place = fsdp1_place(member.parameter, handle)
    shape, info = tuple(handle.flat_param._shapes[place]), handle.flat_param._shard_param_infos[place]
    start, length = (info.intra_param_start_idx, info.numel_in_shard) if info.in_shard else (0, 0)
    piece = Piece(member.name, _known(member), shape, start, length, 0)
    return Flat([piece], handle.process_group, state_by_element=True)


def _zero(flat: Tensor, members: Sequence[Member]) -> Flat:
    taken = [member for member in members if takes_over(member.parameter)]
    stage_3 = [member for member in taken if hasattr(member.parameter, "_z3_optimizer")]
    pieces, groups = _zero_3(flat, stage_3) if stage_3 else _zero_1_and_2(flat, taken)
    if not pieces:
        names = ", ".join(member.name for member in members[:3])
        raise RuntimeError(
            f"a parameter group made with {len(members)} parameters ({names}, ...) now has a tensor of shape "
            f"{tuple(flat.shape)}, which is none of them and of which no engine says what it holds: build AdamMini "
            "from the parameters of the very model that is handed to the engine, before it is"
        )
    if len(groups) > 1:
        raise RuntimeError(
            f"{pieces[0].name} and others of one flat tensor lie on different sets of processes: put expert parameters "
            "into parameter groups of their own"
        )
    for piece in pieces:
        if not piece.layout.fits(piece.shape):
            raise RuntimeError(
                f"{piece.name} has shape {piece.shape}, which its blocks '{piece.layout}' don't fit: it was resized, "
                "or DeepSpeed's tensor parallelism has cut it, which AdamMini does not follow: leave autotp_size out "
                "of the DeepSpeed config"
            )
    return Flat(pieces, groups.pop())


def _known(member: Member) -> Layout:
    if member.layout is None:
        raise RuntimeError(
            f"{member.name} is trained but has no blocks: it was frozen when the optimizer was made, and is unknown to "
            "the partition: make both once it is not"
        )
    return member.layout


def _zero_1_and_2(flat: Tensor, members: Sequence[Member]) -> tuple[list[Piece], set[Any]]:
    """The engine lays the parameters of a group end to end and gives each process an equal part of that."""
    pieces, groups = [], set()
    # The parameters are views of the whole of it, in which each one's place can be told.
    first = min((member.parameter.storage_offset() for member in members), default=0)
    for member in members:
        parameter, mapping = member.parameter, member.parameter._hp_mapping
        groups.add(parameter._dp_group)
        start = length = offset = 0
        if mapping is not None:
            start, length = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
            offset = mapping.hp_fragment_address.start
            here = distributed.get_rank(parameter._dp_group) * flat.numel() + offset
            if parameter.storage_offset() - first + start != here:
                raise RuntimeError(
                    f"DeepSpeed's round_robin_gradients=True lays parameters out in an order that its own account of "
                    f"where {member.name} lies does not follow: set round_robin_gradients to false in the DeepSpeed "
                    "config"
                )
        pieces.append(Piece(member.name, _known(member), tuple(parameter.shape), start, length, offset))
    return pieces, groups


def _zero_3(flat: Tensor, members: Sequence[Member]) -> tuple[list[Piece], set[Any]]:
    """The engine cuts each parameter into a part for each process, and lays the parts of a sub-group end to end."""
    pieces, groups = [], set()
    for member in members:
        parameter = member.parameter
        engine = parameter._z3_optimizer
        if engine.swap_optimizer:
            raise RuntimeError(
                "AdamMini's second moments are fewer than its momenta, which DeepSpeed's offload of the optimizer to "
                'NVMe does not allow for: offload it to the CPU ("offload_optimizer": {"device": "cpu"})'
            )
        position = engine.grad_position.get(parameter.ds_id)
        if position is None or engine.fp32_partitioned_groups_flat[position[0]] is not flat:
            continue
        group, (_, offset, share) = parameter.ds_process_group, position
        groups.add(group)
        shape = tuple(whole_shape(parameter))
        if share != math.ceil(math.prod(shape) / distributed.get_world_size(group)):
            raise RuntimeError(
                f"DeepSpeed has cut {member.name} of shape {shape} into parts of {share}, on "
                f"{distributed.get_world_size(group)} processes: AdamMini trains with plain ZeRO-3, without MiCS"
            )
        start = min(distributed.get_rank(group) * share, math.prod(shape))
        length = min(share, math.prod(shape) - start)
        pieces.append(Piece(member.name, _known(member), shape, start, length, offset))
    return pieces, groups
