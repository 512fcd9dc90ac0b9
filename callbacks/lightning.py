"""A callback for Lightning's trainer that logs what the optimizers' state takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adam_mini_plugins.lightning_base import LightningCallback
from adam_mini_plugins.memory import OptimizerMemory, measure, report

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class OptimizerMemoryMonitor(LightningCallback):
    """Logs the memory of the optimizers' state, any optimizer's, and shows it as a table after the first step.

    The metrics go to each of the trainer's loggers after the first step, and again if they have changed,
    every ``log_every_n_steps``. Several optimizers count together.

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

    The table appears on rank 0, as Lightning's own model summary does.

    Attributes:
        memory: The last measurement, ``None`` before the first step.

    Example::

        trainer = Trainer(callbacks=[AdamMiniOptimizer(), OptimizerMemoryMonitor()])
        trainer.fit(module)
    """

    def __init__(self) -> None:
        self.memory: OptimizerMemory | None = None
        self._logged: dict[str, float] = {}
        self._first_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.memory, self._logged, self._first_step = None, {}, trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        is_first = self.memory is None
        if trainer.global_step == self._first_step or not (is_first or trainer._logger_connector.should_update_logs):
            return
        self.memory = measure(*trainer.optimizers)
        if is_first:
            from lightning_utilities.core.rank_zero import rank_zero_info  # which both Lightnings log by

            rank_zero_info("\n" + self.memory.table("Memory of the optimizers' state"))
        metrics = report(self.memory, pl_module.device)
        if metrics != self._logged:
            self._logged = metrics
            step = trainer.fit_loop.epoch_loop._batches_that_stepped  # by which loggers count, not by optimizers
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=step)
