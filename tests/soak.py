"""Kills trainings with SIGKILL, resumes them, and counts the bits in which they end elsewhere than one left alone.

    python tests/soak.py    # 4 runs of each loop, up to 4 kills each; writes docs/soak.json

Each training is a process of its own, forked from one that has imported everything, so that a start takes
no import. It ends itself by SIGKILL, either when it has made so many steps or when so many bytes of a
checkpoint are written: what is on the disk then is what is left of a machine that has crashed.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

STEPS, EVERY, BATCH = 18, 3, 2  # a checkpoint every so many steps
SECONDS = 150  # for one process; they take about two
OUT = Path(__file__).parent.parent / "docs" / "soak.json"


@dataclass(frozen=True)
class Kill:
    """When a process ends itself: in its optimizer's step number `step`, or after so many bytes of checkpoints."""

    step: int | None = None
    bytes: int | None = None


@dataclass
class Figures:
    """What came of the runs of one loop."""

    runs: int = 0
    kills: int = 0
    while_writing: int = 0
    resumed_from_a_checkpoint: int = 0
    started_over: int = 0
    bits: int = 0
    bits_that_differ: int = 0


# --- the trainings: a Llama with dropout on shuffled sequences ----------------------------------------


class Sequences(Dataset):
    """Sequences of random tokens."""

    def __init__(self) -> None:
        self.tokens = torch.randint(0, 32, (EVERY * BATCH, 8), generator=torch.Generator().manual_seed(5))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[number], "labels": self.tokens[number]}


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_dropout": 0.2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads)).train()


def began(folder: Path, step: int) -> None:
    """Notes from which step a process goes on."""
    folder.mkdir(exist_ok=True)
    with open(folder / "starts", "a") as file:
        file.write(f"{step}\n")


def plain(folder: Path) -> tuple[Any, torch.optim.Optimizer]:
    """A loop written out."""
    from adam_mini_plugins import AdamMini

    model, data, path = llama(), Sequences(), folder / "checkpoint.pt"
    optimizer = AdamMini.for_model(model, lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    holders = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    start = 0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        for name, holder in holders.items():
            holder.load_state_dict(saved[name])
        torch.set_rng_state(saved["rng"])
        start = saved["step"]
    began(folder, start)
    for step in range(start, STEPS):
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(step // EVERY))
        chosen = order[step % EVERY * BATCH :][:BATCH]
        optimizer.zero_grad()
        model(**data[chosen]).loss.backward()
        optimizer.step()
        scheduler.step()
        if (step + 1) % EVERY == 0:
            states = {name: holder.state_dict() for name, holder in holders.items()}
            temporary = path.with_suffix(".tmp")
            torch.save({**states, "rng": torch.get_rng_state(), "step": step + 1}, temporary)
            os.replace(temporary, path)  # whole, or not at all
    return model, optimizer


def last_complete(folder: Path) -> Path | None:
    """The newest of a Trainer's checkpoints that was written to its end: `trainer_state.json` is written last."""
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=step_of, reverse=True):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text())
        except (OSError, ValueError):
            continue
        return checkpoint
    return None


def step_of(checkpoint: Path | None) -> int:
    """The step after which a Trainer's checkpoint was written, 0 for none."""
    return int(checkpoint.name.removeprefix("checkpoint-")) if checkpoint else 0


def trainer(folder: Path) -> tuple[Any, torch.optim.Optimizer]:
    """Transformers' Trainer."""
    from transformers import Trainer, TrainingArguments

    import adam_mini_plugins.hf  # noqa: F401

    checkpoint = last_complete(folder)
    args = TrainingArguments(
        str(folder),
        optim="adam_mini",
        learning_rate=1e-2,
        per_device_train_batch_size=BATCH,
        max_steps=STEPS,
        save_steps=EVERY,
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trained = Trainer(llama(), args, train_dataset=Sequences())
    began(folder, step_of(checkpoint))
    trained.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return trained.model, trained.optimizer.optimizer


def lightning(folder: Path) -> tuple[Any, torch.optim.Optimizer]:
    """Lightning's Trainer, with checkpoints at the ends of epochs."""
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

    from adam_mini_plugins.lightning import AdamMiniOptimizer

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = llama()

        def training_step(self, batch: dict[str, Tensor], number: int) -> Tensor:
            return self.model(**batch).loss

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
            return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS // EVERY)]

        def train_dataloader(self) -> DataLoader:
            data = Sequences()
            # Lightning tells the sampler the epoch, which decides the order: nothing of it needs to be saved.
            sampler = DistributedSampler(data, num_replicas=1, rank=0)
            # With a generator of its own the loader draws none of the random numbers that dropout has next.
            return DataLoader(data, BATCH, sampler=sampler, generator=torch.Generator())

        def on_train_epoch_start(self) -> None:
            # Lightning saves no random numbers' state: dropout's are a matter of the epoch, too.
            torch.manual_seed(self.current_epoch)

    module = Module()
    saved = max(folder.glob("step=*.ckpt"), key=lambda path: int(path.stem[5:]), default=None)  # whole, or not there
    began(folder, 0 if saved is None else int(saved.stem[5:]))
    trained = Trainer(
        max_epochs=STEPS // EVERY,  # with max_steps alone, Lightning takes the end of an epoch for its middle
        callbacks=[AdamMiniOptimizer(), ModelCheckpoint(folder, "{step}")],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trained.fit(module, ckpt_path=saved, weights_only=True)
    return module.model, trained.optimizers[0]


LOOPS: dict[str, Callable[[Path], tuple[Any, torch.optim.Optimizer]]] = {
    "plain": plain,
    "trainer": trainer,
    "lightning": lightning,
}


# --- in the process that trains ------------------------------------------------------------------


class Disk:
    """Writes files as the libraries do, from their first byte to their last, and may be killed in between."""

    def __init__(self, limit: int | None) -> None:
        self.limit, self.written = limit, 0

    def write(self, file: Any, data: bytes) -> int:
        left = len(data) if self.limit is None else self.limit - self.written
        self.written += len(data)
        if left >= len(data):
            return file.write(data)
        file.write(data[:left])
        file.flush()
        return os.kill(os.getpid(), signal.SIGKILL)

    def intercept(self) -> None:
        """Has all files of checkpoints written here."""
        import safetensors.torch
        import transformers.modeling_utils
        from fsspec.implementations.local import LocalFileOpener
        from transformers.trainer_callback import TrainerState

        save, to_json = torch.save, TrainerState.save_to_json

        def torch_save(value: Any, target: Any, *args: Any, **options: Any) -> None:
            if not isinstance(target, str | os.PathLike):  # to memory, as Lightning does first
                return save(value, target, *args, **options)
            buffer = io.BytesIO()
            save(value, buffer, *args, **options)
            self._file(target, buffer.getvalue())

        def safe_save(tensors: Any, target: Any, metadata: Any = None) -> None:
            self._file(target, safetensors.torch.save(tensors, metadata))

        def save_to_json(state: Any, target: str) -> None:
            with tempfile.NamedTemporaryFile() as file:
                to_json(state, file.name)
                self._file(target, Path(file.name).read_bytes())

        torch.save = torch_save
        transformers.modeling_utils.safe_save_file = safe_save
        TrainerState.save_to_json = save_to_json
        LocalFileOpener.write = lambda opener, data: self.write(opener.f, bytes(data))

    def _file(self, target: Any, data: bytes) -> None:
        with open(target, "wb") as file:
            self.write(file, data)


def process(loop: str, folder: Path, kill: Kill) -> None:
    """Trains from the last complete checkpoint of a folder on; leaves what it ended with in `end.pt`."""
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1), os.dup2(log, 2)
    torch.set_num_threads(1)
    disk, save, steps = Disk(kill.bytes), torch.save, 0
    disk.intercept()

    def count(*_: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == kill.step:
            os.kill(os.getpid(), signal.SIGKILL)

    register_optimizer_step_pre_hook(count)
    model, optimizer = LOOPS[loop](folder)
    end = {"model": model.state_dict(), "state": optimizer.state_dict()["state"], "bytes": disk.written}
    save(end, folder / "end.pt")


# --- in the process that watches ------------------------------------------------------------------


def context() -> Any:
    """Forks trainings from a process that has imported what they need."""
    forking = multiprocessing.get_context("forkserver")
    forking.set_forkserver_preload([
        "accelerate", "torch", "transformers", "transformers.models.llama.modeling_llama", "transformers.trainer",
        "lightning.pytorch", "adam_mini_plugins.hf", "adam_mini_plugins.lightning",
    ])  # fmt: skip
    return forking


def started(forking: Any, loop: str, folder: Path, kill: Kill) -> int:
    """The exit code of a training: 0, or -9 where it was killed."""
    running = forking.Process(target=process, args=(loop, folder, kill))
    running.start()
    running.join(SECONDS)
    if running.exitcode not in (0, -signal.SIGKILL):
        running.kill()
        raise RuntimeError(f"{loop} ended with {running.exitcode}:\n{(folder / 'log').read_text()[-4000:]}")
    return running.exitcode


def tensors(end: dict[str, Any]) -> list[Tensor]:
    states = [value for key in sorted(end["state"]) for _, value in sorted(end["state"][key].items())]
    return [*end["model"].values(), *states]


def soak(loop: str, runs: int, kills: int, seed: int = 0) -> Figures:
    """Trains once without interruption, and then so many times with as many kills each."""
    forking, figures, dice = context(), Figures(), random.Random(f"{loop} {seed}")
    with tempfile.TemporaryDirectory() as folder:
        alone = Path(folder) / "alone"
        alone.mkdir()
        started(forking, loop, alone, Kill())
        reference = torch.load(alone / "end.pt", weights_only=True)
        checkpoint = reference["bytes"] // (STEPS // EVERY)
        for run in range(runs):
            here = Path(folder) / str(run)
            here.mkdir()
            figures.runs += 1
            left = kills
            while True:
                kill = Kill()
                if left:
                    # By turns in one of its first steps, and in the first or second checkpoint that it writes.
                    in_writing = left % 2 == 1
                    at = dice.randrange(1, 2 * checkpoint) if in_writing else dice.randrange(1, 2 * EVERY)
                    kill = Kill(bytes=at) if in_writing else Kill(step=at)
                    left -= 1
                if started(forking, loop, here, kill) == 0:
                    break
                figures.kills += 1
                figures.while_writing += kill.bytes is not None
            _, *after_kills = map(int, (here / "starts").read_text().split())
            figures.resumed_from_a_checkpoint += sum(step > 0 for step in after_kills)
            figures.started_over += sum(step == 0 for step in after_kills)
            end = torch.load(here / "end.pt", weights_only=True)
            for one, other in zip(tensors(reference), tensors(end), strict=True):
                a, b = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (one, other))
                figures.bits += 8 * a.numel()
                figures.bits_that_differ += int(sum(((a ^ b) >> bit & 1).sum() for bit in range(8)))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--loops", nargs="+", choices=LOOPS, default=list(LOOPS))
    parser.add_argument("--runs", type=int, default=4, help="interrupted runs of each loop")
    parser.add_argument("--kills", type=int, default=4, help="kills of each run, every other one during a write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    figures = {loop: asdict(soak(loop, args.runs, args.kills, args.seed)) for loop in args.loops}
    total = {key: sum(loop[key] for loop in figures.values()) for key in asdict(Figures())}
    record = {"steps": STEPS, "checkpoint_every": EVERY, "seed": args.seed, "loops": figures, "total": total}
    args.out.write_text(json.dumps(record, indent=2) + "\n")
    json.dump(total, sys.stdout)


if __name__ == "__main__":
    main()
