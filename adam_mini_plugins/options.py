"""The options of a group: their checks, and the form in which groups hold them."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

# Options that saved states may be older than, and what the step was without them.
NEW_OPTIONS = {"fused": None, "stochastic_rounding": False, "seed": 0, "capturable": False}


def checked_options(options: dict[str, Any]) -> dict[str, Any]:
    """Hyper-parameters as a group holds them: in range, betas as floats, dtypes by name.

    Raises:
        TypeError: One is no number.
        ValueError: One is out of range; the message names it and its value.
    """
    for option in ("amsgrad", "differentiable"):
        if options.get(option):
            raise ValueError(f"a parameter group has {option}=True, which AdamMini does not have: leave it out")
    for name in ("lr", "eps", "weight_decay"):
        _check_number(name, options[name])
    betas = options["betas"]
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise ValueError(f"betas must be two numbers, got {betas!r}")
    for i, beta in enumerate(betas):
        _check_number(f"betas[{i}]", beta, 1.0)
    if options["fused"] not in (None, True, False):
        raise ValueError(f"fused must be None, True or False, got {options['fused']!r}")
    if isinstance(options["seed"], bool) or not isinstance(options["seed"], int):
        raise ValueError(f"seed must be a whole number, got {options['seed']!r}")
    return {"betas": tuple(float(beta) for beta in betas), "state_dtype": dtype_name(options["state_dtype"])}


def _check_number(name: str, number: Any, limit: float = math.inf) -> None:
    if not isinstance(number, Real | Tensor):
        raise TypeError(f"{name} must be a number, got {number!r}")
    if isinstance(number, Tensor) and number.numel() != 1:
        raise ValueError(f"{name} as a tensor must have one element, got shape {tuple(number.shape)}")
    if not 0.0 <= float(number) < limit:
        allowed = "0 or more" if limit == math.inf else f"at least 0 and less than {limit:g}"
        raise ValueError(f"{name} must be {'finite' if number == math.inf else allowed}, got {number}")


def dtype_name(dtype: torch.dtype | str | None) -> str | None:
    """A floating-point dtype by its name, as ``"bfloat16"``; ``None`` as it is.

    Raises:
        ValueError: It is no floating-point dtype.
    """
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    resolved = getattr(torch, name, None)
    if not isinstance(resolved, torch.dtype) or not resolved.is_floating_point:
        raise ValueError(f"state_dtype must be a floating-point dtype such as torch.bfloat16, got {dtype!r}")
    return name


def momentum_dtype(parameter: Tensor, state_dtype: str | None) -> torch.dtype:
    """The dtype of a parameter's momentum: the one asked for, or the parameter's own."""
    return parameter.dtype if state_dtype is None else getattr(torch, state_dtype)
