"""FSDP2 by torch itself: models of many kinds against one process, float32 but where said."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import transformers
import workers
import zoo
from torch import nn
from torch.distributed.fsdp import fully_shard

ONE_LAYER = {**zoo.DECODER, "num_hidden_layers": 1}


def phi3() -> nn.Module:
    torch.manual_seed(0)
    return transformers.Phi3ForCausalLM(transformers.Phi3Config(**ONE_LAYER, head_dim=zoo.WIDE_HEAD)).train()


def gpt2() -> nn.Module:
    # In float32 AdamW itself is 1e-5 off: queries and keys have a bias whose gradient is nothing but rounding.
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**zoo.GPT2, "n_layer": 1})).double().train()


def experts(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**ONE_LAYER, num_local_experts=4, **options)
    return transformers.MixtralForCausalLM(config).train()


def bfloat16() -> nn.Module:
    return workers.cut_llama(num_hidden_layers=1).bfloat16()


CASES = {
    "llama": (lambda: workers.llama(hidden_size=192, head_dim=10), {"clip": 0.5}),
    "tied": (lambda: workers.cut_llama(num_hidden_layers=1, tie_word_embeddings=True), {}),
    "fused, swapped": (phi3, {"swap": True}),
    "conv1d": (gpt2, {}),
    "experts": (experts, {}),
    "bfloat16": (bfloat16, {}),
}


def shard(model: nn.Module) -> None:
    for layer in model.transformer.h if hasattr(model, "transformer") else model.model.layers:
        fully_shard(layer)
    fully_shard(model)


def figures() -> dict[str, Any]:
    # Three processes cut where two do, and leave some of them without a row.
    names = CASES if dist.get_world_size() > 2 else ("llama", "tied", "conv1d")
    found = {}
    for name in names:
        build, options = CASES[name]
        found[name] = workers.compare(build, shard, **options)
    return found
