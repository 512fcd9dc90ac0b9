"""The blocks of a model: :func:`partition` asks the rules, :class:`Partition` keeps the answers."""

from __future__ import annotations

import difflib
import fnmatch
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from .geometry import GeometryError, Slices
from .layout import Layout
from .probe import Probe, ProbeError, probe_model
from .rules import HESSIAN_RULES, TENSOR_RULES, Facts, Rule, Site, first_match, has_attention, output_axis
from .whole import as_built

logger = logging.getLogger(__name__)

UserRule = tuple[str, "str | Layout"]

SCHEMES = ("auto", "hessian", "tensor")
VALUES = ("neuron", "whole")


class PartitionError(ValueError):
    """A model's blocks can't be told, or a partition doesn't belong to what it is used with."""


@dataclass(frozen=True)
class TensorBlocks:
    """The blocks of one parameter.

    Args:
        name: The parameter's name in the model.
        shape: Its shape.
        role: What it is: ``"embedding"``, ``"output"``, ``"query"``, ``"key"``, ``"value"``,
            ``"fused"``, ``"linear"``, ``"expert"``, ``"conv"``, ``"bias"``, ``"vector"``, or
            ``"custom"`` where one of your own rules decided.
        layout: How its elements fall into blocks.
        why: The fact that decided.
    """

    name: str
    shape: torch.Size
    role: str
    layout: Layout
    why: str

    @property
    def num_blocks(self) -> int:
        """The number of its blocks."""
        return self.layout.num_blocks

    @property
    def block_index(self) -> Tensor:
        """LongTensor, broadcastable to the shape: the block of every element."""
        return self.layout.block_index(self.shape)


class Partition:
    """The blocks of every parameter of a model, by name; made by :func:`partition`.

    A mapping from parameter names to :class:`TensorBlocks`. All names of a tied parameter lead to the
    same entry. Printing it gives a table, in which layers that are alike share a line.

    Attributes:
        scheme: ``"hessian"`` or ``"tensor"``.
        left_out: Frozen parameters that no rule fits and quantised ones, by name, with the reason.
            They can't be trained with this partition.
    """

    def __init__(
        self,
        scheme: str,
        entries: dict[str, TensorBlocks],
        names: dict[nn.Parameter, list[str]],
        left_out: dict[str, str],
    ) -> None:
        self.scheme = scheme
        self.left_out = left_out
        self._entries = entries
        self._aliases = {alias: first for first, *aliases in names.values() for alias in aliases}
        self._name_of: WeakIdKeyDictionary = WeakIdKeyDictionary({p: first for p, (first, *_) in names.items()})

    def __getitem__(self, name: str) -> TensorBlocks:
        entry = self.get(name)
        if entry is None:
            raise KeyError(f"no parameter {name!r} in this partition{_nearest(name, self._entries)}")
        return entry

    def get(self, name: str) -> TensorBlocks | None:
        """The blocks of a parameter, ``None`` if the partition doesn't know it."""
        return self._entries.get(self._aliases.get(name, name))

    def name_of(self, parameter: Tensor) -> str | None:
        """The name of a parameter of the model that was partitioned, ``None`` for any other tensor."""
        return self._name_of.get(parameter)

    def parameter(self, name: str) -> Tensor | None:
        """The parameter of that name of the model that was partitioned, ``None`` if it is gone or unknown."""
        wanted = self._aliases.get(name, name)
        return next((parameter for parameter, known in self._name_of.items() if known == wanted), None)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.get(name) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def values(self) -> Iterable[TensorBlocks]:
        """The blocks of each parameter, in the model's order."""
        return self._entries.values()

    def block_index(self, name: str) -> Tensor:
        """LongTensor, broadcastable to the parameter's shape: the block of every element."""
        return self[name].block_index

    def num_blocks(self, name: str | None = None) -> int:
        """The number of blocks of one parameter, or of the whole model."""
        return self[name].num_blocks if name is not None else sum(e.num_blocks for e in self.values())

    def __repr__(self) -> str:
        return f"Partition(scheme={self.scheme!r}, {len(self)} tensors, {self.num_blocks():,} blocks)"

    def __str__(self) -> str:
        from .table import render

        return render(self)

    def __getstate__(self) -> dict[str, Any]:
        # Which tensors they were means nothing in another process or beside a copy of the model.
        return {**self.__dict__, "_name_of": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _name_of=WeakIdKeyDictionary())


def partition(
    model: nn.Module,
    scheme: Literal["auto", "hessian", "tensor"] = "auto",
    value: Literal["neuron", "whole"] = "neuron",
    rules: Sequence[UserRule] = (),
    probe: Any = None,
) -> Partition:
    """Partitions a model's parameters into the blocks that share one second moment each.

    The blocks are the smallest dense sub-blocks of the Hessian (the paper's Principle 1 and
    Algorithm 3), read off the model's modules, config and shapes. Without a probe nothing is allocated
    or run: a model on the meta device will do.

    Args:
        model: The model, with its adapters if it has any. Tied parameters count once.
        scheme: ``"hessian"``: an embedding by row, query and key by head, biases by element, any
            other matrix by output neuron, norms and convolutions as a whole. ``"tensor"``: one block
            for each tensor, the paper's choice for anything but Transformers. ``"auto"``:
            ``"hessian"`` for a model that has attention, ``"tensor"`` for one that has none.
        value: Attention values by output ``"neuron"``, or as a ``"whole"``, which the paper prefers
            for runs under 10 to 20 thousand steps (its Appendix C.5).
        rules: Rules of your own, tried first and in order: pairs of a shell-style pattern on the
            parameter's name and what its blocks are: ``"neuron"``, ``"tensor"``, ``"element"``, a
            number of heads as in ``"16 heads"``, or a :class:`Layout`.
        probe: One batch, for a model whose structure doesn't tell: a tensor, a tuple of arguments, a
            mapping of keyword arguments, or a callable that runs the model on one. The model is run
            on it once, in evaluation mode, and the heads of queries and keys are read off what
            reaches its attention; structure says the rest. The model comes back as it was. A small
            batch will do: two sequences of some tokens.

    Raises:
        TypeError: The model is no module, or the rules are no pairs.
        PartitionError: A trainable parameter that no rule fits, a rule that matches nothing or
            doesn't fit what it matches, heads that don't divide a shape, a model that can't be run
            on the probe, or one cut for tensor parallelism as plain tensors.

    Example::

        blocks = partition(model, rules=[("*.mixer.weight", "16 heads")])
        print(blocks)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"partition takes a torch.nn.Module, got {type(model).__name__}: pass the model itself")
    _check_rules(rules)
    _check_choice("scheme", scheme, SCHEMES)
    _check_choice("value", value, VALUES)
    _check_whole(model)
    seen = _probed(model, probe)
    with as_built(model) as built:
        return _read(built, scheme, value, rules, seen)


def _read(model: nn.Module, scheme: str, value: str, rules: Sequence[UserRule], seen: Probe) -> Partition:
    if scheme == "auto":
        scheme = "hessian" if seen.heads or has_attention(model) else "tensor"
        if scheme == "tensor":
            logger.info("no attention is known in %s: one block a tensor, by scheme='auto'", type(model).__name__)
    default_rules = HESSIAN_RULES if scheme == "hessian" else TENSOR_RULES
    facts = _facts(model, value)
    modules = dict(model.named_modules(remove_duplicate=False))

    entries: dict[str, TensorBlocks] = {}
    left_out: dict[str, str] = {}
    unused = [pattern for pattern, _ in rules]
    names = _all_names(model)
    for parameter, (name, *aliases) in names.items():
        if not (parameter.is_floating_point() or parameter.is_complex()):
            left_out[name] = f"quantised, {parameter.dtype}"  # packed as its library likes: it has no rows to cut
            continue
        matching = [rule for rule in rules if fnmatch.filter((name, *aliases), rule[0])]
        unused = [pattern for pattern in unused if pattern not in {rule[0] for rule in matching}]
        site = Site(name, parameter.shape, _path(modules, name), facts)
        try:
            if matching:
                slices = _custom(site, *matching[0])
            else:
                heads = seen.cut(parameter, output_axis(site.module), value) if scheme == "hessian" else None
                slices = heads or _structure(site, default_rules, parameter in seen.multiplied)
        except GeometryError as error:
            if parameter.requires_grad:
                raise PartitionError(_unknown(site, error)) from error
            left_out[name] = str(error)  # costs the optimizer nothing while it is frozen
        else:
            entries[name] = TensorBlocks(name, parameter.shape, slices.role, slices.layout, slices.why)
    if unused:
        raise PartitionError(f"the rule {unused[0]!r} matches no parameter of the model{_nearest(unused[0], entries)}")
    return Partition(scheme, entries, names, left_out)


def _probed(model: nn.Module, probe: Any) -> Probe:
    if probe is None:
        return Probe()
    try:
        seen = probe_model(model, probe)
    except ProbeError as error:
        raise PartitionError(str(error)) from error
    if not seen.heads:
        raise PartitionError(
            f"the probe has seen no attention in {type(model).__name__}: no scaled_dot_product_attention, no attention "
            "function of transformers, no softmax over a product of two activations; leave probe= out for a model that "
            "has none, or say with rules= what the blocks are"
        )
    return seen


def _structure(site: Site, rules: Sequence[Rule], multiplied: bool) -> Slices:
    """What the rules say; where they can't, an output neuron for a matrix that the probe saw at work elsewhere."""
    try:
        return first_match(site, rules)
    except GeometryError:
        if not multiplied or site.ndim != 2:
            raise
        axis = output_axis(site.module)
        layout = Layout.each_row(site.shape[axis], (axis,))
        return Slices("linear", layout, "a block an output neuron: the probe saw it make no query or key")


def _check_choice(option: str, given: str, choices: tuple[str, ...]) -> None:
    if given not in choices:
        raise ValueError(f"{option} must be one of {', '.join(map(repr, choices))}, got {given!r}")


def _check_rules(rules: Any) -> None:
    pairs = list(rules) if isinstance(rules, list | tuple) else [rules]
    for rule in pairs:
        if not isinstance(rule, tuple | list) or len(rule) != 2 or not isinstance(rule[0], str):
            raise TypeError(
                f"rules must be a list of pairs such as ('*.mixer.weight', '16 heads'), got {rule!r}; of a mapping "
                "pass list(rules.items())"
            )


def _check_whole(model: nn.Module) -> None:
    """Raises for a model of whose matrices each process has a part that looks like all of it."""
    for module in model.modules():
        processes = getattr(module, "_tp_size", None) or 1
        # transformers cuts such a model as DTensors now, which tell; once it did as plain tensors.
        if processes > 1 and not any(hasattr(parameter, "device_mesh") for parameter in module.parameters()):
            raise PartitionError(
                f"{type(module).__name__} has been cut over {processes} processes for tensor parallelism, as plain "
                "tensors from which whole rows and heads can't be told: upgrade transformers (5.23 makes them "
                "DTensors, which AdamMini trains), or load it without tp_plan"
            )


def _all_names(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    """Every parameter once, in the model's order, with all its names: more than one where it is tied."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return names


def _facts(model: nn.Module, value: str) -> Facts:
    """What the model says of itself, or what the one says that it wraps, as a LightningModule may."""
    says: Any = next((m for m in model.modules() if callable(getattr(m, "get_output_embeddings", None))), model)
    head = getattr(says, "get_output_embeddings", None)
    return Facts(
        value=value,
        output_embeddings=head() if callable(head) else None,
        base_model=getattr(says, "base_model", None),
        num_labels=getattr(getattr(says, "config", None), "num_labels", None),
    )


def _path(modules: dict[str, nn.Module], name: str) -> tuple[tuple[str, nn.Module], ...]:
    path = []
    while name:
        name, _, held = name.rpartition(".")
        path.append((held, modules[name]))
    return tuple(path)


def _custom(site: Site, pattern: str, blocks: str | Layout) -> Slices:
    """The blocks that a rule of the user's gives."""
    axis = output_axis(site.module) if site.ndim > 1 else 0
    rows = site.shape[axis] if site.ndim else 1
    heads = re.fullmatch(r"(\d+) heads?", blocks) if isinstance(blocks, str) else None
    if isinstance(blocks, Layout):
        layout = blocks
    elif blocks == "element" or not site.ndim:
        layout = Layout.elements(tuple(site.shape))
    elif blocks == "tensor":
        layout = Layout.whole(rows, (axis,))
    elif blocks == "neuron":
        layout = Layout.each_row(rows, (axis,))
    elif heads:
        count = int(heads[1])
        layout = Layout.groups(count, rows // max(count, 1), (axis,))
    else:
        raise PartitionError(
            f"the rule {pattern!r} gives {blocks!r}; it may give 'neuron', 'tensor', 'element', "
            "a number of heads as in '16 heads', or a Layout"
        )
    if not layout.fits(site.shape):
        raise PartitionError(
            f"the rule {pattern!r} gives {blocks!r}, which does not divide "
            f"{site.name} of shape {tuple(site.shape)} into equal blocks along axis {axis}"
        )
    return Slices("custom", layout, f"your rule {pattern!r}: {blocks}")


def _unknown(site: Site, reason: object) -> str:
    return (
        f"no blocks for {site.name} of shape {tuple(site.shape)}, a {site.attribute!r} of "
        f"{type(site.module).__name__}: {reason}. Say what its blocks are with "
        f"rules=[({site.name!r}, ...)], where ... is 'neuron' (one block an output row), 'tensor', "
        "'element', a number of heads as in '16 heads', or a Layout; or have the heads read off its attention by "
        "probe=batch"
    )


def _nearest(name: str, known: Iterable[str]) -> str:
    """A hint at the known name that is most alike, compared at as many levels as the name has."""
    sought = name.removeprefix("*.")
    tails = {".".join(other.split(".")[-1 - sought.count(".") :]): other for other in known}
    close = difflib.get_close_matches(sought, tails, n=1)
    return f"; the nearest is {tails[close[0]]!r}" if close else ""
