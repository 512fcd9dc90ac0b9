"""The step on a CPU at the memory's speed: ``cpu.c``, which is built with the package.

One call for all tensors. What each tensor needs done is a short list of tasks, found out once
(:class:`Table`); a step refreshes addresses and rates, and threads take the tasks one by one.
"""

from __future__ import annotations

import ctypes
import logging
import math
import os
from array import array
from collections.abc import Iterator, Sequence
from functools import lru_cache
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ..blocks import Layout
from ..blocks.layout import Span
from ..update import average, block_means_of

logger = logging.getLogger(__name__)

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_STOCHASTIC = 3
_BLOCKS, _ROWS, _COLUMNS, _ELEMENTS, _SUMS, _MOMENTS = range(6)

# Elements of a task: enough to be worth taking, few enough to share out evenly.
_TASK = 2**16
# Elements of a block that is summed and updated in one go: its gradient stays in the cache in between.
_LONG = 2**18
# Set to anything, this keeps the library from being loaded.
_SWITCH = "ADAM_MINI_NO_KERNEL"

# Of a tensor, where torch's own object is.
_HANDLE = attrgetter("_cdata")
# What the library asks torch's stable C interface, of which the names begin with `aoti_torch_get_`.
_QUERIES = ("data_ptr", "dtype", "dim", "sizes", "strides")


class _Step(ctypes.Structure):
    """``Step`` of ``cpu.c``."""

    _fields_ = (
        *((name, ctypes.c_double) for name in ("lr", "beta1", "beta2", "weight_decay", "eps")),
        *((name, ctypes.c_int64) for name in ("maximize", "tensors")),
        *((name, ctypes.c_void_p) for name in ("grads", "params", "exp_avgs", "exp_avg_sqs", "steps")),
        *((name, ctypes.c_void_p) for name in ("kinds", "rates", "sums", "moments", "updates")),
        *((name, ctypes.c_int64) for name in ("num_sums", "num_moments", "num_updates")),
        ("partial", ctypes.c_void_p),
        *((name, ctypes.c_void_p) for name in _QUERIES),
        *((name, ctypes.c_void_p) for name in ("shapes", "address_of", "written")),
    )


@lru_cache(maxsize=1)
def library() -> Any | None:
    """The built library; ``None``, which is logged once, where there is none."""
    why = _why_not()
    if why:
        logger.warning("AdamMini steps on a CPU without its fused kernel (%s)", why)
        return None
    path = _path()
    loaded: Any = ctypes.CDLL(path)
    loaded.adam_mini_step.argtypes = (ctypes.c_void_p, ctypes.c_uint, ctypes.c_void_p)
    loaded.adam_mini_step.restype = None
    # It asks for memory of Python's objects, so that Python must not go on meanwhile.
    loaded.holds = ctypes.PyDLL(path).adam_mini_holds
    loaded.holds.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
    loaded.adam_mini_prefetch.argtypes = (ctypes.c_void_p, ctypes.c_int64)
    loaded.adam_mini_prefetch.restype = None
    return loaded


def _path() -> str | None:
    """Where the library is, if it was built."""
    spec = find_spec("adam_mini_plugins.kernels._cpu")
    return None if spec is None else spec.origin


def _why_not() -> str:
    """Why the library can't be used; nothing where it can."""
    if _SWITCH in os.environ:
        return f"{_SWITCH} is set"
    path = _path()
    if path is None:
        return "it was not built: reinstall adam-mini-plugins, and see what its build says"
    source = Path(path).with_name("cpu.c")  # is there in an editable install alone
    if source.exists() and source.stat().st_mtime > Path(path).stat().st_mtime:
        return f"it was built before {source} changed: reinstall adam-mini-plugins"
    if _interface() is None:
        return f"torch {torch.__version__} lacks the C interface that it calls"
    return ""


@lru_cache(maxsize=1)
def _interface() -> tuple[dict[str, int | None], dict[torch.dtype, int]] | None:
    """Where torch's functions that the library calls are, and the numbers by which they call dtypes."""
    interface = ctypes.CDLL(torch._C.__file__)
    names = {dtype: str(dtype).removeprefix("torch.") for dtype in _KINDS}
    try:
        queries = {name: getattr(interface, f"aoti_torch_get_{name}") for name in _QUERIES}
        numbers = {dtype: getattr(interface, f"aoti_torch_dtype_{name}")() for dtype, name in names.items()}
        # What the code uses that torch.compile writes.
        address_of = torch._C._dynamo.guards._torchinductor_pyobject_tensor_data_ptr  # type: ignore[attr-defined]
    except AttributeError:
        return None
    found = {name: ctypes.cast(query, ctypes.c_void_p).value for name, query in queries.items()}
    return {**found, "address_of": address_of}, numbers


@lru_cache(maxsize=1)
def _parallel() -> Any | None:
    """What runs a function in threads of the OpenMP that torch itself has loaded, GNU's, LLVM's or Intel's."""
    return getattr(ctypes.CDLL(None), "GOMP_parallel", None) if os.name == "posix" else None


def unsupported(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, layout: Layout) -> str | None:
    """Why a tensor can't take this path; ``None`` where it can.

    Args:
        param: The parameter.
        grad: Its gradient.
        exp_avg: Its momentum.
        exp_avg_sq: Its second moment.
        layout: Its blocks.
    """
    if library() is None:
        return f"there is no fused kernel for a CPU ({_why_not()})"
    for name, tensor in (("it", param), ("its gradient", grad), ("its momentum", exp_avg)):
        if tensor.dtype not in _KINDS:
            return f"{name} is {tensor.dtype}, and the kernel knows float32, bfloat16 and float16"
    for name, tensor in (("it", param), ("its gradient", grad), ("its momentum", exp_avg), ("its moment", exp_avg_sq)):
        if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
            return f"{name} is a {type(tensor).__name__}, which has no memory of its own"
        if tensor.device.type != "cpu":
            return f"{name} is on {tensor.device}"
        if not tensor.is_contiguous():
            return f"{name} is not contiguous: its strides are {tensor.stride()} for shape {tuple(tensor.shape)}"
    if exp_avg_sq.dtype != torch.float32:
        return f"its second moment is {exp_avg_sq.dtype}, not float32"
    if _runs(layout, param.shape) is None:
        return f"the rows of its blocks lie along axes {layout.axes}, in between others"
    return None


def adam_mini(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    layouts: Sequence[Layout],
    block_means: Sequence[Tensor | None],
    *,
    stochastic_rounding: bool = False,
    seeds: Sequence[int] = (),
    **rates: Any,
) -> None:
    """As :func:`adam_mini_plugins.update.adam_mini`, for tensors of which :func:`unsupported` says nothing."""
    seeds = seeds if stochastic_rounding else ()
    table = Table(params, grads, exp_avgs, exp_avg_sqs, state_steps, layouts, block_means, seeds)
    table.step(grads, block_means, **rates)


class Table:
    """What one step of some tensors takes; good for as long as they stay where and what they are.

    Args:
        params: As for :func:`adam_mini`, like those that follow.
        grads: Gradients, of which only the dtypes count here.
        exp_avgs: Momenta.
        exp_avg_sqs: Second moments.
        state_steps: Counts of steps.
        layouts: Blocks.
        block_means: Of which only it counts here where they are given.
        seeds: For each parameter its :func:`~adam_mini_plugins.rounding.seed_of_tensor`, if bfloat16 parameters
            are to be rounded at random; else nothing.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        state_steps: Sequence[Tensor],
        layouts: Sequence[Layout],
        block_means: Sequence[Tensor | None],
        seeds: Sequence[int] = (),
    ) -> None:
        self._layouts, self._exp_avg_sqs, self._params = layouts, exp_avg_sqs, params
        self._written = [*params, *exp_avgs, *exp_avg_sqs, *state_steps]
        kinds, shapes, work = array("q"), array("q"), _Work()
        functions, numbers = cast(tuple[dict[str, Any], dict[torch.dtype, int]], _interface())
        # The means of these come from outside, or from torch.
        self._indirect = []
        for number, (p, g, m, layout, means) in enumerate(zip(params, grads, exp_avgs, layouts, block_means)):
            kind = _STOCHASTIC if seeds and p.dtype == torch.bfloat16 else _KINDS[p.dtype]
            kinds.extend((kind, _KINDS[g.dtype], _KINDS[m.dtype], seeds[number] if seeds else 0))
            shapes.extend((numbers[p.dtype], numbers[g.dtype], p.dim(), *p.shape))
            # None of a tensor's elements may be here, but second moments that other processes have too.
            if work.add(number, layout, p.shape, means is not None) if p.numel() else means is not None:
                self._indirect.append(number)
        addresses = array("Q", list(map(Tensor.data_ptr, self._written)))
        # The call holds their addresses, which keeps nothing alive.
        self._buffers: dict[str, array[Any]] = {
            "params": addresses,
            "grads": array("Q", bytes(8 * len(params))),
            "kinds": kinds,
            "rates": array("I", bytes(12 * len(params))),
            **work.phases,
            "partial": array("d", bytes(8 * work.slots)),
            "shapes": shapes,
            "written": array("Q", map(id, self._written)),
        }
        self._lines = array("Q", [line for tensor in self._written for line in _lines_of(tensor)])
        self._call = _Step(tensors=len(params), **functions)
        for name, buffer in self._buffers.items():
            setattr(self._call, name, buffer.buffer_info()[0])
        for number, name in enumerate(("exp_avgs", "exp_avg_sqs", "steps"), start=1):
            setattr(self._call, name, addresses.buffer_info()[0] + number * len(params) * addresses.itemsize)
        for name, phase in work.phases.items():
            setattr(self._call, f"num_{name}", len(phase) // 8)
        if not self.holds(grads):
            raise RuntimeError(
                f"torch {torch.__version__} says otherwise of these tensors by its C interface than in Python: pass "
                "fused=False, and please report it"
            )

    def prefetch(self) -> None:
        """Asks for the tensors' objects, which a step is about to look at.

        The model and the last step have driven the tensors' objects out of the cache. All at once they are
        there sooner than one by one.
        """
        kernel: Any = library()
        kernel.adam_mini_prefetch(self._lines.buffer_info()[0], len(self._lines))

    def holds(self, grads: Sequence[Tensor]) -> bool:
        """Takes the gradients of the next step; tells whether all tensors are where and what they were.

        Their memory may be another's under the same object, or of another shape.

        Args:
            grads: The gradients, dense.
        """
        handles = [array("Q", list(map(_HANDLE, tensors))) for tensors in (self._params, grads)]
        kernel: Any = library()  # tables are made for tensors that it supports
        return bool(kernel.holds(ctypes.byref(self._call), *(of.buffer_info()[0] for of in handles)))

    def step(
        self,
        grads: Sequence[Tensor],
        block_means: Sequence[Tensor | None],
        *,
        lr: float,
        beta1: float,
        beta2: float,
        weight_decay: float,
        eps: float,
        maximize: bool,
    ) -> None:
        """Performs one step.

        Args:
            grads: The gradients that were taken last.
            block_means: Given for the tensors for which they were given.
            lr: As for :func:`adam_mini`, like those that follow.
            beta1: Decay of the momentum.
            beta2: Decay of the second moment.
            weight_decay: Decoupled weight decay.
            eps: Added to the root of the second moment.
            maximize: Ascend instead of descending.
        """
        if self._indirect:
            self._average_indirect(grads, block_means, beta2)
        call = self._call
        call.lr, call.beta1, call.beta2, call.weight_decay, call.eps = lr, beta1, beta2, weight_decay, eps
        call.maximize = maximize
        # Before the kernel, which drives out of the cache what is at hand now.
        torch.autograd.graph.increment_version(self._written)
        kernel: Any = library()
        kernel.adam_mini_step(ctypes.byref(call), torch.get_num_threads(), _parallel())

    @torch.no_grad()
    def _average_indirect(self, grads: Sequence[Tensor], block_means: Sequence[Tensor | None], beta2: float) -> None:
        for number in self._indirect:
            means, v = block_means[number], self._exp_avg_sqs[number]
            average(v, block_means_of(grads[number], self._layouts[number], v) if means is None else means, beta2)


def _lines_of(tensor: Tensor) -> Iterator[int]:
    """Where in memory a step will look for a tensor: at Python's object, torch's (three lines of the cache), storage's.

    No more than asked for ahead: none is read there, and it may be gone.
    """
    yield id(tensor)
    yield from range(_HANDLE(tensor), _HANDLE(tensor) + 3 * 64, 64)
    yield tensor.untyped_storage()._cdata


class _Work:
    """The tasks of a step: sums of parts of long blocks, then their second moments, then all updates."""

    def __init__(self) -> None:
        self.sums, self.moments, self.updates = array("q"), array("q"), array("q")
        self.phases = {"sums": self.sums, "moments": self.moments, "updates": self.updates}
        self.slots = 0

    def add(self, number: int, layout: Layout, shape: Sequence[int], given: bool) -> bool:
        """Adds the tasks of one tensor; tells whether its second moments have to be made before they start."""
        # Tables are made for tensors that the kernel supports.
        outer, length, inner = cast(tuple[int, int, int], _runs(layout, shape))
        if length == 1 and layout.is_each_row and not given:
            for start, size in _cut(0, outer * inner, _TASK):
                self.updates.extend((_ELEMENTS, number, start, start, 1, 1, size, 0))
            return False
        if inner > 1:
            for o in range(outer):
                for row, size in _cut(0, length, max(1, _TASK // inner)):
                    start = (o * length + row) * inner
                    self.updates.extend((_COLUMNS, number, start, o * inner, size, 1, inner, 0))
            return True
        # A process's part of a tensor has fewer rows than the layout, and then each is a block.
        spans = (Span(0, outer, 1),) if layout.is_each_row else layout.spans
        if given or spans is None:
            self._add_rows(number, 0, outer, length)
            return True
        for row, blocks, size in spans:
            if size * length <= _LONG:
                for first, count in _cut(0, blocks, max(1, _TASK // (size * length))):
                    at = row + first * size
                    self.updates.extend((_BLOCKS, number, at * length, at, count, size, length, 0))
            else:
                for at in range(row, row + blocks * size, size):
                    self._add_long(number, at, size, length)
        return False

    def _add_rows(self, number: int, row: int, rows: int, length: int) -> None:
        """Rows by the second moments that stand there."""
        if length > _TASK:
            for at in range(row, row + rows):
                self._add_range(number, at, at * length, length)
            return
        for at, count in _cut(row, rows, max(1, _TASK // length)):
            self.updates.extend((_ROWS, number, at * length, at, count, 1, length, 0))

    def _add_range(self, number: int, row: int, start: int, size: int) -> None:
        """Elements that share the second moment of one row."""
        for at, count in _cut(start, size, _TASK):
            self.updates.extend((_ROWS, number, at, row, 1, 1, count, 0))

    def _add_long(self, number: int, row: int, size: int, length: int) -> None:
        """A block in two phases."""
        first = self.slots
        for at, count in _cut(row * length, size * length, _TASK):
            self.sums.extend((_SUMS, number, at, row, 1, 1, count, self.slots))
            self.slots += 1
        self.moments.extend((_MOMENTS, number, row * length, row, self.slots - first, size, length, first))
        self._add_range(number, row, row * length, size * length)


def _cut(start: int, count: int, size: int) -> Iterator[tuple[int, int]]:
    """A range as ranges of no more than a size: where each starts, and how long it is."""
    for at in range(start, start + count, size):
        yield at, min(size, start + count - at)


def _runs(layout: Layout, shape: Sequence[int]) -> tuple[int, int, int] | None:
    """How rows lie in memory: row axes, then others, then row axes; the product of each. ``None`` where otherwise."""
    axes = [(axis in layout.axes, size) for axis, size in enumerate(shape) if size > 1]
    rows = [is_row for is_row, _ in axes]
    outer = next((i for i, is_row in enumerate(rows) if not is_row), len(axes))
    inner = next((i for i in range(outer, len(axes)) if rows[i]), len(axes))
    if not all(rows[inner:]):
        return None
    sizes = [size for _, size in axes]
    return math.prod(sizes[:outer]), math.prod(sizes[outer:inner]), math.prod(sizes[inner:])
