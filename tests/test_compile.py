"""``torch.compile(optimizer.step)``."""

from __future__ import annotations

import copy

import torch
import torch._dynamo
from torch._dynamo.utils import counters

from adam_mini_plugins import AdamMini


def test_a_compiled_step_is_right_and_compiles_nothing_anew_as_the_learning_rate_changes() -> None:
    torch._dynamo.reset()
    counters.clear()
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3))
    twin = copy.deepcopy(model)
    ours, plain = (AdamMini.for_model(network, lr=1e-2) for network in (model, twin))
    compiled = torch.compile(ours.step, backend="eager")
    frames = []
    for number in range(6):
        for network, optimizer, step in ((model, ours, compiled), (twin, plain, plain.step)):
            network(torch.ones(2, 5)).square().sum().backward()
            optimizer.param_groups[0]["lr"] = 1e-2 / (1 + number)
            step()
            optimizer.zero_grad()
        frames.append(counters["frames"]["total"])
    for mine, other in zip(model.parameters(), twin.parameters()):
        assert mine.equal(other)
    assert frames[1:] == [frames[1]] * 5
