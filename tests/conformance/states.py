"""State dicts, before and after loading, and copies."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from alike import alike
from torch import nn

from conformance.registry import check
from conformance.subject import INFO, Case, Partitioned, Regression, same, trained


def twin(case: Case, problem: Regression, named: bool = False, **options: Any) -> tuple[Regression, Partitioned]:
    """A copy of a problem, with an optimizer that has made no step."""
    other = Regression(case)
    for p, value in zip(other.params, problem.values, strict=True):
        p.data.copy_(value)
    params = list(zip(("name0", "name1"), other.params)) if named else other.params
    return other, case.optimizer(params, **options)


@check("test_state_dict_deterministic")
def deterministic(case: Case) -> None:
    """A state loaded into a twin trains on bit for bit, with names or without, and saves alike."""
    for names in ((False, False), (False, True), (True, False), (True, True)):
        problem, _ = trained(case, 0)
        problem, optimizer = twin(case, problem, names[0])
        problem.train(optimizer, 10)
        other, second = twin(case, problem, names[1])
        second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for _ in range(10):
            assert same(problem.train(optimizer, 1), other.train(second, 1))
        assert alike(optimizer.state_dict(), second.state_dict(), but="param_names")
        second.param_groups.extend(second.param_groups)  # held twice, told alike
        assert alike(optimizer.state_dict()["param_groups"][-1], second.state_dict()["param_groups"][-1], "param_names")


@check("test_can_load_older_state_dict")
def older(case: Case) -> None:
    """A state saved before an option was there loads, takes the option's default, and trains on."""
    problem, optimizer = trained(case)
    old = copy.deepcopy(optimizer.state_dict())
    for group in old["param_groups"]:
        for flag in INFO.not_og_supported_flags:
            group.pop(flag, None)
    optimizer.load_state_dict(old)
    for flag in INFO.not_og_supported_flags:
        assert optimizer.param_groups[0][flag] == optimizer.defaults[flag]
    problem.train(optimizer, 1)


@check("test_can_load_from_to_named_state_dict")
def names_on_loading(case: Case) -> None:
    """Names are kept where the state or the optimizer has them; those of the state count first, as torch's do."""
    problem, optimizer = trained(case, 1)
    _, named = twin(case, problem, named=True)
    named.load_state_dict(optimizer.state_dict())
    assert named.param_groups[0]["param_names"] == ["p0", "p1"]
    unnamed = optimizer.state_dict()
    for group in unnamed["param_groups"]:
        del group["param_names"]
    _, named = twin(case, problem, named=True)
    named.load_state_dict(unnamed)
    assert named.param_groups[0]["param_names"] == ["name0", "name1"]
    named.step()


@check("test_save_load_equality_with_weights_only")
def saved_plainly(case: Case) -> None:
    """What is saved is read back alike, with `weights_only=True` too."""
    _, optimizer = trained(case)
    state_dict, file = optimizer.state_dict(), io.BytesIO()
    torch.save(state_dict, file)
    for weights_only in (True, False):
        file.seek(0)
        assert alike(torch.load(file, weights_only=weights_only), state_dict)


@check("test_load_nontensor_step")
def steps_as_numbers(case: Case) -> None:
    """A state that counts steps in plain numbers loads, and trains on as one that counts in tensors."""
    problem, optimizer = trained(case)
    other, second = twin(case, problem)
    state_dict = copy.deepcopy(optimizer.state_dict())
    for state in state_dict["state"].values():
        state["step"] = state["step"].item()
    second.load_state_dict(state_dict)
    assert same(problem.train(optimizer), other.train(second))
    assert alike(optimizer.state_dict(), second.state_dict())


@check()
def loading_leaves_the_source(case: Case) -> None:
    """Loading changes nothing in what is loaded, and neither do the steps after it."""
    problem, optimizer = trained(case)
    state_dict = copy.deepcopy(optimizer.state_dict())
    kept = copy.deepcopy(state_dict)
    _, second = twin(case, problem)
    second.load_state_dict(state_dict)
    assert alike(state_dict, kept)
    second.param_groups[0]["lr"] = 7.0
    assert alike(state_dict, kept)


@check()
def saving_changes_nothing(case: Case) -> None:
    """Saving changes nothing, and numbers parameters in their order."""
    problem, optimizer = trained(case)
    other, second = twin(case, problem)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(3):
        state_dict = optimizer.state_dict()
        assert state_dict["param_groups"][0]["params"] == list(state_dict["state"]) == [0, 1]
        assert same(problem.train(optimizer, 1), other.train(second, 1))


@check()
def cast_on_loading(case: Case) -> None:
    """A state loaded for parameters of another dtype takes the dtypes that a new state would have, its values kept."""
    _, optimizer = trained(case)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        other = Regression(case, dtype=dtype)
        second = case.optimizer(other.params)
        second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        loaded = [{k: v.clone() for k, v in second.state[p].items()} for p in other.params]
        fresh = case.optimizer(other.params)
        other.train(fresh, 1)
        for p, source, state in zip(other.params, optimizer.state.values(), loaded, strict=True):
            assert {k: v.dtype for k, v in state.items()} == {k: v.dtype for k, v in fresh.state[p].items()}
            assert torch.equal(state["exp_avg_sq"].float(), source["exp_avg_sq"])
            assert torch.equal(state["exp_avg"], source["exp_avg"].to(state["exp_avg"].dtype))
            assert state["step"] == source["step"]
        other.train(second, 1)


@check("test_state_dict_with_cuda_params", "test_cpu_load_state_dict", devices=("cuda",))
def across_devices(case: Case) -> None:
    """A state goes from CPU to GPU and back, and parameters go on alike; steps are counted where they belong."""
    on_cpu = Case("cpu", {k: v for k, v in case.options.items() if k not in ("fused", "capturable")}, case.name)
    problem, optimizer = trained(on_cpu)
    other = Regression(case)
    for p, value in zip(other.params, problem.values, strict=True):
        p.data.copy_(value)
    other.input = problem.input.to(case.device)
    second = case.optimizer(other.params)
    state_dict = copy.deepcopy(optimizer.state_dict())
    second.load_state_dict(state_dict)
    assert alike(state_dict, optimizer.state_dict())
    for _ in range(5):
        for left, right in zip(problem.train(optimizer, 1), other.train(second, 1), strict=True):
            torch.testing.assert_close(left, right.cpu())
    if not case.options.get("capturable"):
        assert {state["step"].device.type for state in second.state.values()} == {"cpu"}


@check("test_deepcopy_copies_all_public_attrs")
def copies(case: Case) -> None:
    """A deep copy has all public attributes, alike and of its own, and trains on alike."""
    problem, optimizer = trained(case)
    pair = copy.deepcopy((problem.params, optimizer))
    public = {name for name in vars(optimizer) if not name.startswith("_")}
    assert public == {name for name in vars(pair[1]) if not name.startswith("_")}
    assert alike(optimizer.state_dict(), pair[1].state_dict())
    other = Regression(case)
    other.weight, other.bias = pair[0]
    assert same(problem.train(optimizer), other.train(pair[1]))


@check()
def pickled(case: Case) -> None:
    """A pickled optimizer comes back with its groups and state, and trains on alike."""
    problem, optimizer = trained(case)
    params, second = pickle.loads(pickle.dumps((problem.params, optimizer)))
    assert alike(optimizer.state_dict(), second.state_dict())
    other = Regression(case)
    other.weight, other.bias = params
    assert same(problem.train(optimizer), other.train(second))


@check(only=("default",))
def other_shapes(case: Case) -> None:
    """A state with other groups, or with other parameters in them, is refused, and nothing is loaded."""
    problem, optimizer = trained(case)
    before = copy.deepcopy(optimizer.state_dict())
    extra = nn.Parameter(case.randn(2))
    for groups in ([{"params": [p]} for p in problem.params], [*problem.params, extra], problem.params[:1]):
        state_dict = case.optimizer(groups).state_dict()
        with pytest.raises(ValueError, match="the state to load"):
            optimizer.load_state_dict(state_dict)
        assert alike(optimizer.state_dict(), before)
