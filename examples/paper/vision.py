"""Table 6, vision: a ResNet-18, a vision transformer and a DDPM, all small, on scikit-learn's handwritten digits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from .on_par import DEVICE, OnPar, Task

BATCH = 64
TIMES = 200  # of noise


@lru_cache(maxsize=1)
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images to train on and held-out ones, (n, 1, 8, 8) between -1 and 1, and their labels; the same for all seeds."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1
    halves = train_test_split(images, torch.tensor(found.target), test_size=0.5, stratify=found.target, random_state=0)
    train, held_out, labels, held_out_labels = (half.to(DEVICE) for half in halves)
    return train, labels, held_out, held_out_labels


class Classifier(Task):
    """One of transformers' image classifiers."""

    metric, sign = "held-out accuracy (%)", 1
    scale = 1  # how many times larger the model sees the images

    def loss(self) -> Tensor:
        """Cross entropy."""
        images, labels, *_ = digits()
        chosen = torch.randint(len(images), (BATCH,), generator=self.batches)
        return functional.cross_entropy(self._logits(images[chosen]), labels[chosen])

    def score(self) -> float:
        """Per cent."""
        *_, images, labels = digits()
        return 100 * (self._logits(images).argmax(1) == labels).double().mean().item()

    def _logits(self, images: Tensor) -> Tensor:
        return self.model(functional.interpolate(images, scale_factor=self.scale, mode="bilinear")).logits


class ResNet18(Classifier):
    """ResNet-18 of a quarter of its channels. Its first layers shrink an image to a quarter, so it sees it large."""

    lr, scale = 3e-3, 4

    def build(self) -> nn.Module:
        """About 700 thousand parameters."""
        from transformers import ResNetConfig, ResNetForImageClassification

        sizes = {"embedding_size": 16, "hidden_sizes": [16, 32, 64, 128], "depths": [2, 2, 2, 2], "layer_type": "basic"}
        return ResNetForImageClassification(ResNetConfig(**sizes, num_channels=1, num_labels=10))


class ViT(Classifier):
    """A vision transformer; a patch has two by two pixels."""

    lr = 2e-3

    def build(self) -> nn.Module:
        """About 80 thousand parameters."""
        from transformers import ViTConfig, ViTForImageClassification

        sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
        return ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=2, num_channels=1, num_labels=10))


class DDPM(Task):
    """A U-Net that learns to tell the noise in an image (Ho et al. 2020)."""

    metric, sign, lr = "held-out denoising loss", -1, 2e-3

    def build(self) -> nn.Module:
        """About 240 thousand parameters."""
        return UNet(32)

    def loss(self) -> Tensor:
        """Squared error of the noise that is told."""
        images, *_ = digits()
        return self._error(images[torch.randint(len(images), (BATCH,), generator=self.batches)], self.batches)

    def score(self) -> float:
        """Times and noise are the same at every call, and for all seeds."""
        *_, images, _ = digits()
        return self._error(images, torch.Generator().manual_seed(0)).item()

    def _error(self, images: Tensor, generator: torch.Generator) -> Tensor:
        times = torch.randint(TIMES, (len(images),), generator=generator).to(DEVICE)
        noise = torch.randn(images.shape, generator=generator).to(DEVICE)
        kept = (1 - torch.linspace(5e-4, 0.1, TIMES, device=DEVICE)).cumprod(0)[times].view(-1, 1, 1, 1)
        return functional.mse_loss(self.model(kept.sqrt() * images + (1 - kept).sqrt() * noise, times), noise)


class UNet(nn.Module):
    """Two resolutions, a residual block at each on the way down and up, and one at the bottom."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.frequencies = nn.Buffer(torch.exp(-math.log(1000) * torch.linspace(0, 1, width // 2)))
        self.time = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, 2 * width))
        self.enter = nn.Conv2d(1, width, 3, padding=1)
        self.down = Residual(width, width, 2 * width)
        self.shrink = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.bottom = nn.ModuleList(Residual(2 * width, 2 * width, 2 * width) for _ in range(2))
        self.grow = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.up = Residual(2 * width, width, 2 * width)
        self.leave = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, 1, 3, padding=1))

    def forward(self, images: Tensor, times: Tensor) -> Tensor:
        """(n, 1, h, w) and (n,) to (n, 1, h, w)."""
        angles = times[:, None] * self.frequencies
        time = self.time(torch.cat((angles.sin(), angles.cos()), 1))
        fine = coarse = self.down(self.enter(images), time)
        coarse = self.shrink(coarse)
        for block in self.bottom:
            coarse = block(coarse, time)
        return self.leave(self.up(torch.cat((fine, self.grow(coarse)), 1), time))


class Residual(nn.Module):
    """Two convolutions, the time added between them, around a skip."""

    def __init__(self, channels: int, out: int, time: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, out, 3, padding=1))
        self.time = nn.Linear(time, out)
        self.second = nn.Sequential(nn.GroupNorm(8, out), nn.SiLU(), nn.Conv2d(out, out, 3, padding=1))
        self.skip = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, images: Tensor, time: Tensor) -> Tensor:
        """(n, channels, h, w) to (n, out, h, w)."""
        return self.skip(images) + self.second(self.first(images) + self.time(time)[:, :, None, None])


@dataclass(frozen=True)
class Vision(OnPar):
    """A ResNet-18 of a quarter of the width, a vision transformer and a DDPM on 8x8 digits, half of them held out.

    The rate decides most of the DDPM's gap: at one seed, where AdamW ends at 0.127 and Adam-mini at 0.136, twice the
    learning rate ends at 0.130, and blocks by neuron, in place of one a tensor, at 0.134.
    """

    name = "vision"
    claim = "on vision models Adam-mini is on par with AdamW or better"
    libraries = ("scikit-learn",)
    tasks = {"ResNet-18": ResNet18, "ViT": ViT, "DDPM": DDPM}
