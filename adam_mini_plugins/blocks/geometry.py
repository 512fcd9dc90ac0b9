"""How an attention module's projections are divided into heads.

Three kinds of fact have to agree before a tensor is cut: what the module holds (its children, and
the part that each name plays inside attention), the numbers it was built with (its own attributes,
then the nearest config), and the shape of the tensor. Where they don't, :class:`GeometryError` says
what was tried; nothing is guessed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from .layout import Grid, Layout

# The part that a child plays inside an attention module. A name counts only there: a module is taken
# for attention if it holds a query and a key, together or apart, and a number of heads can be found.
QUERY = frozenset({"q_proj", "query", "q", "wq", "q_lin", "q_attn", "query_proj", "to_q", "linear_q", "q_b_proj"})
KEY = frozenset({"k_proj", "key", "k", "wk", "k_lin", "key_proj", "to_k", "linear_k"})
VALUE = frozenset({"v_proj", "value", "v", "wv", "v_lin", "value_proj", "to_v", "linear_v"})
# Query, key and value in one tensor, as three slices one after another ...
FUSED = frozenset({"qkv", "qkv_proj", "Wqkv", "c_attn", "to_qkv", "in_proj_weight"})
# ... or by key/value head, each with its query heads, its key and its value side by side.
FUSED_BY_HEAD = frozenset({"query_key_value"})
# Latent attention's up-projection: each head holds its key rows and its value rows.
KEY_VALUE_BY_HEAD = frozenset({"kv_b_proj"})
# Matrices of attention that no softmax stands behind: one block an output neuron.
LATENT = frozenset({"q_a_proj", "kv_a_proj_with_mqa"})
OUTPUT = frozenset(
    {"o_proj", "out_proj", "dense", "c_proj", "o", "wo", "out", "out_lin", "to_out", "proj", "linear_out"}
)
KNOWN = QUERY | KEY | VALUE | FUSED | FUSED_BY_HEAD | KEY_VALUE_BY_HEAD | LATENT | OUTPUT

HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nhead")
KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", "kv_heads")
HEAD_DIM = ("qk_head_dim", "head_dim", "attention_head_size", "head_size", "key_value_proj_dim", "dim_head")


class GeometryError(ValueError):
    """The heads of an attention projection can't be told, or contradict the tensor's shape."""


@dataclass(frozen=True)
class Heads:
    """The heads of one attention module.

    Args:
        count: Query heads.
        key_value: Key heads, which are key/value heads under grouped-query attention.
        dim: Rows of one query or key head, ``None`` where only the tensors tell.
        source: Where the number of query heads was read, for the table and for errors.
        key_value_source: Where that of key heads was.
    """

    count: int
    key_value: int
    dim: int | None
    source: str
    key_value_source: str


def is_attention(module: nn.Module) -> bool:
    """Whether a module holds projections to attention queries and keys."""
    parts = set(projections(module).values())
    return bool(parts & (FUSED | FUSED_BY_HEAD)) or bool(parts & QUERY and parts & (KEY | KEY_VALUE_BY_HEAD))


def resembles_attention(module: nn.Module) -> bool:
    """Whether a module is called attention and holds matrices, known by name or not."""
    title = type(module).__name__.lower()
    return ("attention" in title or "attn" in title) and bool(projections(module))


def projections(module: nn.Module) -> dict[str, str]:
    """The matrices that a module holds, as children or as parameters of its own, and their parts.

    Returns:
        For each name by which a matrix is held, the part that it plays if the module is attention:
        the name itself, less the suffix of ``nn.MultiheadAttention``'s ``q_proj_weight``.
    """
    held = [name for name, parameter in module._parameters.items() if getattr(parameter, "ndim", 0) == 2]
    for name, child in module._modules.items():
        if getattr(_weight_of(child), "ndim", 0) == 2 and not isinstance(child, nn.Embedding):
            held.append(name)
    return {name: name if name in KNOWN else name.removesuffix("_weight") for name in held}


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
    places = (module, *configs)
    count, source = _first_int(places, HEADS)
    if count is None:
        titles = " nor ".join(type(place).__name__ for place in configs) or "a config"
        raise GeometryError(
            f"no number of heads was found: neither {type(module).__name__} nor {titles} has one of {', '.join(HEADS)}"
        )
    key_value, key_value_source = _first_int((module,), KEY_VALUE_HEADS)
    if key_value is None:
        groups, key_value_source = _first_int((module,), ("num_key_value_groups",))
        if groups is not None:
            key_value = count // groups
        else:
            key_value, key_value_source = _first_int(configs, KEY_VALUE_HEADS)
    if key_value is None:
        key_value, key_value_source = count, source
    dim, _ = _first_int(places, HEAD_DIM)
    return Heads(count, key_value, dim, source, key_value_source)


def _first_int(places: tuple[Any, ...], names: tuple[str, ...]) -> tuple[int | None, str]:
    """The first positive whole number among some attributes of some objects, and where it was."""
    for place in places:
        for name in names:
            number = getattr(place, name, None)
            if isinstance(number, int) and not isinstance(number, bool) and number > 0:
                return number, f"{type(place).__name__}.{name}"
    return None, ""


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
    if part in LATENT | OUTPUT:
        return None
    if part in VALUE:
        grid = _value(rows, value)
        return Slices("value", Layout((axis,), (grid,)), "a block a row" if value == "neuron" else "value='whole'")
    if part in QUERY or part in KEY:
        is_query = part in QUERY
        count, source = (heads.count, heads.source) if is_query else (heads.key_value, heads.key_value_source)
        dim = _divide(rows, count, heads)
        role = "query" if is_query else "key"
        return Slices(role, Layout.groups(count, dim, (axis,)), f"{count} heads of {dim} rows: {source}")
    if part in FUSED_BY_HEAD:
        return _fused_by_head(rows, axis, heads, value)
    if part in KEY_VALUE_BY_HEAD:
        return _latent_key_value(module, rows, axis, heads, value)
    if part in FUSED:
        if QUERY.intersection(projections(module).values()):  # cross-attention: the query stands apart
            return _fused(rows, axis, 0, heads, value)
        return _fused(rows, axis, heads.count, heads, value)
    raise GeometryError(f"{type(module).__name__} holds a matrix {name!r} whose part in attention is not known")


def _value(rows: int, value: str, *outer: int) -> Grid:
    whole = value == "whole"
    return Grid((*outer, rows), (whole,) * (len(outer) + 1))


def _divide(rows: int, count: int, heads: Heads) -> int:
    """Rows of one head among ``count`` that share ``rows``."""
    dim, rest = divmod(rows, count)
    if rest or (heads.dim is not None and dim != heads.dim):
        declared = "" if heads.dim is None else f" of {heads.dim} rows"
        raise GeometryError(f"{rows} rows are not {count} heads{declared} ({_sources(heads)})")
    return dim


def _sources(heads: Heads) -> str:
    text = f"{heads.source}: {heads.count}"
    if heads.key_value_source != heads.source:
        text += f", {heads.key_value_source}"
    return text


def _fused(rows: int, axis: int, queries: int, heads: Heads, value: str) -> Slices:
    """Query, key and value (no query in cross-attention), one slice after another."""
    keys = heads.key_value
    dim = _divide(rows, queries + 2 * keys, heads)
    key = Grid((keys, dim), (False, True))
    query = (Grid((queries, dim), (False, True)),) if queries else ()
    layout = Layout((axis,), (*query, key, _value(keys * dim, value)))
    names = f"{queries} query, {keys} key heads" if queries else f"{keys} key heads"
    return Slices("fused", layout, f"{names} of {dim} rows, {keys * dim} value rows: {heads.source}")


def _fused_by_head(rows: int, axis: int, heads: Heads, value: str) -> Slices:
    """For each key/value head: its query heads, its key, its value."""
    keys = heads.key_value
    dim = _divide(rows, heads.count + 2 * keys, heads)
    query = Grid((keys, heads.count // keys, dim), (False, False, True))
    key = Grid((keys, dim), (False, True))
    layout = Layout((axis,), (query, key, _value(dim, value, keys)), interleave=1)
    why = f"{heads.count} query, {keys} key heads of {dim} rows, value rows between: {heads.source}"
    return Slices("fused", layout, why)


def _latent_key_value(module: nn.Module, rows: int, axis: int, heads: Heads, value: str) -> Slices:
    """For each head: the part of its key that carries no position, its value (DeepSeek-V2, 2.1)."""
    key_dim, value_dim = (getattr(module, name, None) for name in ("qk_nope_head_dim", "v_head_dim"))
    if key_dim is None or value_dim is None or rows != heads.count * (key_dim + value_dim):
        raise GeometryError(
            f"{rows} rows are not {heads.count} heads of qk_nope_head_dim={key_dim} and v_head_dim={value_dim} rows"
        )
    grids = (Grid((heads.count, key_dim), (False, True)), _value(value_dim, value, heads.count))
    why = f"{heads.count} heads of {key_dim} key and {value_dim} value rows: {heads.source}"
    return Slices("fused", Layout((axis,), grids, interleave=1), why)
