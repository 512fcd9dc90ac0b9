"""What an optimizer's state takes, measured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, distributed

from .sharding import local

# The names under which optimizers keep second moments, whole or in factors: torch's Adams and what follows them;
# bitsandbytes; transformers' and torch's Adafactor; RMSprop.
SECOND_MOMENTS = frozenset(
    {"exp_avg_sq", "state2", "exp_avg_sq_row", "exp_avg_sq_col", "row_var", "col_var", "variance", "square_avg"}
)


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
        parameters: Numbers that are trained with this state.
        bytes_by_device: ``state_bytes`` by where they lie, as ``"cuda:0"``, or ``"cpu"`` for offloaded state.
    """

    state_bytes: int
    adamw_state_bytes: int
    second_moment_scalars: int
    parameters: int
    bytes_by_device: dict[str, int]

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

    def table(self, title: str) -> str:
        """The figures as a table for people, bytes in decimal units."""
        rows = [
            ("state", _in_units(self.state_bytes)),
            *((f"  on {device}", _in_units(size)) for device, size in self.bytes_by_device.items()),
            ("AdamW's would be", _in_units(self.adamw_state_bytes)),
            ("saved", f"{self.saved_fraction:.1%}"),
            ("parameters trained", f"{self.parameters:,}"),
            ("second moments", f"{self.second_moment_scalars:,}"),
        ]
        if len(self.bytes_by_device) < 2:
            rows = [row for row in rows if not row[0].startswith(" ")]
        left, right = (max(len(row[i]) for row in rows) for i in (0, 1))
        lines = [f"{name:{left}} | {figure:>{right}}" for name, figure in rows]
        rule = "-" * max(len(title), left + right + 3)
        return "\n".join([title, rule, *lines, rule])


def measure(*optimizers: HasState) -> OptimizerMemory:
    """Measures the state of torch optimizers after their first step; before it there is none.

    Any optimizer will do that keeps ``state`` and ``param_groups`` as torch's do: with low-bit state
    (tensor subclasses count with the tensors inside), with state that several parameters share or
    that lies on another device, and wrapped in others that hold it as ``optimizer``. Of sharded
    parameters this process's part counts.

    Args:
        optimizers: One optimizer, or all of a module's.
    """
    inner = [_unwrap(optimizer) for optimizer in optimizers]
    # Engines may show an optimizer its parameters during a step alone: what has state was one of them.
    held = [p for optimizer in inner for group in optimizer.param_groups for p in group["params"]]
    held += [p for optimizer in inner for p, state in optimizer.state.items() if state and isinstance(p, Tensor)]
    params = list(dict.fromkeys(held))
    stateful = {p for optimizer in inner for p in params if optimizer.state.get(p)}
    # Plain SGD holds nothing, and is compared by all that it trains. Others hold nothing for what had no gradient.
    trained = [p for p in params if p in stateful or (not stateful and p.requires_grad)]
    states = [state for optimizer in inner for state in optimizer.state.values()]
    second_moments = [value for state in states for key, value in _items(state) if key in SECOND_MOMENTS]
    storages = _storages(tensor for state in states for tensor in _tensors(state))
    by_device: dict[str, int] = {}
    for storage in storages:
        by_device[str(storage.device)] = by_device.get(str(storage.device), 0) + storage.nbytes()
    return OptimizerMemory(
        state_bytes=sum(by_device.values()),
        adamw_state_bytes=sum(adamw_state_bytes(p) for p in trained),
        second_moment_scalars=sum(local(v).numel() for v in second_moments if isinstance(v, Tensor)),
        parameters=sum(local(p).numel() for p in trained),
        bytes_by_device=by_device,
    )


def report(memory: OptimizerMemory, device: torch.device) -> dict[str, float]:
    """The figures of a measurement for a log, with those that take more than this process's state.

    All processes have to call it, if there are several.

    Args:
        memory: This process's measurement.
        device: The device that this process trains on.

    Returns:
        ``memory.metrics()``; ``optimizer/state_bytes_all_ranks``; and on a device whose allocator tells,
        ``optimizer/peak_bytes``.
    """
    metrics = memory.metrics()
    total = torch.tensor(memory.state_bytes, dtype=torch.int64, device=device)
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(total)
    metrics["optimizer/state_bytes_all_ranks"] = int(total)
    if device.type == "cuda":
        metrics["optimizer/peak_bytes"] = torch.cuda.max_memory_allocated(device)
    return metrics


def adamw_state_bytes(parameter: Tensor) -> int:
    """Bytes of state that torch's AdamW holds for a parameter: two moments in its dtype and a float32 count."""
    return 2 * local(parameter).numel() * parameter.element_size() + torch.float32.itemsize


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind some tensors, each once however many tensors share it."""
    return sum(storage.nbytes() for storage in _storages(tensors))


def _storages(tensors: Iterable[Tensor]) -> list[torch.UntypedStorage]:
    storages = (plain.untyped_storage() for tensor in tensors for plain in _plain(tensor))
    # An empty storage has no address to tell it by, and nothing to count.
    return list({(str(s.device), s.data_ptr()): s for s in storages if s.nbytes()}.values())


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that hold this process's numbers: those inside a tensor subclass, or itself."""
    tensor = local(tensor)
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _plain(getattr(tensor, name))
    else:
        yield tensor


def _unwrap(optimizer: Any) -> Any:
    """The optimizer that wrappers such as accelerate's, Lightning's and DeepSpeed's hold."""
    while hasattr(getattr(optimizer, "optimizer", None), "param_groups"):
        optimizer = optimizer.optimizer
    return optimizer


def _items(state: Any) -> Iterable[tuple[Any, Any]]:
    return state.items() if isinstance(state, dict) else ()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for member in value.values():
            yield from _tensors(member)
    elif isinstance(value, list | tuple):
        for member in value:
            yield from _tensors(member)


def _in_units(size: float) -> str:
    """Bytes in a unit that leaves up to three digits before the point."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"
