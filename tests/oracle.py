"""The heads of a model's query and key projections, as the model's own attention has them.

An optimizer that keeps one value for each attention head has to know which rows of a projection's
weight make up a head, and architectures lay those rows out in many ways: one projection or a fused
one, queries first or interleaved with keys, keys shared by several queries. Rather than repeat what
the architectures' sources say, `attention_heads` asks the model: the rows of a head are those that
the head's query (or key) has a gradient with respect to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal
from unittest.mock import patch

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

Role = Literal["query", "key"]
SEED = 0


@dataclass(frozen=True)
class HeadRows:
    """The heads in one weight that makes queries or keys.

    `parameter` is the weight's name, `role` what it makes here (a fused weight is reported once for
    each role), `axis` the axis of its outputs: 0 in `nn.Linear`, 1 in transformers' `Conv1D`.
    `rows` holds one set of indices along that axis for each head, in the order of the heads. A set
    that several heads share, such as a key's that is repeated for a group of queries, is there
    once, at its first head.
    """

    parameter: str
    role: Role
    axis: int
    rows: tuple[frozenset[int], ...]


def attention_heads(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> list[HeadRows]:
    """The heads of all weights that make the queries and keys of `model`, in forward order.

    `batch` is run through the model once, in the mode the model is in, and every query and key of
    shape (batch, heads, positions, head_dim) is caught on its way into attention. For each head of
    it, a random linear functional over the batch, the positions and the head's own dimensions is
    differentiated with respect to the projections' weights, and the rows with a gradient that is
    not zero are the head's. Position encodings and norms of queries and keys mix rows within a head
    only, so they change the gradients' values but not which are zero.

    Only the nearest projections count, those with no other projection between them and the
    attention. See `_cut_before`.

    Two things follow that a reader of the result should know:

    - Keys that a model repeats for its query heads before it attends (Falcon) come out as those of
      models that leave this to the attention function (Llama): a set of rows for each key head.
    - In multi-head latent attention (DeepSeek) a head's key is made of two parts: its own, from
      `kv_b_proj`, and one with the position that all heads share, from the last rows of
      `kv_a_proj_with_mqa`. Both weights are reported as keys, the first with a set for each head
      (its rows for values, in between, belong to none), the second with one set in all. The other
      rows of `kv_a_proj_with_mqa`, and `q_a_proj`, come before another projection and do not count.

    The model is left as it was, and so is the random state.

    Raises:
        RuntimeError: If none of the model's attention is caught, or a query or key comes from no
            `nn.Linear` or `Conv1D` with a weight that requires a gradient.
    """
    projections = _projections(model)
    weights = [module.weight for module in projections.values()]
    generator = torch.Generator().manual_seed(SEED)
    found: dict[tuple[str, Role], list[frozenset[int]]] = {}
    with torch.random.fork_rng(), torch.enable_grad():
        for role, heads in _caught_in_forward(model, batch, list(projections.values())):
            for head in heads.unbind(1):
                weighting = torch.randn(head.shape, generator=generator, dtype=head.dtype)
                gradients = torch.autograd.grad(
                    head, weights, weighting.to(head.device), retain_graph=True, allow_unused=True
                )
                reached = False
                for (name, module), gradient in zip(projections.items(), gradients, strict=True):
                    if gradient is not None and (rows := _nonzero(gradient, _axis(module))):
                        found.setdefault((name, role), []).append(rows)
                        reached = True
                if not reached:
                    raise RuntimeError(f"no projection of {type(model).__name__} makes a {role}")
    return [
        HeadRows(f"{name}.weight", role, _axis(projections[name]), tuple(dict.fromkeys(rows)))
        for (name, role), rows in found.items()
    ]


def _projections(model: nn.Module) -> dict[str, nn.Linear | Conv1D]:
    """The modules of `model` that multiply by a matrix, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}


def _axis(projection: nn.Linear | Conv1D) -> int:
    """The axis of a projection's weight that its outputs are along."""
    return 1 if isinstance(projection, Conv1D) else 0


def _nonzero(gradient: Tensor, axis: int) -> frozenset[int]:
    """The indices along `axis` at which `gradient` has anything but zeros."""
    return frozenset((gradient != 0).any(dim=1 - axis).nonzero().flatten().tolist())


def _caught_in_forward(
    model: PreTrainedModel, batch: Mapping[str, Tensor], projections: list[nn.Linear | Conv1D]
) -> list[tuple[Role, Tensor]]:
    """Every query and key of one forward, with the graph down to the nearest of `projections`."""
    caught: list[tuple[Role, Tensor]] = []
    attend = F.scaled_dot_product_attention

    def catch(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        arrived: list[tuple[Role, Tensor]] = [("query", query), ("key", key)]
        for role, heads in arrived:
            if heads.ndim != 4:
                raise RuntimeError(f"a {role} of shape {tuple(heads.shape)} has no axis of heads")
        caught.extend(arrived)
        return attend(query, key, *args, **kwargs)

    with ExitStack() as stack:
        for projection in projections:
            stack.enter_context(projection.register_forward_pre_hook(_cut_before, with_kwargs=True))
        stack.enter_context(_plain_attention(model))
        stack.enter_context(patch.object(F, "scaled_dot_product_attention", catch))
        model(**batch)
    if not caught:
        raise RuntimeError(f"no attention of {type(model).__name__} was caught")
    return caught


def _cut_before(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A hook that hides from a projection where its input comes from.

    Without it, a query would also have a gradient with respect to the layers below. Modules with
    vectors only, such as the norms between a projection and the attention, are not cut.
    """

    def cut(value: Any) -> Any:
        return value.detach() if isinstance(value, Tensor) else value

    return tuple(map(cut, args)), {name: cut(value) for name, value in kwargs.items()}


def _attend_plainly(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """An attention function of transformers that does nothing but call PyTorch's.

    It has no mask, bias or cap: these come after the query and key, and what the attention returns
    does not count, for the graph is cut before the projection that receives it. PyTorch's function
    is looked up at the call, which is what lets it be caught.
    """
    heads = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    return heads.transpose(1, 2), None


PLAIN = "plain_for_oracle"
AttentionInterface.register(PLAIN, _attend_plainly)


@contextmanager
def _plain_attention(model: PreTrainedModel) -> Iterator[None]:
    """Have `model` attend by `_attend_plainly` for a while.

    Models that do not go through transformers' interface for attention functions (Falcon) log that
    they refuse, and keep calling PyTorch's function by themselves.
    """
    configs: dict[int, PreTrainedConfig] = {}
    pending: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    while pending:
        config = pending.pop()
        if isinstance(config, PreTrainedConfig) and id(config) not in configs:
            configs[id(config)] = config
            pending += [getattr(config, name, None) for name in config.sub_configs]
    # The public attribute passes what it is given on to nested configurations, this one does not.
    before = [(config, config._attn_implementation_internal) for config in configs.values()]
    try:
        model.set_attn_implementation(PLAIN)
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation_internal = implementation
