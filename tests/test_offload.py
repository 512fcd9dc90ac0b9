"""AdamMini under torchao's CPUOffloadOptimizer: what it does without a GPU is all of it but the copies between devices.

The stand-in for the GPU is the CPU itself: streams that are always done, and memory that can't be pinned.
"""

from __future__ import annotations

import copy
import io
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn

from adam_mini_plugins import AdamMini, partition

cpu_offload = pytest.importorskip("torchao.optim.cpu_offload", reason="torchao is not installed")


class TorchWithDevice:
    """`torch` as `cpu_offload` sees it, with a device that is the CPU."""

    class Stream:
        def wait_stream(self, other: Any) -> None: ...

        def synchronize(self) -> None: ...

        def record_event(self) -> Any:
            return self

    cuda = SimpleNamespace(Stream=Stream, current_stream=Stream, stream=lambda stream: nullcontext())

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def empty_like(tensor: Tensor, pin_memory: bool = False, **options: Any) -> Tensor:
        return torch.empty_like(tensor, **options)


@pytest.fixture(autouse=True)
def _device(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        monkeypatch.setattr(cpu_offload, "torch", TorchWithDevice())
        monkeypatch.setattr(cpu_offload, "get_available_devices", lambda: ["cpu", "cuda"])


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """As docs/offload.md has them."""
    return [{"params": [p], "param_names": [name]} for name, p in model.named_parameters() if p.requires_grad]


def offloaded(model: nn.Module, **options: Any) -> Any:
    # Some tensors of the zoo's Llama are large enough to be offloaded: 48 x 48 and more.
    options = {"partition": partition(model), "lr": 1e-2, "minimal_size": 2304, **options}
    return cpu_offload.CPUOffloadOptimizer(groups(model), AdamMini, **options)


def test_training_is_bit_for_bit_that_of_adam_mini_alone() -> None:
    model, batch = zoo.CASES["llama"].build()
    alone, resumed = copy.deepcopy(model), copy.deepcopy(model)
    ours, ordinary = offloaded(model), AdamMini.for_model(alone, lr=1e-2)
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4) for optimizer in (ours, ordinary)]
    losses: list[list[float]] = [[], []]
    for step in range(4):
        for seen, one, optimizer, scheduler in zip(losses, (model, alone), (ours, ordinary), schedulers):
            loss = one(**batch).loss
            loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            seen.append(loss.item())
        if step == 1:  # a checkpoint goes on in a process that starts with it
            file = io.BytesIO()
            torch.save(ours.state_dict(), file)
            file.seek(0)
            resumed.load_state_dict(model.state_dict())
            model, ours = resumed, offloaded(resumed)
            ours.load_state_dict(torch.load(file, weights_only=True))
            ours.d_param_groups = ours.d_opt.param_groups  # see docs/offload.md
            schedulers[0].optimizer = ours
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 4
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        assert torch.equal(p, q)
    assert 0 < len(ours.optim_dict) < 21
    for p, q in zip(model.parameters(), alone.parameters()):
        held = ours.optim_dict[p].state[ours.param_d2h_map[p]] if p in ours.optim_dict else ours.d_opt.state[p]
        assert held.keys() == {"step", "exp_avg", "exp_avg_sq"}
        for key, value in held.items():
            assert torch.equal(value, ordinary.state[q][key])


def test_without_names_it_says_what_is_missing() -> None:
    model, _ = zoo.CASES["llama"].build()
    with pytest.raises(
        ValueError, match=r"does not know a tensor of shape \(97, 48\);.* copies of parameters needs their names"
    ):
        cpu_offload.CPUOffloadOptimizer(model.parameters(), AdamMini, partition=partition(model))
