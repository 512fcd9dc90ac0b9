"""A base for Lightning callbacks that both of its packages take."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

# The same code under two names, of which a program imports one. Importing the other as well would have Lightning's
# messages logged by that one.
_LIGHTNINGS = ("lightning.pytorch", "pytorch_lightning")


def _bases() -> tuple[type, ...]:
    """The callback classes of the Lightnings that are imported."""
    return tuple(sys.modules[name].Callback for name in _LIGHTNINGS if hasattr(sys.modules.get(name), "Callback"))


def _import_one() -> tuple[type, ...]:
    for name in _LIGHTNINGS:
        try:
            return (importlib.import_module(name).Callback,)
        except ModuleNotFoundError as error:
            if error.name not in (name, name.partition(".")[0]):
                raise  # it is installed, and lacks something itself
    raise ImportError('Lightning is not installed: pip install "adam-mini-plugins[lightning]"')


if TYPE_CHECKING:
    from lightning.pytorch import Callback as _Callback
else:
    _Callback = type("_Callback", _bases() or _import_one(), {"__module__": __name__})


class LightningCallback(_Callback):
    """A callback for the trainers of ``lightning.pytorch`` and ``pytorch_lightning``, each of which wants its own."""

    def __new__(cls, *args: Any, **kwargs: Any) -> LightningCallback:
        """Makes one that is also a callback of a Lightning imported since this module was."""
        late = tuple(base for base in _bases() if not issubclass(cls, base))
        if late:
            cls = type(cls.__name__, (cls, *late), {"__module__": cls.__module__, "__doc__": cls.__doc__})
        return super().__new__(cls)


__all__ = ["LightningCallback"]
