"""Random models, shapes and rules: each element in one block, each step the paper's, each error one of ours."""

from __future__ import annotations

import itertools
import random
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import adam_mini_reference
from torch import nn

from adam_mini_plugins import AdamMini, Partition, partition
from adam_mini_plugins.blocks import Grid, Layout
from adam_mini_plugins.blocks.partition import PartitionError

# Names that mean something to the rules, in places where they may mean nothing.
NAMES = ("q_proj", "k_proj", "v_proj", "qkv", "attn", "self_attention", "query", "key", "value", "out_proj", "head",
         "heads", "bias", "scale", "embed", "token", "conv", "experts", "norm", "layer", "lora_A", "gate")  # fmt: skip


class Attention(nn.Module):
    """Attention as a model of one's own may write it; its configuration may contradict its shapes."""

    def __init__(self, width: int, heads: int, key_value: int, dim: int, fused: bool, declared: bool) -> None:
        super().__init__()
        if declared:
            self.num_heads, self.num_key_value_heads, self.head_dim = heads, key_value, dim
        if fused:
            self.qkv_proj = nn.Linear(width, (heads + 2 * key_value) * dim)
        else:
            self.q_proj = nn.Linear(width, heads * dim)
            self.k_proj = nn.Linear(width, key_value * dim)
            self.v_proj = nn.Linear(width, key_value * dim)
        self.o_proj = nn.Linear(heads * dim, width)


def leaf(rng: random.Random) -> nn.Module:
    def size() -> int:
        return rng.choice((1, 2, 3, 4, 6, 8))

    kinds: list[Any] = [
        lambda: nn.Linear(size(), size(), bias=rng.random() < 0.5),
        lambda: nn.Embedding(size(), size()),
        lambda: nn.LayerNorm(size()),
        lambda: nn.Conv1d(size(), size(), 2),
        lambda: nn.Conv2d(size(), size(), (1, 2)),
        lambda: nn.GRU(size(), size()),
        lambda: nn.Bilinear(size(), size(), size()),
        lambda: nn.PReLU(),
        lambda: nn.MultiheadAttention(4, rng.choice((1, 2, 4)), kdim=rng.choice((None, 3))),
        lambda: Attention(size(), size(), size(), size(), rng.random() < 0.5, rng.random() < 0.7),
        lambda: nn.ParameterList([torch.randn([size() for _ in range(rng.randrange(4))])]),
    ]
    return rng.choice(kinds)()


def tree(rng: random.Random, depth: int = 0) -> nn.Module:
    """A module of modules, by names that collide with those of attention, some weights tied, some frozen."""
    module = nn.Module()
    for _ in range(rng.randrange(1, 4)):
        child = leaf(rng) if depth > 1 or rng.random() < 0.6 else tree(rng, depth + 1)
        if rng.random() < 0.2:
            child = nn.ModuleList([child, leaf(rng)])
        module.add_module(rng.choice(NAMES), child)
    if rng.random() < 0.3:
        bare = nn.Parameter(torch.randn([rng.choice((1, 2, 5)) for _ in range(rng.randrange(4))]))
        module.register_parameter("bare_" + rng.choice(NAMES), bare)
    if depth == 0:
        linear = [m for m in module.modules() if isinstance(m, nn.Linear | nn.Embedding)]
        for one, other in itertools.pairwise(linear):
            if one.weight.shape == other.weight.shape and rng.random() < 0.7:
                other.weight = one.weight
        for parameter in module.parameters():
            parameter.requires_grad_(rng.random() < 0.9)
    return module


def rules_for(model: nn.Module, rng: random.Random) -> list[tuple[str, Any]]:
    names = [name for name, _ in model.named_parameters()]
    patterns = ["*", "*.weight", *(rng.sample(names, 1) if names else [])]
    blocks = ["neuron", "tensor", "element", "2 heads", "3 heads", "columns", Layout.each_row(4)]
    return [(rng.choice(patterns), rng.choice(blocks)) for _ in range(rng.randrange(3))]


def made(model: nn.Module, rules: list[tuple[str, Any]], rng: random.Random) -> Partition:
    """The partition of a model; of one whose blocks can't be told, with the rule that the error asks for."""
    options: dict[str, Any] = {
        "scheme": rng.choice(("auto", "hessian", "tensor")),
        "value": rng.choice(("neuron", "whole")),
    }
    try:
        return partition(model, rules=rules, **options)
    except PartitionError:
        return partition(model, rules=[("*", rng.choice(("neuron", "tensor", "element")))], **options)


# Trees are drawn from a number: as hypothesis would shrink them they cost more than the steps.
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=80)
def test_any_tree_of_modules_is_tiled_and_steps_as_the_paper_says(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    model = tree(rng)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        with pytest.raises(ValueError, match="has no parameter to train"):
            AdamMini.for_model(model, scheme="tensor")
        return
    blocks = made(model, rules_for(model, rng), rng)
    for name, parameter in trainable.items():
        index = blocks.block_index(name).expand(parameter.shape)  # each element has a block, and one
        assert sorted(set(index.flatten().tolist())) == list(range(blocks.num_blocks(name)))
        assert Layout.parse(str(blocks[name].layout)) == blocks[name].layout

    options = {"lr": 1e-2, "weight_decay": rng.choice((0.0, 0.1)), "maximize": rng.random() < 0.3}
    optimizer = AdamMini(trainable.items(), partition=blocks, **options)
    before = {name: p.detach().clone() for name, p in trainable.items()}
    grads: dict[str, list[torch.Tensor]] = {name: [] for name in trainable}
    for _ in range(2):
        for name, parameter in trainable.items():
            parameter.grad = torch.randn_like(parameter)
            grads[name].append(parameter.grad)
        optimizer.step()
    for name, parameter in trainable.items():
        wanted = adam_mini_reference(before[name], grads[name], blocks.block_index(name), **options)
        torch.testing.assert_close(parameter.detach().double(), wanted, rtol=1e-5, atol=1e-6)
    fresh = AdamMini(trainable.items(), partition=blocks, **options)
    fresh.load_state_dict(optimizer.state_dict())
    assert all(torch.equal(fresh.state[p]["exp_avg_sq"], optimizer.state[p]["exp_avg_sq"]) for p in trainable.values())


LAYOUTS = st.builds(
    lambda sizes, merged, outer, parts, axes: Layout(
        axes,
        tuple(Grid((*outer, *sizes[i:]), (*[False] * len(outer), *merged[i:])) for i in range(parts)),
        len(outer),
    ),
    st.just((2, 3, 1)),
    st.tuples(st.booleans(), st.booleans(), st.booleans()),
    st.sampled_from([(), (2,), (3, 1)]),
    st.integers(1, 3),
    st.sampled_from([(0,), (1,)]),
)


@given(layout=LAYOUTS, seed=st.integers(0, 2**16))
@settings(max_examples=40)
def test_any_layout_as_a_rule_of_ones_own_steps_as_the_paper_says(layout: Layout, seed: int) -> None:
    torch.manual_seed(seed)
    shape = (layout.rows, 3) if layout.axes == (0,) else (3, layout.rows)
    model = nn.ParameterDict({"w": torch.randn(shape, dtype=torch.float64)})
    optimizer = AdamMini.for_model(model, rules=[("w", layout)])
    before, grads = model["w"].detach().clone(), [torch.randn(shape, dtype=torch.float64) for _ in range(3)]
    for grad in grads:
        model["w"].grad = grad
        optimizer.step()
    wanted = adam_mini_reference(before, grads, optimizer.partition.block_index("w"))
    torch.testing.assert_close(model["w"].detach(), wanted, rtol=1e-12, atol=1e-12)


@given(text=st.text("0123456789 heads*(),:|+-", max_size=12))
@settings(max_examples=40)
def test_any_text_as_a_rule_is_blocks_or_an_error_of_ours(text: str) -> None:
    model = nn.Linear(3, 6)
    given_heads = re.fullmatch(r"(\d+) heads?", text)
    if given_heads and int(given_heads[1]) in (1, 2, 3, 6):
        assert partition(model, rules=[("weight", text)]).num_blocks("weight") == int(given_heads[1])
    else:
        with pytest.raises(PartitionError, match="the rule 'weight' gives"):
            partition(model, rules=[("weight", text)])
