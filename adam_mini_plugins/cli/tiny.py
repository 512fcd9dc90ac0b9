"""A tiny instance of any of transformers' architectures, and inputs that it runs on.

Transformers' own tests have a tiny config for each model, but aren't installed with it. Here a config
class is shrunk by the names of its fields, and inputs are tried until one is accepted; what can't be
told from names is in ``tiny_overrides.py``.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from .tiny_overrides import OVERRIDES

WIDTH, HEADS, KEY_HEADS, WIDE_HEAD = 48, 6, 2, 10
VOCABULARY = 199
# Patterns on the names of a config's whole numbers, first match wins.
SIZES: tuple[tuple[str, int], ...] = (
    (r".*vocab_size.*|n_vocab|num_embeddings|n_tokens", VOCABULARY),
    (r"window_size|attention_window", 4),
    (r"num_groups|upsample_groups", 4),
    (r"out_hidden_size", WIDTH),
    (r".*depth_multiplier|num_nextn.*|.*conv_.*layers|.*layer_offset|.*feat_extract.*layers", 0),
    (r"(num_)?(\w+_)?(hidden_|attention_)?(layers|depth|blocks)|n_layers?|\w*num_layers|layers", 2),
    (r"num_key_value_heads|\w*num_kv_heads|n_head_kv|\w*num_key_value_heads", KEY_HEADS),
    (r"num_attention_heads|\w*attention_heads|n_heads?|num_heads|\w*num_heads|\w*n_heads", HEADS),
    (r"qk_rope_head_dim", 4),
    (r"qk_nope_head_dim", 14),
    (r"qk_head_dim", 18),
    (r"v_head_dim", 12),
    (r"head_dim|d_head|\w*_head_dim|d_kv|kv_channels|attention_head_dim", WIDE_HEAD),
    (r"\w*moe_intermediate_size|\w*shared_expert_intermediate_size|expert_ffn_hidden_size", 40),
    (r"\w*intermediate_size|\w*ffn_dim|d_ff|n_inner|\w*ffn_hidden_size|mlp_dim|\w*feed_?forward\w*|d_inner", 80),
    (r"hidden_size_per_layer_input", 12),
    (r"rotary_dim", 4),
    (
        r"\w*hidden_size|\w*d_model|embedding_dim|n_embd|dim|\w*embed_dim|\w*embedding_size|\w*hidden_dim|projection_dim|emb_dim",
        WIDTH,
    ),
    (r"n_routed_experts|num_(local_)?experts|moe_num_experts|n_experts|num_moe_experts", 4),
    (r"num_experts_per_tok|moe_topk|moe_k|top_k_experts|num_selected_experts|moe_top_k", 2),
    (r"n_group", 2),
    (r"topk_group", 1),
    (r"q_lora_rank", 18),
    (r"kv_lora_rank", 16),
    (r"max_position_embeddings|n_positions|max_\w*position\w*|n_ctx|max_sequence_length|max_seq_len|block_size", 64),
    (r"image_size", 32),
)
NOT_FIELDS = ("self", "args", "kwargs")


def _declared(cls: type) -> dict[str, Any]:
    """The fields of a config class and their defaults; older configs are no dataclasses."""
    if dataclasses.is_dataclass(cls):
        return {f.name: f.default for f in dataclasses.fields(cls)}
    signature = inspect.signature(cls.__init__)  # type: ignore[misc]
    return {name: p.default for name, p in signature.parameters.items() if name not in NOT_FIELDS}


COMMON = set(_declared(PreTrainedConfig)) - {"id2label"}
MAX_ELEMENTS = 150_000_000


class CannotRunError(RuntimeError):
    """A model that none of the inputs fits, or that can't be made tiny."""


class Tiny:
    """Shrinks a config class by the names of its fields.

    `apart` sets head_dim apart from hidden_size / heads where a config has it; `grouped` gives several
    query heads one key head.
    """

    def __init__(self, apart: bool, grouped: bool) -> None:
        self.apart, self.grouped = apart, grouped

    def size(self, name: str, default: int) -> int:
        """A small number for a field, or the one that it has."""
        value = next((value for pattern, value in SIZES if re.fullmatch(pattern, name)), None)
        if value is None:
            return default
        if value == WIDE_HEAD and not self.apart:
            return WIDTH // HEADS
        if value == KEY_HEADS and not self.grouped:
            return HEADS
        return value if default > value or value in (HEADS, WIDE_HEAD) else default

    def config(self, like: PreTrainedConfig) -> PreTrainedConfig:
        """A config of the same class with small numbers; what is no size stays as it is."""
        fields = {**self._switches(like), **self.fields(like), **OVERRIDES.get(like.model_type, {})}
        return type(like)(**{name: value for name, value in fields.items() if value is not ...})

    @staticmethod
    def _switches(like: PreTrainedConfig) -> dict[str, Any]:
        """The flags and choices in which a config is not its class's default, such as ``multi_query``."""
        plain, declared = type(like)(), _declared(type(like))
        given = {name: get(like, name) for name in declared if name not in COMMON and not name.startswith("_")}
        return {n: v for n, v in given.items() if isinstance(v, bool | str | float) and v != get(plain, n)}

    def fields(self, default: PreTrainedConfig) -> dict[str, Any]:
        """The fields that change, by name."""
        cls = type(default)
        declared = _declared(cls)
        names = [n for n in declared if n not in COMMON and not n.startswith("_")]
        names += [n for n in inspect.signature(cls.__init__).parameters if n not in (*names, *COMMON, *NOT_FIELDS)]
        kwargs: dict[str, Any] = {}
        for name in names:
            value = get(default, name, declared.get(name))
            if isinstance(value, PreTrainedConfig):
                kwargs[name] = self.config(value)
            elif type(value) is int and declared.get(name, 0) is not None:
                kwargs[name] = self.size(name, value)
            elif isinstance(value, (list, tuple)) and value and all(type(v) is int for v in value):
                depth = "depth" in name or "layers" in name  # a list has an entry a stage; its widths stay as they are
                kwargs[name] = type(value)(1 if depth and "index" not in name else v for v in value)
            elif value is None and re.fullmatch(r"n_routed_experts|num_experts", name):
                kwargs[name] = 4
            elif value is None and name == "num_experts_per_tok":
                kwargs[name] = 2
            if name in kwargs and type(value) in (int, list, tuple) and kwargs[name] == value:
                del kwargs[name]
        if self.grouped and "num_key_value_heads" in names and declared.get("num_key_value_heads", 0) is None:
            kwargs["num_key_value_heads"] = KEY_HEADS
        if self.apart and "head_dim" in names and declared.get("head_dim", 0) is None:
            kwargs["head_dim"] = WIDE_HEAD
        if "qk_rope_head_dim" in names:  # latent attention: no groups, and head_dim is the rotary part
            kwargs |= {"num_key_value_heads": HEADS} | ({"head_dim": 4} if "head_dim" in kwargs else {})
        self._layers(cls, default, kwargs, names)
        self._tokens(default, kwargs, names)
        self._rope(default, kwargs)
        return kwargs

    @staticmethod
    def _layers(cls: type[PreTrainedConfig], default: Any, kwargs: dict[str, Any], names: list[str]) -> None:
        """Lists with an entry a layer are cut to one layer of each kind."""
        count = next((n for n in ("num_hidden_layers", "n_layer", "num_layers") if n in kwargs), None)
        if count is None:
            return
        layers = get(default, count)
        lists = {
            n: list(v)
            for n in dict.fromkeys((*names, "layer_types"))
            if isinstance(v := get(default, n), (list, tuple))
            and len(v) == layers
            and layers > 4
            and not isinstance(getattr(cls, cls.attribute_map.get(n, n), None), property)
        }
        kinds = list(zip(*lists.values())) if lists else []
        picked: list[int] = []
        for i, kind in enumerate(kinds):
            if str(kind) not in {str(kinds[j]) for j in picked}:
                picked.append(i)
        if lists:
            while len(picked) < 2:
                picked.append(len(picked))
            for n, v in lists.items():
                kwargs[n] = [v[i] for i in picked]
            kwargs[count] = len(picked)

    @staticmethod
    def _tokens(default: Any, kwargs: dict[str, Any], names: list[str]) -> None:
        """Special tokens lie within the vocabulary, each with a number of its own."""
        free = VOCABULARY
        for name in names:
            value = get(default, name)
            if re.fullmatch(r"\w*(token|token_id|token_index)", name) and type(value) is int and value >= 100:
                free -= 1
                kwargs[name] = free

    def _rope(self, default: Any, kwargs: dict[str, Any]) -> None:
        """The sections of a multi-axis rotary embedding add up to half a (tiny) head."""
        rope = get(default, "rope_parameters")
        if not isinstance(rope, dict):
            return
        section = rope.get("mrope_section")
        if section is None and "rope_type" in rope and "mrope_section" in _source(type(default)):  # type: ignore[arg-type]
            section = [1, 1, 1]
            rope = {"rope_type": "default", "rope_theta": 10000.0, **rope}
        if section:
            head = kwargs.get("head_dim") or WIDTH // HEADS
            half = int(head * rope.get("partial_rotary_factor", 1.0)) // 2
            small = [max(1, half * s // sum(section)) for s in section]
            small[0] += half - sum(small)
            kwargs["rope_parameters"] = {**rope, "mrope_section": small}


def candidates(model: PreTrainedModel) -> Iterator[dict[str, Any]]:
    """Generic inputs, the likeliest first."""
    parameters = inspect.signature(model.forward).parameters
    config = model.config
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def ids(tokens: int = 12) -> Tensor:
        return torch.randint(5, 90, (1, tokens), generator=generator)

    more: dict[str, Any] = {}
    if "decoder_input_ids" in parameters:
        more["decoder_input_ids"] = ids(8)
    if "bbox" in parameters:
        more["bbox"] = torch.zeros(1, 12, 4, dtype=torch.long)
    if "codebook" in str(parameters) or _find(config, "num_codebooks"):
        books = _find(config, "num_codebooks") or 1
        yield {"input_ids": ids(12).expand(books, 12), "encoder_hidden_states": noise(1, 9, WIDTH)}
    main = getattr(model, "main_input_name", "input_ids")
    order = dict.fromkeys([main, "input_ids", "pixel_values", "input_features", "input_values", "inputs_embeds",
                           "hidden_states"])  # fmt: skip
    width = next(
        (v for n in ("hidden_size", "d_model", "embed_dim") if isinstance(v := get(config, n, 0), int) and v), WIDTH
    )
    for name in order:
        if name not in parameters:
            continue
        if "ids" in name:
            if "encoder_hidden_states" in parameters and not more:
                yield {
                    name: ids(),
                    "encoder_hidden_states": noise(1, 9, get(config, "cross_attention_hidden_size") or width),
                }
            yield {name: ids(), **more}
            yield {name: ids(64), **more}
        elif "pixel" in name:
            size = _find(config, "image_size") or 32
            height, wide = size if isinstance(size, (list, tuple)) else (size, size)
            channels = _find(config, "num_channels") or 3
            frames = _find(config, "num_frames")
            with_text = {**more, **({"input_ids": ids()} if "input_ids" in parameters else {})}
            patch = _find(config, "patch_size") or 4
            patch = patch if isinstance(patch, int) else patch[0]
            for extra in ({}, with_text) if with_text != {} else ({},):
                yield {name: noise(1, channels, height, wide), **extra}
                if "pixel_mask" in parameters:
                    yield {name: noise(1, channels, height, wide), "pixel_mask": torch.ones(1, height, wide), **extra}
                if frames:
                    yield {name: noise(1, frames, channels, height, wide), **extra}
        elif name in ("inputs_embeds", "hidden_states"):
            yield {name: noise(1, 12, width), **more}
        else:
            mels = _find(config, "num_mel_bins") or _find(config, "feature_size") or _find(config, "input_size") or 80
            positions = _find(config, "max_source_positions") or 64
            for shape in (
                (1, mels, 2 * positions),
                (1, 64, mels),
                (1, 64, 2 * mels),
                (1, 2000),
                (1, 1, 2000),
                (1, 400, mels),
            ):
                yield {name: noise(*shape), **more}
            yield {name: ids(), **more}
            for mask in ("attention_mask", "input_features_mask", "feature_attention_mask"):
                if mask in parameters:
                    yield {name: noise(1, mels, 2 * positions), mask: torch.ones(1, 2 * positions, dtype=torch.long)}
                    yield {name: noise(1, 64, mels), mask: torch.ones(1, 64, dtype=torch.long)}
            for lengths in ("feature_lens", "audio_lens"):
                if lengths in parameters:
                    yield {name: noise(mels, 64), lengths: torch.tensor([64])}
    grids = [n for n in ("grid_thw", "image_grid_thw", "grid_thws", "image_grid_hws") if n in parameters]
    for main in ("hidden_states", "pixel_values") if grids else ():
        if main not in parameters:
            continue
        patch = _find(config, "patch_size") or 4
        time = _find(config, "temporal_patch_size") or 1
        channels = _find(config, "in_channels") or _find(config, "num_channels") or 3
        grid = {n: torch.tensor([[1, 8, 8]]) for n in grids}
        merges = {"merge_sizes": torch.tensor([1])} if "merge_sizes" in parameters else {}
        flat, square = (channels * time * patch * patch,), (channels, patch, patch)
        for patches in ((64, *flat), (1, 64, *flat), (64, *square), (1, 64, *square)):
            yield {main: noise(*patches), **grid, **merges}


@functools.cache
def _source(cls: Any) -> str:
    """The source of the models that a config class is for."""
    name = cls.__module__.replace("configuration_", "modeling_")
    return inspect.getsource(importlib.import_module(name)) if importlib.util.find_spec(name) else ""


def get(config: Any, name: str, default: Any = None) -> Any:
    """A field of a config, the default where it has none or one for each layer."""
    try:
        return getattr(config, name, default)
    except RuntimeError:  # a config whose layers differ refuses to name one value for all of them
        return default


def _find(config: Any, name: str) -> Any:
    """A field of a config, or of the first config inside it that has it."""
    value = get(config, name)
    if value is not None:
        return value
    for sub in get(config, "sub_configs", {}):
        inner = get(config, sub)
        if isinstance(inner, PreTrainedConfig) and (value := _find(inner, name)) is not None:
            return value
    return None


def build(cls: Any, like: PreTrainedConfig | None = None) -> tuple[PreTrainedModel, dict[str, Any] | CannotRunError]:
    """A tiny model with random weights, and a batch that it takes or the reason why there is none.

    Args:
        cls: The model's class, of transformers.
        like: A config to make small. Without it the class's default is, with ``head_dim`` set apart from
            ``hidden_size / heads`` and several query heads to a key head, if that can be.

    Raises:
        CannotRunError: It can't be built.
    """
    reasons: list[str] = []
    unfed: tuple[PreTrainedModel, CannotRunError] | None = None
    ways = [(True, True), (False, True), (True, False), (False, False)]
    if like is not None:
        own = _is_apart(like), get(like, "num_key_value_heads") not in (None, get(like, "num_attention_heads"))
        ways.sort(key=lambda way: sum(a != b for a, b in zip(way, own)))
    for apart, grouped in ways:
        try:
            model = _instance(cls, Tiny(apart, grouped).config(like if like is not None else cls.config_class()))
        except Exception as error:  # whatever a config or model objects to
            reasons.append(_reason(error))
            continue
        try:
            return model, feed(model)
        except CannotRunError as error:
            unfed = unfed or (model, error)
    if unfed is not None:
        return unfed
    raise CannotRunError(reasons[0])


def _is_apart(config: PreTrainedConfig) -> bool:
    head, width, heads = (get(config, name) for name in ("head_dim", "hidden_size", "num_attention_heads"))
    return None not in (head, width, heads) and head * heads != width


def _instance(cls: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    config._attn_implementation = config._experts_implementation = "eager"
    with torch.device("meta"):
        elements = sum(p.numel() for p in cls(config).parameters())
    if elements > MAX_ELEMENTS:
        raise CannotRunError(f"{elements:,} elements at the smallest")
    torch.manual_seed(0)
    model = cls(config).float().eval()
    for p in model.parameters():
        p.requires_grad_(True)
        if not p.isfinite().all() or not p.any():
            nn.init.normal_(p, std=0.02)
    return model


def feed(model: PreTrainedModel, tokens: int = 0) -> dict[str, Any]:
    """The first of the generic inputs that a model takes, with at least so many tokens.

    Raises:
        CannotRunError: It takes none.
    """
    reasons = ["no input of a known name"]
    for batch in candidates(model):
        if next(iter(batch.values())).shape[1] < tokens:
            continue
        try:
            with torch.no_grad():
                model(**batch)
            return batch
        except Exception as error:  # whatever a model objects to
            reasons.append(_reason(error))
    raise CannotRunError(reasons[min(1, len(reasons) - 1)])


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[-1] if "validat" in lines[0].lower() else lines[0] if lines else ""
    return f"{type(error).__name__}: {text}"[:160] if not isinstance(error, CannotRunError) else text
