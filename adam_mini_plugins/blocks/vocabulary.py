"""The part that a matrix plays inside an attention module, by the name under which it is held.

A name counts only inside a module that is taken for attention, and only together with the module's
number of heads and the tensor's shape. Names are read as words: ``q_proj``, ``Wq``, ``to_query`` and
``projection_query`` all say query, ``query_global`` and ``layout_query`` as well. A name that says
nothing known is no guess: the tensor is an error unless its shape leaves no choice.
"""

from __future__ import annotations

import re
from functools import lru_cache

QUERY, KEY, VALUE = "query", "key", "value"
# Query, key and value in one tensor: as three slices one after another, or side by side for each
# key/value head.
FUSED, FUSED_BY_HEAD = "fused", "fused by head"
# Query, value and key, in four turns.
FUSED_IN_TURNS = "fused in turns"
# Queries, then keys.
QUERY_KEY = "query and key"
# A query and, side by side with it in each head, a gate on the attention's output.
QUERY_GATE = "query and gate"
# Key and value, one after the other, or a key that is the value as well.
KEY_VALUE = "key and value"
# Latent attention's up-projection: each head holds its key rows and its value rows.
KEY_VALUE_BY_HEAD = "key and value by head"
# Matrices that no product of queries and keys is made of directly: output, gates, decays, latents.
LINEAR = "linear"

QUERIES = frozenset({QUERY, QUERY_GATE})
ALL_IN_ONE = frozenset({FUSED, FUSED_BY_HEAD, FUSED_IN_TURNS, QUERY_KEY})
KEYS = frozenset({KEY, KEY_VALUE, KEY_VALUE_BY_HEAD})
HEADED = QUERIES | KEYS | ALL_IN_ONE

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_QUERY = frozenset({"q", "query", "queries", "wq"})
_KEY = frozenset({"k", "key", "keys", "wk"})
_VALUE = frozenset({"v", "value", "values", "wv"})
_FUSED = frozenset({"qkv", "wqkv"})
_KEY_VALUE = frozenset({"kv", "wkv"})
_DOWN, _UP = frozenset({"a", "down", "compress"}), frozenset({"b", "up"})
# Convolutions of queries and keys that are there already, tables of relative positions.
_NO_PROJECTION = frozenset({"conv", "sconv", "convolution", "emb", "embed", "embedding", "embeddings"})
_GATE = frozenset({"gate", "g", "igate", "fgate", "ogate", "beta", "a", "b", "ba", "f", "i", "z", "dt"})
_OUTPUT = frozenset({"o", "out", "output", "wo", "dense"})
_NAMED: dict[str, str] = {
    "c_attn": FUSED,
    "query_key_value": FUSED_BY_HEAD,
    "r_kernel": KEY,  # relative positions as keys (Transformer-XL): a row for each row of a key
    "r": KEY,
    "linear_pos": KEY,
    "pos_proj": KEY,
    "relative_k_proj": KEY,
    "in_proj_qkvz": FUSED_BY_HEAD,  # gated delta nets: the gate comes last
    "c_proj": LINEAR,
    "proj": LINEAR,
    "projection": LINEAR,
    "projection_layer": LINEAR,
    "post": LINEAR,
    "post_proj": LINEAR,
    "final": LINEAR,
    "linear": LINEAR,
    "gru_rel_pos_linear": LINEAR,
    "att_proj": FUSED,
    # Deformable attention and gating: weights come from one input, with no product of queries and keys.
    "sampling_offsets": LINEAR,
    "attention_weights": LINEAR,
    "attn_layer": LINEAR,
    # One output a position or kernel tap, for all heads: logits that no key stands behind.
    "r_proj": LINEAR,
    "relative_pos_embeddings": LINEAR,
    "conv_kernel_layer": LINEAR,
    "receptance": LINEAR,
}
# Modules whose layout is another than the name says, by class and name. Nothing about their shapes or
# configs differs from those of modules for which the name is right.
_FAMILY: dict[tuple[str, str], str] = {
    ("DisentangledSelfAttention", "in_proj"): FUSED_BY_HEAD,  # DeBERTa
    ("MiniMaxLightningAttention", "qkv_proj"): FUSED_BY_HEAD,
    ("LevitAttention", "queries_keys_values"): FUSED_BY_HEAD,
    ("LevitAttentionSubsample", "keys_values"): KEY_VALUE_BY_HEAD,
    ("CodeGenAttention", "qkv_proj"): FUSED_IN_TURNS,
    ("LSHSelfAttention", "query_key"): QUERY,  # Reformer: keys are the queries
    # No product of queries and keys: RWKV's recurrence is a channel's own, SwiftFormer's attention additive.
    ("RwkvSelfAttention", "key"): LINEAR,
    ("RwkvSelfAttention", "value"): LINEAR,
    ("MobileViTV2LinearSelfAttention", "qkv_proj"): LINEAR,
    ("SwiftFormerEfficientAdditiveAttention", "to_query"): LINEAR,
    ("SwiftFormerEfficientAdditiveAttention", "to_key"): LINEAR,
}
# Attention with one head, in models whose config has the number of heads of other modules or none.
ONE_HEAD = frozenset({"GroupViTAssignAttention", "JanusVQVAEAttnBlock", "ChameleonVQVAEEncoderAttnBlock"})


def words(name: str) -> list[str]:
    """The words of a name, in lower case: ``["q", "proj"]`` for ``q_proj``, ``["wqkv"]`` for ``Wqkv``."""
    return [word.lower() for word in _WORD.findall(name)]


@lru_cache(maxsize=4096)
def part_of(kind: str, name: str) -> str | None:
    """The part of what a module of class ``kind`` holds as ``name``, ``None`` where the name doesn't say."""
    special = _FAMILY.get((kind, name)) or _NAMED.get(name)
    if special is not None:
        return special
    said = frozenset(words(name))
    query, key, value = bool(said & _QUERY), bool(said & _KEY), bool(said & _VALUE)
    if said & _NO_PROJECTION and (query or key or value):
        return None
    if said & _FUSED or (query and key and value):
        return FUSED
    if "qk" in said or (query and key):
        return QUERY_KEY
    if said & _KEY_VALUE or (key and value):
        return LINEAR if said & _DOWN else KEY_VALUE_BY_HEAD if said & _UP else KEY_VALUE
    if query:
        return LINEAR if said & _DOWN else QUERY_GATE if "gate" in said else QUERY
    if key:
        return KEY
    if value:
        return VALUE
    if said & (_OUTPUT | _GATE):
        return LINEAR
    return None
