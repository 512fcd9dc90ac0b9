"""How an attention module's projections are divided into heads.

Three kinds of fact have to agree before a tensor is cut: what the module holds (its children, and
the part that each name plays inside attention), the numbers it was built with (its own attributes,
then the nearest config), and the shape of the tensor. Where they don't, :class:`GeometryError` says
what was tried; nothing is guessed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from .layout import Grid, Layout
from .vocabulary import (
    ALL_IN_ONE,
    FUSED,
    FUSED_BY_HEAD,
    FUSED_IN_TURNS,
    HEADED,
    KEY,
    KEY_VALUE,
    KEY_VALUE_BY_HEAD,
    KEYS,
    LINEAR,
    ONE_HEAD,
    QUERIES,
    QUERY,
    QUERY_GATE,
    QUERY_KEY,
    VALUE,
    part_of,
)

# What modules and configs call these numbers, the most particular first.
HEADS = (
    "num_k_heads", "num_heads", "num_attention_heads", "num_attn_heads", "n_heads", "n_head", "heads", "nhead",
    "index_n_heads",
)  # fmt: skip
KEY_VALUE_HEADS = (
    "num_key_value_heads", "num_kv_heads", "kv_heads", "n_kv_heads", "n_kv_head", "index_kv_heads"
)  # fmt: skip
HEAD_DIM = (
    "head_k_dim", "qk_head_dim", "head_dim", "attention_head_size", "head_size", "key_value_proj_dim", "dim_head",
    "d_head", "key_dim", "index_head_dim",
)  # fmt: skip


class GeometryError(ValueError):
    """The heads of an attention projection can't be told, or contradict the tensor's shape."""


@dataclass(frozen=True)
class Number:
    """A number that a module or a config declares, and where."""

    value: int
    source: str
    own: bool

    def __str__(self) -> str:
        return f"{self.source}: {self.value}"


@dataclass(frozen=True)
class Heads:
    """The heads of one attention module.

    Args:
        count: Query heads.
        key_value: Key heads, which are key/value heads under grouped-query attention.
        dim: Rows of one query or key head, ``None`` where only the tensors tell.
    """

    count: Number
    key_value: Number
    dim: Number | None

    def __str__(self) -> str:
        return str(self.count) if self.key_value == self.count else f"{self.count}, {self.key_value}"


def is_attention(module: nn.Module) -> bool:
    """Whether a module holds projections to attention queries and keys.

    One of the two is enough in a module that is called attention: the keys may be another layer's, or
    the queries learned.
    """
    parts = set(projections(module).values())
    if parts & ALL_IN_ONE or (parts & QUERIES and parts & KEYS):
        return True
    return bool(parts & HEADED) and is_called_attention(module)


def is_called_attention(module: nn.Module) -> bool:
    """Whether the name of a module's class says that it is attention."""
    title = type(module).__name__.lower()
    return "attention" in title or "attn" in title


def resembles_attention(module: nn.Module) -> bool:
    """Whether a module is called attention and holds a matrix of unknown part, but no query, key or other attention."""
    if not is_called_attention(module) or is_attention(module) or None not in projections(module).values():
        return False
    return not any(is_attention(inner) for inner in module.modules() if inner is not module)


def projections(module: nn.Module) -> dict[str, str | None]:
    """The matrices that a module holds, as children or as parameters of its own, and their parts.

    Returns:
        For each name by which a matrix is held, the part that it plays if the module is attention,
        ``None`` where that is not known.
    """
    held = [
        name
        for name, p in module._parameters.items()
        if p is not None and p.ndim in (2, 3) and _has_rows(p) and name not in _LEARNED
    ]
    kind = type(module).__name__
    for name, child in module._modules.items():
        if name.isdigit():  # a list's items are no parts
            break
        if _is_matrix(child) or (part_of(kind, name) is not None and _is_wrapped_matrix(child)):
            held.append(name)
    # nn.MultiheadAttention's q_proj_weight and in_proj_weight
    return {name: FUSED if name == "in_proj_weight" else part_of(kind, name) for name in held}


def _has_rows(parameter: Any) -> bool:
    return parameter.numel() != max(parameter.shape)


# Bare parameters that are the queries themselves, learned, and not what makes them.
_LEARNED = ("query", "queries")


def _is_matrix(child: Any) -> bool:
    """Whether a module is a linear map, if only as a convolution of one position with itself."""
    weight = _weight_of(child)
    if isinstance(child, nn.modules.conv._ConvNd):
        return weight is not None and set(weight.shape[2:]) == {1}
    return getattr(weight, "ndim", 0) == 2 and not isinstance(child, nn.Embedding)


def _is_wrapped_matrix(child: Any) -> bool:
    """Whether a module holds one linear map, and nothing else that has more than vectors."""
    if child is None or not 0 < len(child._modules) < 4:
        return False
    return sum(getattr(_weight_of(inner), "ndim", 0) >= 2 for inner in child._modules.values()) == 1


def _weight_of(child: Any) -> Any:
    """The weight of a layer, or of the one that stands under its adapters."""
    while isinstance(getattr(child, "base_layer", None), nn.Module):
        child = child.base_layer
    if hasattr(child, "adapter_layer_names") and not hasattr(child, "original_module"):
        return None  # nothing is under it, and asked for a weight it would look there for ever
    return getattr(child, "weight", None)


def read_heads(module: nn.Module, configs: tuple[Any, ...]) -> Heads:
    """Reads the number and size of a module's heads off its attributes, then off its configs.

    Args:
        module: An attention module.
        configs: The configs that apply to it, nearest first.

    Raises:
        GeometryError: No number of heads is found.
    """
    if type(module).__name__ in ONE_HEAD:
        one = Number(1, type(module).__name__, own=True)
        return Heads(one, one, None)
    count = _number(module, (), (*HEADS, "groups")) or _number(module, configs, HEADS) or _counted(module)
    if count is None:
        titles = " nor ".join(type(place).__name__ for place in configs) or "a config"
        raise GeometryError(
            f"no number of heads was found: neither {type(module).__name__} nor {titles} has one of {', '.join(HEADS)}"
        )
    groups = _number(module, (), ("num_key_value_groups",))
    key_value = _number(module, (), KEY_VALUE_HEADS)
    if key_value is None and groups is not None:
        key_value = Number(max(count.value // groups.value, 1), groups.source, own=True)
    if key_value is None and hasattr(module, "num_k_heads"):
        key_value = count
    key_value = key_value or _number(module, configs, KEY_VALUE_HEADS) or count
    return Heads(count, key_value, _number(module, configs, HEAD_DIM))


def _counted(module: nn.Module) -> Number | None:
    """The number of heads in a module that declares only their size, by the rows of its queries."""
    dim = _number(module, (), HEAD_DIM)
    query = next((child for name, child in module._modules.items() if part_of("", name) == QUERY), None)
    rows = getattr(_weight_of(query), "shape", (0,))[0]
    return Number(rows // dim.value, dim.source, own=True) if dim is not None and rows >= dim.value else None


def _number(module: nn.Module, configs: tuple[Any, ...], names: tuple[str, ...]) -> Number | None:
    """The first positive whole number among some attributes of a module and its configs."""
    for place in (module, *configs):
        for name in names:
            try:
                number = getattr(place, name, None)
            except RuntimeError:  # a config whose layers differ refuses to name one number for all of them
                continue
            if isinstance(number, int) and not isinstance(number, bool) and number > 0:
                return Number(number, f"{type(place).__name__}.{name}", own=place is module)
    return None


@dataclass(frozen=True)
class Slices:
    """The blocks of one attention projection: what it is, how its rows are cut, and why."""

    role: str
    layout: Layout
    why: str


def cut(module: nn.Module, name: str, rows: int, axis: int, heads: Heads, value: str) -> Slices | None:
    """Cuts the rows of one of an attention module's projections into blocks (the paper's Algorithm 3).

    Args:
        module: The attention module.
        name: The name by which it holds the projection.
        rows: Rows of the projection's weight along its output axis.
        axis: That output axis.
        heads: The module's heads.
        value: ``"neuron"`` for one block a row of the value, ``"whole"`` for one block in all.

    Returns:
        The slices; ``None`` where the projection takes one block an output neuron as any linear map does.

    Raises:
        GeometryError: The heads do not divide the rows, or the name is not known.
    """
    part = projections(module)[name]
    if part == LINEAR or (part is None and rows <= heads.count.value):
        return None  # nothing smaller than a row could be a head's
    if part == VALUE:
        why = "a block a row" if value == "neuron" else "value='whole'"
        return Slices("value", Layout((axis,), (_value(rows, value),)), why)
    if (ratio := getattr(module, "channel_shrink_ratio", None)) and name.startswith("layout_") and heads.dim:
        heads = replace(heads, dim=replace(heads.dim, value=heads.dim.value // ratio))  # LiLT's second stream
    if part in (QUERY, QUERY_GATE):
        return _query(rows, axis, heads, gated=part == QUERY_GATE)
    if part == KEY:
        return _one("key", rows, axis, _key_heads(rows, heads), heads)
    if part == QUERY_KEY:
        return _query_key(rows, axis, heads)
    if part == KEY_VALUE:
        return _key_value(rows, axis, heads, value)
    if part == KEY_VALUE_BY_HEAD:
        return _latent_key_value(module, rows, axis, heads, value)
    if part == FUSED_BY_HEAD or (part == FUSED and getattr(module, "multi_query", None) is False):
        return _fused_by_head(module, rows, axis, heads, value)
    if part == FUSED_IN_TURNS:
        return _fused_in_turns(rows, axis, heads, value)
    if part == FUSED:
        if QUERIES.intersection(projections(module).values()):  # cross-attention: the query stands apart
            return _key_value(rows, axis, heads, value)
        return _fused(module, rows, axis, heads, value)
    raise GeometryError(f"{type(module).__name__} holds a matrix {name!r} whose part in attention is not known")


def _value(rows: int, value: str, *outer: int) -> Grid:
    whole = value == "whole"
    return Grid((*outer, rows), (whole,) * (len(outer) + 1))


def _divide(rows: int, count: int, heads: Heads) -> int:
    """Rows of one head among ``count`` that share ``rows``."""
    dim, rest = divmod(rows, count)
    if rest or (heads.dim is not None and dim != heads.dim.value):
        declared = "" if heads.dim is None else f" of {heads.dim.value} rows"
        raise GeometryError(f"{rows} rows are not {count} heads{declared} ({heads})")
    return dim


def _key_heads(rows: int, heads: Heads) -> Number:
    """The key heads among ``rows``: as the module declares, or else as the size of a head says.

    A config's number may be another tower's, or not hold for keys that all heads share.
    """
    if not heads.key_value.own and heads.dim is not None and rows % heads.dim.value == 0:
        count = rows // heads.dim.value
        if count and heads.count.value % count == 0:
            return Number(count, heads.dim.source, own=True)
    return heads.key_value


def _one(role: str, rows: int, axis: int, count: Number, heads: Heads) -> Slices:
    dim = _divide(rows, count.value, heads)
    why = f"{count.value} heads of {dim} rows: {count.source}"
    return Slices(role, Layout.groups(count.value, dim, (axis,)), why)


def _query(rows: int, axis: int, heads: Heads, gated: bool) -> Slices:
    """Queries, and where there are more rows than theirs: each head's query, then a gate on its output."""
    count, dim = heads.count, heads.dim
    if dim is not None and dim.own and not count.own and rows == dim.value:  # a config's number is of other modules
        count = Number(1, dim.source, own=True)
    more = rows - count.value * dim.value if dim is not None else 0
    if dim is None or more <= 0 or more % count.value or not (gated or more == count.value * dim.value):
        return _one("query", rows, axis, count, heads)
    gate = more // count.value
    grids = (Grid((count.value, dim.value), (False, True)), Grid((count.value, gate), (False, False)))
    why = f"{count.value} heads of {dim.value} query and {gate} gate rows: {count.source}"
    return Slices("fused", Layout((axis,), grids, interleave=1), why)


def _query_key(rows: int, axis: int, heads: Heads) -> Slices:
    """Queries, then keys."""
    queries, keys = heads.count.value, heads.key_value.value
    dim = _divide(rows, queries + keys, heads)
    grids = tuple(Grid((count, dim), (False, True)) for count in (queries, keys))
    return Slices("fused", Layout((axis,), grids), f"{queries} query, {keys} key heads of {dim} rows: {heads}")


def _key_value(rows: int, axis: int, heads: Heads, value: str) -> Slices:
    """Keys, then values; or keys that are the values as well."""
    count = heads.key_value
    if heads.dim is not None and rows == count.value * heads.dim.value:
        return _one("key", rows, axis, count, heads)
    dim = _divide(rows, 2 * count.value, heads)
    keys = Grid((count.value, dim), (False, True))
    why = f"{count.value} key heads of {dim} rows, {count.value * dim} value rows: {count.source}"
    return Slices("fused", Layout((axis,), (keys, _value(count.value * dim, value))), why)


def _fused(module: nn.Module, rows: int, axis: int, heads: Heads, value: str) -> Slices:
    """Query, key and value, one slice after another."""
    queries, keys, dim, values = _shares(module, rows, heads)
    grids = (Grid((queries, dim), (False, True)), Grid((keys, dim), (False, True)), _value(values, value))
    why = f"{queries} query, {keys} key heads of {dim} rows, {values} value rows: {heads.count.source}"
    return Slices("fused", Layout((axis,), grids), why)


def _fused_by_head(module: nn.Module, rows: int, axis: int, heads: Heads, value: str) -> Slices:
    """For each key/value head: its query heads, its key, its value, and a gate where there are rows left."""
    queries, keys, dim, values = _shares(module, rows, heads)
    gates = rows - (queries + keys) * dim - values
    grids = [
        Grid((keys, queries // keys, dim), (False, False, True)),
        Grid((keys, dim), (False, True)),
        _value(values // keys, value, keys),
    ]
    if gates:
        grids.append(_value(gates // keys, "neuron", keys))
    why = f"{queries} query, {keys} key heads of {dim} rows, {values} value rows between: {heads.count.source}"
    return Slices("fused", Layout((axis,), tuple(grids), interleave=1), why)


def _fused_in_turns(rows: int, axis: int, heads: Heads, value: str) -> Slices:
    """In each of four turns: queries, values, keys of a quarter of the heads (CodeGen)."""
    count = heads.count.value
    dim = _divide(rows, 3 * count, heads)
    head = Grid((4, count // 4, dim), (False, False, True))
    layout = Layout((axis,), (head, _value(count // 4 * dim, value, 4), head), interleave=1)
    return Slices("fused", layout, f"{count} heads of {dim} query, value and key rows in 4 turns: {heads.count.source}")


def _shares(module: nn.Module, rows: int, heads: Heads) -> tuple[int, int, int, int]:
    """Query heads, key heads, rows of each, and value rows in all, of a tensor that holds all three.

    The values' share is what the module declares of them, or else what is left if a head's size is
    known, or else as much as the keys'.
    """
    queries, keys, dim = heads.count.value, heads.key_value.value, heads.dim
    if not heads.key_value.own and dim is not None and rows == 3 * queries * dim.value:
        keys = queries
    declared = [getattr(module, name, None) for name in ("num_v_heads", "head_v_dim")]
    if dim is not None and isinstance(declared[0], int) and isinstance(declared[1], int):
        values = declared[0] * declared[1]
        if rows - (queries + keys) * dim.value - values in (0, values):
            return queries, keys, dim.value, values
    ratio = getattr(module, "attention_ratio", None)
    if dim is not None and isinstance(ratio, int) and rows == (queries + keys + ratio * keys) * dim.value:
        return queries, keys, dim.value, ratio * keys * dim.value
    size = _divide(rows, queries + 2 * keys, heads)
    return queries, keys, size, keys * size


def _latent_key_value(module: nn.Module, rows: int, axis: int, heads: Heads, value: str) -> Slices:
    """For each head: the part of its key that carries no position, its value (DeepSeek-V2, 2.1)."""
    key_dim, value_dim = (getattr(module, name, None) for name in ("qk_nope_head_dim", "v_head_dim"))
    count = heads.count.value
    if key_dim is None and heads.dim is not None and isinstance(ratio := getattr(module, "attention_ratio", None), int):
        key_dim, value_dim = heads.dim.value, ratio * heads.dim.value
    if key_dim is None or value_dim is None or rows != count * (key_dim + value_dim):
        raise GeometryError(
            f"{rows} rows are not {count} heads of qk_nope_head_dim={key_dim} and v_head_dim={value_dim} rows"
        )
    grids = (Grid((count, key_dim), (False, True)), _value(value_dim, value, count))
    why = f"{count} heads of {key_dim} key and {value_dim} value rows: {heads.count.source}"
    return Slices("fused", Layout((axis,), grids, interleave=1), why)
