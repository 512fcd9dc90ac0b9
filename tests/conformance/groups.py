"""Parameter groups: forms, defaults, names, errors."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing._internal.common_optimizers import OptimizerErrorEnum

from conformance.registry import check, not_applicable
from conformance.steps import went_the_right_way
from conformance.subject import INFO, PARAMETERS, Case, Regression, same, trained


@check("test_optim_infos_do_not_specify_global_cliquey_kwargs", only=("default",))
def settings_leave_implementations_open(case: Case) -> None:
    """No setting that is tested picks an implementation: the tests do."""
    chosen = [
        set(given.kwargs) & {"foreach", "fused", "differentiable"} for given in INFO.optim_inputs_func(case.device)
    ]
    assert not any(chosen)


@check("test_param_groups_weight_decay")
def weight_decay_of_groups(case: Case) -> None:
    """Groups with decay of their own train, and each has its own."""
    problem = Regression(case)
    own = {**case.options, "weight_decay": 0.0}
    optimizer = INFO.optim_cls([{"params": [problem.weight], **case.options}, {"params": [problem.bias], **own}])
    went_the_right_way(case, problem, optimizer, [])
    assert optimizer.param_groups[1]["weight_decay"] == 0.0


@check("test_param_groups_lr")
def learning_rate_of_groups(case: Case) -> None:
    """A group's own learning rate counts before the default; a rate of almost nothing moves almost nothing."""
    problem, still = Regression(case), case.randn(2).requires_grad_()
    before = still.detach().clone()
    still.grad = torch.ones_like(still)
    options = {"lr": 1e-3, **case.options}
    optimizer = INFO.optim_cls([{"params": problem.params, **options}, {"params": [still]}], lr=1e-28)
    went_the_right_way(case, problem, optimizer, [])
    torch.testing.assert_close(still.detach(), before)


@check("test_param_group_with_lrscheduler_goes_right_direction")
def groups_with_schedulers(case: Case) -> None:
    """Groups with learning rates of their own train under schedulers."""
    for constructors in INFO.scheduler_inputs:
        problem = Regression(case)
        optimizer = case.optimizer([{"params": [problem.weight]}, {"params": [problem.bias], "lr": 0.01}])
        went_the_right_way(case, problem, optimizer, [make(optimizer) for make in constructors])


@check()
def groups_are_optimizers(case: Case) -> None:
    """Groups train as so many optimizers would."""
    together, apart = Regression(case), Regression(case)
    options = {"lr": 0.02, "weight_decay": 0.3}
    joint = case.optimizer([{"params": [together.weight]}, {"params": [together.bias], **options}])
    single = [case.optimizer([apart.weight]), case.optimizer([apart.bias], **options)]
    for _ in range(3):
        together.train(joint, 1)
        apart.loss()
        for optimizer in single:
            optimizer.step()
    assert same(together.values, apart.values)


@check()
def defaults_of_groups(case: Case) -> None:
    """Each group has every option, from itself or the defaults, and so has a group that is added later."""
    _, optimizer = trained(case)
    late = nn.Parameter(torch.zeros(2, 10, device=case.device))
    blocks = INFO.optim_cls([("late", late)]).partition
    known = optimizer.partition
    optimizer.partition = blocks
    optimizer.add_param_group({"params": iter([late]), "lr": 0.5})
    optimizer.partition = known
    first, second = optimizer.param_groups
    assert set(first) == set(second) >= {*optimizer.defaults, "params", "param_names", "blocks"}
    assert (second["lr"], first["lr"]) == (0.5, optimizer.defaults["lr"])
    assert all(second[option] == first[option] for option in optimizer.defaults if option != "lr")
    assert second["params"] == [late]
    assert optimizer.defaults.keys() <= set(PARAMETERS)


@check(only=("default",))
def order_and_names(case: Case) -> None:
    """Parameters stay in the order given, in groups and out of them, by whatever they are given, with their names."""
    values = {f"layer.{n}": nn.Parameter(case.randn(2)) for n in "cab"}
    forms: list[Any] = [
        list(values.items()),
        iter(values.items()),
        tuple(values.items()),
        values.items(),
        [{"params": iter(values.items())}],
        [{"params": item} for item in [[pair] for pair in values.items()]],
    ]
    for form in forms:
        optimizer = case.optimizer(form)
        assert [n for group in optimizer.param_groups for n in group["param_names"]] == list(values)
        held = [p for group in optimizer.param_groups for p in group["params"]]
        assert all(p is q for p, q in zip(held, values.values(), strict=True))
    plain = case.optimizer(p for p in values.values())
    assert all(p is q for p, q in zip(plain.param_groups[0]["params"], values.values(), strict=True))
    one = case.optimizer([{"params": values["layer.a"]}])
    assert one.param_groups[0]["params"][0] is values["layer.a"]


# What torch refuses and AdamMini takes: it knows all names from the partition, and keeps betas as numbers.
TAKEN = (
    "all optimizer params should be with/without names",
    "all optimizer param groups should be with/without names.",
    "betas must be either both floats or both Tensors",
)


@check("test_errors", only=("default",))
def errors(case: Case) -> None:
    """What torch refuses to make an optimizer of is refused with the same type of error, and warned of alike."""
    seen = 0
    for given in INFO.optim_error_inputs_func(case.device, torch.float32):
        bad = given.optimizer_error_input
        if bad.desc in TAKEN or not set(bad.kwargs) <= set(PARAMETERS):
            continue
        assert given.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR
        params = [nn.Parameter(case.randn(1, 1))] if bad.params is None else bad.params
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(given.error_type) as caught:
                INFO.optim_cls(params, **bad.kwargs)
        assert len(str(caught.value)) > 20
        seen += 1
    assert seen >= 6 or case.device != "cpu"


@check(only=("default",))
def errors_of_forms(case: Case) -> None:
    """A set, a mapping, numbers, an empty list, a tensor with a history and a group of no mapping are errors."""
    leaf = nn.Parameter(case.randn(2))
    for params, kind in [
        ({leaf}, TypeError),
        ([{"params": {leaf}}], TypeError),
        ({"layer": leaf}, TypeError),
        ([1.0], TypeError),
        (1.0, TypeError),
        ([], ValueError),
        ([leaf * 2], ValueError),
    ]:
        with pytest.raises(kind, match=r".{20,}"):
            case.optimizer(params)
    with pytest.raises(TypeError, match="must be a dict"):
        case.optimizer([leaf]).add_param_group([leaf])


@check(only=("default",))
def names_may_be_mixed(case: Case) -> None:
    """Parameters with and without names may be mixed."""
    first, second = nn.Parameter(case.randn(2)), nn.Parameter(case.randn(2))
    assert case.optimizer([("first", first), second]).param_groups[0]["param_names"] == ["first", "p1"]
    optimizer = case.optimizer([{"params": [first]}, {"params": [("second", second)]}])
    assert [group["param_names"] for group in optimizer.param_groups] == [["p0"], ["second"]]


not_applicable(
    "Parameters with names don't mix with parameters without",
    "test_errors",
    reason="AdamMini has a name for each parameter from the partition, so that they mix",
    topic="groups",
)
not_applicable(
    "Betas are both numbers or both tensors, and a tensor as learning rate wants `capturable` beside `foreach`",
    "test_errors",
    reason="AdamMini keeps betas as numbers, and has no `foreach`",
    topic="groups",
)


@check("test_optimizer_can_be_printed")
def printed(case: Case) -> None:
    """It can be printed, and shows its options."""
    text = repr(case.optimizer([case.randn(2, 3)]))
    assert all(f"{option}:" in text for option in ("lr", "betas", "eps", "weight_decay", "maximize"))
