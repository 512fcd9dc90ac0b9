"""What is checked of a state dict before any of it is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from . import sharding
from .options import NEW_OPTIONS, checked_options

_START_ANEW = "Load an earlier checkpoint, or start with the model's weights alone"
_TAKE_OVER = (
    "Take it over with AdamMini.from_adamw(state, partition, params=model.named_parameters()), or in a Trainer with "
    'optim_args="from_adamw=true"; or resume with the optimizer that saved it'
)


def checked_groups(
    state_dict: dict[str, Any], groups: list[dict[str, Any]]
) -> tuple[dict[Any, Any], list[dict[str, Any]]]:
    """The states and the groups of a state dict, which an optimizer with ``groups`` can go on with.

    Raises:
        ValueError: It is not of that form, another optimizer's, damaged, or of other groups or blocks.
    """
    states, saved_groups = _parts(state_dict)
    if len(groups) != len(saved_groups):
        raise ValueError(
            f"the state to load has {len(saved_groups)} parameter groups, this optimizer {len(groups)}: build the "
            "optimizer with the groups that it was saved with"
        )
    keys = {key for saved in saved_groups for key in saved["params"]}
    strangers = [key for key in states if isinstance(key, int) and key not in keys]
    if strangers or len(keys) != sum(len(saved["params"]) for saved in saved_groups):
        raise ValueError(
            f"the state to load is damaged: its groups count {len(keys)} different parameters, and it has state "
            f"for {len(strangers)} that are in none of them. {_START_ANEW}"
        )
    for number, (group, saved) in enumerate(zip(groups, saved_groups)):
        if "blocks" not in saved:
            raise ValueError(foreign(state_dict))
        if len(group["params"]) != len(saved["params"]):
            raise ValueError(
                f"parameter group {number} of the state to load has {len(saved['params'])} parameters, "
                f"this optimizer's has {len(group['params'])}: build it with the parameters that it was saved with"
            )
        _check_saved_group(number, saved, len(group["blocks"]))
        for name, blocks, saved_blocks in zip(group["param_names"], group["blocks"], saved["blocks"]):
            if blocks != saved_blocks:
                raise ValueError(
                    f"{name} has blocks {blocks!r}, but {saved_blocks!r} in the state to load: load it into an "
                    "optimizer made with the partition (scheme, value, rules) that it was saved with, and then "
                    "call optimizer.repartition(partition) if the blocks are to be others"
                )
    return states, saved_groups


def check_state(name: str, parameter: Tensor, second_moments: tuple[int, ...], state: Any) -> None:
    """Raises for a parameter's state that its steps could not go on with.

    Args:
        name: What to call the parameter in the error.
        parameter: The parameter.
        second_moments: The shape of its second moments.
        state: The state to load.

    Raises:
        ValueError: An entry is missing, of another shape, or holds what is no state.
    """
    expected = {"exp_avg": tuple(parameter.shape), "exp_avg_sq": second_moments, "step": ()}
    for entry, shape in expected.items():
        if not isinstance(state, dict) or entry not in state:
            has = sorted(state) if isinstance(state, dict) else state
            raise ValueError(f"the state to load has no {entry!r} for {name}; it has {has}. {_START_ANEW}")
        value = state[entry]
        if not isinstance(value, Tensor) and not (entry == "step" and isinstance(value, Real)):
            raise ValueError(
                f"{entry} of {name} is no tensor in the state to load, but {type(value).__name__}. {_START_ANEW}"
            )
        found = torch.as_tensor(value)
        if found.shape != shape:
            raise ValueError(
                f"{entry} of {name} has shape {tuple(found.shape)} in the state to load, but {shape} in this "
                "optimizer: it is another model's, or was cut. Load the state that was saved with this model"
            )
        if found.is_meta or not (found.is_floating_point() or entry == "step"):
            raise ValueError(f"{entry} of {name} holds no numbers, but {found.dtype} on {found.device}. {_START_ANEW}")
    if not 0 <= float(state["step"]) < math.inf:
        raise ValueError(
            f"step of {name} must be 0 or more in the state to load, got {float(state['step'])}. {_START_ANEW}"
        )
    if (sharding.local(state["exp_avg_sq"]) < 0).any():
        raise ValueError(f"exp_avg_sq of {name}, a mean of squares, is negative in the state to load. {_START_ANEW}")


def foreign(state_dict: dict[str, Any]) -> str:
    """Whose state this is that is not AdamMini's, and what to do: the text of an error."""
    keys = sorted({key for state in state_dict["state"].values() for key in state})
    is_adam = {"exp_avg", "exp_avg_sq"} <= set(keys)
    what = "Adam's or AdamW's: it has a second moment for each element" if is_adam else f"another optimizer's: {keys}"
    return (
        f"the state to load is not AdamMini's but {what}. {_TAKE_OVER if is_adam else 'Resume with what saved it'}, or "
        "start AdamMini without this optimizer state (from the model's weights alone)"
    )


def _parts(state_dict: dict[str, Any]) -> tuple[dict[Any, Any], list[dict[str, Any]]]:
    """The states and the groups of a state dict, of the form that torch gives them."""
    for part, kind in (("state", dict), ("param_groups", list)):
        if not isinstance(state_dict.get(part), kind):
            raise ValueError(
                f"the state to load has no {part!r} that is a {kind.__name__}; it has {_shortened(state_dict)}: pass "
                "what state_dict() returned, of a checkpoint that holds more the optimizer's part"
            )
    states, groups = state_dict["state"], state_dict["param_groups"]
    for number, group in enumerate(groups):
        if not isinstance(group, dict) or not isinstance(group.get("params"), list):
            raise ValueError(f"parameter group {number} of the state to load has no list of 'params'. {_START_ANEW}")
    return states, groups


def _shortened(keys: Iterable[Any]) -> str:
    """Some keys as text, that may be thousands."""
    shown = [repr(key) for key in keys]
    return ", ".join(shown[:4]) + f" and {len(shown) - 4} more" * (len(shown) > 4) or "nothing"


def _check_saved_group(number: int, saved: dict[str, Any], members: int) -> None:
    """Raises for a group of a state to load that could not be gone on with by an optimizer's group of ``members``."""
    where = f"parameter group {number} of the state to load"
    missing = [option for option in ("lr", "betas", "eps", "weight_decay") if option not in saved]
    if missing:
        raise ValueError(f"{where} has no {', '.join(map(repr, missing))}. {_START_ANEW}")
    try:
        checked_options({"state_dtype": None, **NEW_OPTIONS, **saved})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} is damaged: {error}. {_START_ANEW}") from error
    for entry in ("blocks", "param_names"):
        found = saved.get(entry, [None] * members)
        if not isinstance(found, list) or len(found) != members:
            raise ValueError(f"{where} has other {entry!r} than one for each of {members} parameters. {_START_ANEW}")
