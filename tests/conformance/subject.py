"""AdamMini as torch's tests want an optimizer described."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.testing._internal import common_optimizers
from torch.testing._internal.common_optimizers import OptimizerInfo, OptimizerInput

from adam_mini_plugins import AdamMini, Partition
from adam_mini_plugins.blocks import Layout
from adam_mini_plugins.blocks.partition import TensorBlocks

PARAMETERS = inspect.signature(AdamMini).parameters

# How AdamMini may be set, each a line.
OPTION_SETS: list[tuple[str, dict[str, Any]]] = [
    ("default", {}),
    ("non-default lr", {"lr": 0.01}),
    ("nonzero weight_decay", {"weight_decay": 0.1}),
    ("no weight_decay", {"weight_decay": 0.0}),
    ("maximize", {"weight_decay": 0.1, "maximize": True}),
    ("non-default betas and eps", {"betas": (0.5, 0.6), "eps": 1e-3}),
    ("beta1 of zero", {"betas": (0.0, 0.9)}),
    ("Tensor lr", {"lr": torch.tensor(0.001)}),
    ("Tensor lr and betas", {"lr": torch.tensor(0.001), "betas": (torch.tensor(0.9), torch.tensor([[0.99]]))}),
    ("low-precision momentum", {"state_dtype": "bfloat16"}),
    ("double momentum", {"state_dtype": torch.float64}),
    ("stochastic rounding", {"stochastic_rounding": True, "seed": 5}),
    ("capturable", {"capturable": True}),
    ("capturable with Tensor lr", {"capturable": True, "lr": torch.tensor(0.001), "weight_decay": 0.1}),
]
# Each setting by fused kernels, where there is one for a tensor, and by plain torch alone.
WAYS: list[tuple[str, dict[str, Any]]] = [("", {"fused": None}), (" & plain torch", {"fused": False})]


def blocks_of(shape: torch.Size, kind: str) -> Layout:
    """The blocks of a tensor: `"row"`, `"tensor"`, or `"element"`, which is AdamW."""
    if kind == "element" or not shape:
        return Layout.elements(tuple(shape))
    return Layout.each_row(shape[0]) if kind == "row" else Layout.whole(shape[0])


class Partitioned(AdamMini):
    """AdamMini of whatever tensors a test has at hand: no model holds them, so their blocks are made here."""

    def __init__(self, params: Any, *args: Any, kind: str = "row", **options: Any) -> None:
        params, named = _listed(params)
        names = {tensor: [name] for name, tensor in named.items()}
        entries = {
            name: TensorBlocks(name, tensor.shape, "custom", blocks_of(tensor.shape, kind), f"a block a {kind}")
            for name, tensor in named.items()
        }
        super().__init__(params, *args, partition=Partition("hessian", entries, names, {}), **options)


def _listed(params: Any) -> tuple[Any, dict[str, Tensor]]:
    """What is given, with iterators read into lists, and the tensors in it by name."""
    named: dict[str, Tensor] = {}

    def add(member: Any) -> None:
        name, tensor = member if isinstance(member, tuple) else (f"p{len(named)}", member)
        if isinstance(tensor, Tensor) and not any(tensor is known for known in named.values()):
            named[name] = tensor

    if isinstance(params, Tensor | set | dict) or not isinstance(params, Iterable):
        return params, named
    listed = list(params)
    for number, member in enumerate(listed):
        if not isinstance(member, dict):
            add(member)
        elif isinstance(member.get("params"), Tensor):
            add(member["params"])
        elif isinstance(member.get("params"), Iterable) and not isinstance(member["params"], set):
            listed[number] = {**member, "params": list(member["params"])}
            for inner in listed[number]["params"]:
                add(inner)
    return listed, named


def option_sets(device: Any, dtype: torch.dtype | None = None) -> list[OptimizerInput]:
    """The settings to test on a device, as torch's tests ask for them: on each the same."""
    return [OptimizerInput(params=None, kwargs=deepcopy(options), desc=name) for name, options in OPTION_SETS]


INFO = OptimizerInfo(
    Partitioned,
    optim_inputs_func=option_sets,
    optim_error_inputs_func=common_optimizers.optim_error_inputs_func_adamw,
    supported_impls=("fused",),
    supports_fused_on=("cpu", "cuda"),
    not_og_supported_flags=tuple(
        name for name in PARAMETERS if name not in ("params", "lr", "betas", "eps", "weight_decay", "partition")
    ),
    has_capturable_arg=True,
    supports_complex=False,
    supports_sparse=False,
)


@dataclass
class Case:
    """One run of a check: where, and how the optimizer is set."""

    device: str
    options: dict[str, Any]
    name: str

    @property
    def setting(self) -> str:
        """How the optimizer is set, whichever way it takes."""
        return self.name.partition(" & ")[0]

    @property
    def goes_up(self) -> bool:
        return bool(self.options.get("maximize", False))

    def optimizer(self, params: Any, **more: Any) -> Partitioned:
        """The optimizer under test; its options are copies, as schedulers write to tensors among them."""
        return INFO.optim_cls(params, **{**deepcopy(self.options), **more})

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, dtype=dtype).to(self.device)


def cases(device: str) -> list[Case]:
    """All settings on a device, each in all ways."""
    return [
        Case(device, {**given.kwargs, **options}, given.desc + way)
        for given in option_sets(device)
        for way, options in WAYS
    ]


@dataclass
class Regression:
    """The smallest thing to train: a weight and a bias, that are to make zero of an input."""

    case: Case
    dtype: torch.dtype = torch.float32
    contiguous: bool = True
    weight: nn.Parameter = field(init=False)
    bias: nn.Parameter = field(init=False)
    input: Tensor = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        values = self.case.randn(10, 5, dtype=self.dtype), self.case.randn(10, dtype=self.dtype)
        if not self.contiguous:
            values = tuple(torch.stack((v, v), dim=-1)[..., 0] for v in values)
        self.weight, self.bias = map(nn.Parameter, values)
        self.input = self.case.randn(5, dtype=self.dtype)

    @property
    def params(self) -> list[nn.Parameter]:
        return [self.weight, self.bias]

    @property
    def values(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.params]

    def loss(self) -> Tensor:
        """The loss, with fresh gradients."""
        for p in self.params:
            p.grad = None
        loss = (self.weight.mv(self.input) + self.bias).square().sum()
        if loss.requires_grad:
            loss.backward()
        return loss.detach()

    def train(self, optimizer: torch.optim.Optimizer, steps: int = 3) -> list[Tensor]:
        """The parameters after some steps."""
        for _ in range(steps):
            self.loss()
            optimizer.step()
        return self.values


def same(left: Iterable[Tensor], right: Iterable[Tensor]) -> bool:
    """Whether tensors are alike, bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def trained(case: Case, steps: int = 3, **more: Any) -> tuple[Regression, Partitioned]:
    """A regression and its optimizer after some steps."""
    problem = Regression(case)
    optimizer = case.optimizer(problem.params, **more)
    problem.train(optimizer, steps)
    return problem, optimizer
