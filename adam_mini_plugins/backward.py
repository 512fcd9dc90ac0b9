"""The step inside the backward pass: each gradient is used as soon as it is complete, and freed.

Full training then needs little more than weights and momentum: of the gradients there is one at a
time. The update is the same, only earlier, and so are schedulers, checkpoints and the training loop.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed
from torch.utils.weak import WeakIdKeyDictionary

from .optimizer import AdamMini
from .sharding import is_sharded


class AdamMiniInBackward(AdamMini):
    """AdamMini that steps each parameter during the backward pass and frees its gradient.

    The arguments and the state are those of :class:`AdamMini`, and so is the training loop:
    ``step()`` belongs after every ``backward()`` still. It ends the step: whatever has a gradient
    then, such as a parameter that was frozen before, is stepped there, and from then on in the
    backward pass.

    What needs all gradients of a step at once can't be had: accumulation over several backward
    passes (an error), ``GradScaler``, and clipping by the norm of all gradients, which finds none to
    clip. ``DistributedDataParallel`` averages gradients after they were used (an error); FSDP2 before,
    where the optimizer is made of a sharded model.

    The optimizer that was made last steps a parameter, and none does once it has been deleted.

    Example::

        optimizer = AdamMiniInBackward.for_model(model, lr=3e-4)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1000)
        for batch in data:
            model(**batch).loss.backward()  # steps
            optimizer.step()
            scheduler.step()
    """

    _stepped: set[Tensor]  # since the last call of step()
    _plan_of: dict[Tensor, Any]  # of each parameter's last step
    _step_supports_amp_scaling = True  # has a GradScaler leave its scale here, for step() to refuse it

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._stepped, self._plan_of = set(), {}
        super().__init__(*args, **kwargs)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as :class:`AdamMini` does; its parameters are stepped during the backward pass."""
        super().add_param_group(param_group)
        self._take_over(len(self.param_groups) - 1)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._stepped, self._plan_of = set(), {}
        for number in range(len(self.param_groups)):
            self._take_over(number)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Ends a step: steps the parameters that have a gradient still.

        Args:
            closure: Reevaluates the model, goes through its backward pass and returns the loss.

        Raises:
            RuntimeError: Called by a ``GradScaler``.
        """
        if vars(self).pop("grad_scale", None) is not None:
            raise RuntimeError(
                "a GradScaler has scaled the loss, and steps in the backward pass have used the gradients before it "
                "could scale them back: train in bfloat16, which needs no GradScaler, or with AdamMini"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        late = [n for n, group in enumerate(self.param_groups) if any(p.grad is not None for p in group["params"])]
        if late:
            self._step()
        for number in late:
            self._take_over(number)
        self._stepped.clear()
        return loss

    def _take_over(self, number: int) -> None:
        """Hooks the parameters of a group, in place of whichever optimizer had hooked them."""
        for position, parameter in enumerate(self.param_groups[number]["params"]):
            if parameter.requires_grad:
                if parameter in _handles:
                    _handles[parameter].remove()
                hook = _hook(weakref.ref(self), number, position)
                _handles[parameter] = parameter.register_post_accumulate_grad_hook(hook)

    @torch.no_grad()
    def _step_one(self, parameter: Tensor, number: int, position: int) -> None:
        """Steps a parameter that has just got its gradient, if it is still where it was in the groups."""
        group = self.param_groups[number]
        if position >= len(group["params"]) or group["params"][position] is not parameter:
            return  # an engine has put another tensor there: step() steps whatever has a gradient
        name = group["param_names"][position]
        if parameter in self._stepped:
            raise RuntimeError(
                f"{name} has got a gradient twice since optimizer.step() was called, and was stepped with the first: "
                "where steps are made in the backward pass, gradients can't be accumulated over several. Call "
                "optimizer.step() after each backward(), or train with AdamMini"
            )
        if not is_sharded(parameter) and _processes() > 1:
            raise RuntimeError(
                f"the gradient of {name} is that of one of {_processes()} processes: DistributedDataParallel averages "
                "gradients after a step in the backward pass would have used them. Use FSDP2 (fully_shard the model, "
                "then make the optimizer), or train with AdamMini"
            )
        one = {key: [group[key][position]] for key in ("params", "param_names", "blocks")}
        self._plan_of[parameter] = self._step_groups([{**group, **one}], self._plan_of.get(parameter, ()))
        self._stepped.add(parameter)
        parameter.grad = None


# The hook that steps a parameter, of whichever optimizer.
_handles: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _hook(optimizer: weakref.ReferenceType[AdamMiniInBackward], number: int, position: int) -> Callable[[Tensor], None]:
    def step(parameter: Tensor) -> None:
        alive = optimizer()
        if alive is not None:
            alive._step_one(parameter, number, position)

    return step


def _processes() -> int:
    initialized = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if initialized else 1
