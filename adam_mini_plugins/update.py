"""The arithmetic of one Adam-mini step, as free functions on tensors.

For a parameter ``p`` with gradient ``g`` and momentum ``m``, and for each of its blocks ``b``
(the paper's Algorithm 2)::

    p   <- p * (1 - lr * weight_decay)
    m   <- beta1 * m + (1 - beta1) * g
    v_b <- beta2 * v_b + (1 - beta2) * mean over b of g*g
    p   <- p - lr / (1 - beta1^t) * m / (sqrt(v_b) / sqrt(1 - beta2^t) + eps)

``v`` is held as one value a row, equal inside a block: it broadcasts against the parameter, and it
can be cut, saved and put together again along with the parameter's rows.

Whatever the dtypes of ``p``, ``g`` and ``m``, the arithmetic is that of ``v``: float32, or float64
for float64 parameters. Each of ``p`` and ``m`` is rounded once, when it is stored.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from .blocks import Layout
from .rounding import key_of_step, round_stochastically_

# Elements handled at a time, which bounds what is held besides: float32 copies of low-precision tensors, which on a
# CPU stay in its cache, stacks of the gradients of small tensors, and what a change of sign takes.
_COPIED_CPU = 2**17
_CHUNK_CPU = 2**18
_CHUNK_ELSEWHERE = 2**25
# On a CPU, tensors of up to so many elements are stacked: for a few, dispatching an operation is what takes time.
_SMALL = 2**14

# What torch takes for a list of tensors.
_Tensors = list[Tensor] | tuple[Tensor, ...]


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
    stochastic_rounding: bool = False,
    seeds: Sequence[int] = (),
    capturable: bool = False,
) -> None:
    """Performs one step for a list of tensors, in place.

    Args:
        params: Parameters.
        grads: Their gradients, of the same shapes.
        exp_avgs: Their momenta, of the same shapes.
        exp_avg_sqs: Their second moments, each of shape ``layout.state_shape(param.shape)``.
        state_steps: For each parameter the number of steps taken so far, a scalar tensor.
        layouts: Their blocks.
        block_means: For each parameter the mean square of its gradient over each row's block, of the second
            moment's shape, where it takes more than the tensor at hand to know it; ``None`` elsewhere.
        lr: Learning rate; a tensor only if ``capturable``.
        beta1: Decay of the momentum.
        beta2: Decay of the second moment.
        weight_decay: Decoupled weight decay, as AdamW's.
        eps: Added to the root of the second moment.
        maximize: Ascend instead of descending.
        stochastic_rounding: Round bfloat16 parameters at random, as :mod:`.rounding` says.
        seeds: For each parameter its :func:`.rounding.seed_of_tensor`, where rounding is at random.
        capturable: No number is read from a tensor, so that a CUDA graph can hold the step; the counts are then on
            the parameters' device.
    """
    steps = _counted(state_steps, capturable)
    at_random = [stochastic_rounding and param.dtype == torch.bfloat16 for param in params]
    for numbers in _batches(params, grads, exp_avgs, layouts, block_means, steps, at_random):
        first = numbers[0]
        step, layout, means = steps[first], layouts[first], block_means[first]
        rates = _Rates(
            decay=1 - lr * weight_decay,
            beta1=beta1,
            beta2=beta2,
            step_size=lr / (1 - beta1**step),
            root_correction=(1 - beta2**step) ** 0.5,
            eps=eps,
            maximize=maximize,
            rounding_key=key_of_step(seeds[first], step) if at_random[first] else None,
        )
        ps, gs, ms, vs = ([of[i] for i in numbers] for of in (params, grads, exp_avgs, exp_avg_sqs))
        _update(ps, gs, ms, vs, layout, means, rates)


def _counted(state_steps: Sequence[Tensor], capturable: bool) -> Sequence[Any]:
    """The numbers of the steps that begin: as plain numbers, unless none may be read."""
    if capturable or not state_steps:
        for step in state_steps:
            step += 1
        return state_steps
    # A plain 1 would be made a tensor for each of them.
    torch._foreach_add_(list(state_steps), torch.ones(()))
    return torch.stack(list(state_steps)).tolist()


def _batches(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    layouts: Sequence[Layout],
    block_means: Sequence[Tensor | None],
    steps: Sequence[Any],
    at_random: Sequence[bool],
) -> Iterable[list[int]]:
    """The numbers of the tensors that are updated together: small ones that are alike, and each other by itself."""
    alike: dict[Any, list[int]] = {}
    for number, (p, g, m, layout, means) in enumerate(zip(params, grads, exp_avgs, layouts, block_means)):
        key: Any = number
        if p.numel() <= _SMALL and means is None and not at_random[number] and _are_plain(p, g, m):
            key = (p.shape, p.dtype, g.dtype, m.dtype, id(layout), steps[number])  # a text has one layout
        alike.setdefault(key, []).append(number)
    for numbers in alike.values():
        size = max(1, _COPIED_CPU // max(params[numbers[0]].numel(), 1))
        yield from (numbers[start : start + size] for start in range(0, len(numbers), size))


def _are_plain(param: Tensor, grad: Tensor, exp_avg: Tensor) -> bool:
    """Whether tensors are on the CPU, have elements, and are of no kind that might not stack."""
    kinds = (Tensor, Parameter)
    return param.is_cpu and param.numel() > 0 and type(param) in kinds and type(grad) is type(exp_avg) is Tensor


class _Rates(NamedTuple):
    """The numbers of one step, those of :func:`adam_mini` with the decays and corrections worked out."""

    decay: float | Tensor
    beta1: float
    beta2: float
    step_size: float | Tensor
    root_correction: float | Tensor
    eps: float
    maximize: bool
    rounding_key: int | Tensor | None


def _update(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    layout: Layout,
    means: Tensor | None,
    rates: _Rates,
) -> None:
    """Updates one tensor, or some small ones that are alike: as many operations for all as for one."""
    (param, *others), grad, exp_avg, exp_avg_sq = params, grads[0], exp_avgs[0], exp_avg_sqs[0]
    copied = any(tensor.dtype != exp_avg_sq.dtype for tensor in (param, grad, exp_avg))
    if others:
        exp_avg_sq, layout = torch.stack(exp_avg_sqs), layout.stacked(len(params))
        grad = torch.stack(grads).to(exp_avg_sq.dtype)
    average(exp_avg_sq, block_means_of(grad, layout, exp_avg_sq) if means is None else means, rates.beta2)
    # The small tensor takes the step size and the division, so that the large ones needn't.
    correction = rates.root_correction
    scale = exp_avg_sq.sqrt().add_(correction * rates.eps).reciprocal_().mul_(correction * rates.step_size)
    if others and not copied:
        _store(exp_avg_sqs, exp_avg_sq.unbind())
        _descend(params, grads, exp_avgs, scale.unbind(), params, rates)
        return
    if others:
        param, exp_avg = (torch.stack(tensors).to(exp_avg_sq.dtype) for tensors in (params, exp_avgs))
    # Its views say where in the tensor their elements are, which only rounding at random needs to know.
    places = param if rates.rounding_key is None else torch.empty(param.shape, device="meta")
    for p, g, m, s, place in _chunks(_limit(param, copied), range(param.dim()), param, grad, exp_avg, scale, places):
        _descend([p], [g], [m], [s], [place], rates)
    if others:
        for tensors, stack in ((params, param), (exp_avgs, exp_avg), (exp_avg_sqs, exp_avg_sq)):
            _store(tensors, stack.unbind())


def _descend(
    params: _Tensors,
    grads: _Tensors,
    exp_avgs: _Tensors,
    scales: _Tensors,
    places: _Tensors,
    rates: _Rates,
) -> None:
    """Updates momenta and parameters in the dtype of the scales, by which the momenta are subtracted."""
    dtype = scales[0].dtype
    gs, ms = _cast(grads, dtype), _cast(exp_avgs, dtype)
    torch._foreach_lerp_(ms, torch._foreach_neg(gs) if rates.maximize else gs, 1 - rates.beta1)
    _store(exp_avgs, ms)
    del gs
    ps = _cast(params, dtype)
    torch._foreach_mul_(ps, rates.decay)
    torch._foreach_addcmul_(ps, ms, scales, value=-1)
    if rates.rounding_key is None:
        _store(params, ps)
    else:
        for param, p, place in zip(params, ps, places):
            round_stochastically_(param, p, place, rates.rounding_key)


def _cast(tensors: _Tensors, dtype: torch.dtype) -> _Tensors:
    """Tensors of one dtype in another: copies, or themselves."""
    return tensors if tensors[0].dtype == dtype else [tensor.to(dtype) for tensor in tensors]


def _store(targets: _Tensors, values: _Tensors) -> None:
    """Rounds results to where they belong, unless that is where they are."""
    if values is not targets:
        torch._foreach_copy_(targets, values)


def block_means_of(grad: Tensor, layout: Layout, like: Tensor) -> Tensor:
    """The mean square of a gradient over each row's block, in the shape of ``like``, a second moment.

    In its dtype; on a CPU in float64 where that overflows, as that of float32 does from 1.8e19 on, while a second
    moment takes only a share of it.
    """
    dtypes = (like.dtype, torch.float64) if grad.device.type == "cpu" else (like.dtype,)  # elsewhere a check waits
    for dtype in dtypes:
        squares = row_squares(grad, layout.axes, dtype)
        means = layout.block_mean(squares.mul_(squares.numel() / max(grad.numel(), 1)))
        if dtype == dtypes[-1] or math.isfinite(means.sum()):
            break
    return means


def row_squares(grad: Tensor, axes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The sum of squares of each row of a gradient.

    Args:
        grad: The gradient.
        axes: The axes that number the rows.
        dtype: In which to add up.

    Returns:
        A tensor with extent 1 along all other axes.
    """
    sums = grad.new_empty([size if axis in axes else 1 for axis, size in enumerate(grad.shape)], dtype=dtype)
    inside = [axis for axis in range(grad.dim()) if sums.shape[axis] != grad.shape[axis]]
    # vector_norm reads the gradient once; the sum of a square would first write the square out.
    for g, part in [(grad, sums)] if grad.dtype == dtype else _chunks(_limit(grad, True), axes, grad, sums):
        part.copy_(torch.linalg.vector_norm(g.to(dtype), dim=inside, keepdim=True) if inside else g)
    return sums.square_()


def average(exp_avg_sq: Tensor, means: Tensor, beta2: float) -> None:
    """Updates a second moment by the mean squares of a gradient."""
    exp_avg_sq.mul_(beta2).add_(means, alpha=1 - beta2)


def second_moment_dtype(parameter: Tensor) -> torch.dtype:
    """The dtype of a parameter's second moment, and of the arithmetic of its step."""
    # In bfloat16, beta2 = 0.999 would leave it where it is: the change of a step rounds away.
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def _limit(tensor: Tensor, copied: bool) -> int:
    """The number of elements to handle at a time."""
    return (_COPIED_CPU if copied else _CHUNK_CPU) if tensor.is_cpu else _CHUNK_ELSEWHERE


def _chunks(limit: int, axes: Sequence[int], *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Cuts tensors that broadcast against the first into views of a bounded number of elements each.

    Args:
        limit: That number.
        axes: The axes that may be cut, slowest first.
        tensors: The first decides how to cut; along an axis where another has extent 1, it is not cut.
    """
    first = tensors[0]
    axis = next((axis for axis in axes if first.shape[axis] > 1), None)
    if first.numel() <= limit or axis is None:
        yield tensors
        return
    length = max(1, limit * first.shape[axis] // first.numel())
    # Split at once: each operation takes long in between others that stream through the cache.
    parts = [t.split(length, axis) if t.shape[axis] > 1 else repeat(t) for t in tensors]
    for part in zip(*parts):
        yield from _chunks(limit, axes, *part)
