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

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .blocks import Layout
from .rounding import key_of_step, round_stochastically_

# Elements handled at a time. On a CPU a chunk stays in the cache from one pass to the next; elsewhere
# the bound is on the float32 copies that low-precision tensors need.
_CHUNK_CPU = 2**20
_CHUNK_ELSEWHERE = 2**25


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
    for number, (param, grad, exp_avg, exp_avg_sq, step_t, layout, means) in enumerate(
        zip(params, grads, exp_avgs, exp_avg_sqs, state_steps, layouts, block_means)
    ):
        step_t += 1
        step = step_t if capturable else step_t.item()
        rates = _Rates(
            decay=1 - lr * weight_decay,
            beta1=beta1,
            beta2=beta2,
            step_size=lr / (1 - beta1**step),
            root_correction=(1 - beta2**step) ** 0.5,
            eps=eps,
            maximize=maximize,
            rounding_key=key_of_step(seeds[number], step)
            if stochastic_rounding and param.dtype == torch.bfloat16
            else None,
        )
        _update(param, grad, exp_avg, exp_avg_sq, layout, means, rates)


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
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    layout: Layout,
    means: Tensor | None,
    rates: _Rates,
) -> None:
    # Its views say where in the tensor their elements are, which only rounding at random needs to know.
    places = param if rates.rounding_key is None else torch.empty(param.shape, device="meta")
    if means is None and layout.is_each_row:
        # A row needs nothing but itself: the whole step is done while its gradient is in the cache.
        for p, g, m, v, place in _chunks(layout.axes, param, grad, exp_avg, exp_avg_sq, places):
            average(v, _row_squares(g, v).mul_(v.numel() / max(g.numel(), 1)), rates.beta2)
            _descend(p, g, m, _scaled_denominator(v, rates), place, rates)
        return
    average(exp_avg_sq, block_means_of(grad, layout, exp_avg_sq) if means is None else means, rates.beta2)
    denominator = _scaled_denominator(exp_avg_sq, rates)
    for p, g, m, d, place in _chunks(layout.axes, param, grad, exp_avg, denominator, places):
        _descend(p, g, m, d, place, rates)


def block_means_of(grad: Tensor, layout: Layout, like: Tensor) -> Tensor:
    """The mean square of a gradient over each row's block, in the shape and dtype of ``like``, a second moment."""
    squares = row_squares(grad, layout.axes, like.dtype)
    return layout.block_mean(squares.mul_(squares.numel() / max(grad.numel(), 1)))


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
    for g, part in _chunks(axes, grad, sums):
        part.copy_(_row_squares(g, part))
    return sums


def _row_squares(grad: Tensor, like: Tensor) -> Tensor:
    """The sum of squares of each row, in the shape and dtype of ``like``."""
    axes = [axis for axis, (size, of_grad) in enumerate(zip(like.shape, grad.shape)) if size != of_grad]
    if not axes:
        return grad.to(like.dtype).square()
    # vector_norm reads the gradient once; the sum of a square would first write the square out.
    return torch.linalg.vector_norm(grad.to(like.dtype), dim=axes, keepdim=True).square_()


def average(exp_avg_sq: Tensor, means: Tensor, beta2: float) -> None:
    """Updates a second moment by the mean squares of a gradient."""
    exp_avg_sq.mul_(beta2).add_(means, alpha=1 - beta2)


def _scaled_denominator(exp_avg_sq: Tensor, rates: _Rates) -> Tensor:
    """What the momentum is divided by: the small tensor takes the step size, so that the large ones needn't."""
    return exp_avg_sq.sqrt().div_(rates.root_correction).add_(rates.eps).div_(rates.step_size)


def _descend(param: Tensor, grad: Tensor, exp_avg: Tensor, denominator: Tensor, place: Tensor, rates: _Rates) -> None:
    """Updates momentum and parameter in the denominator's dtype."""
    dtype = denominator.dtype
    # Where the dtypes are alike, to() gives back the tensor itself, and there is nothing to copy back.
    m = exp_avg.to(dtype).lerp_((-grad if rates.maximize else grad).to(dtype), 1 - rates.beta1)
    if m is not exp_avg:
        exp_avg.copy_(m)
    p = param.to(dtype).mul_(rates.decay).addcdiv_(m, denominator, value=-1)
    if rates.rounding_key is not None:
        round_stochastically_(param, p, place, rates.rounding_key)
    elif p is not param:
        param.copy_(p)


def second_moment_dtype(parameter: Tensor) -> torch.dtype:
    """The dtype of a parameter's second moment, and of the arithmetic of its step."""
    # In bfloat16, beta2 = 0.999 would leave it where it is: the change of a step rounds away.
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def _chunks(axes: tuple[int, ...], *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Cuts tensors that broadcast against the first into views of whole rows, a bounded number of elements each.

    Args:
        axes: The axes that number the rows.
        tensors: The first decides how to cut; along an axis where another has extent 1, it is not cut.
    """
    first = tensors[0]
    limit = _CHUNK_CPU if first.device.type == "cpu" else _CHUNK_ELSEWHERE
    axis = next((axis for axis in axes if first.shape[axis] > 1), None)
    if first.numel() <= limit or axis is None:
        yield tensors
        return
    length = max(1, limit * first.shape[axis] // first.numel())
    for start in range(0, first.shape[axis], length):
        size = min(length, first.shape[axis] - start)
        yield from _chunks(axes, *(t.narrow(axis, start, size) if t.shape[axis] > 1 else t for t in tensors))
