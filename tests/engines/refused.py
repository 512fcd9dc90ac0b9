"""Engines that AdamMini refuses: what it says, on each process, before anything has changed."""

from __future__ import annotations

from typing import Any

import torch
import workers
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from adam_mini_plugins import AdamMini


def fsdp1(use_orig_params: bool) -> Any:
    model = workers.cut_llama(num_hidden_layers=1)
    return FullyShardedDataParallel(model, use_orig_params=use_orig_params, device_id=torch.device("cpu"))


def message(act: Any) -> str:
    try:
        act()
    except (RuntimeError, ValueError) as error:
        return str(error)
    return "not refused"


def made_before(use_orig_params: bool) -> str:
    """The optimizer is made of the model, and the model wrapped afterwards; an engine swaps the parameters."""
    model = workers.cut_llama(num_hidden_layers=1)
    optimizer = AdamMini.for_model(model)
    wrapped = FullyShardedDataParallel(model, use_orig_params=use_orig_params, device_id=torch.device("cpu"))
    optimizer.param_groups[0]["params"] = list(wrapped.parameters())
    return stepped(wrapped, optimizer)


def stepped(model: nn.Module, optimizer: AdamMini) -> str:
    ids = workers.batches(1)[0]
    model(input_ids=ids, labels=ids).loss.backward()
    before = [p.detach().clone() for p in model.parameters()]
    said = message(optimizer.step)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert not optimizer.state
    return said


def figures() -> dict[str, str]:
    return {
        "flat, made after": message(lambda: AdamMini.for_model(fsdp1(False))),
        "flat, made before": made_before(False),
        "original, made before": made_before(True),
    }
