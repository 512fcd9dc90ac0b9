"""Trains a small vision transformer on scikit-learn's digits with Lightning, once with Adam-mini and once with AdamW.

    python examples/lightning_vision.py

1,797 images of 8 x 8 pixels, a fifth of them held out; the transformer sees them as 16 patches. As in
examples/lightning_finetune.py, Adam-mini is one callback, and nothing else differs between the runs. It ends with a
table, a plot and Lightning's logs in ``runs/lightning_vision/``, in less than two minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from lightning.pytorch import seed_everything
from lightning_finetune import TITLES, Tuned, fit, plot, quieten, table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from transformers import ViTConfig, ViTForImageClassification


class Digits(Tuned):
    """A classifier of images; its loss is in nats per image."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """The loss on a batch of images and labels."""
        loss = self.model(pixel_values=batch[0], labels=batch[1]).loss
        self.log("training", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """The share of held-out images whose label is right."""
        right = self.model(pixel_values=batch[0]).logits.argmax(dim=-1) == batch[1]
        self.log("held_out", right.float().mean())


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], formatter_class=formatter)
    add = parser.add_argument
    add("--optim", nargs="+", choices=TITLES, default=list(TITLES), help="optimizers to compare")
    add("--width", type=int, default=64, help="of the transformer")
    add("--layers", type=int, default=3, help="of the transformer")
    add("--heads", type=int, default=4, help="of each layer's attention")
    add("--steps", type=int, default=500, help="optimizer steps")
    add("--batch-size", type=int, default=32, help="images a step")
    add("--lr", type=float, default=2e-3, help="peak learning rate")
    add("--weight-decay", type=float, default=0.05, help="decoupled weight decay")
    add("--seed", type=int, default=0, help="of weights, batches and of what is held out")
    add("--output-dir", type=Path, default=Path("runs/lightning_vision"), help="where plot and logs are written")
    return parser.parse_args()


def read_digits(seed: int) -> list[TensorDataset]:
    """Images (number, 1, 8, 8), from -1 to 1, with their labels: to train on, and held out."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(digits.target)
    parts = train_test_split(range(len(labels)), test_size=0.2, random_state=seed, stratify=labels)
    return [TensorDataset(images[part], labels[part]) for part in parts]


def build_model(args: argparse.Namespace) -> ViTForImageClassification:
    """A vision transformer with random weights."""
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=args.width,
        intermediate_size=4 * args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_labels=10,
    )
    return ViTForImageClassification(config)


def main() -> None:
    """Trains with each optimizer and reports."""
    args, console = parse_arguments(), quieten()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    data = read_digits(args.seed)
    runs = []
    for optim in args.optim:
        seed_everything(args.seed, verbose=False)
        module = Digits(build_model(args), args.lr, args.weight_decay, args.steps)
        loaders = [DataLoader(data[0], args.batch_size, shuffle=True), DataLoader(data[1], len(data[1]))]
        runs.append(fit(module, optim, loaders, args.output_dir / optim))
    console.print(table(runs, "held-out accuracy", percent=True))
    path = args.output_dir / "lightning_vision.png"
    title = f"A vision transformer on scikit-learn's digits with {' and '.join(run.title for run in runs)}"
    plot(runs, title, "cross-entropy (nats/image)", "accuracy", path, percent=True)
    console.print(f"Plot and logs: {path}, {args.output_dir}/*/metrics.csv")


if __name__ == "__main__":
    main()
