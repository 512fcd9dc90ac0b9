"""The rules that say which blocks a parameter has: ordered, first match wins (the paper's Algorithm 3).

A rule looks at a :class:`Site`, a parameter together with the modules that hold it, and returns
:class:`Slices` or ``None``. A parameter that no rule fits is an error of the caller's to report.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .adapters import adapter
from .geometry import GeometryError, Heads, Slices, cut, is_attention, projections, read_heads, resembles_attention
from .layout import Layout


@dataclass(frozen=True)
class Site:
    """A parameter, and where it stands in its model.

    Args:
        name: Its name in the model.
        shape: Its shape.
        path: The modules from the one that holds it up to the model, each with the name by which the
            next lower one (for the first: the parameter) is held.
        facts: What is known of the model as a whole.
    """

    name: str
    shape: torch.Size
    path: tuple[tuple[str, nn.Module], ...]
    facts: Facts

    @property
    def attribute(self) -> str:
        """The name by which its module holds it, such as ``"weight"``."""
        return self.path[0][0]

    @property
    def module(self) -> nn.Module:
        """The module that holds it."""
        return self.path[0][1]

    def at(self, attribute: str, shape: tuple[int, ...], module: nn.Module, level: int) -> Site:
        """The same place, seen from a parameter of ``module`` that stands where level ``level`` of the path does."""
        path = ((attribute, module), *self.path[level + 1 :])
        return Site(self.name, torch.Size(shape), path, self.facts)

    @property
    def ndim(self) -> int:
        """The number of its axes."""
        return len(self.shape)


@dataclass
class Facts:
    """What is known of a model as a whole, and the heads of its attention modules as they are met."""

    value: str
    output_embeddings: nn.Module | None = None
    base_model: nn.Module | None = None
    num_labels: int | None = None
    _heads: dict[int, Heads] = field(default_factory=dict)

    def heads(self, module: nn.Module, configs: tuple[Any, ...]) -> Heads:
        """The heads of an attention module, read once for all its projections."""
        if id(module) not in self._heads:
            self._heads[id(module)] = read_heads(module, configs)
        return self._heads[id(module)]


Rule = Callable[[Site], Slices | None]


def has_attention(model: nn.Module) -> bool:
    """Whether any module of the model is attention, which ``scheme="auto"`` asks."""
    return any(is_attention(module) or resembles_attention(module) for module in model.modules())


def output_axis(module: nn.Module) -> int:
    """The axis of a module's ``weight`` that numbers its outputs.

    It is the first for ``nn.Linear`` and by torch's convention, the second for transformers' ``Conv1D``.
    """
    return 1 if type(module).__name__ == "Conv1D" and hasattr(module, "nf") else 0


def tensor(site: Site) -> Slices:
    """One block for each tensor: torch's default partition."""
    if site.ndim == 0:
        return Slices("vector", Layout.elements(()), "a scalar")
    return Slices(_plain_role(site), Layout.whole(site.shape[0]), "one block a tensor")


def _plain_role(site: Site) -> str:
    if isinstance(site.module, nn.Embedding):
        return "embedding"
    if isinstance(site.module, nn.modules.conv._ConvNd) and site.ndim > 2:
        return "conv"
    return "bias" if _is_bias(site) else "vector" if site.ndim < 2 else "linear"


def bias(site: Site) -> Slices | None:
    """Biases: one block an element, which is AdamW."""
    if not _is_bias(site):
        return None
    return Slices("bias", Layout.elements(tuple(site.shape)), "a block an element, as AdamW")


def _is_bias(site: Site) -> bool:
    return site.attribute == "bias" or site.attribute.endswith("_bias")


def embedding(site: Site) -> Slices | None:
    """Embedding tables, of tokens, positions or types: one block a row."""
    if not isinstance(site.module, (nn.Embedding, nn.EmbeddingBag)) or site.ndim != 2:
        return None
    return Slices("embedding", Layout.each_row(site.shape[0]), f"a block a row of {type(site.module).__name__}")


def vector(site: Site) -> Slices | None:
    """Norm weights, class tokens, other vectors and scalars: one block."""
    if site.ndim == 0:
        return Slices("vector", Layout.elements(()), "a scalar")
    longest = max(site.shape)
    if (site.ndim > 1 and site.shape.numel() != longest) or isinstance(site.module, (nn.Linear, nn.Embedding)):
        return None
    axis = site.shape.index(longest)
    return Slices("vector", Layout.whole(site.shape[axis], (axis,)), f"a vector of {type(site.module).__name__}")


def convolution(site: Site) -> Slices | None:
    """Patch and feature convolutions: one block for the tensor."""
    if not isinstance(site.module, nn.modules.conv._ConvNd):
        return None
    return Slices("conv", Layout.whole(site.shape[0]), f"one block a {type(site.module).__name__}")


def attention(site: Site) -> Slices | None:
    """Projections inside attention: query and key by head, value by row, fused ones slice by slice.

    The attention module may stand any number of levels above the tensor, as where an adapter or a
    wrapper lies between the two.

    Raises:
        GeometryError: The module is attention, but how its rows fall into heads can't be told.
    """
    if site.ndim != 2:
        return None
    for level, (part, module) in enumerate(site.path):
        if is_attention(module) and part in projections(module):
            axis = output_axis(site.module)
            configs = tuple(m.config for _, m in site.path[level:] if hasattr(m, "config"))
            return cut(module, part, site.shape[axis], axis, site.facts.heads(module, configs), site.facts.value)
        if level < 2 and resembles_attention(module):
            raise GeometryError(f"{type(module).__name__} is called attention, but no query and key are known in it")
    return None


def experts(site: Site) -> Slices | None:
    """Stacks of expert matrices: one block an output neuron of each expert, never a mean over experts.

    Raises:
        GeometryError: Which of the last two axes is the output can't be told.
    """
    count = getattr(site.module, "num_experts", None)
    if site.ndim != 3 or count != site.shape[0]:
        return None
    transposed = getattr(site.module, "is_transposed", None)
    if transposed is None:
        raise GeometryError(
            f"{type(site.module).__name__} has no is_transposed to say which of the last two axes is the output"
        )
    axes = (0, 2) if transposed else (0, 1)
    rows = site.shape[0] * site.shape[axes[1]]
    return Slices("expert", Layout.each_row(rows, axes), f"a block an output neuron of each of {count} experts")


def linear(site: Site) -> Slices | None:
    """Any other linear map: one block an output neuron. The map to the vocabulary or to labels likewise."""
    if site.ndim != 2:
        return None
    kind = type(site.module).__name__
    axis = output_axis(site.module)
    layout = Layout.each_row(site.shape[axis], (axis,))
    if site.module is site.facts.output_embeddings or _maps_to_labels(site):
        return Slices("output", layout, f"a block a row of {kind}")
    known = isinstance(site.module, (nn.Linear, nn.RNNBase)) or axis == 1
    if not known and site.attribute != "weight":
        return None
    return Slices("linear", layout, f"a block an output neuron of {kind}")


def _maps_to_labels(site: Site) -> bool:
    """Whether the matrix belongs to a head outside the base model and has a row for each label."""
    base = site.facts.base_model
    outside = base is not None and all(module is not base for _, module in site.path)
    return outside and site.shape[output_axis(site.module)] == site.facts.num_labels


def table(site: Site) -> Slices | None:
    """A table of vectors kept as a bare parameter, ``(1, positions, width)``: one block a vector."""
    if site.ndim != 3 or site.shape[0] != 1 or isinstance(site.module, nn.modules.conv._ConvNd):
        return None
    return Slices("embedding", Layout.each_row(site.shape[1], (1,)), f"a block a vector of {site.attribute}")


TENSOR_RULES: tuple[Rule, ...] = (tensor,)


def adapters(site: Site) -> Slices | None:
    """Parameters that adapters have added; see :mod:`.adapters`."""
    return adapter(site, lambda base: first_match(base, HESSIAN_RULES))


HESSIAN_RULES: tuple[Rule, ...] = (bias, vector, adapters, embedding, convolution, attention, experts, linear, table)


def first_match(site: Site, rules: Iterable[Rule]) -> Slices:
    """What the first rule says that fits.

    Raises:
        GeometryError: None fits.
    """
    for rule in rules:
        slices = rule(site)
        if slices is not None:
            return slices
    raise GeometryError(f"none of the rules fits a tensor of {site.ndim} axes held as {site.attribute!r}")
