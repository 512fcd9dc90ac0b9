"""How a model uses its matrices, seen from a forward pass of the model itself.

An optimizer that keeps one value for each attention head has to know which rows of a projection's
weight make up a head, and architectures lay those rows out in many ways: one projection or a fused
one, queries first or interleaved with keys, keys shared by several queries, gates in between. Rather
than repeat what the architectures' sources say, :func:`observe` asks the model:

- which axis of a matrix is summed over, and so which axes number its rows, is seen where the matrix
  is multiplied;
- which rows make up one attention head are those that the head's query (or key) has a gradient with
  respect to. Queries and keys are what ``scaled_dot_product_attention`` is given, or a function with
  arguments ``query`` and ``key``; or, where a model does its own attention, the two factors of a
  product that goes into a softmax or, without one, into a product with the values.

No name of a module or parameter is looked at.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

SEED = 0
# More leading positions than this (windows times heads, say) are looked at an axis at a time.
MANY = 64

Rows = frozenset[int]


@dataclass(frozen=True)
class Factor:
    """A query or key as attention has it.

    `leading` are the axes along which heads (and batches) are numbered, `channel` the axis of a head's
    own rows; the rest are positions.
    """

    tensor: Tensor
    leading: tuple[int, ...]
    channel: int = -1


@dataclass
class Observed:
    """What a forward pass showed of a model's matrices, by parameter name.

    `contracted` has the axes that are summed over where the matrix is multiplied. `heads` has, for a
    matrix that makes queries or keys, one set for each head: positions on the flattened grid of its
    other axes. `convolved` are those that a convolution has. `attentions` counts how often the model attended.
    """

    contracted: dict[str, tuple[int, ...]] = field(default_factory=dict)
    convolved: set[str] = field(default_factory=set)
    heads: dict[str, list[Rows]] = field(default_factory=dict)
    attentions: int = 0


def observe(model: nn.Module, run: Callable[[], object], linear: bool = False, alone: bool = False) -> Observed:
    """Watches one forward pass, `run()`, and differentiates its queries and keys.

    With `linear`, a product of two activations that is multiplied into a third without a softmax counts
    as attention too. With `alone`, each position is looked at alone, for models that send positions
    through different matrices. Of the sets of rows that a matrix is found to have, those that are made
    of smaller ones are left out: some keys have a share of the queries in them.

    Only the nearest projections count: what goes into a matrix is cut off from what it was made of.
    The statistics of norms are held constant: they scale a head, but don't say what it is made of.
    """
    watch = _Watch(model, linear)
    with torch.enable_grad(), _linear_attention_seen_by(watch, model), watch:
        run()
    observed = Observed(watch.contracted, watch.convolved, attentions=len(watch.attended))
    parameters = {name: p for p, name in watch.names.items() if name in watch.contracted and p.requires_grad}
    generator = torch.Generator().manual_seed(SEED)
    seen: set[int] = set()
    for factors in watch.attended:
        for factor in factors:
            if id(factor.tensor) in seen or not factor.tensor.requires_grad:
                continue
            seen.add(id(factor.tensor))
            for name, sets in _heads(factor, parameters, watch.contracted, generator, alone).items():
                known = observed.heads.setdefault(name, [])
                known += [rows for rows in sets if rows not in known]
    for name, sets in observed.heads.items():
        observed.heads[name] = [rows for rows in sets if not any(other < rows for other in sets)]
    return observed


def _heads(
    factor: Factor,
    parameters: dict[str, nn.Parameter],
    contracted: dict[str, tuple[int, ...]],
    generator: torch.Generator,
    alone: bool,
) -> dict[str, list[Rows]]:
    """For each parameter that makes this query or key, the rows of each head."""
    tensor = factor.tensor
    positions = set(range(tensor.ndim)) - {factor.channel % tensor.ndim}
    leading = [axis for axis in (sorted(positions) if alone else factor.leading) if tensor.shape[axis] > 1]
    count = 1
    for axis in leading:
        count *= tensor.shape[axis]
    looks = [leading] if alone or count <= MANY else [[axis] for axis in leading]
    found: dict[str, list[Rows]] = {}
    for axes in looks:
        for head in _unbind(tensor, axes):
            weighting = torch.randn(head.shape, generator=generator, dtype=head.dtype)
            gradients = torch.autograd.grad(
                head, list(parameters.values()), weighting, retain_graph=True, allow_unused=True
            )
            for name, gradient in zip(parameters, gradients):
                if gradient is None:
                    continue
                rows = (gradient != 0).any(contracted[name]).flatten().nonzero().flatten().tolist()
                if rows and frozenset(rows) not in found.setdefault(name, []):
                    found[name].append(frozenset(rows))
    return found


def _unbind(tensor: Tensor, axes: list[int]) -> list[Tensor]:
    if not axes:
        return [tensor]
    rest = [axis for axis in range(tensor.ndim) if axis not in axes]
    return list(tensor.permute(*axes, *rest).flatten(0, len(axes) - 1).unbind(0))


PRODUCTS = {"matmul", "__matmul__", "bmm", "mm"}
CONVOLUTIONS = {"conv1d", "conv2d", "conv3d"}
SUMS_OF_PRODUCTS = {"baddbmm", "addmm", "addbmm"}


class _Watch(TorchFunctionMode):
    """Sees every operation of a forward pass."""

    def __init__(self, model: nn.Module, linear: bool) -> None:
        super().__init__()
        self.linear = linear
        self.inside = False  # a function whose query and key have been seen
        self.names: dict[nn.Parameter, str] = {p: name for name, p in model.named_parameters()}
        self.by_storage = {p.untyped_storage().data_ptr(): p for p in self.names if p.numel()}
        self.contracted: dict[str, tuple[int, ...]] = {}
        self.convolved: set[str] = set()
        self.attended: list[tuple[Factor, Factor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return func(*args, **kwargs)
        if name == "linear":
            return self._linear(func, *args, **kwargs)
        if name == "__rmatmul__":
            return self._product(torch.matmul, args[1], args[0], "matmul", {})
        if name in PRODUCTS:
            a, b = _named(args, kwargs, ("input", "mat2" if name in ("bmm", "mm") else "other"))
            return self._product(func, a, b, name, {})
        if name in CONVOLUTIONS:
            return self._convolution(func, args, kwargs)
        if name in SUMS_OF_PRODUCTS:
            return self._sum_of_product(func, name, args, kwargs)
        if name == "einsum":
            return self._einsum(func, args)
        if name == "scaled_dot_product_attention":
            query, key = _named(args, kwargs, ("query", "key"))
            self.attend(query, key)
            return func(*args, **kwargs)
        if name == "multi_head_attention_forward":
            return self._multi_head(func, args, kwargs)
        if name == "rsqrt":
            return func(*args, **kwargs).detach()
        if name in ("layer_norm", "rms_norm", "group_norm"):
            return self._norm(func, args, kwargs)
        if name in ("softmax", "logsumexp"):
            if not self.inside:
                self.attended.extend(_scores(args[0] if args else kwargs["input"]))
            return func(*args, **kwargs)
        out = func(*args, **kwargs)
        return _tagged(out, tuple(dict.fromkeys(p for a in (*args, *kwargs.values()) for p in _scores(a))))

    def attend(self, query: Tensor, key: Tensor) -> None:
        """A query and a key whose last two axes are positions and channels."""
        self.attended.append((_factor(query), _factor(key)))

    def _parameter(self, tensor: Any, *summed: int) -> bool:
        """Whether a factor is a parameter or a view of one; notes which axes of it are summed over."""
        parameter = self.by_storage.get(tensor.untyped_storage().data_ptr()) if tensor.device.type != "meta" else None
        if parameter is None or parameter.ndim < 2:
            return False
        strides = [tensor.stride(axis) for axis in summed]
        axes = tuple(a for a in range(parameter.ndim) if parameter.stride(a) in strides and parameter.shape[a] > 1)
        if len(axes) == len(summed):
            self.contracted[self.names[parameter]] = axes
        return True

    def _linear(self, func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return func(_cut(input) if self._parameter(weight, -1) else input, weight, bias)

    def _convolution(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        """One with a kernel of a single position is a matrix."""
        x, weight = _named(args, kwargs, ("input", "weight"))
        if set(weight.shape[2:]) == {1} and self._parameter(weight, 1):
            self.convolved.add(self.names[self.by_storage[weight.untyped_storage().data_ptr()]])
            rest = {**dict(zip(("bias", "stride", "padding", "dilation", "groups"), args[2:])), **kwargs}
            return func(_cut(x), weight, **{k: v for k, v in rest.items() if k not in ("input", "weight")})
        return func(*args, **kwargs)

    def _product(self, func: Any, a: Tensor, b: Tensor, name: str, kwargs: Any) -> Tensor:
        if b.ndim >= 2 and self._parameter(b, -2):
            return func(_cut(a), b, **kwargs)
        if a.ndim >= 2 and self._parameter(a, -1):
            return func(a, _cut(b), **kwargs)
        out = func(a, b, **kwargs)
        if a.ndim < 3 or b.ndim < 3:
            return out
        if self.linear and not self.inside:
            self.attended.extend(_scores(a))  # scores times values, with no softmax between
        return _tagged(out, ((_factor(a), _factor(b, channel=-2)),))

    def _sum_of_product(self, func: Any, name: str, args: Any, kwargs: Any) -> Tensor:
        first, second = ("mat1", "mat2") if name == "addmm" else ("batch1", "batch2")
        total, a, b = _named(args, kwargs, ("input", first, second))
        rest = {k: v for k, v in kwargs.items() if k in ("alpha", "beta", "out")}
        return self._product(lambda a, b: func(total, a, b, **rest), a, b, name, {})

    def _einsum(self, func: Any, args: Any) -> Tensor:
        equation, *operands = args
        if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
            operands = list(operands[0])
        left, _, out = equation.replace(" ", "").partition("->")
        labels = left.split(",")
        where = [_axes(text, t.ndim) for text, t in zip(labels, operands)]
        ours = [False] * len(operands)
        for i, (tensor, axes) in enumerate(zip(operands, where)):
            summed = [axis for label, axis in axes.items() if label not in out]
            ours[i] = bool(summed) and self._parameter(tensor, *summed)
        if any(ours):
            operands = [t if mine else _cut(t) for t, mine in zip(operands, ours)]
            return func(equation, *operands)
        result = func(equation, *operands)
        if len(operands) != 2 or min(t.ndim for t in operands) < 3:
            return result
        if self.linear and not self.inside:
            self.attended.extend(_scores(operands[0]))
        shared = [label for label in where[0] if label in where[1] and label in out]
        dots = [tuple(range(t.ndim - len(a))) if "." in text else () for text, t, a in zip(labels, operands, where)]
        if not shared:  # heads that only one of the two has, as where the keys are a table of positions
            shared = [label for a in where for label in a if label in out]
        factors = [
            Factor(
                t,
                (*d, *(a[label] for label in shared if label in a)),
                next(axis for label, axis in a.items() if label not in out),
            )
            for t, a, d in zip(operands, where, dots)
        ]
        return _tagged(result, (tuple(factors),))  # type: ignore[arg-type]

    def _norm(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A norm as the product with what is a constant here."""
        x = args[0]
        with torch.no_grad():
            out = func(*args, **kwargs)
        return out + (x - x.detach())

    def _multi_head(self, func: Any, args: Any, kwargs: Any) -> Any:
        """PyTorch's own attention as a whole: its projections are its arguments."""
        given = inspect.signature(F.multi_head_attention_forward).bind(*args, **kwargs).arguments
        query, key, heads = given["query"], given["key"], given["num_heads"]
        if given.get("use_separate_proj_weight"):
            q_weight, k_weight, v_weight = (given[f"{n}_proj_weight"] for n in "qkv")
        else:
            q_weight, k_weight, v_weight = given["in_proj_weight"].chunk(3)
        for weight in (q_weight, k_weight, v_weight, given["out_proj_weight"]):
            self._parameter(weight, -1)
        split = [
            torch.matmul(x.detach(), w.t()).unflatten(-1, (heads, -1)).movedim(-2, 0)
            for x, w in ((query, q_weight), (key, k_weight))
        ]
        self.attended.append((_factor(split[0]), _factor(split[1])))
        return func(*(a.detach() if isinstance(a, Tensor) else a for a in args), **kwargs)


def _cut(tensor: Tensor) -> Tensor:
    """What goes into a matrix, without where it came from; finite, for a tiny model may mask all positions."""
    return tensor.detach().nan_to_num()


def _factor(tensor: Tensor, channel: int = -1) -> Factor:
    """A factor whose last two axes are those of positions and channels."""
    return Factor(tensor, tuple(range(tensor.ndim - 2)), channel)


def _named(args: Any, kwargs: Any, names: tuple[str, ...]) -> list[Any]:
    return [args[i] if i < len(args) else kwargs[name] for i, name in enumerate(names)]


def _axes(labels: str, ndim: int) -> dict[str, int]:
    """The axis of each label of an operand of an einsum, counted from the end where dots stand first."""
    before, dots, after = labels.partition("...")
    axes = {label: i for i, label in enumerate(before)}
    start = ndim - len(after) if dots else len(before)
    return axes | {label: start + i for i, label in enumerate(after)}


def _scores(value: Any) -> tuple[tuple[Factor, Factor], ...]:
    """The products of activations that a value is made of without a matrix in between."""
    if isinstance(value, (list, tuple)):
        return tuple(pair for item in value for pair in _scores(item))
    return getattr(value, "_scores", ()) if isinstance(value, Tensor) else ()


def _tagged(out: Any, scores: tuple[tuple[Factor, Factor], ...]) -> Any:
    if scores:
        for tensor in out if isinstance(out, (list, tuple)) else (out,):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                tensor._scores = scores  # type: ignore[attr-defined]
    return out


@contextlib.contextmanager
def _linear_attention_seen_by(watch: _Watch, model: nn.Module) -> Iterator[None]:
    """Has functions that take a ``query`` and a ``key`` shaped (batch, positions, heads, channels) seen.

    They are functions of the modules that define the model's classes, or attributes of its modules.
    """

    def seen(function: Any) -> Any:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            watch.attended.append((Factor(given["query"], (2,)), Factor(given["key"], (2,))))
            watch.inside = True
            try:
                return function(*args, **kwargs)
            finally:
                watch.inside = False

        return wrapper

    with contextlib.ExitStack() as stack:
        for source in {type(m).__module__ for m in model.modules()}:
            for name, value in list(vars(sys.modules[source]).items()):
                if _is_linear_attention(value):
                    stack.enter_context(patch.object(sys.modules[source], name, seen(value)))
        for module in model.modules():
            for name, value in list(vars(module).items()):
                if _is_linear_attention(value):
                    stack.enter_context(patch.object(module, name, seen(value)))
        yield


def _is_linear_attention(value: Any) -> bool:
    return inspect.isfunction(value) and {"query", "key", "value", "beta"} <= set(inspect.signature(value).parameters)
