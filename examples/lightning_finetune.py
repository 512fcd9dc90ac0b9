"""Fine-tunes a causal language model of transformers' with Lightning, once with Adam-mini and once with AdamW.

    python examples/lightning_finetune.py                          # Python's language reference, after its source code
    python examples/lightning_finetune.py --dataset my/texts       # the same on a folder of texts

The module's ``configure_optimizers`` returns AdamW under a cosine, and stays as it is: Adam-mini is one callback of the
trainer, and a second one reports the memory. Both runs start from the same weights and see the same batches.

Without a network there is no model to start from, so that a small Llama first reads the source code of Python's
standard library for a minute; what it is then tuned to is the English of the language reference, as ``help()`` has it.
It ends with a table, a plot and Lightning's logs in ``runs/lightning_finetune/``, in two minutes on two cores.

With a network and a GPU, on a model and texts from the hub:

    python examples/lightning_finetune.py --model Qwen/Qwen3-0.6B-Base --dataset Salesforce/wikitext \
        --dataset-config wikitext-2-raw-v1 --precision bf16-mixed --seq-len 512 --lr 2e-5 --steps 500
"""

from __future__ import annotations

import argparse
import copy
import csv
import random
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from itertools import chain, cycle
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pretrain
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from matplotlib import pyplot as plt
from rich import box
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

from adam_mini_plugins.callbacks.lightning import OptimizerMemoryMonitor
from adam_mini_plugins.lightning import AdamMiniOptimizer

TITLES = {"adam_mini": "Adam-mini", "adamw": "AdamW"}


@dataclass(frozen=True)
class Run:
    """What was measured of one training: pairs of a step and a value, before the first step and on the way."""

    title: str
    training: list[tuple[int, float]]
    held_out: list[tuple[int, float]]
    state_bytes: int
    state_ratio: float
    seconds: float


class Tuned(LightningModule):
    """A module that knows of AdamW alone."""

    def __init__(self, model: nn.Module, lr: float, weight_decay: float, steps: int) -> None:
        super().__init__()
        self.model, self.lr, self.weight_decay, self.steps = model, lr, weight_decay, steps

    def configure_optimizers(self) -> Any:
        """AdamW with decay for matrices alone, warmed up and then under a cosine."""
        trained = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=(0.9, 0.95))
        scheduler = get_cosine_schedule_with_warmup(optimizer, self.steps // 20, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Language(Tuned):
    """A causal language model; its loss is in nats per token."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """The loss on a batch of token ids."""
        loss = self.model(input_ids=batch, labels=batch).loss
        self.log("training", loss)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """The loss on held-out token ids."""
        self.log("held_out", self.model(input_ids=batch, labels=batch).loss)


def fit(module: Tuned, optim: str, loaders: list[DataLoader], folder: Path, **options: Any) -> Run:
    """Trains a module once; nothing but one callback sets one run apart from another.

    Args:
        module: What is trained.
        optim: ``"adam_mini"`` or ``"adamw"``.
        loaders: Data to train on and, unless it is the only one, held-out data.
        folder: Where Lightning's logs are written.
        options: What else the trainer takes.
    """
    began = time.perf_counter()
    memory = OptimizerMemoryMonitor()
    callbacks: list[Callback] = [memory, AdamMiniOptimizer()] if optim == "adam_mini" else [memory]
    trainer = Trainer(
        callbacks=callbacks,
        logger=CSVLogger(folder.parent, name=folder.name, version=""),
        max_steps=module.steps,
        log_every_n_steps=max(1, module.steps // 50),
        val_check_interval=max(1, module.steps // 10),
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=Console().is_terminal,
        gradient_clip_val=1.0,
        **options,
    )
    if len(loaders) > 1:
        trainer.validate(module, loaders[1], verbose=False)
    trainer.fit(module, *loaders)
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    curves = (
        [(int(row["step"]), float(row[name])) for row in rows if row.get(name)] for name in ("training", "held_out")
    )
    figures = memory.memory.state_bytes, memory.memory.state_bytes / memory.memory.adamw_state_bytes
    return Run(TITLES[optim], *curves, *figures, time.perf_counter() - began)


def table(runs: list[Run], held_out: str, percent: bool = False) -> Table:
    """The figures of all runs, a line each."""
    names = (f"{held_out}\nbefore", "\nafter", "optimizer state\n(bytes)", "of AdamW's\nstate", "time\n(s)")
    shown = Table("optimizer", *(Column(name, justify="right") for name in names), box=box.SIMPLE_HEAD)
    for run in runs:
        before, after = (
            f"{value:.1%}" if percent else f"{value:.4f}" for _, value in (run.held_out[0], run.held_out[-1])
        )
        shown.add_row(run.title, before, after, f"{run.state_bytes:,}", f"{run.state_ratio:.4f}", f"{run.seconds:.0f}")
    return shown


def plot(runs: list[Run], title: str, training: str, held_out: str, path: Path, percent: bool = False) -> None:
    """Draws training and held-out curves and, beside them, the optimizer state."""
    style = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10.5}
    with plt.rc_context(style):
        figure, axes = plt.subplots(1, 3, figsize=(11, 4), width_ratios=(2.4, 2.4, 1.1), layout="constrained")
        losses, quality, state = axes
        for run, colour, line in zip(runs, cycle(pretrain.COLOURS), cycle(("-", "--"))):
            losses.plot(*zip(*run.training), line, color=colour, lw=1.5, label=run.title)
            dots = {"marker": "o", "ms": 5, "mfc": colour if line == "-" else "white"}
            quality.plot(*zip(*run.held_out), line, color=colour, lw=2, label=run.title, **dots)
            bar = state.bar(run.title, run.state_bytes / 1e6, color=colour, width=0.6)
            state.bar_label(bar, [f"{run.state_bytes / 1e6:.2f} MB\n{run.state_ratio:.1%}"], padding=3)
        losses.set(title="Training", xlabel="optimizer step", ylabel=training)
        quality.set(title="Held out", xlabel="optimizer step", ylabel=held_out)
        if percent:
            quality.yaxis.set_major_formatter("{x:.0%}")
        for axis in (losses, quality):
            axis.grid(alpha=0.25)
            axis.legend(frameon=False)
        state.set(title="Optimizer state", xlabel="(% of AdamW's)", yticks=[])
        state.margins(x=0.15, y=0.2)
        state.spines["left"].set_visible(False)
        figure.suptitle(title, fontsize=12, fontweight="bold")
        figure.savefig(path, dpi=200)
        plt.close(figure)


def quieten() -> Console:
    """Leaves out what Lightning has to say of small data; a console of a fixed width where there is no terminal."""
    warnings.filterwarnings("ignore", message=".*(does not have many workers|logging interval|LeafSpec).*")
    plt.switch_backend("Agg")
    console = Console()
    return console if console.is_terminal else Console(width=100)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], formatter_class=formatter)
    add = parser.add_argument
    add("--optim", nargs="+", choices=TITLES, default=list(TITLES), help="optimizers to compare")
    add("--model", help="name or folder of a model to start from, in place of a small one that is pre-trained first")
    add("--dataset", help="a text file, a folder, or a dataset of the hub; without it Python's language reference")
    add("--glob", nargs="+", default=["*.txt", "*.md", "*.rst"], help="which files of a folder are read")
    add("--dataset-config", help="configuration of a hub dataset")
    add("--text-column", default="text", help="column of a hub dataset")
    add("--documents", type=int, default=20_000, help="documents to read at most")
    add("--pretrain-steps", type=int, default=150, help="optimizer steps on source code before, without --model")
    add("--steps", type=int, default=100, help="optimizer steps")
    add("--batch-size", type=int, default=8, help="sequences a step")
    add("--seq-len", type=int, default=128, help="tokens a sequence")
    add("--lr", type=float, default=1e-3, help="peak learning rate")
    add("--weight-decay", type=float, default=0.1, help="decoupled weight decay")
    add("--eval-sequences", type=int, default=64, help="held-out sequences that the loss is a mean over")
    add("--precision", default="32-true", help="as Lightning's trainer takes it")
    add("--seed", type=int, default=0, help="of weights, documents and batches")
    add("--output-dir", type=Path, default=Path("runs/lightning_finetune"), help="where plot and logs are written")
    return parser.parse_args()


def small_model(args: argparse.Namespace) -> tuple[nn.Module, Callable[[str], list[int]]]:
    """A Llama that has read some source code, and its tokenizer."""
    size = asdict(pretrain.SIZES["demo"]) | {"steps": args.pretrain_steps, "seq_len": args.seq_len, "seed": args.seed}
    settings = argparse.Namespace(**{**vars(args), **size, "dataset": None, "glob": ["*.py"], "eval_sequences": 1})
    tokenizer, training, _ = pretrain.load_data(settings)
    module = Language(pretrain.build_model(settings, tokenizer), settings.lr, args.weight_decay, args.pretrain_steps)
    options = {"enable_model_summary": False, "accelerator": "auto", "precision": args.precision}
    loader = DataLoader(training.long(), settings.batch_size, shuffle=True)
    fit(module, args.optim[0], [loader], args.output_dir / "pretrain", **options)
    return module.model, lambda text: tokenizer.encode(text + pretrain.END_OF_TEXT).ids


def hub_model(args: argparse.Namespace) -> tuple[nn.Module, Callable[[str], list[int]]]:
    """A model of the hub or of a folder, and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    return AutoModelForCausalLM.from_pretrained(args.model), lambda text: tokenizer(text + tokenizer.eos_token)[
        "input_ids"
    ]


def read_texts(args: argparse.Namespace) -> list[str]:
    """The documents, in an order that the seed decides."""
    if args.dataset:
        return [text for text, _ in zip(pretrain.read_documents(args), range(args.documents))]
    return random.Random(args.seed).sample(list(topics.values()), len(topics))


def sequences(texts: Iterable[str], encode: Callable[[str], list[int]], seq_len: int) -> Tensor:
    """The texts one after another, cut into sequences, a row each."""
    return torch.tensor(list(chain(*map(encode, texts)))).unfold(0, seq_len, seq_len)


def main() -> None:
    """Tunes with each optimizer and reports."""
    args, console = parse_arguments(), quieten()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    model, encode = (hub_model if args.model else small_model)(args)
    texts = read_texts(args)
    every = pretrain.HOLD_OUT_EVERY
    parts = [text for number, text in enumerate(texts) if number % every], texts[::every]
    train, held_out = (sequences(part, encode, args.seq_len) for part in parts)
    data = [train, held_out[: args.eval_sequences]]
    source = args.dataset or "Python's language reference"
    console.print(
        f"\n{len(data[0]):,} sequences of {args.seq_len} tokens to train on, {len(data[1])} held out: {source}\n"
    )
    runs = []
    for optim in args.optim:
        seed_everything(args.seed, verbose=False)
        loaders = [DataLoader(part, args.batch_size, shuffle=part is train) for part in data]
        module = Language(copy.deepcopy(model), args.lr, args.weight_decay, args.steps)
        runs.append(fit(module, optim, loaders, args.output_dir / optim, precision=args.precision))
    console.print(table(runs, "held-out loss (nats/token)"))
    path = args.output_dir / "lightning_finetune.png"
    names = " and ".join(run.title for run in runs)
    loss = "cross-entropy (nats/token)"
    plot(runs, f"Fine-tuning {args.model or 'a small Llama'} on {source} with {names}", loss, loss, path)
    console.print(f"Plot and logs: {path}, {args.output_dir}/*/metrics.csv")


if __name__ == "__main__":
    main()
