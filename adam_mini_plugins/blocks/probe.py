"""Heads read off a model's own attention, for models whose structure doesn't tell.

One forward pass is watched. What meets in an attention (in torch's ``scaled_dot_product_attention``, in one of
transformers' attention functions, or in a product of two activations that a softmax follows) is a query and a key;
autograd says which rows of which weight each of their heads is made of. No name plays a part, so it holds for fused,
transposed, grouped and interleaved projections alike.
"""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal
from unittest.mock import patch

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from .fit import fit_layout
from .geometry import GeometryError, Slices

Role = Literal["query", "key", "value"]

# What torch calls its functions and the methods of its tensors.
PRODUCTS = frozenset(
    {"linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "mv", "addmm", "baddbmm", "einsum", "tensordot"}
)
SUMS = frozenset({"addmm", "baddbmm"})  # whose first argument is added to the product of the others
CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d"})
NORMS = frozenset({"layer_norm", "rms_norm", "group_norm", "batch_norm", "instance_norm", "normalize"})
STATISTICS = frozenset({"mean", "var", "std", "norm", "vector_norm", "rsqrt", "sqrt"})
LOOKUPS = frozenset({"embedding", "embedding_bag"})


class ProbeError(ValueError):
    """A model can't be probed: it rejects the batch, or can't be run or differentiated as it is."""


@dataclass
class Probe:
    """What a forward pass has shown of a model's weights.

    Args:
        slices: For each weight that makes queries, keys or values: the axis of its outputs, and for each role the
            rows of every head. What :meth:`cut` answers from.
        multiplied: Weights that took part in a product, whether attention stands behind it or not.
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
        ProbeError: The model is on the meta device, or rejects the batch, or nothing of it can be differentiated.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile has wrapped
    watch = _Watch(model)
    kind = type(model).__name__
    elsewhere = next((name for name, p in model.named_parameters() if p.is_meta), None)
    if elsewhere is not None:
        raise ProbeError(
            f"{elsewhere} of {kind} is on the meta device, where nothing can be run: probe a model with weights"
        )
    run = batch if callable(batch) else _caller(model, batch)
    with _as_it_was(model), torch.enable_grad(), torch.compiler.set_stance("force_eager"):
        for weight in model.parameters():
            weight.requires_grad_(weight.is_floating_point())
        try:
            with watch, _attention_functions(watch):
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


@dataclass(frozen=True)
class _Operand:
    """A query, key or value on its way into attention.

    Args:
        role: Which of them.
        tensor: It.
        outputs: What its heads are told apart in: itself, or the scores that it is multiplied into.
        axes: Axes of ``outputs`` along which heads may lie.
    """

    role: Role
    tensor: Tensor
    outputs: Tensor
    axes: tuple[int, ...]


class _Watch(TorchFunctionMode):
    """Follows weights and activations through a forward pass.

    Where a weight meets an activation in a product, the activation's past is cut off, so that what reaches an
    attention depends on the nearest weights alone. So are the statistics of norms, which every row enters: it is the
    scaled row itself that says which head it belongs to.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.operands: list[_Operand] = []
        self.multiplied: set[nn.Parameter] = set()
        self._weights = WeakIdKeyDictionary(dict.fromkeys(model.parameters(), True))  # and what is made of them alone
        self._looks = True
        self._products: dict[Any, tuple[Tensor, Tensor]] = {}  # of two activations, by the node of the graph
        self._probabilities: dict[Any, tuple[Tensor, int]] = {}  # what softmax was taken of, by its node

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func is F.multi_head_attention_forward:  # made of functions that are worth watching
            with patch.object(F, "has_torch_function", lambda _: False), self:
                return func(*args, **kwargs)
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        weights = [t for t in tensors if t in self._weights]
        activations = [t for t in tensors if t not in self._weights and t.is_floating_point()]
        if name in PRODUCTS or (name in CONVOLUTIONS and not _is_depthwise(weights)):
            added = tensors[0] if name in SUMS else None
            factors = [w for w in weights if w.ndim > 1 and w is not added]
            return self._product(func, args, kwargs, factors, activations)
        out = func(*args, **kwargs)
        if name == "scaled_dot_product_attention":
            self.attended(*[*args, *(kwargs[k] for k in ("query", "key", "value") if k in kwargs)][:3])
        elif name == "softmax" and activations and out.grad_fn is not None:
            scores, dim = activations[0], next(a for a in (*args[1:], kwargs.get("dim")) if a is not None)
            self._probabilities[out.grad_fn] = (scores, dim % scores.ndim)
            self._scored(scores, dim % scores.ndim)
        elif name in NORMS and activations and out.shape == activations[0].shape:
            return out.detach() + (activations[0] - activations[0].detach())
        elif (
            name in STATISTICS and activations and isinstance(out, Tensor) and _is_statistic(name, out, activations[0])
        ):
            return out.detach()
        elif (
            weights
            and name not in LOOKUPS
            and not any(t.requires_grad or not t.is_floating_point() for t in tensors if t not in self._weights)
        ):
            for made in tree_leaves(out):
                if isinstance(made, Tensor):
                    self._weights[made] = True
        return out

    def _product(self, func: Any, args: Any, kwargs: Any, weights: list[Tensor], activations: list[Tensor]) -> Any:
        if weights and activations:
            self.multiplied.update(*(_leaves(w) for w in weights))
            args, kwargs = tree_map(self._cut, (args, kwargs))
            return func(*args, **kwargs)
        out = func(*args, **kwargs)
        if len(activations) > 1 and out.grad_fn is not None:
            self._products[out.grad_fn] = (activations[-2], activations[-1])
        return out

    def _cut(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value in self._weights:
            return value
        # It stays differentiable, as what comes of activations alone is told from weights by that.
        return value.detach().requires_grad_(value.is_floating_point())

    @contextmanager
    def looking_away(self) -> Iterator[None]:
        """Sees no attention for a while: inside one that has been told of."""
        looked, self._looks = self._looks, False
        try:
            yield
        finally:
            self._looks = looked

    def attended(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Takes note of what is passed to an attention function, each (..., heads, positions, head_dim)."""
        if self._looks:
            axes = tuple(range(query.ndim - 2))
            self.operands += [_Operand("query", query, query, axes), _Operand("key", key, key, axes)]
            self.operands.append(_Operand("value", value, value, ()))

    def _scored(self, scores: Tensor, dim: int) -> None:
        """Takes note of the two activations that attention scores are a product of, if that is what they are."""
        axes = tuple(axis for axis in range(scores.ndim) if axis != dim)
        for node in _walk(scores.grad_fn, until=self._products):
            if node in self._products:
                pair = self._products[node]
                picked = scores.select(dim, 0)  # of the keys it depends on one alone, of the queries on all
                gradients = torch.autograd.grad(
                    picked, pair, torch.randn_like(picked), retain_graph=True, allow_unused=True
                )
                parts = [0.0 if g is None else (g != 0).double().mean().item() for g in gradients]
                query, key = pair if parts[0] >= parts[1] else pair[::-1]
                self.operands += [_Operand("query", query, scores, axes), _Operand("key", key, scores, axes)]

    def find_values(self) -> None:
        """Takes note of what was multiplied by attention's probabilities."""
        for pair in self._products.values():
            for probabilities, value in (pair, pair[::-1]):
                nodes = list(_walk(probabilities.grad_fn, until={**self._products, **self._probabilities}))
                if any(node in self._probabilities for node in nodes):
                    self.operands.append(_Operand("value", value, value, ()))
                    break


def _is_depthwise(weights: list[Tensor]) -> bool:
    return any(w.ndim > 2 and w.shape[1] == 1 and w.shape[0] > 1 for w in weights)


def _is_statistic(name: str, out: Tensor, of: Tensor) -> bool:
    return name in ("rsqrt", "sqrt") or (out.ndim == of.ndim and out.shape == (*of.shape[:-1], 1))


def _walk(node: Any, until: Any = ()) -> Iterator[Any]:
    """The nodes of a graph from one of them back, not beyond those of ``until``."""
    seen, pending = set(), [node]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        if node not in until:
            pending += [earlier for earlier, _ in node.next_functions]


def _leaves(tensor: Tensor) -> list[nn.Parameter]:
    """The parameters that a tensor is computed of."""
    if tensor.grad_fn is None:
        return [tensor] if isinstance(tensor, nn.Parameter) else []
    leaves = (getattr(node, "variable", None) for node in _walk(tensor.grad_fn))
    return [leaf for leaf in leaves if isinstance(leaf, nn.Parameter)]


def _read(watch: _Watch) -> Probe:
    """Differentiates every head that was seen."""
    probe = Probe(multiplied=watch.multiplied)
    generator = torch.Generator().manual_seed(0)
    for operand in watch.operands:
        weights = [leaf for leaf in _leaves(operand.tensor) if leaf in watch.multiplied and leaf.ndim > 1]
        for weight, supports in zip(weights, _heads_in(operand, weights, generator)):
            probe.heads.setdefault(weight, {}).setdefault(operand.role, []).extend(supports)
    return probe


def _heads_in(
    operand: _Operand, weights: list[nn.Parameter], generator: torch.Generator
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


@contextmanager
def _attention_functions(watch: _Watch) -> Iterator[None]:
    """Has transformers' attention functions tell what they are passed: what they call then may be no torch at all."""
    modeling = sys.modules.get("transformers.modeling_utils")
    functions = getattr(modeling, "ALL_ATTENTION_FUNCTIONS", None)

    def told(function: Callable[..., Any]) -> Callable[..., Any]:
        def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
            watch.attended(query, key, value)
            with watch.looking_away():
                return function(module, query, key, value, *args, **kwargs)

        return attend

    with ExitStack() as stack:
        if functions is not None:
            mapping = {name: told(functions[name]) for name in functions}
            stack.enter_context(patch.dict(functions._local_mapping, mapping))
        yield


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Runs what it is around in evaluation mode and puts everything back: modes, buffers, attributes, randomness."""
    attributes = [(module, _snapshot(vars(module))) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    held = {id(g): g for m in model.modules() for g in vars(m).values() if isinstance(g, torch.Generator)}
    generators = [(generator, generator.get_state()) for generator in held.values()]
    differentiated = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    python = random.getstate()
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy else None
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type not in ("cpu", "meta")})
    kind = next((p.device.type for p in model.parameters() if p.device.type not in ("cpu", "meta")), "cuda")
    with torch.random.fork_rng(devices, device_type=kind):
        try:
            model.eval()
            yield
        finally:
            for module, held_before in attributes:
                _restore(vars(module), held_before)
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
            for generator, state in generators:
                generator.set_state(state)
            for parameter, requires_grad, gradient in differentiated:
                parameter.requires_grad_(requires_grad)
                parameter.grad = gradient
            random.setstate(python)
            if numpy:
                numpy.random.set_state(numpy_state)


_Copies = dict[str, tuple[Any, Any]]


def _snapshot(attributes: dict[str, Any]) -> _Copies:
    """Every attribute, and a copy of those that are collections."""
    return {
        name: (value, value.copy() if isinstance(value, dict | list | set) else None)
        for name, value in attributes.items()
    }


def _restore(attributes: dict[str, Any], before: _Copies) -> None:
    attributes.clear()
    for name, (value, copy) in before.items():
        attributes[name] = value
        if isinstance(value, list):
            value[:] = copy
        elif copy is not None:
            value.clear()
            value.update(copy)
