"""The optimizer: parameter groups, state, and torch's conventions around the update."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import sharding
from .blocks import Layout, Partition
from .blocks import partition as make_partition
from .kernels import Members, Plan
from .rounding import seed_of_tensor
from .update import second_moment_dtype

_HOW_TO_PARTITION = (
    "pass partition=adam_mini_plugins.partition(model), or build the optimizer with AdamMini.for_model(model, ...)"
)
_ENGINES = (
    "AdamMini trains with DistributedDataParallel, FSDP2 and tensor parallelism: use FSDP2 (fully_shard in torch, "
    "fsdp_version: 2 in accelerate, ModelParallelStrategy in Lightning)"
)

# Options that saved states may be older than, and what the step was without them.
_NEW_OPTIONS = {"fused": None, "stochastic_rounding": False, "seed": 0, "capturable": False}

# Of each group, what its plan was made for and the plan.
_Plans = Sequence[tuple[list[Any], Plan]]


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
        fused: How the step is computed, as with torch's optimizers: ``None`` takes the fastest way that is
            right for each tensor, ``True`` insists on a fused kernel, ``False`` is plain torch. All ways
            give the same result to rounding and have the same state.
        stochastic_rounding: Round bfloat16 parameters at random, so that steps too small for bfloat16
            count on average (:mod:`adam_mini_plugins.rounding`).
        seed: What the random numbers for that depend on, besides the step and the parameter's place.
        capturable: Keep the counts of steps on the parameters' device and read no number from it, so that
            a CUDA graph can hold the step.

    State of each parameter: ``step`` (scalar), ``exp_avg`` (the parameter's shape), ``exp_avg_sq``
    (the shape of :meth:`Layout.state_shape`: extent 1 along all axes but those that number rows).
    Each group holds the parameters' names as ``param_names`` and their blocks as text in ``blocks``.

    Raises:
        ValueError: A hyper-parameter out of range, no parameters, no partition, or a parameter that
            the partition doesn't know or knows by another shape.
        TypeError: Complex parameters.
        RuntimeError: In the first step, ``fused=True`` where a tensor can't take a fused kernel.

    Example::

        optimizer = AdamMini.for_model(model, lr=3e-4, weight_decay=0.1)

        blocks = partition(model)  # the same in two steps
        optimizer = AdamMini(model.named_parameters(), lr=3e-4, weight_decay=0.1, partition=blocks)
    """

    # Of the last step; found anew wherever they are missing.
    _plans: _Plans = ()

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
        fused: bool | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
        capturable: bool = False,
    ) -> None:
        if partition is None:
            raise ValueError(f"AdamMini needs the blocks of its parameters: {_HOW_TO_PARTITION}")
        if not isinstance(partition, Partition):
            raise TypeError(f"partition must be a Partition, got {type(partition).__name__}: {_HOW_TO_PARTITION}")
        self.partition = partition
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "state_dtype": state_dtype,
            "fused": fused,
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
            "capturable": capturable,
        }
        _checked_options(defaults)
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

        The names may also come as the group's ``param_names``, which libraries pass on that put copies in
        the parameters' places, as to offload them.

        Parameters that the model did not have when it was partitioned, such as those of an adapter
        added later, need a new partition first: ``optimizer.partition = partition(model)``.

        Raises:
            ValueError: The partition doesn't know one of the parameters, or an option is out of
                range. The optimizer is as it was.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
        params = param_group["params"]
        if isinstance(params, set):
            raise TypeError("parameters need an order that is the same in every run; got a set: pass a list")
        group = {**self.defaults, **param_group}
        group.update(_checked_options(group))
        params = [params] if isinstance(params, Tensor) else list(params)
        names = group.get("param_names")
        if names is not None and not any(isinstance(p, tuple) for p in params):
            if len(names) != len(params):
                raise ValueError(f"a parameter group has {len(names)} param_names for {len(params)} parameters")
            params = list(zip(names, params))
        members = [self._identify(p) for p in params]
        group["param_names"] = [name for name, _, _ in members]
        group["params"] = [p for _, p, _ in members]
        group["blocks"] = [blocks for _, _, blocks in members]
        # The group is the dictionary that was given, as with torch's optimizers: whoever gave it may go on to use it.
        param_group.update(group)
        super().add_param_group(param_group)

    def _identify(self, member: Tensor | tuple[str, Tensor]) -> tuple[str, Tensor, str]:
        """A parameter's name, itself, and its blocks as text (none while it is frozen and unknown)."""
        given, parameter = member if isinstance(member, tuple) else (None, member)
        if not isinstance(parameter, Tensor):
            raise TypeError(f"optimizer can only optimize Tensors, got {type(parameter).__name__}")
        # Which tensor it is counts for more than what it is called: wrappers prefix names.
        name = self.partition.name_of(parameter) or given
        _check_engine(name, parameter)
        described = f"a tensor of shape {tuple(parameter.shape)}" if name is None else repr(name)
        if parameter.is_complex():
            raise TypeError(f"AdamMini does not support complex parameters: {described} is {parameter.dtype}")
        entry = self.partition.get(name) if name is not None else None
        if entry is None:
            if not parameter.requires_grad and parameter.grad is None:
                return given or name or "", parameter, ""
            reason = self.partition.left_out.get(name or "", "")
            raise ValueError(
                f"the partition does not know {described}{': ' + reason if reason else ''}; was it made from another "
                f"model, or before this parameter was added? Once the model is complete, {_HOW_TO_PARTITION}; to add "
                "to an optimizer that exists, first set optimizer.partition = partition(model); a library that steps "
                "copies of parameters needs their names, as docs/offload.md has it"
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

        self._step()
        return loss

    @torch._disable_dynamo  # raw pointers and counts that are read: nothing of it can be traced
    def _step(self) -> None:
        self._plans = self._step_groups(self.param_groups, self._plans)

    def _step_groups(self, groups: Sequence[dict[str, Any]], plans: _Plans) -> _Plans:
        """Steps what has a gradient in this optimizer's groups, or parts of them; by the plans of their last step."""
        steps = self._planned(groups, plans)
        if steps is None:
            steps = self._plan(groups)
            # What processes share is found out anew in every step, with what they have to tell each other.
            sharded = any(sharding.is_sharded(p) for group in groups for p in group["params"])
            plans = () if sharded else [(_watched(group), plan) for group, plan, _ in steps]
        for group, plan, members in steps:
            beta1, beta2 = group["betas"]
            plan.step(
                members,
                lr=group["lr"],
                beta1=beta1,
                beta2=beta2,
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=group["maximize"],
                capturable=group["capturable"],
            )
        return plans

    def _planned(
        self, groups: Sequence[dict[str, Any]], plans: _Plans
    ) -> list[tuple[dict[str, Any], Plan, Members]] | None:
        """Each group with the plan of its last step and the tensors of this one; ``None`` if a plan is out of date."""
        if len(plans) != len(groups):
            return None
        found = []
        for group, (watched, plan) in zip(groups, plans):
            if _watched(group) != watched:
                return None
            states = [self.state.get(p) for p in group["params"] if p.grad is not None]
            if not all(states):
                return None
            members = _members(group, states)
            if not plan.holds(members):
                return None
            found.append((group, plan, members))
        return found

    def _plan(self, groups: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], Plan, Members]]:
        """Checks all parameters, and finds for each group a plan and the tensors of this step."""
        for group in groups:
            _check_parameters(group)
        grads, means = _reduced(groups)
        found, seeds = [], self._seeds()
        for group in groups:
            active = [
                (p, name, Layout.parse(blocks))
                for p, name, blocks in zip(group["params"], group["param_names"], group["blocks"])
                if p.grad is not None
            ]
            states = [self._state_of(p, layout, group) for p, _, layout in active]
            members = _members(group, states, grads, means)
            plan = Plan(
                members,
                [name for _, name, _ in active],
                group["fused"],
                [seeds[p] for p, _, _ in active] if group["stochastic_rounding"] else [],
            )
            found.append((group, plan, members))
        return found

    def _seeds(self) -> dict[Tensor, int]:
        """For each parameter where the random numbers for rounding start."""
        members = ((group["seed"], p) for group in self.param_groups for p in group["params"])
        return {p: seed_of_tensor(seed, number) for number, (seed, p) in enumerate(members)}

    def _state_of(self, parameter: Tensor, layout: Layout, group: dict[str, Any]) -> dict[str, Tensor]:
        """A parameter's state, made at its first step."""
        state = self.state[parameter]
        if not state:
            dtype = momentum_dtype(parameter, group["state_dtype"])
            state["step"] = torch.zeros((), dtype=torch.float32, device=_device_of_step(parameter, group))
            state["exp_avg"] = torch.zeros_like(parameter, dtype=dtype, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = sharding.new_second_moment(parameter, layout)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state that :meth:`state_dict` returned.

        How steps are computed (``fused``, ``capturable``) stays as this optimizer was built.

        Raises:
            ValueError: The state is another optimizer's, was made with other blocks, or doesn't fit
                a parameter. The optimizer is as it was.
        """
        accepted: dict[str, Any] = {}
        own = [{key: group[key] for key in ("fused", "capturable")} for group in self.param_groups]

        def check(_: Optimizer, given: dict[str, Any]) -> None:
            self._check_state_dict(given)
            accepted.update(given)

        def restore(_: Optimizer) -> None:
            for group, options in zip(self.param_groups, own):
                group.update(options)
            self._restore_dtypes(accepted)

        # torch casts all state to the parameter's dtype on the way in; take ours from the source.
        # Hooks, so that the check comes after a user's own and the cast before them.
        handles = (
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _check_state_dict(self, state_dict: dict[str, Any]) -> None:
        groups, saved_groups = self.param_groups, state_dict["param_groups"]
        if len(groups) != len(saved_groups):
            raise ValueError(
                f"the state to load has {len(saved_groups)} parameter groups, this optimizer {len(groups)}"
            )
        for number, (group, saved) in enumerate(zip(groups, saved_groups)):
            if "blocks" not in saved:
                raise ValueError(_foreign(state_dict))
            if len(group["params"]) != len(saved["params"]):
                raise ValueError(
                    f"parameter group {number} of the state to load has {len(saved['params'])} parameters, "
                    f"this optimizer's has {len(group['params'])}"
                )
            for parameter, name, blocks, key, saved_blocks in zip(
                group["params"], group["param_names"], group["blocks"], saved["params"], saved["blocks"]
            ):
                if blocks != saved_blocks:
                    raise ValueError(
                        f"{name} has blocks {blocks!r}, but {saved_blocks!r} in the state to load: load it into an "
                        "optimizer made with the partition (scheme, value, rules) that it was saved with"
                    )
                state = state_dict["state"].get(key)
                if state:
                    _check_state(name, parameter, Layout.parse(blocks), state)

    def _restore_dtypes(self, state_dict: dict[str, Any]) -> None:
        """Gives loaded state the dtypes that a new state would have, from the values as they were saved."""
        for group, saved in zip(self.param_groups, state_dict["param_groups"]):
            for parameter, blocks, key in zip(group["params"], group["blocks"], saved["params"]):
                source = state_dict["state"].get(key)
                if source:
                    # A tensor of its own, which a step adds to in place.
                    self.state[parameter]["step"] = torch.as_tensor(source["step"]).to(
                        device=_device_of_step(parameter, group), dtype=torch.float32, copy=True
                    )
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
        super().__setstate__(state)
        # What was saved before these options existed goes on as it was.
        for group in self.param_groups:
            for option, default in _NEW_OPTIONS.items():
                group.setdefault(option, self.defaults.get(option, default))


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


def _reduced(groups: Iterable[dict[str, Any]]) -> tuple[dict[Tensor, Tensor], dict[Tensor, Tensor]]:
    """Of parameters cut over processes the local gradients, and block means where processes share blocks."""
    sharded = [
        (p, Layout.parse(blocks))
        for group in groups
        for p, blocks in zip(group["params"], group["blocks"])
        # With no gradient here too: another process may have one, and waits for this one.
        if sharding.is_sharded(p) and (p.requires_grad or p.grad is not None)
    ]
    return sharding.gradients_and_means(sharded) if sharded else ({}, {})


def _checked_options(options: dict[str, Any]) -> dict[str, Any]:
    """Hyper-parameters as a group holds them: in range, betas as floats, dtypes by name.

    Raises:
        ValueError: One is out of range; the message names it and its value.
    """
    lr, betas, eps, weight_decay = (options[key] for key in ("lr", "betas", "eps", "weight_decay"))
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr as a tensor must have one element, got shape {tuple(lr.shape)}")
    for name, number in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if not number >= 0.0:
            raise ValueError(f"{name} must be 0 or more, got {number}")
    if len(betas) != 2:
        raise ValueError(f"betas must be two numbers, got {betas}")
    for i, beta in enumerate(betas):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"betas[{i}] must be at least 0 and less than 1, got {beta}")
    if options["fused"] not in (None, True, False):
        raise ValueError(f"fused must be None, True or False, got {options['fused']!r}")
    if isinstance(options["seed"], bool) or not isinstance(options["seed"], int):
        raise ValueError(f"seed must be a whole number, got {options['seed']!r}")
    return {"betas": tuple(float(beta) for beta in betas), "state_dtype": dtype_name(options["state_dtype"])}


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


def _device_of_step(parameter: Tensor, group: dict[str, Any]) -> torch.device:
    """Where the count of a parameter's steps is: on the CPU, as torch's, since reading it must not wait for a device."""
    return parameter.device if group["capturable"] else torch.device("cpu")


def _watched(group: dict[str, Any]) -> list[Any]:
    """What of a group a plan hangs on, besides the tensors of a step: a change of it, and all is checked anew."""
    params = group["params"]
    options = [group[key] for key in ("fused", "stochastic_rounding", "seed", "state_dtype", "capturable")]
    return [
        *options,
        list(map(id, params)),
        [p.shape for p in params],
        list(group["blocks"]),
        len(group["param_names"]),
    ]


def _members(
    group: dict[str, Any],
    states: Sequence[dict[str, Tensor]],
    grads: Mapping[Tensor, Tensor] = MappingProxyType({}),
    means: Mapping[Tensor, Tensor] = MappingProxyType({}),
) -> Members:
    """The tensors of a group's step.

    Args:
        group: The group.
        states: The state of each of its parameters that has a gradient.
        grads: Gradients that are not the parameters' own.
        means: Block means that come from elsewhere.
    """
    active = [(p, blocks) for p, blocks in zip(group["params"], group["blocks"]) if p.grad is not None]
    return Members(
        [sharding.local(p) for p, _ in active],
        [grads.get(p, p.grad) if grads else p.grad for p, _ in active],
        [sharding.local(state["exp_avg"]) for state in states],
        [sharding.local(state["exp_avg_sq"]) for state in states],
        [state["step"] for state in states],
        [Layout.parse(blocks) for _, blocks in active],
        [means.get(p) if means else None for p, _ in active],
    )


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


def _check_state(name: str, parameter: Tensor, layout: Layout, state: dict[str, Any]) -> None:
    expected = {"exp_avg": tuple(parameter.shape), "exp_avg_sq": layout.state_shape(parameter.shape), "step": ()}
    for entry, shape in expected.items():
        if entry not in state:
            raise ValueError(f"the state to load has no {entry!r} for {name}; it has {sorted(state)}")
        found = tuple(torch.as_tensor(state[entry]).shape)
        if found != shape:
            raise ValueError(f"{entry} of {name} has shape {found} in the state to load, but {shape} in this optimizer")


def _foreign(state_dict: dict[str, Any]) -> str:
    keys = sorted({key for state in state_dict["state"].values() for key in state})
    is_adam = {"exp_avg", "exp_avg_sq"} <= set(keys)
    what = "Adam's or AdamW's: it has a second moment for each element" if is_adam else f"another optimizer's: {keys}"
    return (
        f"the state to load is not AdamMini's but {what}. Resume with the optimizer that saved it, or start "
        "AdamMini without this optimizer state (from the model's weights alone)"
    )
