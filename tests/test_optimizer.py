"""AdamMini keeps torch's conventions, and says what is wrong before anything has changed."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
import zoo
from torch import nn

from adam_mini_plugins import AdamMini, partition


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3))


def built(model: nn.Module | None = None, **options: Any) -> tuple[nn.Module, AdamMini]:
    model = network() if model is None else model
    return model, AdamMini.for_model(model, scheme="hessian", **options)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3, seed: int = 7) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(8, 4, generator=generator)
        model(x.to(next(model.parameters()).dtype)).square().mean().backward()
        optimizer.step()


def snapshot(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


# --- what a user of AdamW expects -------------------------------------------------------------


def test_the_arguments_and_defaults_are_adamws() -> None:
    theirs = inspect.signature(torch.optim.AdamW).parameters
    ours = inspect.signature(AdamMini).parameters
    for name in ("params", "lr", "betas", "eps", "weight_decay", "maximize"):
        assert ours[name].default == theirs[name].default
        assert ours[name].kind == theirs[name].kind
    assert list(ours)[:5] == list(theirs)[:5]


@pytest.mark.parametrize("form", ["named", "parameters", "groups", "named groups"])
def test_every_form_of_parameters_gives_the_same_training(form: str) -> None:
    model, optimizer = built()
    train(model, optimizer)
    other = network()
    named = list(other.named_parameters())
    plain = [p for _, p in named]
    given = {
        "named": other.named_parameters(),
        "parameters": other.parameters(),
        "groups": [{"params": plain[:2]}, {"params": plain[2:]}],
        "named groups": [{"params": named[:2]}, {"params": iter(named[2:])}],
    }[form]
    second = AdamMini(given, partition=partition(other, scheme="hessian"))
    train(other, second)
    assert same(snapshot(model), snapshot(other))
    assert [n for group in second.param_groups for n in group["param_names"]] == [n for n, _ in named]


def test_a_wrappers_names_are_found_by_the_tensors_themselves() -> None:
    model = network()
    wrapper = nn.ModuleDict({"inner": model})
    optimizer = AdamMini(wrapper.named_parameters(), partition=partition(model, scheme="hessian"))
    assert optimizer.param_groups[0]["param_names"][0] == "inner.0.weight"
    assert optimizer.param_groups[0]["blocks"][0] == "0: 6"


def test_a_partition_of_a_twin_is_found_by_name() -> None:
    with torch.device("meta"):
        twin = network()
    optimizer = AdamMini(network().named_parameters(), partition=partition(twin, scheme="hessian"))
    assert optimizer.param_groups[0]["blocks"] == ["0: 6", "0: 6", "0: (6)", "0: 6", "0: 3", "0: 3"]


def test_each_group_has_its_own_options() -> None:
    model = network()
    groups = [
        {"params": [model[0].weight], "lr": 0.0, "weight_decay": 0.0},
        {"params": [model[2].weight], "betas": (0.5, 0.6), "state_dtype": torch.float64},
    ]
    optimizer = AdamMini(groups, lr=0.1, partition=partition(model, scheme="hessian"))
    before = snapshot(model)
    train(model, optimizer)
    assert torch.equal(model[0].weight, before[0])
    assert not torch.equal(model[2].weight, before[4])
    assert optimizer.param_groups[1]["betas"] == (0.5, 0.6)
    assert optimizer.state[model[2].weight]["exp_avg"].dtype == torch.float64


def test_a_closure_runs_with_gradients_and_its_loss_is_returned() -> None:
    model, optimizer = built()

    def closure() -> torch.Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = model(torch.ones(1, 4)).sum()
        loss.backward()
        return loss

    before = snapshot(model)
    assert isinstance(optimizer.step(closure), torch.Tensor)
    assert not same(before, snapshot(model))
    assert optimizer.step() is None


def test_a_tensor_learning_rate_is_a_number() -> None:
    model, optimizer = built(lr=0.01)
    other, second = built(lr=torch.tensor(0.01, dtype=torch.float64))
    train(model, optimizer)
    train(other, second)
    assert same(snapshot(model), snapshot(other))
    assert isinstance(second.param_groups[0]["lr"], torch.Tensor)


def test_parameters_without_a_gradient_are_left_alone() -> None:
    model, optimizer = built()
    model[0].weight.requires_grad_(False)
    before = snapshot(model)
    train(model, optimizer)
    assert torch.equal(model[0].weight, before[0])
    assert model[0].weight not in optimizer.state
    assert not torch.equal(model[2].weight, before[4])


def test_empty_parameters_and_zero_gradients() -> None:
    model = nn.Linear(0, 3)
    optimizer = AdamMini.for_model(model)
    model.weight.grad, model.bias.grad = torch.zeros_like(model.weight), torch.zeros_like(model.bias)
    before = model.bias.detach().clone()
    optimizer.step()
    torch.testing.assert_close(model.bias.detach(), before * (1 - 1e-3 * 1e-2))
    assert optimizer.state[model.weight]["step"] == 1


def test_nan_gradients_propagate_inside_their_block_and_no_further() -> None:
    model, optimizer = built()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model[0].weight.grad[2, 1] = float("nan")
    optimizer.step()
    assert model[0].weight.isnan().any(dim=1).tolist() == [False, False, True, False, False, False]
    assert not model[2].weight.isnan().any()


def test_a_thawed_layer_joins_by_add_param_group() -> None:
    model = network()
    model[0].requires_grad_(False)
    optimizer = AdamMini(model[2].parameters(), partition=partition(model, scheme="hessian"))
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": model[0].named_parameters(), "lr": 0.5})
    before = snapshot(model)
    train(model, optimizer)
    assert optimizer.param_groups[1]["lr"] == 0.5
    assert not torch.equal(model[0].weight, before[0])


def test_a_failed_add_param_group_leaves_the_optimizer_as_it_was() -> None:
    model, optimizer = built()
    for group, message in (
        ({"params": nn.Linear(2, 2).parameters()}, "the partition does not know"),
        ({"params": [], "lr": -1.0}, "lr must be 0 or more"),
        ({"params": model.parameters()}, "appear in more than one parameter group"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1


def test_learning_rate_schedulers_drive_it() -> None:
    model, optimizer = built(lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)
    rates = []
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        train(model, optimizer, steps=1)
        scheduler.step()
    assert rates == pytest.approx([1.0, 0.853553, 0.5, 0.146447], abs=1e-6)


def test_a_step_after_an_overflow_is_skipped_by_the_grad_scaler() -> None:
    model, optimizer = built()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = snapshot(model)
    for p in model.parameters():
        p.grad = torch.full_like(p, float("inf"))
    scaler.scale(torch.zeros(()))
    scaler.step(optimizer)
    scaler.update()
    assert same(before, snapshot(model))
    assert not optimizer.state
    assert scaler.get_scale() == 2.0

    reference, plain = built()
    for p, q in zip(model.parameters(), reference.parameters()):
        q.grad = torch.ones_like(q)
        p.grad = 2.0 * torch.ones_like(p)
    scaler.step(optimizer)
    plain.step()
    assert same(snapshot(reference), snapshot(model))


def test_zero_grad() -> None:
    model, optimizer = built()
    train(model, optimizer)
    optimizer.zero_grad(set_to_none=False)
    assert all((p.grad == 0).all() for p in model.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_mixed_dtypes_in_one_group() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3).bfloat16(), nn.Linear(3, 2).double())
    optimizer = AdamMini.for_model(model, scheme="hessian")
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    for module, dtype in zip(model, (torch.float32, torch.bfloat16, torch.float64)):
        state = optimizer.state[module.weight]
        assert (module.weight.dtype, state["exp_avg"].dtype) == (dtype, dtype)
        assert state["exp_avg_sq"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_hooks_run_before_and_after_a_step() -> None:
    model, optimizer = built()
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    train(model, optimizer, steps=2)
    assert seen == ["pre", "post"] * 2


@pytest.mark.parametrize("kind", ["pre", "post"])
@pytest.mark.parametrize("of_all", [False, True], ids=["of one optimizer", "of all"])
def test_each_hook_runs_by_itself_and_is_gone_when_removed(kind: str, of_all: bool) -> None:
    model, optimizer = built()
    seen: list[Any] = []
    register = (
        getattr(import_module("torch.optim.optimizer"), f"register_optimizer_step_{kind}_hook")
        if of_all
        else getattr(optimizer, f"register_step_{kind}_hook")
    )
    handle = register(lambda optimizer, *_: seen.append(optimizer))
    train(model, optimizer, steps=1)
    handle.remove()
    train(model, optimizer, steps=1)
    assert seen == [optimizer]


def test_a_label_is_made_for_a_profile_and_not_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    labels: list[str] = []

    class Recorded(torch.autograd.profiler.record_function):
        def __init__(self, name: str, args: str | None = None) -> None:
            labels.append(name)
            super().__init__(name, args)

    monkeypatch.setattr(torch.autograd.profiler, "record_function", Recorded)
    model, optimizer = built()
    train(model, optimizer, steps=1)
    assert not [label for label in labels if "step" in label]
    labels.clear()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        optimizer.step()
    assert labels == ["Optimizer.step#AdamMini.step"]
    assert labels[0] in {event.name for event in profiler.events()}


def test_the_state_is_what_others_rely_on() -> None:
    model, optimizer = built()
    train(model, optimizer)
    for name, p in model.named_parameters():
        state = optimizer.state[p]
        assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
        assert (state["step"].item(), state["exp_avg"].shape) == (3.0, p.shape)
        assert state["exp_avg_sq"].shape == ((len(p), 1) if p.dim() == 2 else p.shape), name


def test_the_second_moment_is_equal_inside_a_block() -> None:
    model, batch = zoo.CASES["gpt_neox"].build()
    optimizer = AdamMini.for_model(model)
    for _ in range(2):
        model(**batch).loss.backward()
        optimizer.step()
    for name, p in model.named_parameters():
        index = optimizer.partition.block_index(name)
        second_moment = optimizer.state[p]["exp_avg_sq"]
        first_of_block = {int(b): v for b, v in zip(index.flatten().flip(0), second_moment.flatten().flip(0))}
        assert second_moment.flatten().tolist() == [first_of_block[b] for b in index.flatten().tolist()]
        assert len(second_moment.unique()) > 1 or index.max() == 0


# --- copies and checkpoints ---------------------------------------------------------------------


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("state_dtype", [None, "float32", "bfloat16"])
def test_training_resumes_bit_for_bit(dtype: torch.dtype, state_dtype: str | None) -> None:
    model, optimizer = built(network().to(dtype), state_dtype=state_dtype)
    train(model, optimizer)
    weights, state = copy.deepcopy(model.state_dict()), through_a_file(optimizer.state_dict())
    train(model, optimizer, seed=8)

    other = network().to(dtype)
    other.load_state_dict(weights)
    _, second = built(other, lr=123.0, state_dtype=state_dtype)
    second.load_state_dict(state)
    train(other, second, seed=8)
    assert same(snapshot(model), snapshot(other))
    assert second.param_groups[0]["lr"] == 1e-3
    for p, q in zip(model.parameters(), other.parameters()):
        for key, value in optimizer.state[p].items():
            assert value.dtype == second.state[q][key].dtype
            assert torch.equal(value, second.state[q][key])


def test_a_state_is_plain_values_and_tensors() -> None:
    model, optimizer = built(state_dtype=torch.bfloat16)
    train(model, optimizer)
    state = optimizer.state_dict()
    plain = (int, float, bool, str, type(None), torch.Tensor)
    for group in state["param_groups"]:
        for value in group.values():
            assert isinstance(value, plain) or all(isinstance(v, plain) for v in value)
    assert state["param_groups"][0]["state_dtype"] == "bfloat16"


def pickled(pair: Any) -> Any:
    return pickle.loads(pickle.dumps(pair))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_a_copy_trains_on_alike_and_apart(duplicate: Callable[[Any], Any]) -> None:
    model, optimizer = built()
    train(model, optimizer)
    other, second = duplicate((model, optimizer))
    train(model, optimizer, seed=8)
    assert not same(snapshot(model), snapshot(other))
    train(other, second, seed=8)
    assert same(snapshot(model), snapshot(other))
    other.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="the partition does not know"):
        second.add_param_group({"params": other.extra.parameters()})


def test_a_users_hooks_on_loading_are_kept() -> None:
    model, optimizer = built(network().bfloat16())
    train(model, optimizer)
    _, second = built(network().bfloat16())
    seen = []

    def rename(_: AdamMini, state: dict[str, Any]) -> dict[str, Any]:
        return {"state": state["moments"], "param_groups": state["param_groups"]}

    second.register_load_state_dict_pre_hook(rename)
    second.register_load_state_dict_post_hook(
        lambda opt: seen.append(opt.state[opt.param_groups[0]["params"][0]]["exp_avg_sq"].dtype)
    )
    state = optimizer.state_dict()
    second.load_state_dict({"moments": state["state"], "param_groups": state["param_groups"]})
    assert seen == [torch.float32]
    second.load_state_dict({"moments": state["state"], "param_groups": state["param_groups"]})
    assert len(seen) == 2


def refused(optimizer: AdamMini, state: dict[str, Any], message: str) -> None:
    """The state is refused with this message, and the optimizer has not changed."""
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    after = optimizer.state_dict()
    assert before["param_groups"] == after["param_groups"]
    for key, values in before["state"].items():
        assert all(torch.equal(value, after["state"][key][name]) for name, value in values.items())


def test_an_adamw_checkpoint_is_refused_by_name() -> None:
    model, optimizer = built()
    train(model, optimizer)
    adamw = torch.optim.AdamW(network().parameters())
    other = network()
    adamw = torch.optim.AdamW(other.parameters())
    train(other, adamw)
    refused(optimizer, adamw.state_dict(), "not AdamMini's but Adam's or AdamW's: it has a second moment for each")
    sgd = torch.optim.SGD(other.parameters(), momentum=0.9)
    train(other, sgd)
    refused(optimizer, sgd.state_dict(), r"not AdamMini's but another optimizer's: \['momentum_buffer'\]")


def test_a_state_that_does_not_fit_names_the_tensor_and_both_shapes() -> None:
    model, optimizer = built()
    train(model, optimizer)
    state = optimizer.state_dict()
    state["state"][4] = {**state["state"][4], "exp_avg": torch.zeros(3, 7)}
    refused(optimizer, state, r"exp_avg of 2\.weight has shape \(3, 7\) in the state to load, but \(3, 6\)")
    state["state"][4] = {"step": torch.tensor(1.0), "exp_avg": torch.zeros(3, 6)}
    refused(optimizer, state, r"no 'exp_avg_sq' for 2\.weight; it has \['exp_avg', 'step'\]")


def test_a_state_of_other_blocks_or_groups_is_refused() -> None:
    model, optimizer = built()
    train(model, optimizer)
    whole = AdamMini.for_model(network(), scheme="tensor")
    refused(optimizer, whole.state_dict(), r"0\.weight has blocks '0: 6', but '0: \(6\)' in the state to load")
    smaller = AdamMini.for_model(nn.Sequential(nn.Linear(4, 6)), scheme="hessian")
    refused(optimizer, smaller.state_dict(), "group 0 of the state to load has 2 parameters, this optimizer's has 6")
    state = optimizer.state_dict()
    state["param_groups"] = state["param_groups"] * 2
    refused(optimizer, state, "2 parameter groups, this optimizer 1")


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be 0 or more, got -1.0"),
        ({"lr": float("nan")}, "lr must be 0 or more, got nan"),
        ({"lr": torch.ones(2)}, r"lr as a tensor must have one element, got shape \(2,\)"),
        ({"betas": (1.0, 0.9)}, r"betas\[0\] must be at least 0 and less than 1, got 1.0"),
        ({"betas": (0.9, -0.1)}, r"betas\[1\] must be at least 0 and less than 1, got -0.1"),
        ({"betas": (0.9, float("nan"))}, r"betas\[1\] must be .* got nan"),
        ({"betas": (0.9,)}, r"betas must be two numbers, got \(0.9,\)"),
        ({"eps": -1e-8}, "eps must be 0 or more, got -1e-08"),
        ({"weight_decay": -0.1}, "weight_decay must be 0 or more, got -0.1"),
        ({"state_dtype": "int8"}, "state_dtype must be a floating-point dtype .* got 'int8'"),
        ({"state_dtype": "half_size"}, "state_dtype must be a floating-point dtype .* got 'half_size'"),
    ],
)
def test_options_out_of_range_name_themselves_and_their_value(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        built(**options)
    model = network()
    with pytest.raises(ValueError, match=message):
        AdamMini([{"params": model.parameters(), **options}], partition=partition(model))


def test_without_a_partition_it_says_how_to_get_one() -> None:
    with pytest.raises(ValueError, match=r"pass partition=adam_mini_plugins\.partition\(model\), or .*for_model"):
        AdamMini(network().parameters())
    with pytest.raises(TypeError, match="partition must be a Partition, got dict"):
        AdamMini(network().parameters(), partition={})


def test_no_parameters() -> None:
    with pytest.raises(ValueError, match="empty parameter list"):
        AdamMini([], partition=partition(network()))
    frozen = network().requires_grad_(False)
    with pytest.raises(ValueError, match="Sequential has no parameter to train: all 6 are frozen"):
        AdamMini.for_model(frozen)


@pytest.mark.parametrize(("given", "error"), [(torch.zeros(2), "iterable of Tensors"), ([1.0], "got float")])
def test_parameters_of_the_wrong_type(given: Any, error: str) -> None:
    with pytest.raises(TypeError, match=error):
        AdamMini(given, partition=partition(network()))


def test_a_set_has_no_order() -> None:
    model = network()
    with pytest.raises(TypeError, match="got a set"):
        AdamMini([{"params": set(model.parameters())}], partition=partition(model))


def test_a_partition_of_another_model_is_refused() -> None:
    blocks = partition(network())
    with pytest.raises(ValueError, match=r"does not know a tensor of shape \(2, 2\); was it made from another model"):
        AdamMini(nn.Linear(2, 2).parameters(), partition=blocks)
    with pytest.raises(ValueError, match="does not know 'weight'; was it made from another model"):
        AdamMini(nn.Linear(2, 2).named_parameters(), partition=blocks)
    with pytest.raises(ValueError, match=r"'0\.weight' has shape \(5, 4\), but \(6, 4\) in the partition"):
        AdamMini(nn.Sequential(nn.Linear(4, 5)).named_parameters(), partition=blocks)


def test_a_frozen_tensor_without_blocks_is_no_trouble_until_it_is_trained() -> None:
    model = network()
    model.odd = nn.Parameter(torch.zeros(2, 3, 4, 5), requires_grad=False)
    optimizer = AdamMini(model.named_parameters(), partition=partition(model, scheme="hessian"))
    train(model, optimizer)
    model.odd.grad = torch.ones_like(model.odd)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=r"odd of shape \(2, 3, 4, 5\) has a gradient but no blocks: it was frozen"):
        optimizer.step()
    assert same(before, snapshot(model))
    model.odd.requires_grad_(True)
    with pytest.raises(ValueError, match="does not know 'odd': none of the rules fits"):
        AdamMini(model.named_parameters(), partition=optimizer.partition)


def test_complex_parameters_are_refused() -> None:
    model = nn.Linear(2, 2, dtype=torch.complex64)
    with pytest.raises(TypeError, match=r"does not support complex parameters: 'weight' is torch\.complex64"):
        AdamMini.for_model(model)


def test_a_sparse_gradient_is_refused_before_anything_has_changed() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Embedding(5, 3, sparse=True))
    optimizer = AdamMini.for_model(model)
    model[0](torch.ones(1, 4)).sum().backward()
    model[1](torch.tensor([1])).sum().backward()
    before = snapshot(model)
    with pytest.raises(
        RuntimeError, match=r"sparse gradients, got one for 1\.weight: build the layer with sparse=False"
    ):
        optimizer.step()
    assert same(before, snapshot(model))
    assert not optimizer.state


def test_an_engine_that_has_flattened_a_parameter_is_noticed() -> None:
    _, optimizer = built()
    flat = nn.Parameter(torch.zeros(20))
    flat.grad = torch.ones(20)
    optimizer.param_groups[0]["params"][0] = flat
    with pytest.raises(
        RuntimeError, match=r"0\.weight has shape \(20,\), which its blocks '0: 6' don't fit.*use FSDP2"
    ):
        optimizer.step()


def test_an_engine_that_has_merged_parameters_is_noticed() -> None:
    _, optimizer = built()
    flat = nn.Parameter(torch.zeros(6, 4))
    flat.grad = torch.ones(6, 4)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(RuntimeError, match="holds 1 tensors for 6 names: an engine has merged or cut them"):
        optimizer.step()


@pytest.mark.parametrize("mark", ["_fsdp_flattened", "_is_flat_param"])
def test_a_parameter_that_an_engine_has_marked_as_flattened_is_refused(mark: str) -> None:
    model, optimizer = built()
    setattr(model[0].bias, mark, True)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=r"0\.bias has been flattened and cut by .*use FSDP2 .*fsdp_version: 2"):
        train(model, optimizer)
    assert same(before, snapshot(model))
    with pytest.raises(RuntimeError, match=r"0\.bias has been flattened and cut by"):
        built(model)
