"""What training a model will take: bytes of weights, gradients and optimizer state, before anything is allocated.

The figures are sums over the shapes and dtypes of parameters, so that a model on the meta device is enough.
Adam-mini's come from the same layouts and dtypes as the optimizer's own state, and every prediction is that of
one named implementation: what it would hold after its first step, to the byte.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import Partition, TensorBlocks
from .memory import adamw_state_bytes
from .options import dtype_name, momentum_dtype
from .parameters import trainable_parameters
from .update import second_moment_dtype

_STEP_BYTES = torch.float32.itemsize  # torch's optimizers count steps in float32, each parameter its own

# bitsandbytes' 8-bit optimizers: smaller tensors stay in float32, the others have a scale a block.
_BNB_SMALLEST, _BNB_BLOCK = 4096, 256
_BNB_MAPS = 2 * 256 * torch.float32.itemsize  # what the bytes stand for, signed and unsigned; once a process


@dataclass(frozen=True)
class Shard:
    """What one process holds of a trainable parameter.

    Args:
        tensor: Its part of the parameter, on the meta device.
        blocks: The blocks of the whole parameter.
    """

    tensor: Tensor
    blocks: TensorBlocks


@dataclass(frozen=True)
class Prediction:
    """The bytes that training with one optimizer takes on one process; on the fullest one where they differ.

    Args:
        optimizer: The optimizer's name.
        implementation: Whose state was counted.
        weights: Bytes of the parameters, the frozen ones included. Buffers are not counted.
        gradients: Bytes of the gradients, each in its parameter's dtype.
        state: Bytes of the optimizer's state after its first step, as :func:`~.memory.measure` counts them.
    """

    optimizer: str
    implementation: str
    weights: int
    gradients: int
    state: int

    @property
    def total(self) -> int:
        """Bytes of all three."""
        return self.weights + self.gradients + self.state

    def as_dict(self) -> dict[str, Any]:
        """The figures and their sum by name."""
        return {**asdict(self), "total": self.total}


def predict(
    model: nn.Module,
    blocks: Partition,
    *,
    shards: int = 1,
    state_dtype: str | None = None,
) -> list[Prediction]:
    """Predicts what training takes: Adam-mini first, AdamW second, then the other choices.

    Args:
        model: The model in the dtypes that it trains in, adapters included; the meta device will do.
        blocks: Its partition.
        shards: The number of processes over which each parameter is cut along its first axis, as FSDP2
            does. A process then holds ``ceil(rows / shards)`` rows at most, with their gradients and
            state; the predictions are for the process that holds the most.
        state_dtype: The dtype of Adam-mini's momentum, as for :class:`AdamMini`.

    Raises:
        ValueError: ``shards`` is less than 1, no parameter is trainable, or there is no such dtype.
    """
    state_dtype = dtype_name(state_dtype)
    if shards < 1:
        raise ValueError(f"shards must be 1 or more, got {shards}")
    held = [Shard(_first_shard(p, shards), blocks[name]) for name, p in trainable_parameters(model)]
    weights = sum(_first_shard(p, shards).nbytes for p in model.parameters())
    gradients = sum(shard.tensor.nbytes for shard in held)

    def adam_mini(held: Sequence[Shard]) -> int:
        return sum(adam_mini_state_bytes(shard.tensor, shard.blocks, state_dtype) for shard in held)

    choices: tuple[tuple[str, str, Callable[[Sequence[Shard]], int]], ...] = (
        ("Adam-mini", "adam_mini_plugins.AdamMini", adam_mini),
        ("AdamW", "torch.optim.AdamW", _adamw),
        ("8-bit AdamW", "bitsandbytes.optim.AdamW8bit", _adamw_8bit),
        ("Adafactor", "transformers.Adafactor", _adafactor),
        ("Lion", "bitsandbytes.optim.Lion", _lion),
        ("Muon", "torch.optim.Muon, with AdamW for what it doesn't take", _muon),
    )
    return [Prediction(name, made_by, weights, gradients, state(held)) for name, made_by, state in choices]


def _first_shard(parameter: Tensor, shards: int) -> Tensor:
    """The first of the parts that a parameter is cut into along its first axis: none is larger."""
    shape = list(parameter.shape)
    if shape:
        shape[0] = math.ceil(shape[0] / shards)
    return torch.empty(shape, dtype=parameter.dtype, device="meta")


def adam_mini_state_bytes(parameter: Tensor, blocks: TensorBlocks, state_dtype: str | None = None) -> int:
    """Bytes of state that AdamMini holds for a parameter, or for some of its rows."""
    momentum = parameter.numel() * momentum_dtype(parameter, state_dtype).itemsize
    second_moments = math.prod(blocks.layout.state_shape(parameter.shape))
    return momentum + second_moments * second_moment_dtype(parameter).itemsize + _STEP_BYTES


def _adamw(held: Sequence[Shard]) -> int:
    return sum(adamw_state_bytes(shard.tensor) for shard in held)


def _adamw_8bit(held: Sequence[Shard]) -> int:
    """Two moments of a byte each and a float32 scale a block of them; in small tensors, of float32."""
    sizes = [shard.tensor.numel() for shard in held]
    large = [size for size in sizes if size >= _BNB_SMALLEST]
    scales = sum(math.ceil(size / _BNB_BLOCK) for size in large) * torch.float32.itemsize
    small = (sum(sizes) - sum(large)) * torch.float32.itemsize
    return 2 * (sum(large) + scales + small) + (_BNB_MAPS if large else 0)


def _adafactor(held: Sequence[Shard]) -> int:
    """A row and a column of second moments a matrix, without momentum; one number more, the parameter's scale."""
    total = 0
    for shard in held:
        *outer, rows, columns = (1, 1, *shard.tensor.shape)
        factors = math.prod(outer) * (rows + columns) if shard.tensor.ndim > 1 else shard.tensor.numel()
        total += (factors + 1) * max(shard.tensor.element_size(), torch.float32.itemsize)
    return total


def _lion(held: Sequence[Shard]) -> int:
    """A momentum in float32, whatever the parameter's dtype."""
    return sum(shard.tensor.numel() for shard in held) * torch.float32.itemsize


def _muon(held: Sequence[Shard]) -> int:
    """A momentum for hidden matrices; AdamW's state for embeddings, the output, vectors and stacks of matrices."""
    return sum(shard.tensor.nbytes if _is_hidden_matrix(shard) else adamw_state_bytes(shard.tensor) for shard in held)


def _is_hidden_matrix(shard: Shard) -> bool:
    return shard.tensor.ndim == 2 and shard.blocks.role not in ("embedding", "output", "vector")
