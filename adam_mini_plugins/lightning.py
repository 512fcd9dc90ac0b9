"""The door into Lightning: a callback that makes AdamMini of what ``configure_optimizers`` returns as AdamW."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from torch.optim import Optimizer

from .blocks import partition
from .convert import adam_mini_, is_adam
from .lightning_base import LightningCallback
from .optimizer import AdamMini

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

logger = logging.getLogger(__name__)


class AdamMiniOptimizer(LightningCallback):
    """Trains with AdamMini where a module's ``configure_optimizers`` says Adam or AdamW.

    The optimizers keep their groups and hyper-parameters and stay the same objects, so schedulers go
    on driving them. It works in each form that Lightning allows, one optimizer or several, with
    schedulers or without, automatic or manual. ``AdamMini`` written out in ``configure_optimizers``
    is left as it is, and this callback is not needed then.

    Args:
        scheme: How the module is partitioned into blocks, as for :func:`adam_mini_plugins.partition`,
            like the next two.
        value: How attention values are cut.
        rules: Rules of your own, tried first: pairs of a pattern on the parameter's name and what its
            blocks are, such as ``["net.mixer.weight", "16 heads"]``.
        state_dtype: The momentum's dtype, as ``"bfloat16"``; each parameter's own by default.
        others: What to do with any other optimizer: ``"error"``, or ``"keep"`` it as it is.

    Raises:
        ValueError: An argument is none of its choices.
        TypeError: When the fit starts: an optimizer that is neither Adam nor AdamW.
        ValueError: When the fit starts: an option that AdamMini has no equal to, such as ``amsgrad``.
        PartitionError: When the fit starts: a parameter whose blocks can't be told; ``rules`` says what they are.

    Example::

        trainer = Trainer(callbacks=[AdamMiniOptimizer()])
        trainer.fit(module)

    In the YAML file of a ``LightningCLI``::

        trainer:
          callbacks:
            - class_path: adam_mini_plugins.lightning.AdamMiniOptimizer
              init_args: {value: whole}
    """

    def __init__(
        self,
        scheme: Literal["auto", "hessian", "tensor"] = "auto",
        value: Literal["neuron", "whole"] = "neuron",
        rules: Sequence[tuple[str, str]] = (),
        state_dtype: str | None = None,
        others: Literal["error", "keep"] = "error",
    ) -> None:
        if others not in ("error", "keep"):
            raise ValueError(f"others must be one of 'error', 'keep', got {others!r}")
        self.scheme = scheme
        self.value = value
        self.rules = tuple((pattern, blocks) for pattern, blocks in rules)
        self.state_dtype = state_dtype
        self.others = others
        self._restore: Callable[[], None] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Wraps ``configure_optimizers``, which Lightning calls once ``configure_model`` has built the layers."""
        if stage == "fit":
            self._unwrap()
            self._wrap(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leaves the module as it was."""
        self._unwrap()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leaves the module as it was."""
        self._unwrap()

    def _wrap(self, module: LightningModule) -> None:
        own = vars(module).get("configure_optimizers")  # set by LightningCLI, for one
        configure = module.configure_optimizers

        # A function, not a bound method or a partial: copies of the module share it instead of copying the module.
        @functools.wraps(configure)
        def configure_optimizers() -> Any:
            configured = configure()
            self._convert(module, list(_optimizers(configured)))
            return configured

        def restore() -> None:
            if own is None:
                vars(module).pop("configure_optimizers", None)
            else:
                vars(module)["configure_optimizers"] = own

        vars(module)["configure_optimizers"] = configure_optimizers
        self._restore = restore

    def _unwrap(self) -> None:
        if self._restore is not None:
            self._restore()
            self._restore = None

    def _convert(self, module: LightningModule, optimizers: list[Optimizer]) -> None:
        if self.others == "error":
            for optimizer in optimizers:
                if not is_adam(optimizer) and not isinstance(optimizer, AdamMini):
                    kind = type(optimizer)
                    raise TypeError(
                        f"configure_optimizers of {type(module).__name__} returned {kind.__module__}.{kind.__name__}, "
                        "and AdamMiniOptimizer converts torch.optim.Adam and AdamW alone: return one of these, or keep "
                        'what it returned with AdamMiniOptimizer(others="keep")'
                    )
        adams = [optimizer for optimizer in optimizers if is_adam(optimizer)]
        if not adams:
            return
        blocks = partition(module, scheme=self.scheme, value=self.value, rules=self.rules)
        for optimizer in adams:
            adam_mini_(optimizer, blocks, state_dtype=self.state_dtype)
        logger.info("%d of %d optimizers converted: %r", len(adams), len(optimizers), blocks)


def _optimizers(configured: Any) -> Iterator[Optimizer]:
    """The optimizers in what ``configure_optimizers`` returned, each once."""
    found: dict[int, Optimizer] = {}

    def walk(part: Any) -> None:
        if isinstance(part, Optimizer):
            found[id(part)] = part
        elif isinstance(part, list | tuple | dict):
            for member in part.values() if isinstance(part, dict) else part:
                walk(member)

    walk(configured)
    return iter(found.values())
