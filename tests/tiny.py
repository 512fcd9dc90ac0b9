"""A Llama of a few numbers, and steps on random tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import LlamaConfig, LlamaForCausalLM


def llama(**options: Any) -> LlamaForCausalLM:
    """One layer of four heads and two key/value heads, untied, always the same."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **options}))


def train(model: nn.Module, optimizer: Optimizer, steps: int = 3, seed: int = 1) -> None:
    """Steps with each token's successor as its label."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        tokens = torch.randint(0, 20, (2, 8), generator=generator)
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
