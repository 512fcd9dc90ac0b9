"""The optimizer: parameter groups, state, and torch's conventions around the update."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import sharding
from .blocks import Layout, Partition
from .blocks import partition as make_partition
from .update import adam_mini, second_moment_dtype

_HOW_TO_PARTITION = (
    "pass partition=adam_mini_plugins.partition(model), or build the optimizer with AdamMini.for_model(model, ...)"
)
_START_ANEW = "Load an earlier checkpoint, or start with the model's weights alone"
_ENGINES = (
    "AdamMini trains with DistributedDataParallel, FSDP2 and tensor parallelism: use FSDP2 (fully_shard in torch, "
    "fsdp_version: 2 in accelerate, ModelParallelStrategy in Lightning)"
)


class AdamMini(Optimizer):
    r"""Adam-mini: AdamW with one second moment for each block of the Hessian.

    Implements Algorithm 2 of "Adam-mini: Use Fewer Learning Rates To Gain More". The state is the
    momentum and, for each tensor, one number a row: about half of AdamW's. Hyper-parameters and
    their defaults are AdamW's.

    Args:
        params: What ``torch.optim.AdamW`` takes: parameters, ``(name, parameter)`` pairs as from
            ``model.named_parameters()``, or groups of either.
        lr: Learning rate, a number or a tensor of one element.
        betas: Decay of the momentum and of the second moment.
        eps: Added to the root of the second moment, outside the root.
        weight_decay: Decoupled weight decay.
        partition: The blocks, from :func:`adam_mini_plugins.partition` of the model.
        maximize: Ascend instead of descending.
        state_dtype: The momentum's dtype, as ``torch.bfloat16`` or ``"bfloat16"``; the parameter's
            own by default. The second moment, which is small, is float32 or the parameter's float64.

    State of each parameter: ``step`` (scalar), ``exp_avg`` (the parameter's shape), ``exp_avg_sq``
    (the shape of :meth:`Layout.state_shape`: extent 1 along all axes but those that number rows).
    Each group holds the parameters' names as ``param_names`` and their blocks as text in ``blocks``.

    Raises:
        ValueError: A hyper-parameter out of range, no parameters, no partition, or a parameter that
            the partition doesn't know or knows by another shape.
        TypeError: Complex parameters.

    Example::

        optimizer = AdamMini.for_model(model, lr=3e-4, weight_decay=0.1)

        blocks = partition(model)  # the same in two steps
        optimizer = AdamMini(model.named_parameters(), lr=3e-4, weight_decay=0.1, partition=blocks)
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        partition: Partition | None = None,
        maximize: bool = False,
        state_dtype: torch.dtype | str | None = None,
    ) -> None:
        if partition is None:
            raise ValueError(f"AdamMini needs the blocks of its parameters: {_HOW_TO_PARTITION}")
        if not isinstance(partition, Partition):
            raise TypeError(f"partition must be a Partition, got {type(partition).__name__}: {_HOW_TO_PARTITION}")
        _check_ordered(params)
        self.partition = partition
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "state_dtype": state_dtype,
        }
        defaults.update(_checked_options(defaults))
        super().__init__(params, defaults)

    @classmethod
    def for_model(
        cls,
        model: nn.Module,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        scheme: str = "auto",
        value: str = "neuron",
        rules: Iterable[tuple[str, str | Layout]] = (),
        probe: Any = None,
        **options: Any,
    ) -> AdamMini:
        """Builds the optimizer for all trainable parameters of a model, its partition included.

        Args:
            model: The model.
            lr: Learning rate.
            betas: Decay of the momentum and of the second moment.
            eps: Added to the root of the second moment.
            weight_decay: Decoupled weight decay.
            scheme: As for :func:`adam_mini_plugins.partition`, like the next three.
            value: How attention values are cut.
            rules: Rules of your own, tried first.
            probe: One batch, to read heads off the model's own attention.
            **options: Whatever else :class:`AdamMini` takes.
        """
        blocks = make_partition(model, scheme, value, tuple(rules), probe)  # type: ignore[arg-type]
        return cls(trainable_parameters(model), lr, betas, eps, weight_decay, partition=blocks, **options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters or of ``(name, parameter)`` pairs, as torch's optimizers do.

        Parameters that the model did not have when it was partitioned, such as those of an adapter
        added later, need a new partition first: ``optimizer.partition = partition(model)``.

        Raises:
            ValueError: The partition doesn't know one of the parameters, or an option is out of
                range. The optimizer is as it was.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
        params = param_group.get("params")
        if not isinstance(params, Iterable):
            raise TypeError(
                "a parameter group needs 'params', a tensor or an iterable of tensors or of (name, tensor) pairs; got "
                f"{type(params).__name__} in a group of {sorted(param_group)}"
            )
        _check_ordered(params)
        group = {**self.defaults, **param_group}
        group.update(_checked_options(group))
        members = [self._identify(p) for p in ([params] if isinstance(params, Tensor) else params)]
        group["param_names"] = [name for name, _, _ in members]
        group["params"] = [p for _, p, _ in members]
        group["blocks"] = [blocks for _, _, blocks in members]
        held = {p for other in self.param_groups for p in other["params"]}
        twice = [name for name, p, _ in members if p in held]
        if twice:
            raise ValueError(
                f"some parameters appear in more than one parameter group: {', '.join(twice)}; leave them in one"
            )
        super().add_param_group(group)

    def _identify(self, member: Tensor | tuple[str, Tensor]) -> tuple[str, Tensor, str]:
        """A parameter's name, itself, and its blocks as text (none while it is frozen and unknown)."""
        if isinstance(member, tuple) and not (len(member) == 2 and isinstance(member[0], str)):
            raise TypeError(
                f"a named parameter is a pair (name, tensor), got {[type(part).__name__ for part in member]}"
            )
        given, parameter = member if isinstance(member, tuple) else (None, member)
        if not isinstance(parameter, Tensor):
            raise TypeError(
                f"optimizer can only optimize Tensors, got {type(parameter).__name__}: pass tensors or (name, tensor) "
                "pairs, of a mapping its items()"
            )
        # Which tensor it is counts for more than what it is called: wrappers prefix names.
        name = self.partition.name_of(parameter) or given
        _check_engine(name, parameter)
        described = f"a tensor of shape {tuple(parameter.shape)}" if name is None else repr(name)
        if parameter.is_complex():
            raise TypeError(f"AdamMini does not support complex parameters: {described} is {parameter.dtype}")
        if not (parameter.is_leaf or parameter.retains_grad):
            raise ValueError(
                f"can't optimize a non-leaf Tensor: {described} is the result of an operation; pass what it is made of"
            )
        entry = self.partition.get(name) if name is not None else None
        if entry is None:
            if not parameter.requires_grad:
                return given or name or "", parameter, ""
            reason = self.partition.left_out.get(name or "", "")
            raise ValueError(
                f"the partition does not know {described}{': ' + reason if reason else ''}; was it made from another "
                f"model, or before this parameter was added? Once the model is complete, {_HOW_TO_PARTITION}; to add "
                "to an optimizer that exists, first set optimizer.partition = partition(model)"
            )
        if entry.shape != parameter.shape:
            raise ValueError(
                f"{described} has shape {tuple(parameter.shape)}, but {tuple(entry.shape)} in the partition, which "
                f"is another model's or was made before a resize: {_HOW_TO_PARTITION}"
            )
        return given or entry.name, parameter, str(entry.layout)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Performs one optimization step.

        Args:
            closure: Reevaluates the model and returns the loss.

        Raises:
            RuntimeError: A sparse gradient, or a gradient for a parameter without known blocks.
                Nothing has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        for group in self.param_groups:
            _check_parameters(group)
        grads, means = self._reduced()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            members = [
                (p, layout, self._state_of(p, layout, group["state_dtype"]))
                for p, layout in zip(group["params"], map(Layout.parse, group["blocks"]))
                if p.grad is not None
            ]
            adam_mini(
                [sharding.local(p) for p, _, _ in members],
                [grads.get(p, p.grad) for p, _, _ in members],
                [sharding.local(state["exp_avg"]) for _, _, state in members],
                [sharding.local(state["exp_avg_sq"]) for _, _, state in members],
                [state["step"] for _, _, state in members],
                [layout for _, layout, _ in members],
                [means.get(p) for p, _, _ in members],
                lr=float(group["lr"]),
                beta1=beta1,
                beta2=beta2,
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=group["maximize"],
            )
        return loss

    def _reduced(self) -> tuple[dict[Tensor, Tensor], dict[Tensor, Tensor]]:
        """Of parameters cut over processes the local gradients, and block means where processes share blocks."""
        sharded = [
            (p, Layout.parse(blocks))
            for group in self.param_groups
            for p, blocks in zip(group["params"], group["blocks"])
            # With no gradient here too: another process may have one, and waits for this one.
            if sharding.is_sharded(p) and (p.requires_grad or p.grad is not None)
        ]
        return sharding.gradients_and_means(sharded) if sharded else ({}, {})

    def _state_of(self, parameter: Tensor, layout: Layout, state_dtype: str | None) -> dict[str, Tensor]:
        """A parameter's state, made at its first step."""
        state = self.state[parameter]
        if not state:
            dtype = momentum_dtype(parameter, state_dtype)
            # The count stays on the CPU, as torch's does: reading it must not wait for a device.
            state["step"] = torch.tensor(0.0, dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter, dtype=dtype, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = sharding.new_second_moment(parameter, layout)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state that :meth:`state_dict` returned.

        Raises:
            TypeError: It is no state dict.
            ValueError: The state is another optimizer's, was made with other blocks, doesn't fit a
                parameter, or is damaged. The optimizer is as it was.
        """
        if not isinstance(state_dict, dict):
            raise TypeError(
                f"the state to load must be what state_dict() returned, a dict, got {type(state_dict).__name__}; a "
                "file is read with torch.load first"
            )
        accepted: dict[str, Any] = {}

        def check(_: Optimizer, given: dict[str, Any]) -> None:
            self._check_state_dict(given)
            accepted.update(given)

        # torch casts all state to the parameter's dtype on the way in; take ours from the source.
        # Hooks, so that the check comes after a user's own and the cast before them.
        handles = (
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(lambda _: self._restore_dtypes(accepted), prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _check_state_dict(self, state_dict: dict[str, Any]) -> None:
        groups = self.param_groups
        states, saved_groups = _parts(state_dict)
        if len(groups) != len(saved_groups):
            raise ValueError(
                f"the state to load has {len(saved_groups)} parameter groups, this optimizer {len(groups)}: build the "
                "optimizer with the groups that it was saved with"
            )
        keys = {key for saved in saved_groups for key in saved["params"]}
        strangers = [key for key in states if isinstance(key, int) and key not in keys]
        if strangers or len(keys) != sum(len(saved["params"]) for saved in saved_groups):
            raise ValueError(
                f"the state to load is damaged: its groups count {len(keys)} different parameters, and it has state "
                f"for {len(strangers)} that are in none of them. {_START_ANEW}"
            )
        for number, (group, saved) in enumerate(zip(groups, saved_groups)):
            if "blocks" not in saved:
                raise ValueError(_foreign(state_dict))
            if len(group["params"]) != len(saved["params"]):
                raise ValueError(
                    f"parameter group {number} of the state to load has {len(saved['params'])} parameters, "
                    f"this optimizer's has {len(group['params'])}: build it with the parameters that it was saved with"
                )
            _check_saved_group(number, saved)
            for parameter, name, blocks, key, saved_blocks in zip(
                group["params"], group["param_names"], group["blocks"], saved["params"], saved["blocks"]
            ):
                if blocks != saved_blocks:
                    raise ValueError(
                        f"{name} has blocks {blocks!r}, but {saved_blocks!r} in the state to load: load it into an "
                        "optimizer made with the partition (scheme, value, rules) that it was saved with"
                    )
                state = states.get(key)
                if state:
                    _check_state(name, parameter, Layout.parse(blocks), state)

    def _restore_dtypes(self, state_dict: dict[str, Any]) -> None:
        """Gives loaded state the dtypes that a new state would have, from the values as they were saved."""
        for group, saved in zip(self.param_groups, state_dict["param_groups"]):
            for parameter, blocks, key in zip(group["params"], group["blocks"], saved["params"]):
                source = state_dict["state"].get(key)
                if source:
                    dtypes = {
                        "exp_avg": momentum_dtype(parameter, group["state_dtype"]),
                        "exp_avg_sq": second_moment_dtype(parameter),
                    }
                    for entry, dtype in dtypes.items():
                        value = source[entry].to(device=parameter.device, dtype=dtype)
                        self.state[parameter][entry] = sharding.placed(value, parameter, Layout.parse(blocks))

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "partition": self.partition}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes a state over, pickled or loaded: one saved before an option was there gets the option's default."""
        super().__setstate__(state)
        for group in self.param_groups:
            for option in self.defaults.keys() - {"differentiable"}:  # which torch gives to every optimizer
                group.setdefault(option, self.defaults[option])
        for of_parameter in self.state.values():
            if isinstance(of_parameter, dict) and "step" in of_parameter:
                of_parameter["step"] = torch.as_tensor(of_parameter["step"], dtype=torch.float32)


def trainable_parameters(model: nn.Module) -> list[tuple[str, Tensor]]:
    """The parameters of a model that are not frozen, by name.

    Raises:
        ValueError: There are none.
    """
    named = list(model.named_parameters())
    trainable: list[tuple[str, Tensor]] = [(name, p) for name, p in named if p.requires_grad]
    if not trainable:
        raise ValueError(
            f"{type(model).__name__} has no parameter to train: all {len(named)} are frozen. Call requires_grad_(True) "
            "on what is to be trained; with PEFT, load the adapter with is_trainable=True"
        )
    return trainable


def _check_ordered(params: Any) -> None:
    if isinstance(params, set | frozenset):
        raise TypeError("parameters need an order that is the same in every run; got a set: pass a list")


def _checked_options(options: dict[str, Any]) -> dict[str, Any]:
    """Hyper-parameters as a group holds them: in range, betas as floats, dtypes by name.

    Raises:
        ValueError: One is out of range; the message names it and its value.
    """
    for option in ("amsgrad", "differentiable"):
        if options.get(option):
            raise ValueError(f"a parameter group has {option}=True, which AdamMini does not have: leave it out")
    for name in ("lr", "eps", "weight_decay"):
        _check_number(name, options[name])
    betas = options["betas"]
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise ValueError(f"betas must be two numbers, got {betas!r}")
    for i, beta in enumerate(betas):
        _check_number(f"betas[{i}]", beta, 1.0)
    return {"betas": tuple(float(beta) for beta in betas), "state_dtype": dtype_name(options["state_dtype"])}


def _check_number(name: str, number: Any, limit: float = math.inf) -> None:
    if not isinstance(number, Real | Tensor):
        raise TypeError(f"{name} must be a number, got {number!r}")
    if isinstance(number, Tensor) and number.numel() != 1:
        raise ValueError(f"{name} as a tensor must have one element, got shape {tuple(number.shape)}")
    if not 0.0 <= float(number) < limit:
        allowed = "0 or more" if limit == math.inf else f"at least 0 and less than {limit:g}"
        raise ValueError(f"{name} must be {'finite' if number == math.inf else allowed}, got {number}")


def dtype_name(dtype: torch.dtype | str | None) -> str | None:
    """A floating-point dtype by its name, as ``"bfloat16"``; ``None`` as it is.

    Raises:
        ValueError: It is no floating-point dtype.
    """
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    resolved = getattr(torch, name, None)
    if not isinstance(resolved, torch.dtype) or not resolved.is_floating_point:
        raise ValueError(f"state_dtype must be a floating-point dtype such as torch.bfloat16, got {dtype!r}")
    return name


def momentum_dtype(parameter: Tensor, state_dtype: str | None) -> torch.dtype:
    """The dtype of a parameter's momentum: the one asked for, or the parameter's own."""
    return parameter.dtype if state_dtype is None else getattr(torch, state_dtype)


def _check_parameters(group: dict[str, Any]) -> None:
    """Raises where a step would go wrong, before anything has changed and before processes wait for each other."""
    params, names = group["params"], group["param_names"]
    if len(params) != len(names):
        raise RuntimeError(
            f"a parameter group holds {len(params)} tensors for {len(names)} names: an engine has merged or cut them, "
            f"as DeepSpeed ZeRO and FSDP1 do. {_ENGINES}"
        )
    for parameter, name, blocks in zip(params, names, group["blocks"]):
        grad = parameter.grad
        if grad is not None and grad.is_sparse:
            raise RuntimeError(
                f"AdamMini does not support sparse gradients, got one for {name}: build the layer with sparse=False"
            )
        _check_engine(name, parameter)
        if not blocks and grad is not None:
            raise RuntimeError(
                f"{name} of shape {tuple(parameter.shape)} has a gradient but no blocks: it was frozen, and is "
                f"unknown to the partition. {_HOW_TO_PARTITION}"
            )
        # Without a gradient too: an engine may have left this process none of the tensor.
        if blocks and not Layout.parse(blocks).fits(parameter.shape):
            raise RuntimeError(
                f"{name} has shape {tuple(parameter.shape)}, which its blocks {blocks!r} don't fit: it was resized, or "
                f"an engine has flattened it, as DeepSpeed ZeRO and FSDP1 do. {_ENGINES}"
            )


def _check_engine(name: str | None, parameter: Tensor) -> None:
    """Raises for a parameter that an engine has flattened, where the engine has left a mark on it."""
    if hasattr(parameter, "_is_flat_param") or hasattr(parameter, "_fsdp_flattened"):
        engine = "FSDP1 (FullyShardedDataParallel)"
    elif hasattr(parameter, "ds_id"):
        engine = "DeepSpeed ZeRO-3"
    else:
        return
    raise RuntimeError(f"{name} has been flattened and cut by {engine}, and its blocks can't be told. {_ENGINES}")


def _parts(state_dict: dict[str, Any]) -> tuple[dict[Any, Any], list[dict[str, Any]]]:
    """The states and the groups of a state dict, of the form that torch gives them."""
    for part, kind in (("state", dict), ("param_groups", list)):
        if not isinstance(state_dict.get(part), kind):
            raise ValueError(
                f"the state to load has no {part!r} that is a {kind.__name__}; it has {_shortened(state_dict)}: pass "
                "what state_dict() returned, of a checkpoint that holds more the optimizer's part"
            )
    states, groups = state_dict["state"], state_dict["param_groups"]
    for number, group in enumerate(groups):
        if not isinstance(group, dict) or not isinstance(group.get("params"), list):
            raise ValueError(f"parameter group {number} of the state to load has no list of 'params'. {_START_ANEW}")
    return states, groups


def _shortened(keys: Iterable[Any]) -> str:
    """Some keys as text, that may be thousands."""
    shown = [repr(key) for key in keys]
    return ", ".join(shown[:4]) + f" and {len(shown) - 4} more" * (len(shown) > 4) or "nothing"


def _check_saved_group(number: int, saved: dict[str, Any]) -> None:
    """Raises for a group of a state to load that could not be gone on with."""
    where = f"parameter group {number} of the state to load"
    missing = [option for option in ("lr", "betas", "eps", "weight_decay") if option not in saved]
    if missing:
        raise ValueError(f"{where} has no {', '.join(map(repr, missing))}. {_START_ANEW}")
    try:
        _checked_options({"state_dtype": None, **saved})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} is damaged: {error}. {_START_ANEW}") from error
    for entry in ("blocks", "param_names"):
        found = saved.get(entry, saved["params"])
        if not isinstance(found, list) or len(found) != len(saved["params"]):
            raise ValueError(
                f"{where} has {len(saved['params'])} parameters and other {entry!r} for them. {_START_ANEW}"
            )


def _check_state(name: str, parameter: Tensor, layout: Layout, state: Any) -> None:
    expected = {"exp_avg": tuple(parameter.shape), "exp_avg_sq": layout.state_shape(parameter.shape), "step": ()}
    for entry, shape in expected.items():
        if not isinstance(state, dict) or entry not in state:
            has = sorted(state) if isinstance(state, dict) else state
            raise ValueError(f"the state to load has no {entry!r} for {name}; it has {has}. {_START_ANEW}")
        value = state[entry]
        if not isinstance(value, Tensor) and not (entry == "step" and isinstance(value, Real)):
            raise ValueError(
                f"{entry} of {name} is no tensor in the state to load, but {type(value).__name__}. {_START_ANEW}"
            )
        found = torch.as_tensor(value)
        if found.shape != shape:
            raise ValueError(
                f"{entry} of {name} has shape {tuple(found.shape)} in the state to load, but {shape} in this "
                "optimizer: it is another model's, or was cut. Load the state that was saved with this model"
            )
        if found.is_meta or not (found.is_floating_point() or entry == "step"):
            raise ValueError(f"{entry} of {name} holds no numbers, but {found.dtype} on {found.device}. {_START_ANEW}")
    if not 0 <= float(state["step"]) < math.inf:
        raise ValueError(
            f"step of {name} must be 0 or more in the state to load, got {float(state['step'])}. {_START_ANEW}"
        )
    if (sharding.local(state["exp_avg_sq"]) < 0).any():
        raise ValueError(f"exp_avg_sq of {name}, a mean of squares, is negative in the state to load. {_START_ANEW}")


def _foreign(state_dict: dict[str, Any]) -> str:
    keys = sorted({key for state in state_dict["state"].values() for key in state})
    is_adam = {"exp_avg", "exp_avg_sq"} <= set(keys)
    what = "Adam's or AdamW's: it has a second moment for each element" if is_adam else f"another optimizer's: {keys}"
    return (
        f"the state to load is not AdamMini's but {what}. Resume with the optimizer that saved it, or start "
        "AdamMini without this optimizer state (from the model's weights alone)"
    )
