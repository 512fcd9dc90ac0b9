"""The ways through a step: the eager form of :mod:`..update`, and fused kernels that do the same faster.

A module of kernels has ``adam_mini``, which takes what :func:`..update.adam_mini` takes, and
``unsupported``, which says why a tensor can't go there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib import import_module
from operator import is_, itemgetter
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
        return Members._make(_picked(column, numbers) for column in self)


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
        self._tabled = numbers_of.pop(cpu, [])
        of_table = _picked(seeds, self._tabled) if seeds else []
        self._table = cpu.Table(*members.at(self._tabled), of_table) if self._tabled else None
        self._others = [(way, of, _picked(seeds, of) if seeds else []) for way, of in numbers_of.items()]
        self._kinds = self._kinds_of(members.params, members.grads)

    def prefetch(self) -> None:
        """Asks for what a step looks at, which of many small tensors is most of its time."""
        if self._table is not None:
            self._table.prefetch()

    def holds(self, params: list[Tensor], grads: list[Tensor], states: Sequence[Any]) -> bool:
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
            and same(params, then.params)
            and same(map(itemgetter("exp_avg"), states), then.exp_avgs)
            and same(map(itemgetter("exp_avg_sq"), states), then.exp_avg_sqs)
            and same(map(itemgetter("step"), states), then.state_steps)
            and self._kinds_of(params, grads) == self._kinds
            and (self._table is None or self._table.holds(_picked(grads, self._tabled)))
        )

    def _kinds_of(self, params: list[Tensor], grads: list[Tensor]) -> list[Any]:
        """What the way of a tensor hangs on that can change under the same object, or with a new gradient.

        Only of those that are in no table, which looks at all of it itself.
        """
        kinds: list[Any] = []
        for _, numbers, _ in self._others:
            for p, g in zip(_picked(params, numbers), _picked(grads, numbers)):
                # Of a sparse gradient it can't be told whether it is contiguous.
                kinds.append((p.shape, p.dtype, g.dtype, g.layout == torch.strided and g.is_contiguous()))
        return kinds

    def step(self, grads: list[Tensor], *, lr: float | Tensor, capturable: bool, **rates: Any) -> None:
        """Performs one step.

        Args:
            grads: Gradients for which it holds.
            lr: Learning rate.
            capturable: Whether no number may be read from a tensor.
            **rates: What else :func:`..update.adam_mini` takes.
        """
        members = self._members._replace(grads=grads)
        if self._table is not None:
            means = _picked(members.block_means, self._tabled)
            self._table.step(_picked(grads, self._tabled), means, lr=float(lr), **rates)
        for way, numbers, seeds in self._others:
            way.adam_mini(
                *members.at(numbers),
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


def same(tensors: Iterable[Tensor], others: Iterable[Tensor]) -> bool:
    """Whether these are the same objects as those, as far as both go."""
    return all(map(is_, tensors, others))


def _picked(column: Any, numbers: Sequence[int]) -> Any:
    """Those of a column with these numbers, which rise: the column itself where that is all."""
    return column if len(numbers) == len(column) else [column[i] for i in numbers]
