"""The Adam-mini step as Triton kernels: :func:`adam_mini_plugins.update.adam_mini` for tensors on a GPU.

A step has to read each gradient, and to read and write each momentum and parameter: 20 bytes a
float32 parameter, where AdamW moves 28. The kernels get there, whatever the number of tensors, in a
few launches:

=================  ==========================================  =============================================
kernel             for                                         bytes moved for a float32 parameter
=================  ==========================================  =============================================
``_step_blocks``   blocks of up to ``_LONGEST`` elements       20: a program holds its blocks in registers
``_square_sums``   longer blocks (a head, a whole vector),     4: what each tile adds
``_averages``      in three phases                             0: adds up what a block's tiles add, in order
``_descend``                                                   20: the parameters, tile by tile
=================  ==========================================  =============================================

Where the rows of a block do not follow one another in memory (the columns of a ``Conv1D``), and where
block means come from other processes, torch's operations replace the first two phases, and ``_descend``
does the rest.

**Which program does what** stands in three tables in device memory. ``programs`` gives each program a
job and its number within the job; a row of ``jobs`` describes a run of equal blocks (a :class:`Span`)
or a whole tensor; a row of ``tensors`` holds the addresses of one tensor with its gradient and state.
The first two depend on shapes alone and are made once. The third is made anew when an address has
changed, as those of gradients do that ``zero_grad`` released. Tables travel from pinned memory, in the
stream's order: nothing waits for the device.

**Numbers that change from step to step** (learning rate, step count) are arguments, which compile
nothing anew. With ``capturable`` the kernels read them from device memory, and work out the bias
corrections themselves, so that a CUDA graph that holds the step follows them. A graph keeps the
addresses that it was captured with: gradients have to stay where they are, as for torch's optimizers.

Sums are added up in a fixed order, without atomics: the same step gives the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..blocks import Layout
from ..blocks.layout import Span
from ..update import block_means_of

# Elements of a program: with 8 warps, 16 of each tensor in the registers of a thread.
_TILE = 4096
# Elements of the longest block that a program holds in registers: 32 of each tensor a thread, with 16 warps.
_LONGEST = 16384
# Rows of a long block whose second moments a program of _averages writes.
_ROWS = 1024
# Bytes of tables kept on the device, those of the plan at hand apart.
_KEPT = 2**26

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

# Columns of the table of tensors. _STEP is the step count's address where it lies on the device, otherwise by how
# many steps the tensor is behind the count that is passed to the kernel.
_PARAM, _GRAD, _EXP_AVG, _EXP_AVG_SQ, _STEP, _SEED, _TENSOR_COLUMNS = map(tl.constexpr, range(7))
# Columns of the table of jobs. A job's rows begin at _START, in _BLOCKS blocks of _SIZE rows. Element i of a tensor
# lies in row (i // _COLUMNS) * _PERIOD + i % _PERIOD: the period is 1 where a row is one piece of memory.
_TENSOR, _START, _BLOCKS, _SIZE, _COLUMNS, _PERIOD, _SUMS, _JOB_COLUMNS = map(tl.constexpr, range(8))


@triton.jit
def _step_blocks(
    programs,
    jobs,
    tensors,
    lr,
    step,
    beta1,
    rest1,
    log_beta1,
    beta2,
    rest2,
    log_beta2,
    weight_decay,
    eps,
    sign,
    P: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    LR_ON_DEVICE: tl.constexpr,
    CAPTURABLE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    """The whole step for ``TILE // WIDTH`` blocks, each of at most ``WIDTH`` elements."""
    job, local = _job(programs, jobs)
    tensor = tensors + tl.load(job + _TENSOR) * _TENSOR_COLUMNS
    size = tl.load(job + _SIZE)
    columns = tl.load(job + _COLUMNS)
    first = local * (TILE // WIDTH)
    row = tl.load(job + _START) + first * size
    blocks = tl.load(job + _BLOCKS) - first

    start = row * columns
    # Runs of blocks of one element are one piece of memory; otherwise a block is what has to be aligned.
    count = 1 if WIDTH == 1 else (size * columns).to(tl.int32)
    if ALIGNED:
        start = tl.multiple_of(start, 8)
        if WIDTH == 1:
            blocks = tl.multiple_of(blocks, 8)
        else:
            count = tl.multiple_of(count, 8)
    block = tl.arange(0, TILE // WIDTH)
    k = tl.arange(0, WIDTH)
    offsets = block[:, None] * count + k[None, :]
    exists = block < blocks
    inside = exists[:, None] & (k < count)[None, :]

    # All loads before anything else, so that they are under way together. The second moment, which is equal in all
    # rows of a block, is read from the first one: before the sum, behind which others may have written it.
    averages = _pointer(tensor, _EXP_AVG_SQ, tl.float32, False) + row
    v = tl.load(averages + block * size, mask=exists, other=0)
    g = tl.load(_pointer(tensor, _GRAD, G, ALIGNED) + start + offsets, mask=inside, other=0).to(tl.float32) * sign
    m_pointers = _pointer(tensor, _EXP_AVG, M, ALIGNED) + start + offsets
    p_pointers = _pointer(tensor, _PARAM, P, ALIGNED) + start + offsets
    m = tl.load(m_pointers, mask=inside, other=0).to(tl.float32)
    p = tl.load(p_pointers, mask=inside, other=0).to(tl.float32)
    lr, step_size, root, key = _rates(tensor, lr, step, log_beta1, log_beta2, LR_ON_DEVICE, CAPTURABLE, STOCHASTIC)

    v = beta2 * v + _weighted_squares(g, rest2 / count, 1)
    m = beta1 * m + rest1 * g
    scale = step_size / (tl.sqrt(v) / root + eps)
    p = p * (1 - lr * weight_decay) - scale[:, None] * m
    tl.store(m_pointers, _rounded(m, M, 0, 0, False), mask=inside)
    tl.store(p_pointers, _rounded(p, P, start + offsets, key, STOCHASTIC), mask=inside)
    if size == 1:
        tl.store(averages + block, v, mask=exists)
    else:
        rows = block[:, None] * size + k[None, :]
        tl.store(averages + rows, v[:, None] + tl.zeros_like(p), mask=exists[:, None] & (k < size)[None, :])


@triton.jit
def _square_sums(programs, jobs, tensors, sums, rest2, G: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr):
    """What a tile of a long block adds to the block's second moment."""
    job, local = _job(programs, jobs)
    tensor = tensors + tl.load(job + _TENSOR) * _TENSOR_COLUMNS
    columns = tl.load(job + _COLUMNS)
    count = tl.load(job + _SIZE) * columns
    tiles = tl.cdiv(count, TILE)
    tile = local % tiles
    start = tl.load(job + _START) * columns + (local // tiles) * count + tile * TILE
    left = tl.minimum(count - tile * TILE, TILE).to(tl.int32)
    if ALIGNED:
        start = tl.multiple_of(start, 8)
        left = tl.multiple_of(left, 8)
    k = tl.arange(0, TILE)
    g = tl.load(_pointer(tensor, _GRAD, G, ALIGNED) + start + k, mask=k < left, other=0).to(tl.float32)
    tl.store(sums + tl.load(job + _SUMS) + local, _weighted_squares(g, rest2 / count, 0))


@triton.jit
def _averages(programs, jobs, tensors, sums, beta2, TILE: tl.constexpr, ROWS: tl.constexpr):
    """The new second moment of ``ROWS`` rows of a long block. Programs of the same block add up the same."""
    job, local = _job(programs, jobs)
    tensor = tensors + tl.load(job + _TENSOR) * _TENSOR_COLUMNS
    size = tl.load(job + _SIZE)
    count = size * tl.load(job + _COLUMNS)
    tiles = tl.cdiv(count, TILE)
    parts = tl.cdiv(size, ROWS)
    block = local // parts
    of_block = sums + tl.load(job + _SUMS) + block * tiles
    k = tl.arange(0, ROWS)
    total = tl.zeros([ROWS], tl.float32)
    for tile in range(0, tiles, ROWS):
        total += tl.load(of_block + tile + k, mask=tile + k < tiles, other=0)
    row = (local % parts) * ROWS + k
    pointers = _pointer(tensor, _EXP_AVG_SQ, tl.float32, False) + tl.load(job + _START) + block * size + row
    v = tl.load(pointers, mask=row < size, other=0)
    tl.store(pointers, beta2 * v + tl.sum(total), mask=row < size)


@triton.jit
def _descend(
    programs,
    jobs,
    tensors,
    lr,
    step,
    beta1,
    rest1,
    log_beta1,
    log_beta2,
    weight_decay,
    eps,
    sign,
    P: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
    LR_ON_DEVICE: tl.constexpr,
    CAPTURABLE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    """Momentum and parameter of a tile, once the second moments are up to date."""
    job, local = _job(programs, jobs)
    tensor = tensors + tl.load(job + _TENSOR) * _TENSOR_COLUMNS
    columns = tl.load(job + _COLUMNS)
    period = tl.load(job + _PERIOD)
    elements = tl.load(job + _BLOCKS) * tl.load(job + _SIZE) * columns
    start = tl.load(job + _START) * columns + local * TILE
    left = tl.minimum(elements - local * TILE, TILE).to(tl.int32)
    # The tile's first element tells the first row in 64 bits; from there on 32 are enough.
    outer = (start // columns) * period
    k = tl.arange(0, TILE)
    row = (((start % columns).to(tl.int32) + k) // columns.to(tl.int32)) * period.to(tl.int32)
    row += ((start % period).to(tl.int32) + k) % period.to(tl.int32)
    if ALIGNED:
        start = tl.multiple_of(start, 8)
        left = tl.multiple_of(left, 8)
    inside = k < left

    m_pointers = _pointer(tensor, _EXP_AVG, M, ALIGNED) + start + k
    p_pointers = _pointer(tensor, _PARAM, P, ALIGNED) + start + k
    g = tl.load(_pointer(tensor, _GRAD, G, ALIGNED) + start + k, mask=inside, other=0).to(tl.float32) * sign
    m = tl.load(m_pointers, mask=inside, other=0).to(tl.float32)
    p = tl.load(p_pointers, mask=inside, other=0).to(tl.float32)
    v = tl.load(_pointer(tensor, _EXP_AVG_SQ, tl.float32, False) + outer + row, mask=inside, other=0)
    lr, step_size, root, key = _rates(tensor, lr, step, log_beta1, log_beta2, LR_ON_DEVICE, CAPTURABLE, STOCHASTIC)

    m = beta1 * m + rest1 * g
    p = p * (1 - lr * weight_decay) - step_size / (tl.sqrt(v) / root + eps) * m
    tl.store(m_pointers, _rounded(m, M, 0, 0, False), mask=inside)
    tl.store(p_pointers, _rounded(p, P, start + k, key, STOCHASTIC), mask=inside)


@triton.jit
def _job(programs, jobs):
    """The row of this program's job, and the program's number within it."""
    entry = programs + tl.program_id(0).to(tl.int64) * 2
    return jobs + tl.load(entry).to(tl.int64) * _JOB_COLUMNS, tl.load(entry + 1).to(tl.int64)


@triton.jit
def _pointer(tensor, COLUMN: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """An address from the table of tensors, as a pointer."""
    pointer = tl.load(tensor + COLUMN).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _weighted_squares(g, weight, AXIS: tl.constexpr):
    """The sum of squares times a weight, which float32 may hold where it holds none of the squares."""
    near = tl.sum(g * g, AXIS)
    far = g * 2.0**-32
    far = tl.sum(far * far, AXIS)
    return tl.where(near < float("inf"), near * weight, far * weight * 2.0**64)


@triton.jit
def _rates(
    tensor,
    lr,
    step,
    log_beta1,
    log_beta2,
    LR_ON_DEVICE: tl.constexpr,
    CAPTURABLE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    """Learning rate, step size and root of the second moment's correction, and the key of the step's random numbers."""
    if LR_ON_DEVICE:
        lr = tl.load(lr).to(tl.float32)
    column = tl.load(tensor + _STEP)
    if CAPTURABLE:
        step = tl.load(column.to(tl.pointer_type(tl.float32)))
    else:
        step -= column.to(tl.float32)
    key = step.to(tl.int32).to(tl.uint32)
    if STOCHASTIC:
        key = _mixed(tl.load(tensor + _SEED).to(tl.uint32) + key * 0x9E3779B9)
    return lr, lr / _one_minus_power(log_beta1, step), tl.sqrt(_one_minus_power(log_beta2, step)), key


@triton.jit
def _one_minus_power(log_base, exponent):
    """``1 - base**exponent`` to the last bits of float32: near 0, where the difference loses them, by the series."""
    x = log_base * exponent
    near = tl.maximum(x, -1.0)
    series = 1.0
    for i in tl.static_range(11):
        series = 1 + near / (12 - i) * series
    return tl.where(x > -1, -near * series, 1 - tl.exp(x))


@triton.jit
def _rounded(value, DTYPE: tl.constexpr, position, key, STOCHASTIC: tl.constexpr):
    """A value as it is stored: the nearest there is or, in bfloat16, up or down at random.

    To cut a bfloat16 out of a float32's bits rounds to nearest (ties to even) or at random, by what is added before.
    The random bits are a hash of the element's position in its tensor and the step's key.
    """
    if DTYPE == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        if STOCHASTIC:
            high = _mixed((position >> 32).to(tl.uint32))
            added = _mixed((position.to(tl.uint32) * 0x9E3779B9 + key) ^ high) >> 16
        else:
            added = 0x7FFF + ((bits >> 16) & 1)
        cut = ((bits + added) & 0xFFFF0000).to(tl.float32, bitcast=True)
        value = tl.where((bits & 0x7F800000) == 0x7F800000, value, cut)
    return value.to(DTYPE)


@triton.jit
def _mixed(x):
    """The 32 bits well mixed: the finalizer of MurmurHash3."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


_INTERPRETED = not isinstance(_mixed, triton.JITFunction)


def unsupported(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, layout: Layout) -> str | None:
    """Why the kernels can't take a tensor, in words; ``None`` if they can.

    Under Triton's interpreter (``TRITON_INTERPRET=1``) tensors on a CPU are taken as well.
    """
    tensors = {"parameter": param, "gradient": grad, "momentum": exp_avg, "second moment": exp_avg_sq}
    for name, tensor in tensors.items():
        if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
            return f"its {name} is a {type(tensor).__name__}, which has no memory of its own"
        if tensor.device != param.device:
            return f"its {name} is on {tensor.device}, the parameter on {param.device}"
        if not tensor.is_contiguous():
            return f"its {name} is not contiguous: strides {tensor.stride()} for shape {tuple(tensor.shape)}"
        if tensor.dtype not in ((torch.float32,) if tensor is exp_avg_sq else _DTYPES):
            return f"its {name} is {tensor.dtype}"
    if param.device.type != "cuda" and not (_INTERPRETED and param.device.type == "cpu"):
        return f"it is on {param.device}"
    index = _row_index(param.shape, layout.axes)
    if index is None:
        return f"its rows lie along axes {layout.axes} of shape {tuple(param.shape)}, in between others"
    if index[0] >= 2**31 - _TILE:
        return f"its rows of {index[0]} elements are too long"
    return None


@torch.no_grad()
def adam_mini(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    layouts: Sequence[Layout],
    block_means: Sequence[Tensor | None],
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    maximize: bool,
    capturable: bool = False,
    stochastic_rounding: bool = False,
    seeds: Sequence[int] = (),
) -> None:
    """Performs one step for a list of tensors, in place, as :func:`adam_mini_plugins.update.adam_mini`.

    Args:
        params: Parameters, all on one device, for which :func:`unsupported` has nothing to say.
        grads: As there, like the next five.
        exp_avgs: Momenta.
        exp_avg_sqs: Second moments.
        state_steps: Numbers of steps taken so far, float32 scalars: on the CPU, or with ``capturable`` on the
            parameters' device.
        layouts: Blocks.
        block_means: Block means that are known already.
        lr: Learning rate. A tensor on the parameters' device is read there, by the kernels.
        beta1: Decay of the momentum.
        beta2: Decay of the second moment.
        weight_decay: Decoupled weight decay.
        eps: Added to the root of the second moment.
        maximize: Ascend instead of descending.
        capturable: Read what changes from step to step on the device, so that a CUDA graph can hold the step.
        stochastic_rounding: Round bfloat16 parameters up or down at random instead of to the nearest.
        seeds: For each parameter 32 bits, from which the random numbers come.

    Raises:
        RuntimeError: A CUDA graph is being captured before a first step with these tensors.
    """
    if not params:
        return
    device = params[0].device
    with torch.cuda.device_of(params[0]):
        if _capturing(device) and not capturable:
            raise RuntimeError("a CUDA graph is being captured, which needs an optimizer with capturable=True")
        pointers = [[t.data_ptr() for t in tensors] for tensors in (params, grads, exp_avgs, exp_avg_sqs)]
        if capturable:
            step, steps = 0.0, [count.data_ptr() for count in state_steps]
        else:
            taken = [count.item() for count in state_steps]
            step = max(taken) + 1
            steps = [int(step - 1 - count) for count in taken]
        plan = _plan_for(device, params, grads, exp_avgs, layouts, block_means, pointers)
        columns = [*pointers, steps, list(seeds) if stochastic_rounding else [0] * len(params)]
        tensors = plan.tensors(columns, capturable)

        if capturable:
            torch._foreach_add_(list(state_steps), 1)
        else:
            # On a CPU this is a loop, which would make a tensor of a number for every count.
            torch._foreach_add_(list(state_steps), torch.tensor(1.0), alpha=1.0)
        _average_apart([(grads[i], exp_avg_sqs[i], layouts[i], block_means[i]) for i in plan.apart], beta2)
        on_device = isinstance(lr, Tensor) and lr.device == device
        arguments = {
            "lr": lr if on_device else float(lr),
            "step": float(step),
            "beta1": float(beta1),
            "rest1": 1.0 - beta1,
            "log_beta1": math.log(beta1) if beta1 else -math.inf,
            "beta2": float(beta2),
            "rest2": 1.0 - beta2,
            "log_beta2": math.log(beta2) if beta2 else -math.inf,
            "weight_decay": float(weight_decay),
            "eps": float(eps),
            "sign": -1.0 if maximize else 1.0,
            "LR_ON_DEVICE": on_device,
            "CAPTURABLE": capturable,
            "STOCHASTIC": stochastic_rounding,
        }
        plan.launch(tensors, arguments)
    torch.autograd.graph.increment_version(params)


def _average_apart(members: Sequence[tuple[Tensor, Tensor, Layout, Tensor | None]], beta2: float) -> None:
    """Second moments by torch's operations: of given block means, or where the rows of a block lie apart in memory."""
    if not members:
        return
    averages, means = [], []
    for grad, exp_avg_sq, layout, known in members:
        if known is None:
            known = block_means_of(grad, layout, exp_avg_sq)
        averages.append(exp_avg_sq)
        means.append(known)
    torch._foreach_mul_(averages, beta2)
    torch._foreach_add_(averages, means, alpha=1 - beta2)


@lru_cache(maxsize=4096)
def _row_index(shape: torch.Size, axes: tuple[int, ...]) -> tuple[int, int] | None:
    """How to find an element's row: ``(i // columns) * period + i % period``.

    Returns:
        Columns and period; ``None`` where it takes more than that.
    """
    kinds = groupby(((axis in axes, size) for axis, size in enumerate(shape) if size != 1), key=lambda pair: pair[0])
    runs = [(numbers_rows, math.prod(size for _, size in run)) for numbers_rows, run in kinds]
    if runs and not runs[0][0]:
        runs.insert(0, (True, 1))
    if len(runs) > 3:
        return None
    _, inner, period = ([size for _, size in runs] + [1, 1, 1])[:3]
    return inner * period, period


class _Job(NamedTuple):
    """A row of the table of jobs: a run of equal blocks of a tensor, or all of it."""

    tensor: int
    start: int
    blocks: int
    size: int
    columns: int
    period: int
    sums: int


class _Launch:
    """One launch of a kernel: its tables, and what it was compiled for.

    Args:
        kernel: The kernel.
        jobs: What it has to do.
        programs: How many programs each job takes.
        device: Where the tables go.
        options: The kernel's compile-time arguments, but those that a caller decides.
    """

    def __init__(
        self, kernel: Any, jobs: Sequence[_Job], programs: Sequence[int], device: torch.device, **options: Any
    ) -> None:
        counts = torch.tensor(programs)
        job = torch.repeat_interleave(counts)
        local = torch.arange(len(job)) - (counts.cumsum(0) - counts)[job]
        self._kernel = kernel
        self._programs = _pinned(torch.stack([job, local], dim=1).to(torch.int32), device).to(device, non_blocking=True)
        self._jobs = _pinned(torch.tensor(jobs), device).to(device, non_blocking=True)
        self._options = {"num_warps": 16 if options["TILE"] > 2 * _TILE else 8, **options}

    @property
    def nbytes(self) -> int:
        """Bytes of the tables."""
        return self._programs.nbytes + self._jobs.nbytes

    def __call__(self, tensors: Tensor, arguments: dict[str, Any]) -> None:
        taken = {name: arguments[name] for name in self._kernel.arg_names if name in arguments}
        if "STOCHASTIC" in taken:
            taken["STOCHASTIC"] &= self._options["P"] == tl.bfloat16
        self._kernel[(len(self._programs),)](self._programs, self._jobs, tensors, **taken, **self._options)


class _Plan:
    """The launches of a step, which depend on shapes alone, and the addresses of its tensors as last seen."""

    def __init__(
        self,
        device: torch.device,
        shapes: Iterable[tuple[int, ...]],
        dtypes: Iterable[tuple[torch.dtype, ...]],
        layouts: Sequence[Layout],
        has_means: Iterable[bool],
        aligned: Iterable[bool],
    ) -> None:
        # Tensors whose block means are known already, or take torch's operations to know.
        self.apart: list[int] = []
        short: dict[tuple, list[_Job]] = {}
        long: dict[tuple, list[_Job]] = {}
        rest: dict[tuple, list[_Job]] = {}
        sums = 0
        for number, (shape, types, layout, with_means, vectors) in enumerate(
            zip(shapes, dtypes, layouts, has_means, aligned)
        ):
            if 0 in shape:
                # None of a tensor's elements may be here, but second moments that other processes have too.
                self.apart += [number] * with_means
                continue
            kinds = tuple(_DTYPES[dtype] for dtype in types)
            columns, period = _row_index(shape, layout.axes)  # type: ignore[misc]
            rows = math.prod(layout.state_shape(shape))
            # The layout of a shard may be that of the whole tensor: rows that are blocks are so wherever they lie.
            spans = (Span(0, rows, 1),) if layout.is_each_row else layout.spans
            if with_means or period > 1 or spans is None:
                elements = math.prod(shape)
                self.apart.append(number)
                job = _Job(number, 0, 1, elements // columns, columns, period, 0)
                rest.setdefault((*kinds, vectors and elements % 8 == 0), []).append(job)
                continue
            for span in spans:
                count = span.size * columns
                job = _Job(number, span.start, span.blocks, span.size, columns, period, sums)
                # Vectors of 8 elements must not reach across the ends of blocks; blocks of one element are one piece.
                unit = count if count > 1 else span.blocks
                whole = vectors and unit % 8 == 0 and span.start * columns % 8 == 0
                if count <= _LONGEST:
                    short.setdefault((*kinds, whole, triton.next_power_of_2(count)), []).append(job)
                else:
                    sums += span.blocks * triton.cdiv(count, _TILE)
                    long.setdefault((kinds[1], whole), []).append(job)
                    rest.setdefault((*kinds, whole), []).append(job)

        self.sums = torch.empty(sums, device=device)
        self._launches = []
        for (p, g, m, aligned, width), jobs in short.items():
            tile = max(width, _TILE)
            programs = [triton.cdiv(job.blocks, tile // width) for job in jobs]
            options = {"P": p, "G": g, "M": m, "ALIGNED": aligned, "WIDTH": width, "TILE": tile}
            self._launches.append(_Launch(_step_blocks, jobs, programs, device, **options))
        for (g, aligned), jobs in long.items():
            programs = [job.blocks * triton.cdiv(job.size * job.columns, _TILE) for job in jobs]
            self._launches.append(_Launch(_square_sums, jobs, programs, device, G=g, ALIGNED=aligned, TILE=_TILE))
        if jobs := [job for jobs in long.values() for job in jobs]:
            programs = [job.blocks * triton.cdiv(job.size, _ROWS) for job in jobs]
            self._launches.append(_Launch(_averages, jobs, programs, device, TILE=_TILE, ROWS=_ROWS))
        for (p, g, m, aligned), jobs in rest.items():
            programs = [triton.cdiv(job.blocks * job.size * job.columns, _TILE) for job in jobs]
            options = {"P": p, "G": g, "M": m, "ALIGNED": aligned, "TILE": _TILE}
            self._launches.append(_Launch(_descend, jobs, programs, device, **options))

        self.nbytes = self.sums.nbytes + sum(launch.nbytes for launch in self._launches)
        # Kept, so that no other layout takes their place in memory: the plan is found by their ids.
        self._layouts = list(layouts)
        self._columns: list[list[int]] = []
        self._tensors = torch.empty(len(layouts), _TENSOR_COLUMNS.value, dtype=torch.int64, device=device)
        self._stream = _stream(device)
        self._reserve: Tensor | None = None

    def tensors(self, columns: list[list[int]], capturable: bool) -> Tensor:
        """The table of tensors on the device, brought up to date.

        Args:
            columns: Its columns.
            capturable: Be ready for the capture of a graph.
        """
        device = self._tensors.device
        changed = torch.tensor(columns).t().contiguous() if columns != self._columns else None
        if not _capturing(device):
            if (stream := _stream(device)) != self._stream:
                stream.wait_stream(self._stream)
                self._stream = stream
            if changed is not None:
                self._tensors.copy_(_pinned(changed, device), non_blocking=True)
                self._columns = columns
            if capturable and self._reserve is None:
                self._reserve = _pinned(torch.zeros(self._tensors.shape, dtype=torch.int64), device)
            return self._tensors
        if self._reserve is None:
            raise RuntimeError(_NO_WARM_UP)
        # A graph reads its tables at every replay, and nothing tells when it is gone. New addresses, as of gradients
        # made during the capture, are its own, in memory that was pinned before: during a capture none can be.
        _CAPTURED.append((self, self._reserve))
        if changed is None:
            return self._tensors
        pinned, self._reserve = self._reserve, None
        return pinned.copy_(changed).to(device, non_blocking=True)

    def launch(self, tensors: Tensor, arguments: dict[str, Any]) -> None:
        """Starts all kernels.

        Args:
            tensors: The table of tensors.
            arguments: The kernels' arguments by name; each takes those that it has.
        """
        for launch in self._launches:
            launch(tensors, {**arguments, "sums": self.sums})


_PLANS: dict[tuple, _Plan] = {}
_CAPTURED: list[tuple[_Plan, Tensor]] = []
_NO_WARM_UP = (
    "a CUDA graph is being captured, but the tables of this step are not on the device yet: take a step outside the "
    "capture first, with capturable=True and the same tensors having gradients"
)


def _plan_for(
    device: torch.device,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    layouts: Sequence[Layout],
    block_means: Sequence[Tensor | None],
    pointers: Sequence[Sequence[int]],
) -> _Plan:
    """The plan of a step, made when it is first needed; the newest are kept."""
    shapes = tuple([p.shape for p in params])
    dtypes = tuple([(p.dtype, g.dtype, m.dtype) for p, g, m in zip(params, grads, exp_avgs)])
    has_means = tuple([means is not None for means in block_means])
    aligned = tuple([(p | g | m) % 16 == 0 for p, g, m, _ in zip(*pointers)])  # as vectors of 16 bytes have to be
    key = (device, shapes, dtypes, tuple(map(id, layouts)), has_means, aligned)
    plan = _PLANS.get(key)
    if plan is None:
        if _capturing(device):
            raise RuntimeError(_NO_WARM_UP)
        plan = _PLANS[key] = _Plan(device, shapes, dtypes, layouts, has_means, aligned)
        kept = sum(other.nbytes for other in _PLANS.values()) - plan.nbytes
        while kept > _KEPT:
            kept -= _PLANS.pop(next(iter(_PLANS))).nbytes
    return plan


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _stream(device: torch.device) -> Any:
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def _pinned(host: Tensor, device: torch.device) -> Tensor:
    """A tensor in memory from which a copy to the device needs no waiting."""
    return host.pin_memory() if device.type == "cuda" else host
