"""The drop-in for the published package, with that package itself as the peer."""

from __future__ import annotations

import copy
import inspect
import logging
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import tiny
import torch
import zoo
from tiny import train
from torch import nn

from adam_mini_plugins import AdamMini, Layout, PartitionError, partition
from adam_mini_plugins.compat import Adam_mini

published = pytest.importorskip("adam_mini", reason="the published package, the peer, is not installed")

GEOMETRY: dict[str, Any] = {"dim": 16, "n_heads": 4, "n_kv_heads": 2, "verbose": False}
OPTIONS: dict[str, Any] = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.2}
Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(autouse=True)
def _no_warning_unless_expected() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=UserWarning, message=".*(blocks|heads).*")
        yield


llama = partial(tiny.llama, num_hidden_layers=2, attention_bias=True)


def theirs(trained: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return published.Adam_mini(trained.named_parameters(), **{**OPTIONS, **GEOMETRY, **options})


def ours(trained: nn.Module, **options: Any) -> Adam_mini:
    return Adam_mini(trained.named_parameters(), **{**OPTIONS, **GEOMETRY, **options})


def assert_near(one: nn.Module, other: nn.Module, tolerance: float = 2e-7) -> None:
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0.0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


def test_the_arguments_are_the_published_ones_and_a_model() -> None:
    peer = inspect.signature(published.Adam_mini).parameters
    mine = inspect.signature(Adam_mini).parameters
    assert [*peer, "model"] == list(mine)
    for name, parameter in peer.items():
        assert (mine[name].default, mine[name].kind) == (parameter.default, parameter.kind), name


@pytest.mark.parametrize("with_model", [False, True])
def test_it_trains_as_the_published_one_where_that_is_right(with_model: bool) -> None:
    one, other = llama(), llama()
    mine = ours(one, model=one if with_model else None)
    peer = theirs(other)
    train(one, mine, 8)
    train(other, peer, 8)
    assert_near(one, other)
    assert [g["name"] for g in mine.param_groups] == [g["name"] for g in peer.param_groups]
    assert [g["weight_decay"] for g in mine.param_groups] == [g["weight_decay"] for g in peer.param_groups]


@pytest.mark.parametrize("with_model", [False, True])
def test_training_goes_on_from_its_checkpoint_as_it_would_have(with_model: bool) -> None:
    other = llama()
    peer = theirs(other)
    train(other, peer)
    one, saved = copy.deepcopy(other), copy.deepcopy(peer.state_dict())

    mine = ours(one, lr=1.0, betas=(0.1, 0.1), model=one if with_model else None)
    mine.load_state_dict(saved)
    assert {key: mine.param_groups[0][key] for key in OPTIONS} == OPTIONS
    train(one, mine, seed=2)
    train(other, peer, seed=2)
    assert_near(one, other)
    for p, q in zip(one.parameters(), other.parameters()):
        assert mine.state[p]["step"] == peer.state[q]["step"] == 6

    again = ours(one)
    again.load_state_dict(mine.state_dict())  # its own, now
    assert torch.equal(again.state[one.lm_head.weight]["exp_avg"], mine.state[one.lm_head.weight]["exp_avg"])


def test_heads_that_are_wider_than_the_guess_are_warned_of_by_name() -> None:
    model = llama(head_dim=8)
    with pytest.warns(UserWarning, match="AdamMini takes the model's blocks") as caught:
        mine = ours(model, model=model)
    text = str(caught[0].message)
    assert "model.layers.0-1.self_attn.q_proj.weight: blocks 0: 4 (8), not 0: 8 (4)" in text
    assert "model.layers.0-1.self_attn.k_proj.weight: blocks 0: 2 (8), not 0: 4 (4)" in text
    assert text.count("\n") == 2
    assert mine.partition.num_blocks(Q) == 4
    # Without the model the numbers given tell that something is wrong, and the blocks are as guessed.
    with pytest.warns(UserWarning, match="contradict n_heads") as caught:
        mine = ours(model)
    assert "q_proj.weight: 8 heads by dim=16, where 4 were said" in str(caught[0].message)
    assert mine.partition.num_blocks(Q) == 8


def test_a_checkpoint_of_a_wrong_guess_is_averaged_over_the_models_blocks() -> None:
    model = llama(head_dim=8)
    peer = theirs(model)
    train(model, peer)
    with pytest.warns(UserWarning, match="takes the model's blocks"):
        mine = ours(model, model=model)
    mine.load_state_dict(peer.state_dict())
    q = model.get_parameter(Q)
    guessed = peer.state[q]["vmean"].double()
    expected = guessed.view(4, 2).mean(1).repeat_interleave(8)[:, None]
    torch.testing.assert_close(mine.state[q]["exp_avg_sq"].double(), expected, rtol=1e-6, atol=0.0)
    assert torch.equal(mine.state[q]["exp_avg"], peer.state[q]["m"].view(32, 16))


def test_fused_and_transposed_projections_are_warned_of() -> None:
    model, _ = zoo.CASES["gpt2"].build()
    with pytest.warns(UserWarning, match="takes the model's blocks") as caught:
        Adam_mini(model.named_parameters(), dim=48, n_heads=6, model=model)
    text = str(caught[0].message)
    assert "transformer.h.0-1.attn.c_attn.weight: blocks 1: 6 (8) + 6 (8) + 48, not 0: (48)" in text
    assert "transformer.h.0-1.mlp.c_fc.weight: blocks 1: 192, not 0: 48" in text
    assert "transformer.wte.weight" not in text


def test_what_the_guess_fails_on_is_an_error_without_a_model_and_warned_of_with_one() -> None:
    model = llama()
    with pytest.raises(
        PartitionError, match=r"q_proj.weight of shape \(16, 16\) .* = 131072 elements: pass the model's"
    ):
        Adam_mini(model.named_parameters())
    with pytest.warns(UserWarning, match=r"q_proj.weight: blocks 0: 4 \(4\), where that one fails"):
        Adam_mini(model.named_parameters(), model=model)
    vector = [("mlp.norm.weight", nn.Parameter(torch.ones(3)))]
    with pytest.raises(PartitionError, match=r"mlp.norm.weight has shape \(3,\), .* block a row: pass model=model"):
        Adam_mini(vector)


def test_words_that_a_script_adds_count_before_the_first_step() -> None:
    def named() -> list[tuple[str, nn.Parameter]]:
        torch.manual_seed(0)
        return [
            ("net.up.weight", nn.Parameter(torch.randn(4, 3))),
            ("net.down.weight", nn.Parameter(torch.randn(3, 4))),
        ]

    results = []
    for cls in (published.Adam_mini, Adam_mini):
        members = named()
        optimizer = cls(members, lr=0.1, verbose=False)
        optimizer.mlp_names.add("up")
        seen: list[int] = []
        optimizer.register_step_pre_hook(lambda *_, seen=seen: seen.append(1))
        for seed in (1, 2, 3):
            generator = torch.Generator().manual_seed(seed)
            for _, p in members:
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
        assert len(seen) == 3
        results.append([p for _, p in members])
    again = Adam_mini(named(), verbose=False)
    again.mlp_names.add("up")
    again.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0]["blocks"] == [str(Layout.each_row(4))]
    assert optimizer.param_groups[1]["blocks"] == [str(Layout.whole(3))]
    for p, q in zip(*results):
        torch.testing.assert_close(p, q, rtol=0.0, atol=2e-7)


def test_a_checkpoint_that_does_not_fit_is_refused() -> None:
    model = llama()
    peer = theirs(model)
    train(model, peer, 1)
    saved = peer.state_dict()
    named = list(model.named_parameters())
    mine = Adam_mini(named[::-1], **GEOMETRY)
    with pytest.raises(ValueError, match=r"'model\.embed_tokens\.weight' stands where here is 'lm_head\.weight'"):
        mine.load_state_dict(saved)
    mine = ours(model)
    half = {**saved, "state": {**saved["state"], 0: {**saved["state"][0], "m": torch.zeros(12, 16)}}}
    with pytest.raises(ValueError, match=r"embed_tokens.weight has shape \(24, 16\), .* 192 elements .* 24 second"):
        mine.load_state_dict(half)
    assert not mine.state
    adamw = torch.optim.AdamW([{"params": [p]} for _, p in named])
    train(model, adamw, 1)
    with pytest.raises(ValueError, match="not AdamMini's but Adam's"):
        mine.load_state_dict(adamw.state_dict())


def test_other_arguments(caplog: pytest.LogCaptureFixture) -> None:
    model = llama()
    with pytest.raises(ValueError, match="n_heads must be a multiple of n_kv_heads, got 4 and 3"):
        ours(model, n_kv_heads=3)
    with pytest.warns(FutureWarning, match="model_sharding has no effect"):
        ours(model, model_sharding=True)
    model.lm_head.requires_grad_(False)
    with caplog.at_level(logging.INFO, logger="adam_mini_plugins"):
        mine = ours(model, verbose=True)
    assert "published partition: " in caplog.text
    assert len(mine.param_groups) == len(list(model.parameters())) - 1
    assert isinstance(mine, AdamMini)


def test_it_can_move_on_to_the_models_blocks_later() -> None:
    model = llama()
    mine = ours(model)
    train(model, mine)
    mine.repartition(partition(model, value="whole"))
    train(model, mine, 1)
    assert {float(state["step"]) for state in mine.state.values()} == {4.0}
