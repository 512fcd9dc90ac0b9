"""The blocks of adapters (PEFT), which are known by what their layers declare, not imported.

A layer that PEFT has put in the place of another holds that one as ``base_layer`` and lists its own
tensors in ``adapter_layer_names``. By the paper's Principle 1 they fall into three kinds:

- those that produce the rows of the layer they adapt, such as LoRA's B: they take that layer's rule,
  heads for query and key (the table :data:`OUTPUT_AXES` says along which axis);
- those with output neurons of their own, such as LoRA's A: one block a neuron;
- vectors and scalars, such as DoRA's magnitudes: one block, as norms, by the rule for all vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from .geometry import GeometryError, Slices
from .layout import Grid, Layout

if TYPE_CHECKING:
    from .rules import Site

# The axes that number the adapted layer's output rows, in their order. Some layers hold several tensors
# under a name of theirs; the tensor's own then follows it.
OUTPUT_AXES: dict[str, tuple[int, ...]] = {
    "lora_B": (0,),
    "hira_B": (0,),
    "delora_B": (0,),
    "supertuning_lora_B": (0,),
    "gralora_B": (0, 2),
    "gralora_B_general": (0,),
    "hada_w1_a": (0,),
    "hada_w2_a": (0,),
    "peanut_B": (0,),
    "deft_P": (0,),
    "miss_block": (1,),
    "lily_B": (1,),
    "glora_A.Xd": (0,),
    "glora_B.Xd": (0,),
    "osf_svd_params.U_low": (0,),
}
# The axes that number neurons, tokens or vectors of its own, where they are not all but the last.
OWN_AXES: dict[str, tuple[int, ...]] = {
    "lora_embedding_A": (1,),  # (rank, tokens)
    "hira_embedding_A": (1,),
    "hra_u": (1,),  # (features, reflections)
    "gralora_A": (0, 2),  # (parts, features, rank)
    "poly_lora_A": (0, 1, 3),  # (splits, skills, features, rank)
    "poly_lora_B": (0, 1, 3),
}


def adapter(site: Site, rules: Callable[[Site], Slices]) -> Slices | None:
    """The blocks of a parameter that an adapter has added, ``None`` for any other.

    Args:
        site: The parameter.
        rules: The rules for the layer that is adapted.

    Raises:
        GeometryError: The adapter is empty, or the layer that it adapts can't be found.
    """
    level = next((i for i, (_, m) in enumerate(site.path) if hasattr(m, "adapter_layer_names")), None)
    if level is None:
        return _prompt(site)
    kind: str = site.path[level][0]
    layer: Any = site.path[level][1]
    if kind not in (*layer.adapter_layer_names, *layer.other_param_names) or kind == "modules_to_save":
        return None  # the adapted layer itself, or a copy of it
    if site.shape.numel() == 0:
        raise GeometryError(f"the adapter is empty, as of rank 0, so that nothing of {kind} can be trained")
    kind = kind if kind in OUTPUT_AXES else f"{kind}.{site.attribute}"
    if kind in OUTPUT_AXES:
        produced = _output_rows(site, kind, layer, level, rules)
        if produced is not None:
            return produced
    return _own_rows(site, kind.partition(".")[0])


def _prompt(site: Site) -> Slices | None:
    """Bare tensors of a prompt encoder or of a tuner as a whole: one block a token or vector."""
    under_peft = any(hasattr(module, "peft_config") for _, module in site.path)
    bare = isinstance(site.module, nn.ParameterDict | nn.ParameterList) or any(
        held == "prompt_encoder" for held, _ in site.path[1:]
    )
    if not under_peft or not bare or isinstance(site.module, nn.Linear | nn.RNNBase):
        return None
    return _own_rows(site, site.path[1][0] if len(site.path) > 1 else site.attribute)


def _own_rows(site: Site, kind: str) -> Slices:
    axes = OWN_AXES.get(kind, tuple(range(site.ndim - 1)))
    rows = 1
    for axis in axes:
        rows *= site.shape[axis]
    return Slices("adapter", Layout.each_row(rows, axes), f"a block a row of {kind}")


def _output_rows(site: Site, kind: str, layer: Any, level: int, rules: Callable[[Site], Slices]) -> Slices | None:
    """The blocks of the layer that is adapted; ``None`` for a variant that has no row for each of its outputs."""
    axes = OUTPUT_AXES[kind]
    base = _base_of(layer)
    if hasattr(layer, "parameter_name"):  # it adapts a bare stack of expert matrices
        return _expert_rows(site, kind, base)
    attribute, shape = _weight_of(base)
    adapted = rules(site.at(attribute, shape, base, level))
    layout = Layout(axes, adapted.layout.grids, adapted.layout.interleave)
    if not layout.fits(site.shape):
        return None
    return Slices("adapter", layout, f"{kind} of a {adapted.role}: {adapted.why}")


def _base_of(layer: Any) -> nn.Module:
    """The layer under an adapter, and under adapters of adapters."""
    base = layer
    while hasattr(base, "base_layer"):
        base = base.base_layer
    if base is layer or not isinstance(base, nn.Module):
        raise GeometryError(f"the layer that {type(layer).__name__} adapts can't be found: it has no base_layer")
    return base


def _weight_of(base: Any) -> tuple[str, tuple[int, ...]]:
    """The name and shape of an adapted layer's weight, the shape before any quantisation packed it."""
    if isinstance(base, nn.MultiheadAttention) and base.in_proj_weight is not None:
        return "in_proj_weight", tuple(base.in_proj_weight.shape)
    if hasattr(base, "out_features") and hasattr(base, "in_features"):
        return "weight", (base.out_features, base.in_features)
    if getattr(base, "weight", None) is None:
        raise GeometryError(f"the layer that is adapted, a {type(base).__name__}, has no weight")
    return "weight", tuple(base.weight.shape)


def _expert_rows(site: Site, kind: str, base: Any) -> Slices:
    """LoRA's B of an expert stack, (out, rank * experts): each row and expert apart, over the rank."""
    experts = getattr(base, "num_experts", None)
    if not experts or site.shape[1] % experts:
        raise GeometryError(f"{site.shape[1]} columns of {kind} are not those of num_experts={experts}")
    grid = Grid((site.shape[0], site.shape[1] // experts, experts), (False, True, False))
    return Slices("adapter", Layout((0, 1), (grid,)), f"{kind} of {experts} experts: a block a row of each")
