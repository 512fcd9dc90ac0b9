"""Changes of mind in the middle of a run: AdamW to AdamMini and back, other blocks, a model that has changed."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from test_hf import arguments, inner, trainer_for
from tiny import llama, train
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR
from transformers import LlamaForCausalLM, TrainerCallback

from adam_mini_plugins import AdamMini, Partition, partition
from adam_mini_plugins.convert import adam_mini_, take_over_adamw

sys.path.append(str(Path(__file__).parent / "engines"))

from launch import launch

OPTIONS: dict[str, Any] = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.2}
Q = "model.layers.0.self_attn.q_proj.weight"
V = "model.layers.0.self_attn.v_proj.weight"


def adamw_run(steps: int = 3, **options: Any) -> tuple[LlamaForCausalLM, AdamW]:
    model = llama()
    optimizer = AdamW(model.named_parameters(), **{**OPTIONS, **options})
    train(model, optimizer, steps)
    return model, optimizer


def moments(optimizer: torch.optim.Optimizer, model: nn.Module, entry: str) -> dict[str, Tensor]:
    return {name: optimizer.state[p][entry].clone() for name, p in model.named_parameters() if p in optimizer.state}


def means(second_moment: Tensor, blocks: Partition, name: str) -> Tensor:
    """The mean over each block, block by block and in float64, for each element."""
    index = blocks.block_index(name).expand(second_moment.shape)
    result = torch.empty(second_moment.shape, dtype=torch.float64)
    for block in range(blocks.num_blocks(name)):
        result[index == block] = second_moment.double()[index == block].mean()
    return result


def assert_means(optimizer: AdamMini, before: dict[str, Tensor], model: nn.Module, blocks: Partition) -> None:
    after = moments(optimizer, model, "exp_avg_sq")
    assert after.keys() == before.keys()
    for name, value in after.items():
        expected = means(before[name], blocks, name)
        torch.testing.assert_close(value.double().expand(expected.shape), expected, rtol=1e-6, atol=0.0)


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# --- from AdamW and back ---------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}, {"capturable": False, "maximize": True}])
def test_adamw_is_taken_over_as_it_stands(options: dict[str, Any]) -> None:
    model, adamw = adamw_run(**options)
    adamw.param_groups[0]["mine"] = 7
    before, weights = copy.deepcopy(adamw.state_dict()), parameters(model)
    squares = moments(adamw, model, "exp_avg_sq")
    blocks = partition(model)

    optimizer = AdamMini.from_adamw(adamw, blocks)

    assert_means(optimizer, squares, model, blocks)
    for p in model.parameters():
        assert torch.equal(optimizer.state[p]["exp_avg"], adamw.state[p]["exp_avg"])
        assert optimizer.state[p]["step"] == 3
    (group,) = optimizer.param_groups
    assert {key: group[key] for key in OPTIONS} == OPTIONS
    assert (group["mine"], group["maximize"]) == (7, options.get("maximize", False))
    assert group["param_names"] == [name for name, _ in model.named_parameters()]
    # What was saved before is what AdamW still has, and a step of AdamMini's doesn't reach it.
    train(model, optimizer)
    after = adamw.state_dict()
    for key, state in before["state"].items():
        assert all(torch.equal(value, after["state"][key][entry]) for entry, value in state.items())
    assert any(not torch.equal(weights[name], p) for name, p in model.named_parameters())


def test_with_a_block_an_element_training_goes_on_as_adamws() -> None:
    model, adamw = adamw_run()
    twin, other = adamw_run()
    optimizer = AdamMini.from_adamw(adamw, partition(model, rules=[("*", "element")]))
    train(model, optimizer, 4, seed=2)
    train(twin, other, 4, seed=2)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0.0, atol=2e-7)


def test_a_state_dict_is_taken_over_as_its_adamw_is() -> None:
    model, adamw = adamw_run()
    blocks = partition(model)
    saved = copy.deepcopy(adamw.state_dict())
    from_saved = AdamMini.from_adamw(saved, blocks, params=model.named_parameters())
    ours, theirs = from_saved.state_dict(), AdamMini.from_adamw(adamw, blocks).state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    for key, state in theirs["state"].items():
        assert all(torch.equal(value, ours["state"][key][entry]) for entry, value in state.items())


def test_there_and_back_spreads_each_blocks_value() -> None:
    model, adamw = adamw_run()
    optimizer = AdamMini.from_adamw(adamw, partition(model))
    train(model, optimizer, 2, seed=2)
    held = moments(optimizer, model, "exp_avg_sq")

    back = optimizer.to_adamw(fused=True)

    assert type(back) is AdamW
    for name, p in model.named_parameters():
        assert torch.equal(back.state[p]["exp_avg"], optimizer.state[p]["exp_avg"])
        assert back.state[p]["step"] == 5
        assert torch.equal(back.state[p]["exp_avg_sq"], held[name].expand(p.shape))
    (group,) = back.param_groups
    assert {key: group[key] for key in OPTIONS} == OPTIONS
    assert group["fused"]
    assert not {"blocks", "state_dtype"} & set(group)
    train(model, back)
    assert torch.equal(held[Q], optimizer.state[model.get_parameter(Q)]["exp_avg_sq"])


def test_there_and_back_with_a_block_an_element_is_no_change_at_all() -> None:
    model, adamw = adamw_run()
    back = AdamMini.from_adamw(adamw, partition(model, rules=[("*", "element")])).to_adamw()
    assert back.state_dict().keys() == adamw.state_dict().keys()
    for key, state in adamw.state_dict()["state"].items():
        assert all(torch.equal(value, back.state_dict()["state"][key][entry]) for entry, value in state.items())
    assert back.param_groups == adamw.param_groups


def test_in_place_schedulers_and_references_go_on() -> None:
    model, adamw = adamw_run(0)
    twin, other = adamw_run(0)
    schedules = CosineAnnealingLR(adamw, 8), CosineAnnealingLR(other, 8)
    for steps, convert in ((3, True), (3, False)):
        for net, optimizer, schedule in ((model, adamw, schedules[0]), (twin, other, schedules[1])):
            for _ in range(steps):
                train(net, optimizer, 1)
                schedule.step()
        if convert:
            squares = moments(adamw, model, "exp_avg_sq")
            momentum = adamw.state[model.lm_head.weight]["exp_avg"]
            group, blocks = adamw.param_groups[0], partition(model)
            assert adam_mini_(adamw, blocks) is adamw
            assert_means(adamw, squares, model, blocks)
            assert adamw.state[model.lm_head.weight]["exp_avg"].data_ptr() == momentum.data_ptr()
            assert adamw.param_groups[0] is group
        assert schedules[0].get_last_lr() == schedules[1].get_last_lr()
    assert adamw.param_groups[0]["lr"] == other.param_groups[0]["lr"] < OPTIONS["lr"]
    assert isinstance(adamw, AdamMini)


def test_low_precision_parameters() -> None:
    model = llama().to(torch.bfloat16)
    adamw = AdamW(model.parameters(), lr=1e-2)
    train(model, adamw)
    squares, blocks = moments(adamw, model, "exp_avg_sq"), partition(model)
    optimizer = AdamMini.from_adamw(adamw, blocks, state_dtype="float32")
    assert_means(optimizer, squares, model, blocks)
    assert {state["exp_avg"].dtype for state in optimizer.state.values()} == {torch.float32}
    back = optimizer.to_adamw()
    assert {state["exp_avg_sq"].dtype for state in back.state.values()} == {torch.bfloat16}
    train(model, back)


def refused(
    optimizer: torch.optim.Optimizer | dict[str, Any], message: str, error: type = ValueError, **k: Any
) -> None:
    with pytest.raises(error, match=message):
        AdamMini.from_adamw(optimizer, partition(llama()), **k)


def test_what_cannot_be_taken_over_is_an_error_that_says_why() -> None:
    model, adamw = adamw_run()
    saved = adamw.state_dict()
    refused(SGD(model.parameters()), "only torch's Adam and AdamW can become AdamMini, got SGD", TypeError)
    refused(saved, r"a state dict has no parameters: pass params= .*params=model.named_parameters\(\)")
    refused(adamw, "leave params= out", params=model.parameters())
    refused(AdamW(model.parameters(), amsgrad=True), "amsgrad=True, which AdamMini does not have: set amsgrad=False")
    refused(Adam(model.named_parameters(), weight_decay=0.1), "weight_decay=0.1, which Adam adds to the gradient")
    sgd = SGD(model.parameters(), momentum=0.9)
    train(model, sgd)
    refused(sgd.state_dict(), r"another optimizer's: \['momentum_buffer'\]", params=model.named_parameters())
    named = list(model.named_parameters())
    refused(
        saved, r"exp_avg of model.norm.weight has shape \(16, 16\) .* parameter \(16,\): .* order", params=named[::-1]
    )
    refused(saved, r"groups of \[12\] parameters, this optimizer of \[2\]", params=named[:2])


def test_a_hook_makes_either_checkpoint_load() -> None:
    model, adamw = adamw_run()
    optimizer = AdamMini.for_model(model, **OPTIONS)
    saved = adamw.state_dict()
    with pytest.raises(ValueError, match=r'AdamMini\.from_adamw\(.*optim_args="from_adamw=true"'):
        optimizer.load_state_dict(saved)
    optimizer.register_load_state_dict_pre_hook(take_over_adamw)
    optimizer.load_state_dict(saved)
    assert_means(optimizer, moments(adamw, model, "exp_avg_sq"), model, optimizer.partition)
    train(model, optimizer)
    own = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    optimizer.load_state_dict(own)
    assert {float(state["step"]) for state in optimizer.state.values()} == {6.0}


# --- from the Trainer ---------------------------------------------------------------------------


class Seen(TrainerCallback):
    """The optimizer's state when training begins."""

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        self.state = copy.deepcopy(getattr(optimizer, "optimizer", optimizer).state_dict()["state"])


def test_the_trainer_resumes_from_an_adamw_checkpoint_where_it_is_asked_to(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 3}
    first = trainer_for("llama", arguments(tmp_path, optim="adamw_torch", **saving))
    first.train()
    saved = torch.load(tmp_path / "checkpoint-3" / "optimizer.pt", weights_only=True)
    seen = Seen()
    args = arguments(tmp_path / "on", optim_args="from_adamw=true", **saving)
    resumed = trainer_for("llama", args, callbacks=[seen])
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert isinstance(inner(resumed), AdamMini)
    assert resumed.state.global_step == 6
    names = [name for group in inner(resumed).param_groups for name in group["param_names"]]
    assert len(names) == len(saved["state"]) > 8
    for key, name in enumerate(names):
        assert torch.equal(seen.state[key]["exp_avg"], saved["state"][key]["exp_avg"])
        expected = means(saved["state"][key]["exp_avg_sq"], inner(resumed).partition, name)
        value = seen.state[key]["exp_avg_sq"].double().expand(expected.shape)
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=0.0)
        assert seen.state[key]["step"] == 3
    # From its own checkpoints it resumes as ever, with the option left in place.
    again = trainer_for("llama", arguments(tmp_path / "on", optim_args="from_adamw=true", max_steps=7))
    again.train(resume_from_checkpoint=str(tmp_path / "on" / "checkpoint-6"))
    assert {float(state["step"]) for state in inner(again).state.values()} == {7.0}
    with pytest.raises(ValueError, match="from_adamw=yes, and from_adamw is one of true, false"):
        trainer_for("llama", arguments(tmp_path, optim_args="from_adamw=yes")).create_optimizer()


# --- other blocks, another model ---------------------------------------------------------------------


def mini_run(model: LlamaForCausalLM | None = None, **options: Any) -> tuple[LlamaForCausalLM, AdamMini]:
    model = llama() if model is None else model
    optimizer = AdamMini.for_model(model, **{**OPTIONS, **options})
    train(model, optimizer)
    return model, optimizer


def test_other_blocks_take_the_means_of_those_before() -> None:
    model, optimizer = mini_run()
    group = optimizer.param_groups[0]
    before = moments(optimizer, model, "exp_avg_sq")
    spread = {name: before[name].expand(p.shape) for name, p in model.named_parameters()}

    whole = partition(model, value="whole")
    optimizer.repartition(whole)
    assert_means(optimizer, spread, model, whole)
    value = moments(optimizer, model, "exp_avg_sq")
    assert value[V].unique().numel() == 1 < before[V].unique().numel()
    assert all(torch.equal(value[name], before[name]) for name in before if not name.endswith("v_proj.weight"))
    assert optimizer.param_groups[0] is group
    assert optimizer.partition is whole

    tensor = partition(model, scheme="tensor")
    optimizer.repartition(tensor)
    assert_means(optimizer, spread, model, tensor)
    optimizer.repartition(partition(model))
    after = moments(optimizer, model, "exp_avg_sq")
    assert all(value.unique().numel() == 1 for value in after.values())
    assert after[Q].shape == before[Q].shape
    train(model, optimizer)
    assert {float(state["step"]) for state in optimizer.state.values()} == {6.0}


def test_the_same_blocks_are_no_change_to_the_bit() -> None:
    model, optimizer = mini_run()
    twin, other = mini_run()
    optimizer.repartition(partition(model))
    train(model, optimizer, seed=2)
    train(twin, other, seed=2)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", [30, 20])
def test_a_changed_vocabulary_keeps_the_rows_that_stay(tied: bool, size: int) -> None:
    model, optimizer = mini_run(llama(tie_word_embeddings=tied))
    names = ["model.embed_tokens.weight", *([] if tied else ["lm_head.weight"])]
    before = {entry: moments(optimizer, model, entry) for entry in ("exp_avg", "exp_avg_sq")}
    model.resize_token_embeddings(size)
    with pytest.raises((RuntimeError, ValueError)):
        train(model, optimizer, 1)

    optimizer.repartition(partition(model))

    kept = min(size, 24)
    for name, p in model.named_parameters():
        state = optimizer.state[p]
        assert state["step"] == 3
        rows = kept if name in names else len(p)
        assert state["exp_avg"].shape == p.shape
        assert torch.equal(state["exp_avg"][:rows], before["exp_avg"][name][:rows])
        assert torch.equal(state["exp_avg_sq"][:rows], before["exp_avg_sq"][name][:rows])
        assert (state["exp_avg"][rows:] == 0).all()
        fresh = state["exp_avg_sq"][rows:]
        torch.testing.assert_close(fresh, before["exp_avg_sq"][name].mean().expand_as(fresh).clone())
    trained = {p for group in optimizer.param_groups for p in group["params"]}
    assert trained == set(model.parameters())
    train(model, optimizer, 1)
    assert {float(state["step"]) for state in optimizer.state.values()} == {4.0}


def test_the_first_steps_of_new_rows_are_no_longer_than_those_of_others() -> None:
    lr = 1e-2
    table = nn.Sequential(nn.Embedding(4, 3))
    optimizer = AdamMini.for_model(table, lr=lr, weight_decay=0.0, scheme="hessian")

    def steps(count: int) -> float:
        longest = 0.0
        for _ in range(count):
            before = table[0].weight.detach().clone()
            table[0].weight.grad = torch.ones_like(table[0].weight)
            optimizer.step()
            longest = max(longest, (table[0].weight - before).abs().max().item())
        return longest

    steps(300)
    table[0] = nn.Embedding(6, 3)
    optimizer.repartition(partition(table, scheme="hessian"))
    assert len(optimizer.state[table[0].weight]["exp_avg"]) == 6
    assert steps(100) == pytest.approx(lr, rel=1e-3)


def test_more_than_one_extent_is_another_tensor() -> None:
    model, optimizer = mini_run()
    model.lm_head = nn.Linear(17, 25, bias=False)
    before = optimizer.state_dict()
    with pytest.raises(ValueError, match=r"lm_head.weight had shape \(24, 16\) and has \(25, 17\)"):
        optimizer.repartition(partition(model))
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]
    with pytest.raises(ValueError, match=r"the partition does not know 'model\.embed_tokens\.weight'"):
        optimizer.repartition(partition(nn.Sequential(nn.Linear(2, 2)), scheme="tensor"))


def test_layers_added_frozen_and_thawed() -> None:
    model, optimizer = mini_run()
    rest = [p for name, p in model.named_parameters() if name != Q]
    frozen = model.get_parameter(Q).requires_grad_(False)
    at, held = frozen.clone(), optimizer.state[frozen]["exp_avg"].clone()
    train(model, optimizer, 2)
    assert torch.equal(frozen, at)
    assert torch.equal(optimizer.state[frozen]["exp_avg"], held)

    more = llama(num_hidden_layers=2).model.layers[1]
    model.model.layers.append(more)
    model.config.num_hidden_layers = 2
    frozen.requires_grad_(True)
    optimizer.repartition(partition(model))
    optimizer.add_param_group({"params": [(f"model.layers.1.{n}", p) for n, p in more.named_parameters()], "lr": 1e-2})
    train(model, optimizer, 2)
    assert not torch.equal(frozen, at)
    steps = {3 + 2: [frozen], 3 + 2 + 2: rest, 2: list(more.parameters())}
    for step, members in steps.items():
        assert {float(optimizer.state[p]["step"]) for p in members} == {float(step)}
    assert optimizer.param_groups[1]["blocks"] == optimizer.param_groups[0]["blocks"][1:-2]


def test_what_was_frozen_and_unknown_gets_its_blocks() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    odd = nn.Parameter(torch.ones(2, 2, 2), requires_grad=False)
    model.register_parameter("odd", odd)
    optimizer = AdamMini([*model.named_parameters()], partition=partition(model, scheme="hessian"))
    assert optimizer.param_groups[0]["blocks"][0] == ""
    odd.requires_grad_(True)
    optimizer.repartition(partition(model, scheme="hessian", rules=[("odd", "tensor")]))
    odd.grad = torch.ones_like(odd)
    optimizer.step()
    assert (odd < 1).all()


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_other_models_go_there_and_back(name: str) -> None:
    model, batch = zoo.CASES[name].build()
    adamw = AdamW(model.parameters(), lr=1e-3)
    for _ in range(2):
        adamw.zero_grad()
        model(**batch).loss.backward()
        adamw.step()
    squares, blocks = moments(adamw, model, "exp_avg_sq"), partition(model)
    optimizer = AdamMini.from_adamw(adamw, blocks)
    assert_means(optimizer, squares, model, blocks)
    optimizer.to_adamw().step()


def test_sharded_parameters_are_converted_as_whole_ones_are() -> None:
    figures = launch("native.py", 2, "change_of_mind")["change_of_mind"]
    assert figures["weights"] <= 2e-6
    assert figures["moments"] <= 1e-4  # of the largest
