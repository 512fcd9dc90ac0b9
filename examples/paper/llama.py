"""The small Llama on Python's source code that several experiments train: examples/pretrain.py's, and smaller ones."""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator
from torch import Tensor, nn
from torch.optim import Optimizer

from .frame import Case, Experiment, Result, flag, median
from .plots import WIDTH, band

if TYPE_CHECKING:
    from examples.pretrain import Size

BETAS, WEIGHT_DECAY, CLIP, WARMUP = (0.9, 0.95), 0.1, 1.0, 0.05
EVALUATIONS = 10
TRAILING, SPIKE = 20, 0.5  # a spike is a batch's loss so many nats above the median of so many before

Build = Callable[[nn.Module], Sequence[Optimizer]]


@dataclass(frozen=True)
class LlamaExperiment(Experiment):
    """An experiment that trains Llamas."""

    seeds: int = flag(3, "number of initial weights and orders of the data")
    steps: int = flag(300, "optimizer steps of a training")
    size: str = flag("tiny", "the model: mini, tiny, or one of examples/pretrain.py's (demo, 39M, 67M, ...)")
    dataset: str = flag("", "texts, as for examples/pretrain.py; by default Python's standard library")

    def base(self, seed: int) -> Case:
        """What all cases have."""
        return {"size": self.size, "dataset": self.dataset, "steps": self.steps, "seed": seed}


@dataclass(frozen=True)
class Comparison(LlamaExperiment):
    """Variants of an optimizer beside AdamW, at the same learning rates."""

    lrs: tuple[float, ...] = flag((1e-3, 3e-3), "peak learning rates")

    def names(self) -> tuple[str, ...]:
        """The variants, AdamW first."""
        raise NotImplementedError

    def build(self, name: str, model: nn.Module, lr: float) -> Optimizer:
        """The optimizer of a variant."""
        raise NotImplementedError

    def cases(self) -> list[Case]:
        """A training a seed, a learning rate and a variant."""
        return [
            {**self.base(seed), "lr": lr, "name": name}
            for seed in range(self.seeds)
            for lr in self.lrs
            for name in self.names()
        ]

    def measure(self, case: Case) -> dict[str, Any]:
        """Losses and spikes."""
        return train(lambda model: [self.build(case["name"], model, case["lr"])], case)

    def draw(self, results: Sequence[Result]) -> Figure:
        """Validation losses less AdamW's at the same seed, a panel a learning rate."""
        figure, axes = plt.subplots(1, len(self.lrs), figsize=(WIDTH, 3.8), sharey=True, layout="constrained")
        for axis, lr in zip([axes] if len(self.lrs) == 1 else axes, self.lrs):
            curves = {name: self._curves(results, name, lr) for name in self.names()}
            base, *_ = reference = curves.pop("AdamW")
            for number, (name, found) in enumerate(curves.items()):
                gaps = [
                    [loss - least for (_, loss), (_, least) in zip(one, other)] for one, other in zip(found, reference)
                ]
                style = {"color": f"C{(0, 5, 3, 1, 4, 6)[number % 6]}", "ls": ("-", "--", "-.", ":")[number % 4]}
                band(axis, [step for step, _ in base], gaps, name, **style)
            end = median(one[-1][1] for one in reference)
            axis.set(title=f"learning rate {lr:g}\n(AdamW ends at {end:.2f})", xlabel="optimizer step")
            axis.axhline(0, color="black", lw=0.8)
            axis.grid(alpha=0.25)
        # Linear up to a tenth, so that what is close can be told apart and what has failed is in the picture, too.
        figure.axes[0].set_yscale("symlog", linthresh=0.1, linscale=2)
        figure.axes[0].margins(y=0.02)
        figure.axes[0].yaxis.set_minor_locator(NullLocator())
        figure.axes[0].yaxis.set_major_locator(FixedLocator([-1, -0.1, -0.05, 0, 0.05, 0.1, 1, 10]))
        figure.axes[0].yaxis.set_major_formatter("{x:+g}")
        figure.axes[0].set_ylabel("validation loss less AdamW's\n(nats/token, linear up to 0.1)")
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
        return figure

    @staticmethod
    def _curves(results: Sequence[Result], name: str, lr: float) -> list[list[tuple[int, float]]]:
        """A seed's pairs of a step and the loss, from the first step on."""
        found = [r.found["validation"][1:] for r in results if (r.case["name"], r.case["lr"]) == (name, lr)]
        return [[(step, point(loss)) for step, loss in one] for one in found]

    def finals(self, results: Sequence[Result], name: str, lr: float) -> list[float]:
        """The last validation losses, by seed."""
        return [last(r) for r in results if r.case["name"] == name and r.case["lr"] == lr]

    def best(self, results: Sequence[Result], name: str) -> list[float]:
        """Those of the learning rate at which the median is least: the same search for each variant."""
        return min((self.finals(results, name, lr) for lr in self.lrs), key=median)


def adamw(model: nn.Module, lr: float) -> Optimizer:
    """The one that all others are held against."""
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=BETAS, weight_decay=WEIGHT_DECAY)


def last(result: Result) -> float:
    """The last validation loss; infinite for a run that has diverged."""
    loss = result.found["validation"][-1][1]
    return math.inf if loss is None else loss


def point(loss: float | None) -> float:
    """A loss as it is drawn: nothing for a run that has diverged."""
    return math.nan if loss is None else loss


def size_of(size: str) -> Size:
    """A model and how it is trained: one of examples/pretrain.py's, or of the smaller ones here."""
    from examples import pretrain

    sizes = {
        "micro": pretrain.Size(16, 2, 2, 2, 64, 300, vocab_size=512, batch_size=4, lr=3e-3),
        "mini": pretrain.Size(32, 2, 2, 2, 64, 300, vocab_size=512, batch_size=4, lr=3e-3),
        "mini-2048": pretrain.Size(32, 2, 2, 2, 64, 300, vocab_size=2048, batch_size=4, lr=3e-3),
        "tiny": pretrain.Size(64, 2, 4, 4, 64, 300, vocab_size=512, batch_size=8, lr=1e-3),
        **pretrain.SIZES,
    }
    if size not in sizes:
        raise SystemExit(f"--size {size}: choose from {', '.join(sizes)}")
    return sizes[size]


@lru_cache(maxsize=1)
def material(size: str, dataset: str, steps: int, seed: int) -> tuple[argparse.Namespace, Any, Tensor, Tensor]:
    """Arguments as of examples/pretrain.py, a tokenizer, sequences to train on and held-out ones."""
    from examples import pretrain

    given = {**asdict(size_of(size)), "steps": steps, "seed": seed, "eval_sequences": 64, "dataset": dataset or None}
    args = argparse.Namespace(**given, glob=["*.py", "*.txt", "*.md"], dataset_config=None, text_column="text")
    with tempfile.TemporaryDirectory() as folder:
        args.output_dir = Path(folder)
        return args, *pretrain.load_data(args)


def material_of(case: Case) -> tuple[argparse.Namespace, Any, Tensor, Tensor]:
    """A case's material; cases of several lengths have the same where they say for how many steps it is to last."""
    return material(case["size"], case["dataset"], case.get("text_for_steps", case["steps"]), case["seed"])


def small_text(vocabulary: int, length: int, seed: int) -> Tensor:
    """So many tokens of Python's source, in a vocabulary that was made for it: (length,), int64."""
    from examples import pretrain

    args = argparse.Namespace(dataset=None, glob=["*.py"], seed=seed)
    documents = pretrain.read_documents(args)
    texts = [next(documents) for _ in range(50)]
    encoded = pretrain.train_tokenizer(texts, vocabulary).encode("".join(texts))
    return torch.tensor(encoded.ids[:length])


def new_model(case: Case) -> nn.Module:
    """A case's model with its initial weights, the same at every call."""
    from examples import pretrain

    args, tokenizer, *_ = material_of(case)
    return pretrain.build_model(args, tokenizer).to(_device())


def batches(case: Case) -> Iterator[Tensor]:
    """A case's batches, one epoch after another, each in an order of its own."""
    args, _, sequences, _ = material_of(case)
    generator = torch.Generator().manual_seed(case["seed"])
    while True:
        for chosen in torch.randperm(len(sequences), generator=generator).split(args.batch_size):
            if len(chosen) == args.batch_size:
                yield sequences[chosen].long().to(_device())


def train(
    build: Build, case: Case, schedule: str = "cosine", watch: Callable[[int, nn.Module], None] = lambda *_: None
) -> dict[str, Any]:
    """Trains a case's model once.

    Args:
        build: Makes the optimizers of a model; each has the schedule.
        case: Says size, data, steps and seed.
        schedule: As transformers calls it; ``"cosine"`` and ``"constant"`` after a rise over 5% of the steps.
        watch: Called with the number of steps taken and the model, before the first step and after each.

    Returns:
        Pairs of a step and the validation loss in nats a token, ``None`` once a run has diverged; and the spikes.
    """
    from transformers import get_scheduler

    steps = case["steps"]
    model = new_model(case)
    *_, held_out = material_of(case)
    optimizers = build(model)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    schedulers = [get_scheduler(name, optimizer, round(WARMUP * steps), steps) for optimizer in optimizers]
    validation = [(0, evaluate(model, held_out))]
    losses: list[float] = []
    spikes = 0
    watch(0, model)
    for step, batch in zip(range(1, steps + 1), batches(case)):
        loss = model(batch, labels=batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for one in (*optimizers, *schedulers):
            one.step()
        model.zero_grad()
        losses.append(loss.item())
        before = losses[-TRAILING - 1 : -1]
        spikes += len(before) == TRAILING and losses[-1] > statistics.median(before) + SPIKE
        watch(step, model)
        if step % max(1, steps // EVALUATIONS) == 0 or step == steps:
            diverged = not math.isfinite(losses[-1])
            validation.append((step, math.inf if diverged else evaluate(model, held_out)))
    return {"validation": validation, "spikes": spikes}


@torch.no_grad()
def evaluate(model: nn.Module, held_out: Tensor) -> float:
    """Mean loss over the held-out sequences, nats a token."""
    parts = held_out.long().to(_device()).split(16)
    return sum(model(part, labels=part).loss.item() * len(part) for part in parts) / len(held_out)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
