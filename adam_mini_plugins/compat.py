"""What differs from one installation to the next."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning.pytorch import Callback as LightningCallback
else:

    def _lightning_callback() -> type:
        """One base class for callbacks that the trainers of both Lightning packages take.

        ``lightning.pytorch`` and ``pytorch_lightning`` are the same code under two names, and each tells
        its callbacks by its own class. Installing the first brings the second, so that mostly there are both.
        """
        bases = []
        for package in ("lightning.pytorch", "pytorch_lightning"):
            try:
                bases.append(importlib.import_module(package).Callback)
            except ModuleNotFoundError as error:
                if error.name not in (package, package.partition(".")[0]):
                    raise  # it is installed, and lacks something itself
        if not bases:
            raise ImportError(
                'neither lightning nor pytorch_lightning is installed: pip install "adam-mini-plugins[lightning]"'
            )
        return type("LightningCallback", tuple(bases), {"__module__": __name__, "__doc__": bases[0].__doc__})

    LightningCallback = _lightning_callback()

__all__ = ["LightningCallback"]
