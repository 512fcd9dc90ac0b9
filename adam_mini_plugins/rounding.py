"""Stochastic rounding to bfloat16: up or down at random, so that the mean is the number itself.

In bfloat16 a step smaller than a 256th of a weight is lost; rounded at random, it is made one time in
so many, and the weights follow their float32 course on average.

The random bits are a function of seed, step and position alone, so every path has the same, a resumed
run goes on with those of the run that it resumes, and nothing is kept. For element ``i`` of a tensor
(its position in this process's part, in row-major order), all in unsigned 32-bit arithmetic that wraps::

    fmix32(h):  h ^= h >> 16;  h *= 0x85EBCA6B;  h ^= h >> 13;  h *= 0xC2B2AE35;  h ^= h >> 16

    seed_of_tensor = fmix32(seed + number of the tensor in the optimizer)
    key            = fmix32(seed_of_tensor + 0x9E3779B9 * step)            # the first step is 1
    random         = fmix32((low 32 bits of i * 0x9E3779B9 + key) ^ fmix32(high 32 bits of i)) >> 16

The 16 random bits are added to the float32's bits, of which the upper 16 are kept: infinities and NaN
stay what they are. ``fmix32`` is the last step of Austin Appleby's MurmurHash3.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B9
_LOW = 0xFFFFFFFF


def fmix32(h: int) -> int:
    """Mixes the bits of a number of 32 bits; of a larger or negative one, the low 32 bits are taken."""
    h &= _LOW
    h = (h ^ (h >> 16)) * 0x85EBCA6B & _LOW
    h = (h ^ (h >> 13)) * 0xC2B2AE35 & _LOW
    return h ^ (h >> 16)


def seed_of_tensor(seed: int, number: int) -> int:
    """A tensor's seed, from the group's and the tensor's number in the optimizer."""
    return fmix32(seed + number)


def key_of_step(seed: int, step: int | float | Tensor) -> int | Tensor:
    """What a tensor's random bits of one step come from, by the tensor's seed and the number of the step."""
    if isinstance(step, Tensor):
        return _fmix32_(step.long() * _GOLDEN + seed)
    return fmix32(seed + _GOLDEN * int(step))


def round_stochastically_(target: Tensor, values: Tensor, places: Tensor, key: int | Tensor) -> None:
    """Rounds float32 values to bfloat16 at random.

    Args:
        target: Where they go, in bfloat16.
        values: Of the same shape, float32.
        places: Of the same shape, a view of a contiguous tensor of the whole tensor's shape that starts at 0: its
            strides say where in the whole the values lie.
        key: Of :func:`key_of_step`.
    """
    index = torch.full((), int(places.storage_offset()), dtype=torch.int64, device=values.device)
    for axis, (size, stride) in enumerate(zip(places.shape, places.stride())):
        along = torch.arange(0, size * stride, stride, device=values.device)
        index = index + along.view([-1 if i == axis else 1 for i in range(places.dim())])
    bits = _fmix32_(((index & _LOW) * _GOLDEN + key) & _LOW ^ _fmix32_(index >> 32)) >> 16
    bits.add_(values.contiguous().view(torch.int32)).bitwise_and_(-0x10000)
    target.copy_(torch.where(values.isfinite(), bits.to(torch.int32).view(torch.float32), values))


def _fmix32_(h: Tensor) -> Tensor:
    """:func:`fmix32` of int64 numbers, in place."""
    h.bitwise_and_(_LOW)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        # The products need 64 bits and may wrap there: the low 32 are right all the same.
        h.bitwise_xor_(h >> shift).mul_(factor).bitwise_and_(_LOW)
    return h.bitwise_xor_(h >> 16)
