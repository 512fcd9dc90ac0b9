"""The ways through a step: the eager form of :mod:`..update`, and fused kernels that do the same faster.

A module of kernels has ``adam_mini``, which takes what :func:`..update.adam_mini` takes, and
``unsupported``, which says why a tensor can't go there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib import import_module
from operator import attrgetter, is_, itemgetter
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import update
from ..blocks import Layout
from . import cpu

_KERNELS = {"cpu": ".cpu", "cuda": ".triton"}


class Members(NamedTuple):
    """Tensors that take a step together, as lists of one length; what each is says :func:`..update.adam_mini`."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    state_steps: list[Tensor]
    layouts: list[Layout]
    block_means: list[Tensor | None]

    def at(self, numbers: Sequence[int]) -> Members:
        """Those with these numbers."""
        return Members._make([column[i] for i in numbers] for column in self)


class Plan:
    """The way that each tensor takes, found out once; good for as long as the tensors stay what they are.

    Args:
        members: The tensors.
        names: What to call them in errors.
        fused: ``None`` for the fastest way that is right for each tensor, ``True`` to insist on a fused
            kernel, ``False`` for the eager form.
        seeds: Of each tensor, to round bfloat16 parameters at random; nothing to round to the nearest.

    Raises:
        RuntimeError: A kernel is insisted on, and there is none for a tensor; the message says why.
    """

    def __init__(
        self, members: Members, names: Sequence[str], fused: bool | None = None, seeds: Sequence[int] = ()
    ) -> None:
        numbers_of: dict[ModuleType, list[int]] = {}
        for number, name in enumerate(names):
            way, why = (update, "") if fused is False else _way_of(members.at([number]))
            if way is update and fused:
                raise RuntimeError(f"fused=True, but no fused kernel can update {name}: {why}. Pass fused=None")
            numbers_of.setdefault(way, []).append(number)
        # Without the gradients, which are freed when a step is over.
        self._members = members._replace(grads=[])
        self._kinds, self._contiguous = _kinds(members.params, members.grads), _contiguous(members.grads)
        self._ways = [
            (way, numbers, [seeds[i] for i in numbers] if seeds else []) for way, numbers in numbers_of.items()
        ]
        self._table = next((cpu.Table(*members.at(of), seeds) for way, of, seeds in self._ways if way is cpu), None)

    def holds(self, params: Sequence[Tensor], grads: Sequence[Tensor], states: Sequence[Any]) -> bool:
        """Whether it is good for a step of these: of tensors with the blocks and no means that it was made for.

        This is most of what a step of small tensors takes, so that loops are in C.

        Args:
            params: The parameters.
            grads: Their gradients.
            states: Their states, ``None`` for those without.
        """
        then = self._members
        return (
            len(params) == len(then.params)
            and all(states)
            and _are(params, then.params)
            and _are(map(itemgetter("exp_avg"), states), then.exp_avgs)
            and _are(map(itemgetter("exp_avg_sq"), states), then.exp_avg_sqs)
            and _are(map(itemgetter("step"), states), then.state_steps)
            and _kinds(params, grads) == self._kinds
            and _contiguous(grads) == self._contiguous
            and (self._table is None or self._table.stands())
        )

    def step(self, grads: list[Tensor], *, lr: float | Tensor, capturable: bool, **rates: Any) -> None:
        """Performs one step.

        Args:
            grads: Gradients for which it holds.
            lr: Learning rate.
            capturable: Whether no number may be read from a tensor.
            **rates: What else :func:`..update.adam_mini` takes.
        """
        members = self._members._replace(grads=grads)
        for way, numbers, seeds in self._ways:
            of_way = members if len(self._ways) == 1 else members.at(numbers)
            if self._table is not None and way is cpu:
                self._table.step(of_way.grads, of_way.block_means, lr=float(lr), **rates)
            else:
                way.adam_mini(
                    *of_way,
                    lr=lr if capturable else float(lr),
                    stochastic_rounding=bool(seeds),
                    seeds=seeds,
                    capturable=capturable,
                    **rates,
                )


def _way_of(member: Members) -> tuple[ModuleType, str]:
    """The module that updates a tensor, and why it is the eager form, if it is."""
    (param,), (grad,), (exp_avg,), (exp_avg_sq,), (step,), (layout,), _ = member
    device = param.device.type
    if device not in _KERNELS:
        return update, f"it is on {device!r}, and there are kernels for {', '.join(_KERNELS)}"
    kernels = import_module(_KERNELS[device], __package__)
    if step.dtype != torch.float32:
        return update, f"its count of steps is {step.dtype}, not float32"
    why = kernels.unsupported(param, grad, exp_avg, exp_avg_sq, layout)
    return (update, why) if why else (kernels, "")


def _are(tensors: Iterable[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether these are the same objects as those, as far as both go."""
    return all(map(is_, tensors, others))


def _kinds(params: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Any]:
    """What the way of a tensor hangs on that can change under the same object, or with a new gradient."""
    dtype, layout = attrgetter("dtype"), attrgetter("layout")
    return [*map(dtype, params), *map(dtype, grads), *map(layout, grads)]


def _contiguous(grads: Sequence[Tensor]) -> list[bool]:
    """The same, where layouts are alike: of a sparse gradient it can't be told."""
    return list(map(Tensor.is_contiguous, grads))
