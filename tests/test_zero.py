"""Flat tensors in an optimizer's groups, as DeepSpeed ZeRO leaves them there, acted out in one process."""

from __future__ import annotations

import copy
import io
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adam_mini_plugins import AdamMini, engines, flat, partition
from adam_mini_plugins.blocks.whole import as_built, whole_shape
from adam_mini_plugins.memory import measure

RULES = [("query.weight", "2 heads"), ("key.weight", "tensor"), ("*.weight", "neuron"), ("*.bias", "element")]
WORLD = SimpleNamespace(
    get_rank=lambda group: 0,
    get_world_size=lambda group: 1,
    get_backend_config=lambda group: "cpu:gloo",
    all_gather=lambda tensors, mine, group: tensors[0].copy_(mine),
)


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process group of this process."""
    monkeypatch.setattr(engines, "distributed", WORLD)
    monkeypatch.setattr(flat, "distributed", WORLD)


def model() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({name: nn.Linear(5, 6) for name in ("query", "key", "other")})


def optimizer_of(module: nn.Module, lr: float = 1e-2) -> AdamMini:
    named = list(module.named_parameters())
    groups = [{"params": [pair for pair in named if pair[1].ndim == n], "weight_decay": n / 10} for n in (2, 1)]
    return AdamMini(groups, lr=lr, partition=partition(module, "hessian", rules=RULES))


def zero_2(optimizer: AdamMini, padding: int = 3) -> list[Tensor]:
    """What DeepSpeed does to an optimizer: one flat tensor a group, and on each parameter where it is in there."""
    flats = []
    for group in optimizer.param_groups:
        whole = torch.cat([*(p.detach().flatten() for p in group["params"]), torch.zeros(padding)])
        offset = 0
        for p in group["params"]:
            p.data = whole[offset : offset + p.numel()].view_as(p)
            address = SimpleNamespace(start=0, numel=p.numel())
            there = SimpleNamespace(start=offset, numel=p.numel())
            p._hp_mapping = SimpleNamespace(lp_fragment_address=address, hp_fragment_address=there)
            p._dp_group = "dp"
            offset += p.numel()
        flats.append(whole.clone().requires_grad_())
        group["params"] = [flats[-1]]
    return flats


def zero_3(optimizer: AdamMini, sub_groups: bool = False, **options: Any) -> SimpleNamespace:
    """The same of ZeRO-3: nothing in a parameter's place, and nothing in the groups but during a step."""
    engine = SimpleNamespace(swap_optimizer=False, grad_position={}, fp32_partitioned_groups_flat=[])
    vars(engine).update(options)
    flats = engine.fp32_partitioned_groups_flat
    for group in optimizer.param_groups:
        for together in [[p] for p in group["params"]] if sub_groups else [group["params"]]:
            offset = 0
            flats.append(torch.cat([p.detach().flatten() for p in together]).requires_grad_())
            for p in together:
                p.ds_id, p.ds_shape, p.ds_process_group = len(engine.grad_position), p.shape, "dp"
                p._z3_optimizer = engine
                engine.grad_position[p.ds_id] = [len(flats) - 1, offset, p.numel()]
                offset += p.numel()
                p.data = torch.empty(0)
        group["params"] = []
    return engine


def gradients(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(p.shape, generator=generator) for p in model().parameters()]


def alone(steps: int) -> list[Tensor]:
    module = model()
    optimizer = optimizer_of(module)
    for step in range(steps):
        for p, grad in zip(module.parameters(), gradients(step)):
            p.grad = grad
        optimizer.step()
    return [p.detach() for p in module.parameters()]


def in_groups(tensors: list[Tensor]) -> list[Tensor]:
    return [torch.cat([t.flatten() for t in tensors if t.ndim == n]) for n in (2, 1)]


def train(optimizer: AdamMini, flats: list[Tensor], steps: range) -> None:
    """Steps of one group at a time, with no other there."""
    groups = optimizer.param_groups
    for step in steps:
        for group, p, grad in zip(groups, flats, in_groups(gradients(step))):
            optimizer.param_groups = [group]
            group["params"] = [p]
            p.grad = torch.cat([grad, torch.zeros(len(p) - len(grad))])
            optimizer.step()
            optimizer.param_groups = groups


def close(flats: list[Tensor], expected: list[Tensor]) -> None:
    for p, wanted in zip(flats, in_groups(expected)):
        torch.testing.assert_close(p.detach()[: len(wanted)], wanted, rtol=0, atol=1e-7)
        assert not p.detach()[len(wanted) :].any()  # padding


@pytest.mark.parametrize("stage", [2, 3])
def test_flat_tensors_step_as_the_parameters_that_they_hold(stage: int) -> None:
    module = model()
    optimizer = optimizer_of(module)
    flats = zero_2(optimizer) if stage == 2 else zero_3(optimizer).fp32_partitioned_groups_flat
    train(optimizer, flats, range(3))
    close(flats, alone(3))
    state = optimizer.state[flats[0]]
    assert state["step"] == 3
    assert state["exp_avg_sq"].shape == (3 * 6,)
    # Equal inside a block: two heads of 3 rows, one block of 6, and 6 of a row.
    assert [len(part.unique()) for part in state["exp_avg_sq"].split(6)] == [2, 1, 6]
    memory = measure(optimizer)
    assert memory.parameters == sum(len(p) for p in flats)
    assert memory.adamw_state_bytes == 2 * (2 * 4) * memory.parameters // 2 + 2 * 4
    assert memory.second_moment_scalars == 18 + 18


def test_flat_tensors_that_take_turns_in_a_group_count_their_own_steps() -> None:
    def in_turn(tensors: list[Tensor]) -> list[Tensor]:
        return sorted(tensors, key=lambda tensor: -tensor.ndim)

    module = model()
    optimizer = optimizer_of(module)
    flats = zero_3(optimizer, sub_groups=True).fp32_partitioned_groups_flat
    for step in range(3):
        for number, (p, grad) in enumerate(zip(flats, in_turn(gradients(step)), strict=True)):
            group = optimizer.param_groups[number // 3]
            p.grad, group["params"] = grad.flatten(), [p]
            optimizer.step()
            group["params"] = []
    for p, expected in zip(flats, in_turn(alone(3)), strict=True):
        torch.testing.assert_close(p.detach(), expected.flatten(), rtol=0, atol=1e-7)
        assert optimizer.state[p]["step"] == 3


def test_state_is_saved_and_loaded_with_the_flat_tensors() -> None:
    modules = [model() for _ in range(3)]
    optimizer, other, third = (optimizer_of(module, lr) for module, lr in zip(modules, (1e-2, 1.0, 1e-2)))
    flats = zero_2(optimizer)
    train(optimizer, flats, range(2))
    buffer = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "flats": [p.detach() for p in flats]}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    again = zero_2(other)
    for p, value in zip(again, saved["flats"]):
        p.data.copy_(value)
    other.load_state_dict(saved["optimizer"])
    train(other, again, range(2, 4))
    close(again, alone(4))

    zero_2(third, padding=5)
    with pytest.raises(ValueError, match=r"exp_avg of the flat tensor of query.weight, .* has shape \(93,\) in the"):
        third.load_state_dict(saved["optimizer"])
    assert not third.state
    saved["optimizer"]["state"][0]["exp_avg_sq"] = saved["optimizer"]["state"][0]["exp_avg_sq"][:-1]
    with pytest.raises(ValueError, match=r"exp_avg_sq of the flat tensor of .* has shape \(17,\) in the state to load"):
        optimizer.load_state_dict(saved["optimizer"])


def test_copies_and_pickles_know_what_they_were_made_with() -> None:
    module = model()
    copied, optimizer = copy.deepcopy((module, optimizer_of(module)))
    assert copied.query.weight is optimizer.param_groups[0]["params"][0]
    flats = zero_2(optimizer)
    train(optimizer, flats, range(2))
    close(flats, alone(2))


def first_step(optimizer: AdamMini) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    before = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    try:
        optimizer.step()
    finally:
        after = [p.detach() for group in optimizer.param_groups for p in group["params"]]
        assert all(torch.equal(p, q) for p, q in zip(before, after, strict=True))
        assert not optimizer.state


def shown(optimizer: AdamMini, engine: SimpleNamespace) -> AdamMini:
    """ZeRO-3, with its flat tensor in the first group."""
    optimizer.param_groups[0]["params"] = [engine.fp32_partitioned_groups_flat[0]]
    return optimizer


def test_an_order_that_the_engine_does_not_follow_is_refused() -> None:
    module = model()
    optimizer = optimizer_of(module)
    zero_2(optimizer)
    mappings = [module[name].weight._hp_mapping for name in ("query", "key")]
    module.query.weight._hp_mapping, module.key.weight._hp_mapping = reversed(mappings)
    with pytest.raises(RuntimeError, match=r"round_robin_gradients=True lays parameters out .*where query.weight lies"):
        first_step(optimizer)


def test_offload_to_nvme_is_refused() -> None:
    module = model()
    optimizer = optimizer_of(module)
    engine = zero_3(optimizer, swap_optimizer=True)
    with pytest.raises(RuntimeError, match=r"DeepSpeed's offload of the optimizer to NVMe .*\"device\": \"cpu\""):
        first_step(shown(optimizer, engine))


def test_parts_of_another_size_are_refused() -> None:
    module = model()
    optimizer = optimizer_of(module)
    engine = zero_3(optimizer)
    for position in engine.grad_position.values():
        position[2] //= 2
    with pytest.raises(RuntimeError, match=r"cut query.weight of shape \(6, 5\) into parts of 15, on 1 .*without MiCS"):
        first_step(shown(optimizer, engine))


def test_a_shape_that_is_not_the_partitions_is_refused() -> None:
    module = model()
    optimizer = optimizer_of(module)
    zero_2(optimizer)
    module.query.weight.data = module.query.weight.data[:3]
    with pytest.raises(RuntimeError, match=r"query.weight has shape \(3, 5\), which its .*leave autotp_size out"):
        first_step(optimizer)


def test_processes_of_other_groups_are_refused() -> None:
    module = model()
    optimizer = optimizer_of(module)
    zero_2(optimizer)
    module.key.weight._dp_group = "experts"
    with pytest.raises(RuntimeError, match="different sets of processes: put expert parameters into parameter groups"):
        first_step(optimizer)


def test_a_flat_tensor_of_other_parameters_is_refused() -> None:
    module, other = model(), model()
    optimizer = optimizer_of(module)
    engine, another = zero_3(optimizer), zero_3(optimizer_of(other))
    with pytest.raises(RuntimeError, match=r"made with 3 parameters \(query.weight, .*\(90,\), which is none of them"):
        first_step(shown(optimizer, another))
    # Made of a copy, whose parameters the engine has never seen.
    copied = optimizer_of(model())
    copied.param_groups[0]["params"] = [engine.fp32_partitioned_groups_flat[0]]
    with pytest.raises(RuntimeError, match="holds 1 tensors for 3 names: an engine has merged or cut them"):
        first_step(copied)


def test_a_model_that_zero_3_has_cut_is_partitioned_by_its_whole_shapes() -> None:
    module = model()
    expected = partition(module, "hessian", rules=RULES)
    zero_3(optimizer_of(module))
    found = partition(module, "hessian", rules=RULES)
    assert [str(blocks.layout) for blocks in found.values()] == [str(blocks.layout) for blocks in expected.values()]
    assert [blocks.shape for blocks in found.values()] == [blocks.shape for blocks in expected.values()]
    assert module.query.weight.shape == (0,)
    with as_built(module):
        assert module.query.weight.shape == whole_shape(module.query.weight) == (6, 5)
        assert module.query.weight.untyped_storage().nbytes() == 4
