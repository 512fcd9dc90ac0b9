"""Heads read off a model's own attention, for models whose structure doesn't tell.

One forward pass is watched. What meets in an attention (in torch's ``scaled_dot_product_attention``, in one of
transformers' attention functions, or in a product of two activations that a softmax follows) is a query and a key;
autograd says which rows of which weight each of their heads is made of. No name plays a part, so it holds for fused,
transposed, grouped and interleaved projections alike.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .fit import fit_layout
from .geometry import GeometryError, Slices
from .undo import as_it_was
from .watch import Operand, Role, Watch, attention_functions, leaves_of


class ProbeError(ValueError):
    """A model can't be probed: it rejects the batch, or can't be run or differentiated as it is."""


@dataclass
class Probe:
    """What a forward pass has shown of a model's weights.

    Args:
        multiplied: Weights that took part in a product, whether attention stands behind it or not.
        heads: For each weight that makes queries, keys or values, by role and for every head: along each axis of the
            weight, a mask of where the head depends on it.
    """

    multiplied: set[nn.Parameter] = field(default_factory=set)
    heads: dict[nn.Parameter, dict[Role, list[tuple[Tensor, ...]]]] = field(default_factory=dict)

    def cut(self, weight: nn.Parameter, axis: int, value: str) -> Slices | None:
        """Cuts a weight by the heads that were seen, ``None`` if it makes no query, key or value.

        Args:
            weight: A parameter of the model that was probed.
            axis: The axis that numbers its outputs by its module's convention, for where its heads don't show it.
            value: ``"neuron"`` for one block a row of the value, ``"whole"`` for one block in all.

        Raises:
            GeometryError: The rows of its heads follow no regular pattern.
        """
        seen = self.heads.get(weight)
        if not seen or (set(seen) == {"value"} and value == "neuron"):
            return None
        supports = list(itertools.chain(*seen.values()))
        telling = [a for a in range(weight.ndim) if len({tuple(s[a].tolist()) for s in supports}) > 1]
        if len(telling) > 1:
            raise GeometryError(f"the heads that the probe has seen differ along the axes {telling} of the weight")
        axis = telling[0] if telling else axis
        kinds: list[str] = ["other"] * weight.shape[axis]
        blocks: list[Any] = list(range(len(kinds)))
        for role in ("value", "key", "query"):
            for number, rows in enumerate(_disjoint([s[axis] for s in seen.get(role, ())])):
                for row in rows.nonzero().flatten().tolist():
                    kinds[row] = role
                    blocks[row] = row if role == "value" and value == "neuron" else (role, number)
        layout = fit_layout(kinds, blocks, axis)
        if layout is None:
            raise GeometryError("the rows of the heads that the probe has seen follow no regular pattern")
        present = sorted(set(kinds), key=("query", "key", "value", "other").index)
        counts = {role: len({b for b, kind in zip(blocks, kinds) if kind == role}) for role in present}
        text = ", ".join(
            f"{counts[role]} {role} heads" if role in ("query", "key") else f"{kinds.count(role)} {role} rows"
            for role in present
        )
        return Slices(present[0] if len(present) == 1 else "fused", layout, f"seen in attention: {text}")


def _disjoint(sets: list[Tensor]) -> list[Tensor]:
    """Sets of rows without repetitions, those united that have some rows in common but not all."""
    united: list[Tensor] = []
    for rows in sets:
        for other in [other for other in united if bool((other & rows).any())]:
            united = [one for one in united if one is not other]
            rows = rows | other
        united.append(rows)
    return united


def probe_model(model: nn.Module, batch: Any) -> Probe:
    """Runs a model once, in evaluation mode, and sees what its attention is made of. The model comes back as it was.

    Args:
        model: A model with real weights.
        batch: A tensor, a tuple of arguments, a mapping of keyword arguments, or a callable that runs the model.

    Raises:
        ProbeError: The model is on the meta device, or rejects the batch, or what it attends to is not finite.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile has wrapped
    watch = Watch(model)
    kind = type(model).__name__
    elsewhere = next((name for name, p in model.named_parameters() if p.is_meta), None)
    if elsewhere is not None:
        raise ProbeError(
            f"{elsewhere} of {kind} is on the meta device, where nothing can be run: probe a model with weights"
        )
    run = batch if callable(batch) else _caller(model, batch)
    with as_it_was(model), torch.enable_grad(), torch.compiler.set_stance("force_eager"):
        for weight in model.parameters():
            weight.requires_grad_(weight.is_floating_point())
        try:
            with watch, attention_functions(watch):
                run()
        except Exception as error:
            raise ProbeError(f"{kind} could not be run on the probe: {type(error).__name__}: {error}") from error
        watch.find_values()
        return _read(watch)


def _caller(model: nn.Module, batch: Any) -> Callable[[], Any]:
    def given(value: Any) -> Any:
        differentiable = isinstance(value, Tensor) and value.is_floating_point()
        return value.detach().clone().requires_grad_() if differentiable else value

    if isinstance(batch, Mapping):
        return lambda: model(**{name: tree_map(given, value) for name, value in batch.items()})
    arguments = tuple(batch) if isinstance(batch, tuple | list) else (batch,)
    return lambda: model(*(tree_map(given, value) for value in arguments))


def _read(watch: Watch) -> Probe:
    """Differentiates every head that was seen."""
    probe = Probe(multiplied=watch.multiplied)
    generator = torch.Generator().manual_seed(0)
    for operand in watch.operands:
        weights = [leaf for leaf in leaves_of(operand.tensor) if leaf in watch.multiplied and leaf.ndim > 1]
        for weight, supports in zip(weights, _heads_in(operand, weights, generator)):
            probe.heads.setdefault(weight, {}).setdefault(operand.role, []).extend(supports)
    return probe


def _heads_in(
    operand: Operand, weights: list[nn.Parameter], generator: torch.Generator
) -> Iterator[list[tuple[Tensor, ...]]]:
    """For each weight, and for each head: along each axis of the weight, where the head depends on it."""
    if not weights:
        return

    def supports(index: dict[int, int]) -> list[tuple[Tensor, ...]]:
        picked = operand.outputs
        for axis in sorted(index, reverse=True):
            picked = picked.select(axis, index[axis])
        weighting = torch.randn(picked.shape, generator=generator).to(picked)
        if operand.outputs is not operand.tensor:
            (gradient,) = torch.autograd.grad(picked, operand.tensor, weighting, retain_graph=True)
            gradients = torch.autograd.grad(operand.tensor, weights, gradient, retain_graph=True)
        else:
            gradients = torch.autograd.grad(picked, weights, weighting, retain_graph=True)
        if not all(bool(gradient.isfinite().all()) for gradient in gradients):
            raise ProbeError(f"a {operand.role} that the probe has met is not finite")
        return [_support(gradient) for gradient in gradients]

    shape = operand.outputs.shape
    ends = {axis: (supports({axis: 0}), supports({axis: shape[axis] - 1})) for axis in operand.axes if shape[axis] > 1}
    telling = [axis for axis, (first, last) in ends.items() if not _equal(first, last)]
    each = [
        supports(dict(zip(telling, index))) for index in itertools.product(*(range(shape[axis]) for axis in telling))
    ]
    yield from ([head[number] for head in each] for number in range(len(weights)))


def _support(gradient: Tensor) -> tuple[Tensor, ...]:
    there = gradient != 0
    return tuple(
        there.any(dim=tuple(other for other in range(there.ndim) if other != axis)) for axis in range(there.ndim)
    )


def _equal(first: list[tuple[Tensor, ...]], last: list[tuple[Tensor, ...]]) -> bool:
    return all(torch.equal(a, b) for one, other in zip(first, last) for a, b in zip(one, other))
