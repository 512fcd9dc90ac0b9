"""Hooks, and the order in which they run."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch.optim import SGD, Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from conformance.registry import check
from conformance.subject import Case, Regression, same, trained


def made(case: Case) -> Any:
    return case.optimizer([case.randn(2, 3).requires_grad_()])


@check("test_state_dict_pre_hook", "test_state_dict_post_hook", "test_state_dict_pre_post_hook")
def saving(case: Case) -> None:
    """Hooks on saving run before and after it, and what the later one returns is the state dict."""
    optimizer, seen = made(case), []

    def before(given: Optimizer) -> None:
        seen.append(("before", given is optimizer))
        given.state["mark"] = 1

    def after(given: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        seen.append(("after", given is optimizer))
        return {**state_dict, "marked": state_dict["state"].pop("mark", None)}

    handle = optimizer.register_state_dict_post_hook(after)
    assert optimizer.state_dict()["marked"] is None
    optimizer.register_state_dict_pre_hook(before)
    assert optimizer.state_dict()["marked"] == 1
    assert seen == [("after", True), ("before", True), ("after", True)]
    handle.remove()
    assert optimizer.state_dict()["state"] == {"mark": 1}


@check("test_load_state_dict_pre_hook_and_prepend")
def before_loading(case: Case) -> None:
    """Hooks before loading change or replace what is loaded, in their order, and `prepend` puts one first."""
    optimizer = made(case)
    state_dict = optimizer.state_dict()

    def change(_: Optimizer, given: dict[str, Any]) -> None:
        given["param_groups"][0]["lr"] = 0.002

    def replace(_: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
        given = deepcopy(given)
        given["param_groups"][0]["lr"] = 0.003
        return given

    optimizer.register_load_state_dict_pre_hook(change)
    optimizer.load_state_dict(state_dict)
    assert optimizer.param_groups[0]["lr"] == 0.002
    handle = optimizer.register_load_state_dict_pre_hook(replace, prepend=True)
    optimizer.load_state_dict(state_dict)
    assert optimizer.param_groups[0]["lr"] == 0.002
    handle.remove()
    optimizer.register_load_state_dict_pre_hook(replace)
    optimizer.load_state_dict(state_dict)
    assert optimizer.param_groups[0]["lr"] == 0.003


@check("test_load_state_dict_post_hook", "test_load_state_dict_pre_post_hook")
def after_loading(case: Case) -> None:
    """Hooks after loading see what was loaded, dtypes and all, in their order, and `prepend` puts one first."""
    _, optimizer = trained(case)
    seen: list[Any] = []

    def note(given: Optimizer) -> None:
        seen.append((given.param_groups[0]["lr"], *[s["exp_avg_sq"].dtype for s in given.state.values()]))

    def lower(_: Optimizer, given: dict[str, Any]) -> None:
        given["param_groups"][0]["lr"] = 0.003

    optimizer.register_load_state_dict_post_hook(note)
    optimizer.register_load_state_dict_post_hook(lambda _: seen.append("first"), prepend=True)
    optimizer.register_load_state_dict_pre_hook(lower)
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["first", (0.003, torch.float32, torch.float32)]
    hooks = (optimizer._optimizer_load_state_dict_pre_hooks, optimizer._optimizer_load_state_dict_post_hooks)
    assert [len(registered) for registered in hooks] == [1, 2]


@check(only=("default",))
def a_hook_that_raises(case: Case) -> None:
    """A hook that raises while loading leaves the optimizer, and its hooks, as they were."""
    problem, optimizer = trained(case)
    before = problem.values

    def fail(*_: Any) -> None:
        raise RuntimeError("the hook")

    handle = optimizer.register_load_state_dict_pre_hook(fail)
    with pytest.raises(RuntimeError, match="the hook"):
        optimizer.load_state_dict(optimizer.state_dict())
    handle.remove()
    assert not optimizer._optimizer_load_state_dict_pre_hooks
    assert not optimizer._optimizer_load_state_dict_post_hooks
    assert same(problem.values, before)


@check("test_step_pre_hook", "test_step_post_hook")
def around_a_step(case: Case) -> None:
    """Hooks on steps run before and after each, until they are removed; an earlier one may change the arguments."""
    optimizer = made(case)
    seen: list[Any] = []

    def before(given: Optimizer, args: Any, kwargs: Any) -> Any:
        seen.append(("before", given is optimizer, args[1:], dict(kwargs)))
        return args[:1], {"closure": lambda: "replaced"}

    def after(given: Optimizer, args: Any, kwargs: Any) -> None:
        seen.append(("after", given is optimizer))

    handles = [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]
    assert optimizer.step() == "replaced"
    assert seen == [("before", True, (), {}), ("after", True)]
    for handle in handles:
        handle.remove()
    assert optimizer.step() is None
    assert len(seen) == 2


@check("test_step_all_hooks")
def global_hooks(case: Case) -> None:
    """Hooks of all optimizers run outside those of one: global, own, step, own, global; beside another optimizer."""
    problem = Regression(case)
    optimizer, other = case.optimizer(problem.params), SGD(problem.params)
    seen: list[str] = []

    def noting(what: str) -> Any:
        return lambda *_: seen.append(what)

    handles = [
        register_optimizer_step_pre_hook(noting("all before")),
        register_optimizer_step_post_hook(noting("all after")),
        *[one.register_step_pre_hook(noting("own before")) for one in (optimizer, other)],
        *[one.register_step_post_hook(noting("own after")) for one in (optimizer, other)],
    ]
    order = ["all before", "own before", "own after", "all after"]
    try:
        optimizer.step()
        assert seen == order
        other.step()
        optimizer.step()
        assert seen == order * 3
    finally:
        for handle in handles:
            handle.remove()
    optimizer.step()
    assert seen == order * 3
