"""A forward pass followed by its tensors: what meets in attention, and which weights stand right behind it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal
from unittest.mock import patch

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

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


@dataclass(frozen=True)
class Operand:
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


class Watch(TorchFunctionMode):
    """Follows weights and activations through a forward pass.

    Where a weight meets an activation in a product, the activation's past is cut off, so that what reaches an
    attention depends on the nearest weights alone. So are the statistics of norms, which every row enters: it is the
    scaled row itself that says which head it belongs to.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.operands: list[Operand] = []
        self.multiplied: set[nn.Parameter] = set()
        self._weights = WeakIdKeyDictionary(dict.fromkeys(model.parameters(), True))  # and what is made of them alone
        self._looks = True
        self._products: dict[Any, tuple[Tensor, Tensor]] = {}  # of two activations, by the node of the graph
        self._probabilities: set[Any] = set()  # the nodes of softmax

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
            scores, dim = activations[0], args[1] if len(args) > 1 else kwargs.get("dim")
            if dim is not None:  # left out by old code, for an axis that torch then picks
                self._probabilities.add(out.grad_fn)
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
            self.multiplied.update(*(leaves_of(w) for w in weights))
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
            self.operands += [Operand("query", query, query, axes), Operand("key", key, key, axes)]
            self.operands.append(Operand("value", value, value, ()))

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
                self.operands += [Operand("query", query, scores, axes), Operand("key", key, scores, axes)]

    def find_values(self) -> None:
        """Takes note of what was multiplied by attention's probabilities."""
        for pair in self._products.values():
            for probabilities, value in (pair, pair[::-1]):
                nodes = list(_walk(probabilities.grad_fn, until=self._products.keys() | self._probabilities))
                if any(node in self._probabilities for node in nodes):
                    self.operands.append(Operand("value", value, value, ()))
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


def leaves_of(tensor: Tensor) -> list[nn.Parameter]:
    """The parameters that a tensor is computed of."""
    if tensor.grad_fn is None:
        return [tensor] if isinstance(tensor, nn.Parameter) else []
    leaves = (getattr(node, "variable", None) for node in _walk(tensor.grad_fn))
    return [leaf for leaf in leaves if isinstance(leaf, nn.Parameter)]


@contextmanager
def attention_functions(watch: Watch) -> Iterator[None]:
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
