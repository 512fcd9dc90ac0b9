"""What the pictures share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.image import AxesImage
from torch import Tensor

from .frame import median

WIDTH = 8.0  # inches; the README shows a picture at about this width


def band(axes: Axes, x: Sequence[float], curves: Sequence[Sequence[float]], label: str, **style: Any) -> None:
    """The median of several seeds' curves over the range from the least to the most."""
    middle, least, most = ([pick(values) for values in zip(*curves)] for pick in (median, min, max))
    (line,) = axes.plot(x, middle, label=label, lw=1.8, **style)
    axes.fill_between(x, least, most, color=line.get_color(), alpha=0.18, lw=0)


def whiskers(axes: Axes, x: Sequence[float], found: Sequence[Sequence[float]], label: str, **style: Any) -> None:
    """The median of several seeds' values at each place, with whiskers from the least to the most."""
    middle = [median(values) for values in found]
    error = [
        [m - min(values) for m, values in zip(middle, found)],
        [max(values) - m for m, values in zip(middle, found)],
    ]
    axes.errorbar(x, middle, error, capsize=3, label=label, **style)


def heat(axes: Axes, values: Tensor, **options: Any) -> AxesImage:
    """A matrix as an image without ticks; one colour map for all, from dark to light, readable in grey too."""
    image = axes.imshow(values, cmap="cividis", interpolation="nearest", **options)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    return image
