"""FSDP2: from AdamW to AdamMini, other blocks, and back, while parameters are sharded."""

from __future__ import annotations

import workers
from fsdp2 import shard
from torch import Tensor, nn

from adam_mini_plugins import AdamMini, partition
from adam_mini_plugins.convert import adam_mini_


def changed(model: nn.Module, part: slice) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters and second moments after two steps each of AdamW, AdamMini, other blocks, and AdamW again."""
    adamw = workers.adamw(model)
    workers.train(model, adamw, workers.batches(2), part)
    copied = AdamMini.from_adamw(adamw, partition(model))
    optimizer = adam_mini_(adamw, partition(model))
    for p in model.parameters():  # both ways alike
        assert (copied.state[p]["exp_avg_sq"] == optimizer.state[p]["exp_avg_sq"]).all()
    workers.train(model, optimizer, workers.batches(2, 2), part)
    optimizer.repartition(partition(model, scheme="tensor"))
    workers.train(model, optimizer, workers.batches(2, 4), part)
    back = optimizer.to_adamw()
    workers.train(model, back, workers.batches(2, 6), part)
    moments = {name: workers.whole(back.state[p]["exp_avg_sq"]) for name, p in model.named_parameters()}
    return workers.weights(model), moments


def figures() -> dict[str, float]:
    weights, moments = changed(workers.cut_llama(num_hidden_layers=1), slice(None))
    model = workers.cut_llama(num_hidden_layers=1)
    shard(model)
    cut_weights, cut_moments = changed(model, workers.of_rank())
    largest = max(float(moment.max()) for moment in moments.values())
    return {
        "weights": workers.distance(weights, cut_weights),
        "moments": workers.distance(moments, cut_moments) / largest,
    }
