"""The Hessian inside the blocks: against closed forms, and on a small Transformer (the paper's Figure 7)."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from adam_mini_plugins import partition
from adam_mini_plugins.hessian import hessian_of_rows, measure_hessian

VOCABULARY, DIM, HEADS = 24, 4, 4


def test_a_quadratic_has_the_hessian_that_it_is_made_of() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 4, generator=generator, requires_grad=True)
    hessian = torch.randn(12, 12, generator=generator)
    hessian = hessian + hessian.T
    loss = weight.flatten() @ hessian @ weight.flatten() / 2

    mass = hessian_of_rows(loss, weight, torch.arange(3)[:, None])

    expected = hessian.abs().view(3, 4, 3, 4).sum(dim=(1, 3)).double()
    torch.testing.assert_close(mass, expected, rtol=1e-5, atol=1e-5)


def test_rows_along_the_second_axis() -> None:
    weight = torch.randn(2, 3, requires_grad=True)
    loss = (weight.sum(dim=0) ** 2).sum() / 2  # couples what is in one column, each pair by 1

    mass = hessian_of_rows(loss, weight, torch.arange(3)[None])

    torch.testing.assert_close(mass, 4 * torch.eye(3, dtype=torch.float64))


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Tensor]:
    """A Llama of one layer after some steps on text, one character a token."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HEADS * DIM,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config)
    text = torch.tensor([ord(letter) % VOCABULARY for letter in (copy.__doc__ or "") * 2])
    data = text.unfold(0, 16, 5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for batch in data[torch.arange(60 * 8).view(60, 8) % len(data)]:
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, data[:16]


def test_heads_of_query_and_key_are_the_dense_blocks_and_neurons_of_the_rest(trained: tuple[nn.Module, Tensor]) -> None:
    model, batch = trained
    before = copy.deepcopy(model.state_dict())
    layer = "model.layers.0."
    names = [f"{layer}self_attn.{part}_proj.weight" for part in "qkvo"]
    names += [f"{layer}mlp.{part}_proj.weight" for part in ("gate", "up", "down")]

    report = measure_hessian(model, lambda: model(batch, labels=batch).loss, partition(model), names)

    assert [one.name for one in report] == names
    densest = {one.name.rsplit(".", 2)[-2]: one.densest for one in report}
    assert densest == {
        **dict.fromkeys(("q_proj", "k_proj"), "head"),
        **dict.fromkeys(("v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), "neuron"),
    }
    assert [one.chosen for one in report] == [one.densest for one in report]
    for one in report:
        levels = {level.name: level for level in one.levels}
        assert levels["neuron"].inside < levels["head"].inside < levels["tensor"].inside == 1
        assert levels["head"].area == pytest.approx(DIM / len(one.mass))
        torch.testing.assert_close(one.mass, one.mass.T, rtol=1e-3, atol=1e-5 * one.mass.max().item())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_tensor_that_is_too_large_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(200, 200))
    with pytest.raises(ValueError, match=r"0\.weight has 40,000 elements"):
        measure_hessian(model, lambda: model(torch.ones(200)).sum(), partition(model))
    with pytest.raises(ValueError, match="no parameter 'other'"):
        measure_hessian(model, lambda: model(torch.ones(200)).sum(), partition(model), ["other"])
