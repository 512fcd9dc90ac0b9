"""Lightning on the CPU under the strategies that are named.

`ddp`, `model parallel` (`whole checkpoint` with such), `tensor parallel`, `two dimensions` (that and FSDP2), `zero 2`
and `zero 3`.
"""

from __future__ import annotations

import faulthandler
import os
import warnings
from pathlib import Path
from typing import Any

import tensor_parallel
import torch
import workers
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from adam_mini_plugins import AdamMini, partition
from adam_mini_plugins.lightning import AdamMiniOptimizer

OUTPUT = Path(os.environ["CHECKPOINTS"])
PROCESSES = int(os.environ["WORLD_SIZE"])
IDS = workers.batches(1)[0]  # each step sees all of it
TENSOR_PARALLEL = {"tensor parallel": 2, "two dimensions": 2}


class Module(LightningModule):
    """A Llama, sharded where the strategy has a mesh, that asks for AdamW."""

    def __init__(self) -> None:
        super().__init__()
        self.model: Any = None

    def configure_model(self) -> None:
        if self.model is None:
            self.model = workers.cut_llama(num_hidden_layers=1, use_cache=False)
            if self.device_mesh is not None:
                mesh = self.device_mesh["data_parallel"]
                if self.device_mesh["tensor_parallel"].size() > 1:
                    tensor_parallel.parallelize(self.model, self.device_mesh["tensor_parallel"])
                if mesh.size() > 1:
                    fully_shard(self.model.model.layers[0], mesh=mesh)
                    fully_shard(self.model, mesh=mesh)

    def training_step(self, ids: torch.Tensor, _: int) -> torch.Tensor:
        return self.model(input_ids=ids, labels=ids).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), **workers.OPTIONS)


def strategy(name: str) -> Any:
    if name == "ddp":
        return DDPStrategy(process_group_backend="gloo")
    if name.startswith("zero"):
        return zero_strategy(int(name[-1]))
    whole, tensor_parallel_size = name == "whole checkpoint", TENSOR_PARALLEL.get(name, 1)
    return ModelParallelStrategy(
        data_parallel_size=PROCESSES // tensor_parallel_size, tensor_parallel_size=tensor_parallel_size,
        save_distributed_checkpoint=not whole, process_group_backend="gloo",
    )  # fmt: skip


def zero_strategy(stage: int) -> Any:
    import zero
    from lightning.pytorch.strategies import DeepSpeedStrategy, ParallelStrategy

    class OnCPU(DeepSpeedStrategy):
        @property
        def root_device(self) -> torch.device:
            return torch.device("cpu", 0)  # DeepSpeed wants a number

        def setup_environment(self) -> None:
            """As it is done there, but for the demand that devices are CUDA's."""
            ParallelStrategy.setup_environment(self)
            self.set_world_ranks()
            self._init_deepspeed_distributed()

    settings = zero.config(stage, offload=stage == 2)
    del settings["train_micro_batch_size_per_gpu"], settings["gradient_clipping"]  # these are Lightning's business
    return OnCPU(config=settings, process_group_backend="gloo")


def assert_engine(name: str, trainer: Trainer, optimizer: torch.optim.Optimizer) -> None:
    if name.startswith("zero"):
        assert trainer.strategy.deepspeed_engine.zero_optimization_stage() == int(name[-1])
        assert all(p.ndim == 1 for p in optimizer.state)
        return
    parts = [isinstance(p, DTensor) for p in optimizer.param_groups[0]["params"]]
    assert isinstance(trainer.strategy, DDPStrategy if name == "ddp" else ModelParallelStrategy)
    # Without FSDP2 around it, tensor parallelism leaves norms whole.
    assert {"ddp": not any(parts), "tensor parallel": any(parts)}.get(name, all(parts))


def fit(name: str, epochs: int, ours: bool = True, **options: Any) -> tuple[Trainer, dict[str, torch.Tensor]]:
    """The trainer, and the weights after as many steps as epochs."""
    trainer = Trainer(
        accelerator="cpu", devices=PROCESSES, strategy=strategy(name), max_epochs=epochs, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[AdamMiniOptimizer()] if ours else [],
    )  # fmt: skip
    module = Module()
    if name.startswith("zero"):  # ZeRO-3 would cut it as it is made, which transformers' initialisation does not allow
        module.model = workers.cut_llama(num_hidden_layers=1, use_cache=False)
    processes = PROCESSES // TENSOR_PARALLEL.get(name, 1)  # those that have different data
    trainer.fit(module, DataLoader(list(IDS), batch_size=len(IDS) // processes), **options)
    (optimizer,) = (getattr(optimizer, "optimizer", optimizer) for optimizer in trainer.optimizers)
    assert type(optimizer) is (AdamMini if ours else torch.optim.AdamW)
    assert trainer.global_step == epochs
    assert_engine(name, trainer, optimizer)
    return trainer, workers.weights(module.model)


def alone(ours: bool) -> tuple[dict[str, torch.Tensor], float]:
    """One process's weights at the end, and how far they have come."""
    model: nn.Module = workers.cut_llama(num_hidden_layers=1, use_cache=False)
    start = workers.weights(model)
    make: Any = torch.optim.AdamW
    optimizer = make(model.parameters(), **workers.OPTIONS)
    if ours:
        optimizer = AdamMini(model.named_parameters(), partition=partition(model), **workers.OPTIONS)
    workers.train(model, optimizer, [IDS] * workers.STEPS)
    end = workers.weights(model)
    return end, workers.distance(start, end)


def main() -> None:
    faulthandler.dump_traceback_later(290)
    warnings.simplefilter("ignore")
    figures: dict[str, dict[str, float]] = {}
    for name in workers.arguments():
        figures[name] = {}
        for ours, key in ((True, "adam_mini"), (False, "adamw"))[: 1 if name == "whole checkpoint" else 2]:
            end, moved = alone(ours)
            _, weights = fit(name, workers.STEPS, ours)
            figures[name] |= {key: workers.distance(weights, end), f"{key} moved": moved}
            checkpoint = OUTPUT / f"{name} {key}.ckpt"
            trainer, _ = fit(name, 3, ours)
            trainer.save_checkpoint(checkpoint)
            _, resumed = fit(name, workers.STEPS, ours, ckpt_path=str(checkpoint))
            figures[name][f"{key} resumed"] = workers.distance(resumed, weights)
    workers.report(figures)


main()
