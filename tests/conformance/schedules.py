"""Learning-rate schedulers, and averages of weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW, Optimizer, lr_scheduler, swa_utils

from conformance.registry import check
from conformance.subject import Case, Regression, same

# Each of torch's schedulers, with more than one form where they write to more than the learning rate.
SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda _: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 6, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 3), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, factor=0.5),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-2, step_size_up=3, base_momentum=0.5, max_momentum=0.9),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 1e-2, total_steps=10),
    "SWALR": lambda o: swa_utils.SWALR(o, 1e-3, anneal_epochs=4),
}
BASES = ("LRScheduler", "_LRScheduler")


def element_case(case: Case) -> tuple[Case, dict[str, Any]]:
    """The settings that AdamW has too, and what makes AdamW of them."""
    own = (
        "state_dtype",
        "stochastic_rounding",
        "seed",
        "fused",
        "capturable",
    )  # which AdamW has not, or on a GPU alone
    shared = {k: v for k, v in case.options.items() if k not in own}
    if "betas" in shared:
        shared["betas"] = tuple(float(beta) for beta in shared["betas"])
    return Case(case.device, {**shared, "fused": case.options["fused"]}, case.name), shared


@check("TestLRScheduler", only=("default", "maximize", "non-default betas and eps", "Tensor lr"))
def schedulers(case: Case) -> None:
    """Each of torch's schedulers drives it as it drives AdamW, and where blocks are elements, to the same weights."""
    known = {name for name in lr_scheduler.__all__ if name not in BASES}
    assert known <= set(SCHEDULERS), f"torch has a scheduler that is not tested here: {known - set(SCHEDULERS)}"
    case, shared = element_case(case)
    for make in SCHEDULERS.values():
        ours, theirs = Regression(case), Regression(case)
        optimizers = case.optimizer(ours.params, kind="element"), AdamW(theirs.params, **copy.deepcopy(shared))
        scheduled = [make(optimizer) for optimizer in optimizers]
        for _ in range(9):
            told = []
            for problem, optimizer, scheduler in zip((ours, theirs), optimizers, scheduled, strict=True):
                loss = problem.loss()
                optimizer.step()
                plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
                scheduler.step(*[torch.tensor(1.0)] * plateau)
                group = optimizer.param_groups[0]
                told.append((float(group["lr"]), *map(float, group["betas"])))
                assert torch.isfinite(loss)
            assert told[0] == told[1]
        torch.testing.assert_close(ours.values, theirs.values, rtol=1e-4, atol=1e-5)


@check("TestLRScheduler", only=("default", "Tensor lr and betas"))
def schedulers_resume(case: Case) -> None:
    """Saved in the middle together with a scheduler, each resumes bit for bit."""
    for make in SCHEDULERS.values():
        whole, first = Regression(case), Regression(case)
        optimizers = [case.optimizer(problem.params) for problem in (whole, first)]
        scheduled = [make(optimizer) for optimizer in optimizers]

        def advance(problem: Regression, optimizer: Optimizer, scheduler: Any) -> None:
            for _ in range(4):
                problem.train(optimizer, 1)
                plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
                scheduler.step(*[torch.tensor(1.0)] * plateau)

        for problem, optimizer, scheduler in zip((whole, first), optimizers, scheduled, strict=True):
            advance(problem, optimizer, scheduler)
        advance(whole, optimizers[0], scheduled[0])

        second = Regression(case)
        for p, value in zip(second.params, first.values, strict=True):
            p.data.copy_(value)
        resumed = case.optimizer(second.params)
        scheduler = make(resumed)
        scheduler.load_state_dict(copy.deepcopy(scheduled[1].state_dict()))
        resumed.load_state_dict(copy.deepcopy(optimizers[1].state_dict()))
        advance(second, resumed, scheduler)
        assert same(second.values, whole.values)


@check("TestSWAUtils")
def averages(case: Case) -> None:
    """Averaged weights, plain and exponential, are the averages of where it went, and the average trains nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).to(case.device)
    optimizer = case.optimizer(model.named_parameters())
    mean, exponential = (
        swa_utils.AveragedModel(model),
        swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.5)),
    )
    scheduler = swa_utils.SWALR(optimizer, 0.01, anneal_epochs=2)
    seen = []
    for _ in range(4):
        optimizer.zero_grad()
        model(case.randn(8, 3)).square().mean().backward()
        optimizer.step()
        scheduler.step()
        for average in (mean, exponential):
            average.update_parameters(model)
        seen.append([p.detach().clone() for p in model.parameters()])
    torch.testing.assert_close(list(mean.module.parameters()), [torch.stack(w).mean(0) for w in zip(*seen)])
    moving = seen[0]
    for weights in seen[1:]:
        moving = [0.5 * old + 0.5 * new for old, new in zip(moving, weights, strict=True)]
    torch.testing.assert_close([p.detach() for p in exponential.module.parameters()], moving)
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.01)
    swa_utils.update_bn([case.randn(8, 3)], mean, device=torch.device(case.device))
    assert not any(p in optimizer.state for p in mean.parameters())
