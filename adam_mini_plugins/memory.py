"""What an optimizer's state takes, measured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


class HasState(Protocol):
    """What is read of an optimizer; a wrapper that shows its inner optimizer's will do."""

    state: Any
    param_groups: list[dict[str, Any]]


@dataclass(frozen=True)
class OptimizerMemory:
    """The memory of an optimizer's state on this process.

    Args:
        state_bytes: Bytes that the state's tensors occupy, each storage counted once.
        adamw_state_bytes: Bytes that torch's AdamW would hold for the same parameters and dtypes.
        second_moment_scalars: Numbers that stand for second moments.
    """

    state_bytes: int
    adamw_state_bytes: int
    second_moment_scalars: int

    @property
    def saved_fraction(self) -> float:
        """The part of AdamW's state that is not held, 0 to 1; negative where it is more than AdamW's."""
        return 1 - self.state_bytes / self.adamw_state_bytes if self.adamw_state_bytes else 0.0

    def metrics(self) -> dict[str, float]:
        """The figures under the names by which they are logged."""
        return {
            "optimizer/state_bytes": self.state_bytes,
            "optimizer/adamw_state_bytes": self.adamw_state_bytes,
            "optimizer/saved_fraction": self.saved_fraction,
            "optimizer/second_moment_scalars": self.second_moment_scalars,
        }


def measure(optimizer: HasState) -> OptimizerMemory:
    """Measures the state of any torch optimizer, after its first step (before it there is none)."""
    stepped = [p for group in optimizer.param_groups for p in group["params"] if optimizer.state.get(p)]
    states = [optimizer.state[p] for p in stepped]
    second_moments = [state["exp_avg_sq"] for state in states if isinstance(state.get("exp_avg_sq"), Tensor)]
    return OptimizerMemory(
        state_bytes=storage_bytes(tensor for state in states for tensor in _tensors(state)),
        adamw_state_bytes=sum(adamw_state_bytes(p) for p in stepped),
        second_moment_scalars=sum(v.numel() for v in second_moments),
    )


def adamw_state_bytes(parameter: Tensor) -> int:
    """Bytes of state that torch's AdamW holds for a parameter: two moments in its dtype and a float32 count."""
    return 2 * parameter.numel() * parameter.element_size() + torch.float32.itemsize


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind some tensors, each once however many tensors share it."""
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for member in value.values():
            yield from _tensors(member)
    elif isinstance(value, list | tuple):
        for member in value:
            yield from _tensors(member)
