"""A callback for transformers' trainers that logs what the optimizer's state takes."""

from __future__ import annotations

import functools
import logging
from typing import Any

from adam_mini_plugins.memory import OptimizerMemory, measure, report

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_callback import CallbackHandler
except ImportError as error:
    raise ImportError(
        'adam_mini_plugins.callbacks.hf needs transformers: pip install "adam-mini-plugins[hf]"'
    ) from error

logger = logging.getLogger("adam_mini_plugins")


class OptimizerMemoryCallback(TrainerCallback):
    """Logs the memory of the optimizer's state, any optimizer's, and shows it as a table after the first step.

    The metrics go into the first log after the first step, and into a later one if they have changed since.
    Whatever the trainer reports to gets them, and its ``log_history`` too.

    Metrics:
        - ``optimizer/state_bytes``: bytes of state on this process.
        - ``optimizer/state_bytes_all_ranks``: bytes of state on all processes.
        - ``optimizer/adamw_state_bytes``: bytes that torch's AdamW would hold on this process for the same
          parameters and dtypes.
        - ``optimizer/saved_fraction``: the part of AdamW's bytes that is not held, 0 to 1; negative where
          it is more than AdamW's.
        - ``optimizer/second_moment_scalars``: numbers that stand for second moments on this process.
        - ``optimizer/peak_bytes``: the most bytes that tensors have taken on this process's CUDA device
          so far; not there on other devices.

    The table appears on rank 0, above the progress bar, or as a log message at level INFO where ``disable_tqdm``
    is set.

    Attributes:
        memory: The last measurement, ``None`` before the first step.

    Example::

        memory = OptimizerMemoryCallback()
        trainer = Trainer(model, args, train_dataset=data, callbacks=[memory])
        trainer.train()
        memory.memory.state_bytes
    """

    def __init__(self) -> None:
        self.memory: OptimizerMemory | None = None
        self._logged: dict[str, float] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.memory, self._logged = None, {}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.memory is None:
            self.memory = measure(kwargs["optimizer"])
            if state.is_world_process_zero:
                self._show(self.memory.table("Memory of the optimizer's state"), args)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.memory is None or logs is None:
            return
        self.memory = measure(kwargs["optimizer"])
        metrics = report(self.memory, args.device)
        if metrics == self._logged:
            return
        self._logged = metrics
        logs.update(metrics)
        if state.log_history:
            state.log_history[-1].update(metrics)  # the trainer has written it before it called us

    @staticmethod
    def _show(table: str, args: TrainingArguments) -> None:
        if args.disable_tqdm:
            logger.info("%s", table)
        else:
            from tqdm.auto import tqdm

            tqdm.write(table)


def _see_logs_first() -> None:
    """Has this callback called with a log before any other is.

    Trainer puts the callbacks of ``report_to``, such as TensorBoard's, before those of its user and tells none of
    them of the others: what the user's add to a log comes too late. Called again in its turn, ours adds nothing.
    """
    call_all: Any = CallbackHandler.on_log

    @functools.wraps(call_all)
    def on_log(
        self: CallbackHandler, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any
    ) -> TrainerControl:
        for callback in self.callbacks:
            if isinstance(callback, OptimizerMemoryCallback):
                callback.on_log(args, state, control, logs=logs, optimizer=self.optimizer)
        return call_all(self, args, state, control, logs)

    CallbackHandler.on_log = on_log  # type: ignore[assignment, method-assign]


_see_logs_first()
