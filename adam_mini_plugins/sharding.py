"""Parameters cut over processes: which blocks the cuts go through, and their means by one reduction.

A process holds some rows of a tensor, each whole or, where the tensor is cut along another axis, in
part. Momentum and second moments are cut as the parameter is, so that a step is the update of one
process on local tensors, but for the blocks that lie on several processes. Of those each process sums
its own squares; one all-reduce for each dimension of the mesh adds the sums up. Nothing is sent for
blocks that lie on one process.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from .blocks import Layout
from .update import row_squares, second_moment_dtype


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, told without importing what DTensors need."""
    return hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """This process's part of a DTensor, or the tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a DTensor, on every process of its mesh, which all have to call this; or the tensor itself."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def new_second_moment(parameter: Any, layout: Layout) -> Tensor:
    """Zeros, one for each row of a parameter, cut over processes as the parameter's rows are."""
    shape, dtype = layout.state_shape(parameter.shape), second_moment_dtype(parameter)
    if not is_sharded(parameter):
        return parameter.new_zeros(shape, dtype=dtype)
    from torch.distributed.tensor import DTensor

    part = local(parameter)
    return DTensor.from_local(
        part.new_zeros(layout.state_shape(part.shape), dtype=dtype),
        parameter.device_mesh,
        _row_placements(parameter, layout),
        run_check=False,
        shape=torch.Size(shape),
        stride=torch.empty(shape, device="meta").stride(),
    )


def placed(value: Any, parameter: Any, layout: Layout) -> Tensor:
    """State of a parameter cut as that parameter is.

    Args:
        value: State of the parameter's shape or of ``layout.state_shape`` of it, whole on every process
            or a DTensor on the parameter's mesh.
        parameter: The parameter.
        layout: Its blocks.

    Raises:
        ValueError: The state is cut over processes in a way that the parameter is not.
    """
    if not is_sharded(parameter):
        if is_sharded(value):
            raise ValueError(
                f"the state to load is cut over the processes of {value.device_mesh}, the parameters are not: save "
                "and load it with torch.distributed.checkpoint.state_dict, which cuts and joins it"
            )
        return value
    placements = parameter.placements if value.shape == parameter.shape else _row_placements(parameter, layout)
    if is_sharded(value):
        if value.device_mesh != parameter.device_mesh:
            raise ValueError(
                f"the state to load is cut over the processes of {value.device_mesh}, the parameters over those of "
                f"{parameter.device_mesh}: save and load it with torch.distributed.checkpoint.state_dict"
            )
        return value.redistribute(placements=placements)
    from torch.distributed.tensor import distribute_tensor

    # Every process has all of it, and keeps its own part: nothing to send.
    return distribute_tensor(value, parameter.device_mesh, placements, src_data_rank=None)


def gradients_and_means(
    members: Iterable[tuple[Any, Layout]],
) -> tuple[dict[Tensor, Tensor], dict[Tensor, Tensor]]:
    """This process's part of each gradient, and block means for those whose rows don't stand alone.

    All processes of the parameters' meshes have to call it with the same parameters in the same
    order; on some of them gradients may be missing.

    Args:
        members: DTensor parameters with their blocks.

    Returns:
        By parameter, the local gradient (of the parameter's local shape); and, where a row is not a block of
        its own that lies here whole, the mean square of each local row's block (of ``layout.state_shape``
        of the local shape).
    """
    grads: dict[Tensor, Tensor] = {}
    shares: list[tuple[Any, Layout, Cuts, Tensor]] = []
    for parameter, layout in members:
        cuts = cuts_of(parameter, layout)
        grad = parameter.grad
        if grad is not None:
            if grad.placements != parameter.placements:
                # What processes have yet to add up is added up here, as torch's optimizers do.
                grad = grad.redistribute(placements=parameter.placements)
            grads[parameter] = local(grad)
        if cuts is not None:
            shares.append((parameter, layout, cuts, _share(grads.get(parameter), parameter, layout, cuts)))
    _reduce(shares)
    means = {
        parameter: share[cuts.first].view(layout.state_shape(local(parameter).shape))
        for parameter, layout, cuts, share in shares
    }
    return grads, means


def _share(grad: Tensor | None, parameter: Any, layout: Layout, cuts: Cuts) -> Tensor:
    """What a local gradient adds to the mean square of each block, one value for each row of the whole tensor."""
    squares = local(parameter).new_zeros(layout.rows, dtype=second_moment_dtype(parameter))
    if grad is None:
        return squares
    squares[cuts.rows] = row_squares(grad, layout.axes, squares.dtype).reshape(-1)
    # The rows of other processes count, as zeros: these shares of a mean add up to the mean.
    return layout.block_mean(squares.mul_(layout.rows / parameter.numel())).contiguous()


def _reduce(shares: Sequence[tuple[Any, Layout, Cuts, Tensor]]) -> None:
    """Adds up, in place, the shares in blocks that lie on several processes: one all-reduce a process group."""
    members: dict[Any, list[tuple[Tensor, Tensor]]] = {}
    for parameter, _, cuts, share in shares:
        for dim in cuts.dims:
            members.setdefault(parameter.device_mesh.get_group(dim), []).append((share, cuts.reduced))
    # Where a tensor is cut along two dimensions, the sums of one are added up along the other, in any order.
    for group, cut in members.items():
        for (share, reduced), sums in zip(cut, add_up([share[reduced] for share, reduced in cut], group)):
            share[reduced] = sums.to(share.dtype)


def add_up(parts: Sequence[Tensor], group: Any) -> tuple[Tensor, ...]:
    """Vectors added up over the processes of a group, by one all-reduce for all of them, or none for no numbers."""
    sums = torch.cat(list(parts))
    if sums.numel():
        distributed.all_reduce(sums, group=group)
    return sums.split([len(part) for part in parts])


class Cuts(NamedTuple):
    """How the blocks of a tensor lie on processes, seen from one of them. All numbers are of rows of the whole tensor.

    Args:
        rows: The rows of this process, in their order here.
        first: For each of them, the first row of its block.
        reduced: The first rows of the blocks that are to be added up over processes: the same list on all
            processes that add.
        dims: The dimensions of the mesh along which they are added up.
    """

    rows: Tensor
    first: Tensor
    reduced: Tensor
    dims: tuple[int, ...]


def cuts_of(parameter: Any, layout: Layout) -> Cuts | None:
    """How the blocks of a DTensor lie on processes; ``None`` where each row is a whole block, or nothing is cut.

    Raises:
        RuntimeError: The parameter is cut in a way that is not known here.
    """
    mesh, part = parameter.device_mesh, local(parameter)
    for placement in parameter.placements:
        if _axis(placement) is None and not placement.is_replicate():
            raise RuntimeError(
                f"AdamMini does not train parameters that are placed as {placement}, only replicated and sharded ones"
            )
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return None  # on other processes, nothing of it is here
    cuts = find_cuts(
        layout, tuple(parameter.shape), tuple(mesh.shape), tuple(coordinate), tuple(parameter.placements), part.device
    )
    if cuts is not None and len(cuts.rows) != math.prod(layout.state_shape(part.shape)):
        raise RuntimeError(
            f"a tensor of shape {tuple(parameter.shape)} placed as {parameter.placements} on {mesh} has "
            f"{tuple(part.shape)} on process {tuple(coordinate)}, where {len(cuts.rows)} rows were expected: it was "
            "not cut as torch cuts tensors"
        )
    return cuts


@lru_cache(maxsize=1024)
def find_cuts(
    layout: Layout,
    shape: tuple[int, ...],
    mesh_shape: tuple[int, ...],
    coordinate: tuple[int, ...],
    placements: tuple[Any, ...],
    device: torch.device,
) -> Cuts | None:
    """As :func:`cuts_of`, for any process of any mesh.

    Args:
        layout: The tensor's blocks.
        shape: Its whole shape.
        mesh_shape: The extents of the mesh.
        coordinate: Which process of the mesh.
        placements: How the tensor is placed along each dimension of the mesh.
        device: Where the row numbers are to be used.
    """
    sharded = [dim for dim, placement in enumerate(placements) if _axis(placement) is not None and mesh_shape[dim] > 1]
    by_rows = [dim for dim in sharded if _axis(placements[dim]) in layout.axes]
    by_columns = [dim for dim in sharded if dim not in by_rows]
    if not sharded or (layout.is_each_row and not by_columns):
        return None
    block, rows = layout.block_index(shape).reshape(-1), torch.arange(layout.rows)
    owners = _owners(shape, mesh_shape, placements)

    # Along which dimensions of the mesh a block lies on more than one process.
    cut = {dim: torch.ones(layout.num_blocks, dtype=torch.bool) for dim in by_columns}
    of_rows = {}
    for dim in by_rows:
        of_rows[dim] = _along(owners[dim], _axis(placements[dim]), layout.state_shape(shape))
        cut[dim] = _per_block(block, of_rows[dim], layout, "amin") != _per_block(block, of_rows[dim], layout, "amax")
    dims = tuple(dim for dim in sharded if cut[dim].any())

    here = torch.ones(layout.rows, dtype=torch.bool)
    together = here.clone()  # the rows on all processes that add up with this one
    for dim in by_rows:
        mine = of_rows[dim] == coordinate[dim]
        here &= mine
        if dim not in dims:
            together &= mine
    first = _per_block(block, rows, layout, "amin")
    candidates = block[together].unique()
    is_cut = torch.stack([cut[dim] for dim in sharded]).any(dim=0)
    reduced = first[candidates[is_cut[candidates]]]
    return Cuts(rows[here].to(device), first[block[here]].to(device), reduced.to(device), dims)


def _per_block(block: Tensor, values: Tensor, layout: Layout, reduce: str) -> Tensor:
    """The least or greatest of the values of a block's rows."""
    return values.new_zeros(layout.num_blocks).scatter_reduce_(0, block, values, reduce, include_self=False)


def _along(values: Tensor, axis: int | None, shape: tuple[int, ...]) -> Tensor:
    """One value for each position along an axis, as one for each row."""
    return values.view([-1 if i == axis else 1 for i in range(len(shape))]).expand(shape).reshape(-1)


def _owners(shape: tuple[int, ...], mesh_shape: tuple[int, ...], placements: tuple[Any, ...]) -> dict[int, Tensor]:
    """For each dimension of the mesh that cuts, which process along it has each position of the axis that it cuts."""
    owners: dict[int, Tensor] = {}
    held: dict[int, list[Tensor]] = {}
    for dim, placement in enumerate(placements):
        axis = _axis(placement)
        if axis is None:
            continue
        owner = torch.empty(shape[axis], dtype=torch.long)
        parts = []
        for positions in held.get(axis, [torch.arange(shape[axis])]):
            # FSDP cuts what tensor parallelism has cut before it into this many pieces, and says so on its own,
            # earlier dimension of the mesh: a process gets a part of each piece, of which the other cut leaves one.
            pieces = [_chunks(piece, mesh_shape[dim]) for piece in _chunks(positions, _pieces(placement))]
            for process, of_process in enumerate(zip(*pieces)):
                parts.append(torch.cat(of_process))
                owner[parts[-1]] = process
        held[axis], owners[dim] = parts, owner
    return owners


def _chunks(positions: Tensor, count: int) -> list[Tensor]:
    """Cuts as ``torch.chunk`` does, into as many parts as asked for: the last may be empty."""
    length = math.ceil(len(positions) / count)
    return [positions[i * length : (i + 1) * length] for i in range(count)]


def _axis(placement: Any) -> int | None:
    """The axis that a placement cuts, if it does."""
    return getattr(placement, "dim", None)


def _pieces(placement: Any) -> int:
    return getattr(placement, "split_factor", 1)


def _row_placements(parameter: Any, layout: Layout) -> list[Any]:
    """How one value a row is placed: cut with the rows, and the same on processes that share rows."""
    from torch.distributed.tensor import Replicate

    return [placement if _axis(placement) in layout.axes else Replicate() for placement in parameter.placements]
