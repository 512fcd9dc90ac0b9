"""The optimizer: parameter groups, state, and torch's conventions around the update."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial, wraps
from itertools import islice
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils.weak import TensorWeakRef, WeakIdKeyDictionary

from . import engines, sharding, state_dicts
from .blocks import Layout, Partition
from .blocks import partition as make_partition
from .flat import block_means
from .kernels import Members, Plan, same
from .options import NEW_OPTIONS, checked_options, momentum_dtype
from .parameters import (
    HOW_TO_PARTITION,
    check_ordered,
    check_parameters,
    identify,
    names_of,
    trainable_parameters,
)
from .rounding import seed_of_tensor
from .update import second_moment_dtype

_GRAD = attrgetter("grad")
# What of a group's options a plan hangs on.
_OPTIONS = itemgetter("fused", "stochastic_rounding", "seed", "state_dtype", "capturable")


class _GroupPlan(NamedTuple):
    """The plan of a group's last step, and what of the group it was made for."""

    options: tuple[Any, ...]
    params: list[Tensor]
    blocks: list[str]
    plan: Plan

    def is_of(self, group: dict[str, Any]) -> bool:
        """Whether a group is as it was then, but for what the plan looks at itself."""
        return (
            _OPTIONS(group) == self.options
            and len(group["params"]) == len(group["param_names"]) == len(self.params)
            and same(group["params"], self.params)
            and group["blocks"] == self.blocks
        )


_Plans = Sequence[_GroupPlan]


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
            raise ValueError(f"AdamMini needs the blocks of its parameters: {HOW_TO_PARTITION}")
        if not isinstance(partition, Partition):
            raise TypeError(f"partition must be a Partition, got {type(partition).__name__}: {HOW_TO_PARTITION}")
        check_ordered(params)
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
        defaults.update(checked_options(defaults))
        self._remember([])
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

    @classmethod
    def from_adamw(
        cls,
        adamw: Optimizer | dict[str, Any],
        partition: Partition,
        *,
        params: Iterable[Any] | None = None,
        state_dtype: torch.dtype | str | None = None,
    ) -> AdamMini:
        """Takes over from AdamW, at any step: training goes on.

        The momentum and the step counts are AdamW's, each block's second moment is the mean of
        AdamW's. Groups keep their hyper-parameters, names and whatever others keep in them. AdamW is
        left as it was. Where schedulers hold it, :func:`adam_mini_plugins.convert.adam_mini_` turns the
        AdamW itself into AdamMini instead, without a copy of the momentum.

        Args:
            adamw: A ``torch.optim.AdamW`` (or an Adam without weight decay), or what its ``state_dict()`` returned.
            partition: The blocks, from :func:`adam_mini_plugins.partition` of the model.
            params: For a state dict, the parameters as they were given to AdamW: the same groups and order.
            state_dtype: The momentum's dtype, the parameter's own by default.

        Raises:
            TypeError: It is another optimizer.
            ValueError: An option that AdamMini has no equal to, a state that doesn't fit its parameter,
                or a parameter that the partition doesn't know.

        Example::

            optimizer = AdamMini.from_adamw(optimizer, partition(model))

            saved = torch.load("optimizer.pt", weights_only=True)  # or from a checkpoint
            optimizer = AdamMini.from_adamw(saved, partition(model), params=model.named_parameters())
        """
        from .convert import from_adamw  # it builds on this module

        return from_adamw(adamw, partition, params=params, state_dtype=state_dtype)

    def to_adamw(self, **options: Any) -> AdamW:
        """An AdamW that goes on where this optimizer is, which is left as it was.

        Momentum, step counts and groups are this optimizer's; each element's second moment is its block's.

        Args:
            **options: What AdamW takes and AdamMini does not, as ``fused=True``.
        """
        from .convert import to_adamw

        return to_adamw(self, **options)

    def repartition(self, partition: Partition) -> None:
        """Follows a model that has changed, or takes other blocks, in the middle of a run.

        Each block's second moment is the mean of what its elements had. Momentum, step counts and
        groups stay. A parameter that the model has replaced by another of the same name is replaced
        here too. Where one extent has changed, as the vocabulary's, what stays keeps its state; what is
        new starts with no momentum and the mean of the second moments of that tensor. What was frozen
        and is trained now gets its blocks. Layers that are new are added afterwards, by
        :meth:`add_param_group`.

        Args:
            partition: The blocks, from :func:`adam_mini_plugins.partition` of the model as it is now.

        Raises:
            ValueError: The partition doesn't know one of the parameters, or one has changed in more than
                one extent. The optimizer is as it was.

        Example::

            optimizer.repartition(partition(model, value="whole"))

            model.resize_token_embeddings(50_304)
            optimizer.repartition(partition(model))
        """
        from .convert import repartition

        repartition(self, partition)

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
        params = param_group.get("params")
        if not isinstance(params, Iterable):
            raise TypeError(
                "a parameter group needs 'params', a tensor or an iterable of tensors or of (name, tensor) pairs; got "
                f"{type(params).__name__} in a group of {sorted(param_group)}"
            )
        check_ordered(params)
        group = {**self.defaults, **param_group}
        group.update(checked_options(group))
        params = [params] if isinstance(params, Tensor) else list(params)
        names = group.get("param_names")
        if names is not None and not any(isinstance(p, tuple) for p in params):
            if len(names) != len(params):
                raise ValueError(f"a parameter group has {len(names)} param_names for {len(params)} parameters")
            params = list(zip(names, params))
        members = [identify(p, self.partition) for p in params]
        group["param_names"] = [name for name, _, _ in members]
        group["params"] = [p for _, p, _ in members]
        group["blocks"] = [blocks for _, _, blocks in members]
        held = {p for other in self.param_groups for p in other["params"]}
        twice = [name for name, p, _ in members if p in held]
        if twice:
            raise ValueError(
                f"some parameters appear in more than one parameter group: {', '.join(twice)}; leave them in one"
            )
        # The group is the dictionary that was given, as with torch's optimizers: whoever gave it may go on to use it.
        param_group.update(group)
        super().add_param_group(param_group)
        self._remember([param_group])

    def _remember(self, groups: list[dict[str, Any]]) -> None:
        """Notes which tensors groups are made with: an engine may replace them, and say on them by what."""
        if "_made_with" not in vars(self):
            # Weak, so that whole tensors don't outlive the cutting of a model that replaces them.
            self._made_with: dict[str, TensorWeakRef | None] = {}
            self._flats: WeakIdKeyDictionary = WeakIdKeyDictionary()
        for group in groups:
            for name, parameter in zip(group["param_names"], group["params"]):
                self._made_with[name] = None if name in self._made_with else TensorWeakRef(parameter)

    def _resolve(self, group: dict[str, Any]) -> None:
        """Finds out what those tensors of a group hold that an engine has put in its parameters' place."""
        if all(p in self._flats for p in group["params"]):
            return
        references = [self._made_with.get(name) for name in group["param_names"]]
        members = [
            engines.Member(name, Layout.parse(blocks) if blocks else None, reference() if reference else None)
            for name, blocks, reference in zip(group["param_names"], group["blocks"], references)
        ]
        if any(engines.takes_over(member.parameter) for member in members):
            for p in group["params"]:
                flat = engines.find_flat(p, members)
                if flat is not None:
                    self._flats[p] = flat

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """What torch wraps a step in, for hooks and the label in a profile, only where there is one of these.

        Its label is made whether somebody profiles or not, and takes an eighth of the step of a small model.
        """
        wrapped = Optimizer.profile_hook_step(func)

        @wraps(func)
        def step(self: AdamMini, *args: Any, **kwargs: Any) -> Any:
            needed = (
                torch.compiler.is_compiling()  # which knows torch's wrapper
                or self._optimizer_step_pre_hooks
                or self._optimizer_step_post_hooks
                or _global_optimizer_pre_hooks
                or _global_optimizer_post_hooks
                or torch.autograd._profiler_enabled()
            )
            return (wrapped if needed else func)(self, *args, **kwargs)

        return step

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

        if torch.compiler.is_compiling():
            self._step_untraced()
        else:
            self._step()
        return loss

    @torch._disable_dynamo  # raw pointers and counts that are read: nothing of it can be traced
    def _step_untraced(self) -> None:
        self._step()

    def _step(self) -> None:
        self._plans = self._step_groups(self.param_groups, self._plans)

    def _step_groups(self, groups: Sequence[dict[str, Any]], plans: _Plans) -> _Plans:
        """Steps what has a gradient in this optimizer's groups, or parts of them; by the plans of their last step."""
        steps = self._planned(groups, plans)
        if steps is None:
            steps = self._plan(groups)
            # What processes share is found out anew in every step, with what they have to tell each other.
            cut = any(sharding.is_sharded(p) or p in self._flats for group in groups for p in group["params"])
            new = (
                _GroupPlan(_OPTIONS(group), list(group["params"]), list(group["blocks"]), plan)
                for group, plan, _ in steps
            )
            plans = () if cut else list(new)
        for group, plan, grads in steps:
            lr, (beta1, beta2) = group["lr"], group["betas"]
            plan.step(
                grads,
                lr=lr.reshape(()) if isinstance(lr, Tensor) else lr,  # one element, of any number of axes
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
    ) -> list[tuple[dict[str, Any], Plan, list[Tensor]]] | None:
        """Each group with the plan of its last step and the gradients of this; ``None`` if a plan is out of date."""
        for planned in plans:
            planned.plan.prefetch()
        if len(plans) != len(groups) or not all(map(_GroupPlan.is_of, plans, groups)):
            return None
        of_groups = []
        for group in groups:
            grads = list(map(_GRAD, group["params"]))
            with_grad = [p for p, grad in zip(group["params"], grads) if grad is not None]
            of_groups.append((with_grad, [grad for grad in grads if grad is not None]))
        states, found = iter(self._states([p for params, _ in of_groups for p in params])), []
        for group, planned, (params, grads) in zip(groups, plans, of_groups):
            if not planned.plan.holds(params, grads, list(islice(states, len(params)))):
                return None
            found.append((group, planned.plan, grads))
        return found

    def _states(self, params: Sequence[Tensor]) -> list[Any]:
        """The states of parameters; ``None`` for those without."""
        if len(params) == len(self.state) and same(params, self.state):
            return list(self.state.values())  # most often they are in this order: none has to be looked up
        return list(map(self.state.get, params))

    @torch.no_grad()
    def _plan(self, groups: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], Plan, list[Tensor]]]:
        """Checks all parameters, and finds for each group a plan and the gradients of this step."""
        for group in groups:
            self._resolve(group)
            check_parameters(group, self._flats)
        grads, means = self._reduced(groups)
        found, seeds = [], self._seeds()
        for group in groups:
            names, of_parts, rows = [], [], []
            for p, name, blocks in zip(group["params"], names_of(group, self._flats), group["blocks"]):
                if p.grad is not None:
                    parts = list(self._parts(p, Layout.parse(blocks), group, grads.get(p, p.grad), means.get(p)))
                    rows += parts
                    names += [name] * len(parts)
                    of_parts += [
                        seed_of_tensor(seeds[p], number) if number else seeds[p] for number in range(len(parts))
                    ]
            members = Members(*map(list, zip(*rows))) if rows else Members(*([] for _ in Members._fields))
            plan = Plan(members, names, group["fused"], of_parts if group["stochastic_rounding"] else [])
            found.append((group, plan, members.grads))
        return found

    def _parts(
        self, p: Tensor, layout: Layout, group: dict[str, Any], grad: Tensor, means: Any
    ) -> Iterator[tuple[Any, ...]]:
        """What takes a step for a tensor of a group, as rows of :class:`Members`: itself, or the boxes it holds."""
        flat = self._flats.get(p)
        if flat is None:
            state = self._state_of(p, group, partial(sharding.new_second_moment, p, layout))
            moments = [sharding.local(state[entry]) for entry in ("exp_avg", "exp_avg_sq")]
            yield (sharding.local(p), grad, *moments, state["step"], layout, means)
        elif flat.boxes:  # without any, it is the end of what was laid out for other processes
            state = self._state_of(p, group, lambda: p.new_zeros(flat.num_rows, dtype=second_moment_dtype(p)))
            yield from zip(
                flat.views(p),
                flat.views(grad),
                flat.views(state["exp_avg"]),
                flat.second_moments(state["exp_avg_sq"]),
                [state["step"], *(state["step"].clone() for _ in flat.boxes[1:])],  # each is counted up once
                flat.layouts,
                means,
            )

    def _reduced(self, groups: Sequence[dict[str, Any]]) -> tuple[dict[Tensor, Tensor], dict[Tensor, Any]]:
        """Of parameters cut over processes the local gradients, and block means where processes share blocks.

        Of flat tensors, block means of each box.
        """
        tensors = [(p, blocks) for group in groups for p, blocks in zip(group["params"], group["blocks"])]
        # With no gradient here too: another process may have one, and waits for this one.
        cut = [(p, Layout.parse(blocks)) for p, blocks in tensors if p.requires_grad or p.grad is not None]
        sharded = [(p, layout) for p, layout in cut if sharding.is_sharded(p)]
        grads, means = sharding.gradients_and_means(sharded) if sharded else ({}, {})
        flats = [p for p, _ in cut if p in self._flats]
        of_flats = block_means([(self._flats[p], p.grad, second_moment_dtype(p), p.device) for p in flats])
        return grads, {**means, **dict(zip(flats, of_flats))}

    def _seeds(self) -> dict[Tensor, int]:
        """For each parameter where the random numbers for rounding start."""
        members = ((group["seed"], p) for group in self.param_groups for p in group["params"])
        return {p: seed_of_tensor(seed, number) for number, (seed, p) in enumerate(members)}

    def _state_of(
        self, parameter: Tensor, group: dict[str, Any], new_second_moment: Callable[[], Tensor]
    ) -> dict[str, Tensor]:
        """A parameter's state, made at its first step."""
        state = self.state[parameter]
        if not state:
            dtype = momentum_dtype(parameter, group["state_dtype"])
            state["step"] = torch.zeros((), dtype=torch.float32, device=_device_of_step(parameter, group))
            state["exp_avg"] = torch.zeros_like(parameter, dtype=dtype, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = new_second_moment()
        return state

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of the optimizer as a dictionary, as torch's optimizers do."""
        packed = super().state_dict()
        for group, saved in zip(self.param_groups, packed["param_groups"]):
            for parameter, key in zip(group["params"], saved["params"]):
                flat, state = self._flats.get(parameter), packed["state"].get(key)
                if flat is not None and flat.state_by_element and state:
                    whole = flat.by_element(state["exp_avg_sq"], parameter.numel())
                    packed["state"][key] = {**state, "exp_avg_sq": whole}
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state that :meth:`state_dict` returned.

        How steps are computed (``fused``, ``capturable``) stays as this optimizer was built.

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
        states, saved_groups = state_dicts.checked_groups(state_dict, self.param_groups)
        for group, saved in zip(self.param_groups, saved_groups):
            self._resolve(group)
            for parameter, name, blocks, key in zip(
                group["params"], names_of(group, self._flats), group["blocks"], saved["params"]
            ):
                state, flat = states.get(key), self._flats.get(parameter)
                if state and flat is not None:
                    rows = parameter.numel() if flat.state_by_element else flat.num_rows
                    state_dicts.check_state(name, parameter, (rows,), state)
                elif state:
                    state_dicts.check_state(name, parameter, Layout.parse(blocks).state_shape(parameter.shape), state)

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
                        flat = self._flats.get(parameter)
                        if flat is not None and flat.state_by_element and entry == "exp_avg_sq":
                            value = flat.by_row(value)
                        self.state[parameter][entry] = sharding.placed(value, parameter, Layout.parse(blocks))

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "partition": self.partition}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes a state over, pickled or loaded: one saved before an option was there gets the option's default."""
        super().__setstate__(state)
        for group in self.param_groups:
            for option, default in {**NEW_OPTIONS, **self.defaults}.items():
                if option != "differentiable":  # which torch gives to every optimizer
                    group.setdefault(option, default)
        for of_parameter in self.state.values():
            if isinstance(of_parameter, dict) and "step" in of_parameter:
                of_parameter["step"] = torch.as_tensor(of_parameter["step"], dtype=torch.float32)
        if "_made_with" not in vars(self):  # not so when it is a state dictionary that is loaded
            self._remember(self.param_groups)


def _device_of_step(parameter: Tensor, group: dict[str, Any]) -> torch.device:
    """Where the count of a parameter's steps is: as torch's on the CPU, so that reading it waits for no device."""
    return parameter.device if group["capturable"] else torch.device("cpu")
