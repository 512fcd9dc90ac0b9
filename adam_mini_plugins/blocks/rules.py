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
from .geometry import (
    GeometryError,
    Heads,
    Slices,
    cut,
    is_attention,
    is_called_attention,
    projections,
    read_heads,
    resembles_attention,
)
from .layout import Grid, Layout
from .vocabulary import words


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
    def configs(self) -> tuple[Any, ...]:
        """The configs that apply to it, nearest first."""
        return tuple(module.config for _, module in self.path if hasattr(module, "config"))

    @property
    def widths(self) -> set[int]:
        """What its nearest config says of the model's width."""
        named = (getattr(config, name, None) for config in self.configs[:1] for name in ("hidden_size", "d_model"))
        return {width for width in named if isinstance(width, int)}

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
    return any(is_attention(m) or (is_called_attention(m) and projections(m)) for m in model.modules())


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
    said = words(site.attribute)
    return bool(said) and (bool({"bias", "biases"} & {said[0], said[-1]}))


def embedding(site: Site) -> Slices | None:
    """Embedding tables, of tokens, positions or types: one block a row."""
    if not isinstance(site.module, (nn.Embedding, nn.EmbeddingBag)) or site.ndim != 2:
        return None
    return Slices("embedding", Layout.each_row(site.shape[0]), f"a block a row of {type(site.module).__name__}")


def vector(site: Site) -> Slices | None:
    """Norm weights, class tokens, other vectors and scalars: one block."""
    if site.ndim == 0:
        return Slices("vector", Layout.elements(()), "a scalar")
    if site.ndim == 2 and words(site.attribute)[-1:] == ["scale"]:
        return Slices("vector", Layout.whole(site.shape.numel(), (0, 1)), f"a vector of {type(site.module).__name__}")
    longest = max(site.shape)
    row_of_a_matrix = site.attribute == "weight" and isinstance(site.module, (nn.Linear, nn.Embedding))
    if (site.ndim > 1 and site.shape.numel() != longest) or row_of_a_matrix:
        return None
    axis = site.shape.index(longest)
    return Slices("vector", Layout.whole(site.shape[axis], (axis,)), f"a vector of {type(site.module).__name__}")


def convolution(site: Site) -> Slices | None:
    """Patch, feature and short convolutions, torch's or a module's own: one block for the tensor."""
    own = "conv" in type(site.module).__name__.lower() and site.attribute != "weight"
    if not isinstance(site.module, nn.modules.conv._ConvNd) and not own:
        return None
    return Slices("conv", Layout.whole(site.shape[0]), f"one block a {type(site.module).__name__}")


def attention(site: Site) -> Slices | None:
    """Projections inside attention: query and key by head, value by row, fused ones slice by slice.

    The attention module may stand any number of levels above the tensor, as where an adapter or a
    wrapper lies between the two.

    Raises:
        GeometryError: The module is attention, but how its rows fall into heads can't be told.
    """
    if site.ndim < 2:
        return None
    for level, (part, module) in enumerate(site.path):
        if is_attention(module) and part in projections(module):
            configs = tuple(m.config for _, m in site.path[level:] if hasattr(m, "config"))
            heads = site.facts.heads(module, configs)
            if site.ndim > 2 and level == 0:
                return _headed(site, part, module, heads)
            axis = output_axis(site.module)
            return cut(module, part, site.shape[axis], axis, heads, site.facts.value)
        if level < 2 and resembles_attention(module):
            raise GeometryError(f"{type(module).__name__} is called attention, but no query and key are known in it")
    return None


def _headed(site: Site, part: str, module: nn.Module, heads: Heads) -> Slices | None:
    """A projection that is kept with an axis of heads and one of a head's rows: ``(width, heads, dim)``."""
    if site.ndim != 3 or site.shape[1] not in (heads.count.value, heads.key_value.value):
        return None
    slices = cut(module, part, site.shape[1] * site.shape[2], 0, heads, site.facts.value)
    if slices is None:  # the output projection sums over heads
        return Slices("linear", Layout.each_row(site.shape[0]), "a block an output neuron")
    return Slices(slices.role, Layout((1, 2), slices.layout.grids), slices.why)


# Modules whose stacks are square, or don't follow one another, so that only their code tells.
_TRANSPOSED = {"RecurrentGemmaRglru": True, "ZambaMambaMixer": False, "CsmCodebooksHead": True}


def experts(site: Site) -> Slices | None:
    """Stacks of expert matrices: one block an output neuron of each expert, never a mean over experts.

    Which of the last two axes is the output is declared by the module, or follows from the shapes: what
    one stack puts out, the next one takes in.

    Raises:
        GeometryError: Which of the last two axes is the output can't be told.
    """
    if type(site.module).__name__ == "DbrxExpertGLU" and site.attribute == "w2":
        return _flat_experts(site)
    if site.ndim != 3 or isinstance(site.module, nn.modules.conv._ConvNd):
        return None
    count = site.shape[0]
    stacks = [p.shape for p in site.module._parameters.values() if p is not None and p.ndim == 3]
    family = _TRANSPOSED.get(type(site.module).__name__)
    if count != getattr(site.module, "num_experts", None) and len(stacks) < 2 and family is None:
        return None
    transposed = getattr(site.module, "is_transposed", family)
    if transposed is None:
        transposed = _is_transposed(site, stacks)
    axes = (0, 2) if transposed else (0, 1)
    rows = count * site.shape[axes[1]]
    if len(site.path) > 1 and (site.path[1][0], type(site.path[1][1]).__name__) == ("input_linear", "JetMoeMoA"):
        return _expert_queries(site, count)
    return Slices("expert", Layout.each_row(rows, axes), f"a block an output neuron of each of {count} experts")


def _flat_experts(site: Site) -> Slices:
    """Experts below one another as ``(experts * in, out)`` (DBRX): a block an output neuron of each."""
    module: Any = site.module
    grid = Grid((module.moe_num_experts, module.ffn_hidden_size, site.shape[1]), (False, True, False))
    return Slices("expert", Layout((0, 1), (grid,)), f"a block a column of each of {grid.sizes[0]} experts")


def _expert_queries(site: Site, count: int) -> Slices:
    """Experts that make queries: a block a head of each (JetMoE, whose experts have a query for each key head)."""
    heads = site.configs[0].num_key_value_heads
    grid = Grid((count, heads, site.shape[1] // heads), (False, False, True))
    return Slices("query", Layout((0, 1), (grid,)), f"{heads} heads of each of {count} experts")


def _is_transposed(site: Site, stacks: list[torch.Size]) -> bool:
    """Whether a module's stacks are ``(experts, in, out)``, by the only way in which they fit together."""
    if len(stacks) == 1:
        sizes = [getattr(site.module, name, None) for name in ("input_size", "output_size")]
        fits = {False: sizes == [stacks[0][2], stacks[0][1]], True: sizes == [stacks[0][1], stacks[0][2]]}
        if site.attribute == "weight" and fits[False]:  # as torch's own; a square one too
            return False
    else:
        (_, *first), (_, *last) = stacks[0], stacks[-1]
        fits = {
            False: first[1] == last[0] and first[0] in (last[1], 2 * last[1]),
            True: first[0] == last[1] and first[1] in (last[0], 2 * last[0]),
        }
        if fits[True] and fits[False]:  # the way in has the model's width
            fits = {False: first[1] in site.widths, True: first[0] in site.widths}
    if fits[True] == fits[False]:
        shapes = ", ".join(str(tuple(shape)) for shape in stacks)
        raise GeometryError(
            f"{type(site.module).__name__} has no is_transposed to say which of the last two axes is the output, "
            f"and its shapes don't tell: {shapes}"
        )
    return fits[True]


# The output axis of bare matrices, which no module says: by exact name, and of some by class as well.
_BARE: dict[str, int] = {
    "fn": 0,
    "hc_fn": 0,
    "index_kpool_compress_gate": 0,
    "DbrxExpertGLU.w1": 0,
    "DbrxExpertGLU.v1": 0,
    "InklingRelativeLogits.proj": 1,
    "Inkling2RelativeLogits.proj": 1,
    "mm_input_projection_weight": 1,
    "prompts_visual_projection": 1,
    "text_projection": 1,
}


def linear(site: Site) -> Slices | None:
    """Any other linear map: one block an output neuron. The map to the vocabulary or to labels likewise."""
    if site.ndim != 2:
        return None
    kind = type(site.module).__name__
    axis = output_axis(site.module)
    layout = Layout.each_row(site.shape[axis], (axis,))
    if site.module is site.facts.output_embeddings or _maps_to_labels(site):
        return Slices("output", layout, f"a block a row of {kind}")
    if isinstance(site.module, (nn.Linear, nn.RNNBase)) or axis == 1 or site.attribute == "weight":
        return Slices("linear", layout, f"a block an output neuron of {kind}")
    bare = _BARE.get(site.attribute, _BARE.get(f"{kind}.{site.attribute}"))
    if bare is None:
        return None
    return Slices("linear", Layout.each_row(site.shape[bare], (bare,)), f"a block an output neuron of {site.attribute}")


def _maps_to_labels(site: Site) -> bool:
    """Whether the matrix belongs to a head outside the base model and has a row for each label."""
    base = site.facts.base_model
    outside = base is not None and all(module is not base for _, module in site.path)
    return outside and site.shape[output_axis(site.module)] == site.facts.num_labels


# What bare tables of vectors are called, one vector a row.
_TABLE = frozenset({
    "ape", "class", "cls", "codebook", "emb", "embed", "embedding", "embeddings", "latent", "latents", "memory", "pad",
    "pos", "position", "positional", "positions", "probe", "prompt", "prompts", "queries", "query", "register",
    "registers", "table", "token", "tokens",
})  # fmt: skip
_PROJECTION = frozenset({"proj", "projection"})


def table(site: Site) -> Slices | None:
    """Vectors kept as a bare parameter, of positions, classes, latents or learned queries: one block a vector.

    They are an embedding that is not looked up by ``nn.Embedding``: ``(positions, width)``,
    ``(1, positions, width)``, ``(1, height, width, channels)``.
    """
    called = set(words(" ".join(held for held, _ in site.path[:3]) if _is_list(site.module) else site.attribute))
    if site.ndim < 2 or site.attribute == "weight" or not called & _TABLE or called & _PROJECTION:
        return None
    if is_attention(site.module) and projections(site.module).get(site.attribute) is not None:
        return None
    axes = tuple(range(site.ndim - 1))
    rows = site.shape[:-1].numel()
    return Slices("embedding", Layout.each_row(rows, axes), f"a block a vector of {site.attribute}")


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, nn.ParameterList | nn.ParameterDict)


def recurrence(site: Site) -> Slices | None:
    """The rates of a state-space layer, ``(channels, states)``: one block a channel.

    A channel's recurrence is diagonal and its own, so that nothing couples it densely with another's;
    it is to its states what an output neuron is to its inputs. Rates of a head, ``(heads,)``, are a
    vector, and so is the skip ``D``. The matrices in and out of such a layer are linear maps, by output
    neuron: the state is not a product of queries and keys behind a softmax, and the finer blocks can't
    merge what is of different curvature.
    """
    if site.attribute == "D" and site.ndim == 2:
        return Slices("vector", Layout.whole(site.shape.numel(), (0, 1)), f"a vector of {type(site.module).__name__}")
    if site.attribute != "A_log" or site.ndim < 2:
        return None
    axes = tuple(range(site.ndim - 1))
    return Slices("linear", Layout.each_row(site.shape[:-1].numel(), axes), "a block a channel of the recurrence")


def parametrized(site: Site) -> Slices | None:
    """What stands behind a weight that torch computes, as in weight normalisation: the rule of that weight."""
    if not isinstance(site.module, nn.utils.parametrize.ParametrizationList):
        return None
    attribute, module = site.path[1][0], site.path[2][1]
    behind = site.at(attribute, tuple(site.shape), module, 2)
    return vector(behind) or first_match(behind, HESSIAN_RULES)


TENSOR_RULES: tuple[Rule, ...] = (tensor,)


def adapters(site: Site) -> Slices | None:
    """Parameters that adapters have added; see :mod:`.adapters`."""
    return adapter(site, lambda base: first_match(base, HESSIAN_RULES))


HESSIAN_RULES: tuple[Rule, ...] = (
    bias, vector, adapters, parametrized, embedding, table, recurrence, attention, convolution, experts, linear
)  # fmt: skip


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
