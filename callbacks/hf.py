"""A callback for transformers' trainers that logs what the optimizer's state takes."""

from __future__ import annotations

import logging
from typing import Any

from adam_mini_plugins.memory import OptimizerMemory, measure

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise ImportError(
        'adam_mini_plugins.callbacks.hf needs transformers: pip install "adam-mini-plugins[hf]"'
    ) from error

logger = logging.getLogger("adam_mini_plugins")


class OptimizerMemoryCallback(TrainerCallback):
    """Measures the optimizer's state after the first step and adds it to the next log, for any optimizer.

    Metrics:
        ``optimizer/state_bytes``: bytes of state on this process.
        ``optimizer/adamw_state_bytes``: bytes that torch's AdamW would hold for the same parameters
        and dtypes.
        ``optimizer/saved_fraction``: the part of AdamW's bytes that is not held, 0 to 1.
        ``optimizer/second_moment_scalars``: numbers that stand for second moments.

    They go into the trainer's ``log_history``, its progress bar, and whatever reads the logs after
    this callback.

    Attributes:
        memory: The measurement, ``None`` before the first step.

    Example::

        memory = OptimizerMemoryCallback()
        trainer = Trainer(model, args, train_dataset=data, callbacks=[memory])
        trainer.train()
        memory.memory.state_bytes
    """

    def __init__(self) -> None:
        self.memory: OptimizerMemory | None = None
        self._logged = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.memory, self._logged = None, False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.memory is None:
            self.memory = measure(kwargs["optimizer"])
            if state.is_world_process_zero:
                logger.info("optimizer state: %s", self.memory.metrics())

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.memory is None or self._logged or logs is None:
            return
        metrics = self.memory.metrics()
        logs.update(metrics)
        if state.log_history:
            state.log_history[-1].update(metrics)  # the trainer has written it before it called us
        self._logged = True
