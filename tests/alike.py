"""State dicts compared bit for bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def flat(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state dict as paths and values, that can be compared."""

    def walk(path: str, part: Any) -> Any:
        if isinstance(part, dict | list | tuple):
            items = part.items() if isinstance(part, dict) else enumerate(part)
            for key, value in items:
                yield from walk(f"{path}/{key}", value)
            yield f"{path} is a", type(part).__name__
        else:
            yield path, part

    return dict(walk("", state_dict))


def alike(left: dict[str, Any], right: dict[str, Any], but: str = "\0") -> bool:
    """Whether two state dicts are alike bit for bit, in types and dtypes too."""
    left, right = ({k: v for k, v in flat(d).items() if but not in k} for d in (left, right))

    def equal(a: Any, b: Any) -> bool:
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
        return type(a) is type(b) and a == b

    return left.keys() == right.keys() and all(equal(value, right[key]) for key, value in left.items())
