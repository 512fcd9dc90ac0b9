"""Pre-trains a small Llama from scratch, once with Adam-mini and once with AdamW, and compares the two.

    python examples/pretrain.py                      # 1.5M parameters on Python's own source code
    python examples/pretrain.py --dataset my/texts   # the same on a folder of texts

Data, initial weights, order of the batches and hyper-parameters are the same for both; nothing differs but
``optim``. It ends with a table, a plot and a JSON file of what was measured, in ``runs/pretrain/``. The
default takes three to five minutes on two CPU cores, and no network.

The other sizes are those of the paper's scaling law experiments (Tables 8 and 9), for one large GPU:

    python examples/pretrain.py --size 39M --dataset allenai/c4 --dataset-config en --bf16 --accumulation 4
"""

# ruff: noqa: D102 (what each hook of a TrainerCallback is for stands in the base class)

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sysconfig
import time
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import chain, cycle, islice, pairwise
from pathlib import Path
from typing import Any

# Where other work shares the cores, OpenMP threads that spin while they wait make a step ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from matplotlib import pyplot as plt
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, logging, set_seed
from transformers.trainer_callback import PrinterCallback

import adam_mini_plugins.hf  # makes optim="adam_mini" known to transformers
from adam_mini_plugins.callbacks.hf import OptimizerMemoryCallback

END_OF_TEXT = "<|endoftext|>"
HOLD_OUT_EVERY = 20  # of so many documents one is for validation
LEFT_OUT = {"site-packages", "test", "tests", "idlelib", "pydoc_data", "encodings"}  # not the library, or tables
TITLES = {"adam_mini": "Adam-mini", "adamw_torch": "AdamW", "adamw_torch_fused": "AdamW, fused"}
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito, colour-blind safe
HAS_ACCELERATOR = torch.accelerator.is_available()


@dataclass(frozen=True)
class Size:
    """A model, and how it is trained unless the command line says otherwise."""

    d_model: int
    layers: int
    heads: int
    kv_heads: int
    seq_len: int
    steps: int
    vocab_size: int = 32_000
    batch_size: int = 256
    lr: float = 6e-4
    warmup: float = 0.01


SIZES = {
    "demo": Size(128, 4, 4, 2, 128, 400, vocab_size=2048, batch_size=8, lr=1e-3, warmup=0.05),
    "39M": Size(384, 8, 6, 6, 512, 7_800),
    "67M": Size(512, 10, 8, 8, 512, 13_400),
    "102M": Size(640, 12, 10, 10, 512, 20_400),
    "162M": Size(768, 16, 12, 12, 512, 32_400),
    "271M": Size(1024, 16, 16, 16, 512, 54_200),
    "1B": Size(2048, 18, 16, 16, 512, 200_000, lr=2e-4),
}


@dataclass(frozen=True)
class Run:
    """What was measured of one training; losses are pairs of a step and nats per token."""

    optim: str
    title: str
    validation: list[tuple[int, float]]
    training: list[tuple[int, float]]
    state_bytes: int
    state_ratio: float
    optimizer_step_ms: float
    tokens_per_second: float
    seconds: float


def parse_arguments() -> argparse.Namespace:
    """The command line, with the defaults of the size that it names filled in."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], formatter_class=formatter)
    add = parser.add_argument
    add("--size", choices=SIZES, default="demo", help="the model; all but demo are the paper's")
    add("--optim", nargs="+", default=["adam_mini", "adamw_torch"], help="optimizers to compare, as Trainer names them")
    add("--optim-args", help="options for them as Trainer takes them, such as value=whole")
    add("--dataset", help="a text file, a folder, or a dataset of the hub; without it Python's standard library")
    add("--glob", nargs="+", default=["*.py", "*.txt", "*.md", "*.rst"], help="which files of a folder are read")
    add("--dataset-config", help="configuration of a hub dataset")
    add("--text-column", default="text", help="column of a hub dataset")
    add("--scheduler", choices=["linear", "cosine"], default="linear", help="how the learning rate decays")
    add("--weight-decay", type=float, default=0.1, help="decoupled weight decay")
    add("--accumulation", type=int, default=1, help="parts that a batch is computed in, to save memory")
    add("--eval-sequences", type=int, default=64, help="held-out sequences that the validation loss is a mean over")
    add("--bf16", action="store_true", help="bfloat16 autocast")
    add("--seed", type=int, default=0, help="of weights, documents and batches")
    add("--output-dir", type=Path, default=Path("runs/pretrain"), help="where tokenizer, plot and figures are written")
    own = parser.add_argument_group("set by --size where not given", argument_default=argparse.SUPPRESS)
    own.add_argument("--steps", type=int, help="optimizer steps")
    own.add_argument("--batch-size", type=int, help="sequences a step")
    own.add_argument("--seq-len", type=int, help="tokens a sequence")
    own.add_argument("--vocab-size", type=int, help="tokens of the vocabulary")
    own.add_argument("--lr", type=float, help="peak learning rate")
    own.add_argument("--warmup", type=float, help="fraction of the steps in which the learning rate rises")
    given = parser.parse_args()
    args = argparse.Namespace(**{**asdict(SIZES[given.size]), **vars(given)})
    if args.batch_size % args.accumulation:
        parser.error(f"--accumulation {args.accumulation} does not divide a batch of {args.batch_size} sequences")
    return args


def read_documents(args: argparse.Namespace) -> Iterator[str]:
    """The documents, in an order that the seed decides."""
    path = Path(args.dataset or sysconfig.get_path("stdlib"))
    if path.is_dir():
        files = sorted({file for glob in args.glob for file in path.rglob(glob) if file.is_file()})
        if not args.dataset:
            files = [f for f in files if f.suffix == ".py" and not LEFT_OUT.intersection(f.relative_to(path).parts)]
        random.Random(args.seed).shuffle(files)
        return (file.read_text(encoding="utf-8", errors="replace") for file in files)
    if path.is_file():  # one long text: pieces of about a page, so that some can be held out
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        pages = ["".join(lines[i : i + 60]) for i in range(0, len(lines), 60)]
        random.Random(args.seed).shuffle(pages)
        return iter(pages)

    import datasets

    try:  # streamed: no more is downloaded than is trained on
        rows = datasets.load_dataset(args.dataset, args.dataset_config, split="train", streaming=True)
        columns = list(next(iter(rows)))
    except Exception as error:  # of many kinds: no network, no such name, a config to choose
        raise SystemExit(f"--dataset {args.dataset}: no such file or folder, and the hub gave none: {error}") from error
    if args.text_column not in columns:
        raise SystemExit(f"--text-column {args.text_column}: {args.dataset} has the columns {', '.join(columns)}")
    return (row[args.text_column] for row in rows)


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": [END_OF_TEXT], "initial_alphabet": alphabet, "show_progress": False}
    tokenizer.train_from_iterator(documents, trainers.BpeTrainer(vocab_size=vocab_size, **options))
    return tokenizer


def load_data(args: argparse.Namespace) -> tuple[Tokenizer, Tensor, Tensor]:
    """A tokenizer trained on the first documents; sequences to train on, as many as are wanted; held-out ones."""
    documents = enumerate(read_documents(args))
    sample = list(islice(documents, args.vocab_size))
    tokenizer = train_tokenizer((text for number, text in sample if number % HOLD_OUT_EVERY), args.vocab_size)
    tokenizer.save(str(args.output_dir / "tokenizer.json"))

    train, held_out = array("i"), array("i")
    numbered = chain(sample, documents)
    while len(train) < args.steps * args.batch_size * args.seq_len and (batch := list(islice(numbered, 64))):
        for (number, _), encoded in zip(batch, tokenizer.encode_batch([text for _, text in batch])):
            tokens = train if number % HOLD_OUT_EVERY else held_out
            tokens.extend([*encoded.ids, tokenizer.token_to_id(END_OF_TEXT)])
    if len(train) < args.batch_size * args.seq_len or len(held_out) < args.seq_len:
        raise SystemExit(
            f"--dataset {args.dataset} has too little text: {len(train):,} tokens to train on and {len(held_out):,} to "
            f"validate with, where a sequence takes {args.seq_len} and a batch {args.batch_size} of them "
            f"(of a folder, {' '.join(args.glob)} are read: --glob)"
        )
    # A row is a sequence: the documents stand one after another, each ended by a token of its own.
    training, validation = (
        torch.asarray(tokens, dtype=torch.int32)[: len(tokens) // args.seq_len * args.seq_len].view(-1, args.seq_len)
        for tokens in (train, held_out)
    )
    chosen = torch.randperm(len(validation), generator=torch.Generator().manual_seed(args.seed))
    return tokenizer, training, validation[chosen[: args.eval_sequences]]


def collate(sequences: list[Tensor]) -> dict[str, Tensor]:
    """A batch as the model takes it."""
    tokens = torch.stack(sequences).long()
    return {"input_ids": tokens, "labels": tokens}


def build_model(args: argparse.Namespace, tokenizer: Tokenizer) -> LlamaForCausalLM:
    """A Llama with random weights, the same at every call."""
    set_seed(args.seed)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=args.d_model,
        intermediate_size=-(-8 * args.d_model // (3 * 256)) * 256,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        max_position_embeddings=args.seq_len,
        bos_token_id=None,
        eos_token_id=tokenizer.token_to_id(END_OF_TEXT),
        use_cache=False,
    )
    return LlamaForCausalLM(config)


class Monitor(TrainerCallback):
    """Notes when the optimizer's steps begin and end; shows a line an evaluation and, on a terminal, a bar."""

    def __init__(self, title: str, steps: int, console: Console) -> None:
        self.title, self.console, self.began = title, console, time.perf_counter()
        self.before_steps: list[float] = []
        self.after_steps: list[float] = []
        columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.task = self.bar.add_task(title, total=steps)

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.before_steps.append(self._now())

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.after_steps.append(self._now())
        self.bar.advance(self.task)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:
        training = next((f"{log['loss']:.3f}" for log in reversed(state.log_history) if "loss" in log), "-")
        step = f"{state.global_step:>{len(str(state.max_steps))}}/{state.max_steps}"
        losses = f"training {training:>6}   validation {metrics['eval_loss']:6.3f}"
        seconds = time.perf_counter() - self.began
        self.console.print(f"{self.title:12}  step {step}   {losses}   {seconds:5.0f} s", highlight=False)

    @staticmethod
    def _now() -> float:
        if HAS_ACCELERATOR:  # kernels run on after they are launched
            torch.accelerator.synchronize()
        return time.perf_counter()


def train(optim: str, args: argparse.Namespace, tokenizer: Tokenizer, data: list[Tensor], console: Console) -> Run:
    """Trains once; nothing but the optimizer's name sets one run apart from another."""
    arguments = TrainingArguments(
        output_dir=str(args.output_dir),
        optim=optim,
        optim_args=args.optim_args,
        learning_rate=args.lr,
        lr_scheduler_type=args.scheduler,
        warmup_steps=args.warmup,
        adam_beta1=0.9,
        adam_beta2=0.95,
        adam_epsilon=1e-8,
        weight_decay=args.weight_decay,
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size // args.accumulation,
        per_device_eval_batch_size=args.batch_size // args.accumulation,
        gradient_accumulation_steps=args.accumulation,
        bf16=args.bf16,
        dataloader_pin_memory=HAS_ACCELERATOR,
        seed=args.seed,
        eval_strategy="steps",
        eval_steps=max(1, args.steps // 10),
        eval_on_start=True,
        logging_steps=max(1, args.steps // 50),
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    title = TITLES.get(optim, optim)
    memory, monitor = OptimizerMemoryCallback(), Monitor(title, args.steps, console)
    trainer = Trainer(build_model(args, tokenizer), arguments, collate, *data, callbacks=[memory, monitor])
    trainer.remove_callback(PrinterCallback)
    with monitor.bar:
        trainer.train()
    console.print()
    history = trainer.state.log_history
    # From step to step: of so many periods, the few that an evaluation lengthens don't move the median.
    period = statistics.median(after - before for before, after in pairwise(monitor.after_steps))
    return Run(
        optim,
        title,
        validation=[(log["step"], log["eval_loss"]) for log in history if "eval_loss" in log],
        training=[(log["step"], log["loss"]) for log in history if "loss" in log],
        state_bytes=memory.memory.state_bytes,
        state_ratio=memory.memory.state_bytes / memory.memory.adamw_state_bytes,
        optimizer_step_ms=1e3 * statistics.median(b - a for a, b in zip(monitor.before_steps, monitor.after_steps)),
        tokens_per_second=args.batch_size * args.seq_len / period,
        seconds=time.perf_counter() - monitor.began,
    )


def table(runs: list[Run]) -> Table:
    """The figures of all runs, a line each."""
    heads = ("validation loss\n(nats/token)", "optimizer state\n(bytes)", "of AdamW's\nstate", "optimizer step\n(ms)")
    shown = Table("optimizer", *(Column(head, justify="right") for head in heads), box=box.SIMPLE_HEAD)
    for run in runs:
        memory = (f"{run.state_bytes:,}", f"{run.state_ratio:.4f}")
        shown.add_row(run.title, f"{run.validation[-1][1]:.4f}", *memory, f"{run.optimizer_step_ms:.2f}")
    return shown


def plot(runs: list[Run], title: str, path: Path) -> None:
    """Draws the losses and, beside them, the optimizer state."""
    style = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10.5}
    with plt.rc_context(style):
        figure, (losses, state) = plt.subplots(1, 2, figsize=(8, 4.2), width_ratios=(3.5, 1), layout="constrained")
        for run, colour, line in zip(runs, cycle(COLOURS), cycle(("-", "--"))):
            losses.plot(*zip(*run.training), line, color=colour, lw=1, alpha=0.6, label=f"{run.title}, training")
            dots = {"marker": "o", "ms": 5, "mfc": colour if line == "-" else "white"}
            losses.plot(*zip(*run.validation), line, color=colour, lw=2, **dots, label=f"{run.title}, validation")
            bar = state.bar(run.title, run.state_bytes / 1e6, color=colour, width=0.6)
            state.bar_label(bar, [f"{run.state_bytes / 1e6:.2f} MB\n{run.state_ratio:.1%}"], padding=3)
        losses.set(title="Loss", xlabel="optimizer step", ylabel="cross-entropy (nats/token)")
        losses.grid(alpha=0.25)
        losses.legend(frameon=False)
        state.set(title="Optimizer state", xlabel="(% of AdamW's)", yticks=[])
        state.margins(x=0.15, y=0.18)
        state.spines["left"].set_visible(False)
        figure.suptitle(title, fontsize=12, fontweight="bold")
        figure.get_layout_engine().set(wspace=0.06)
        figure.savefig(path, dpi=200)
        plt.close(figure)


def environment() -> dict[str, Any]:
    """The machine and the versions that the figures hold for."""
    libraries = ("torch", "transformers", "accelerate", "tokenizers")
    return {
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "adam_mini_plugins": adam_mini_plugins.__version__,
        **{library: version(library) for library in libraries},
    }


def main() -> None:
    """Trains with each optimizer and reports."""
    args = parse_arguments()
    logging.set_verbosity_error()
    plt.switch_backend("Agg")
    console = Console()
    console = console if console.is_terminal else Console(width=100)
    args.output_dir.mkdir(parents=True, exist_ok=True)

    tokenizer, *data = load_data(args)
    size = f"{build_model(args, tokenizer).num_parameters() / 1e6:.1f}M"
    source = args.dataset or f"Python {platform.python_version()}'s standard library"
    console.print(f"Llama, {size} parameters, vocabulary {tokenizer.get_vocab_size():,}, on {source}")
    console.print(f"{args.steps:,} steps of {args.batch_size} x {args.seq_len} tokens; {len(data[0]):,} sequences\n")
    runs = [train(optim, args, tokenizer, data, console) for optim in args.optim]
    console.print(table(runs))

    title = f"Pre-training a {size}-parameter Llama with {' and '.join(run.title for run in runs)}"
    plot(runs, title, args.output_dir / "pretrain.png")
    record = {"environment": environment(), "arguments": vars(args), "runs": [asdict(run) for run in runs]}
    (args.output_dir / "pretrain.json").write_text(json.dumps(record, indent=2, default=str) + "\n")
    console.print(f"Plot and figures: {args.output_dir}/pretrain.png, pretrain.json")


if __name__ == "__main__":
    main()
