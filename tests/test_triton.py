"""The Triton kernels against the paper's algorithm: on a CUDA device if there is one, else in Triton's interpreter."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import adam_mini_reference
from test_layout import layouts, shape_for
from test_update import LAYOUTS, ROUNDING
from torch import Tensor

from adam_mini_plugins import Layout

pytest.importorskip("triton", minversion="3.4", reason="needs triton, of a version whose interpreter knows numpy 2")

import triton.language as tl

from adam_mini_plugins.kernels import triton as kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RATES = {"lr": 0.02, "beta1": 0.8, "beta2": 0.95, "weight_decay": 0.1, "eps": 1e-6, "maximize": False}


@pytest.fixture(autouse=True)
def _no_plans() -> None:
    kernels._PLANS.clear()


@contextmanager
def small_programs() -> Iterator[None]:
    """Lengths by which tiny tensors take many programs, and blocks of more than 16 elements three phases."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"_TILE": 64, "_LONGEST": 16, "_ROWS": 8}.items():
            patch.setattr(kernels, name, value)
        yield


class Tensors:
    """Parameters with state, and gradients of very different sizes from element to element."""

    def __init__(
        self,
        members: list[tuple[tuple[int, ...], Layout]],
        dtype: torch.dtype = torch.float32,
        state_dtype: torch.dtype | None = None,
        offset: int = 0,
    ) -> None:
        def new(values: Tensor, dtype: torch.dtype) -> Tensor:
            # Between numbers that must neither be read nor written.
            store = torch.full((values.numel() + 32,), torch.nan, dtype=dtype, device=DEVICE)
            self._stores.append(store)
            view = store[8 + offset :][: values.numel()].view(values.shape)
            return view.copy_(values)

        self._stores: list[Tensor] = []
        shapes, self.layouts = zip(*members)
        self.params = [new(torch.randn(shape), dtype) for shape in shapes]
        self.exp_avgs = [new(torch.zeros(shape), state_dtype or dtype) for shape in shapes]
        self.exp_avg_sqs = [new(torch.zeros(of.state_shape(s)), torch.float32) for s, of in members]
        self.steps = [torch.zeros(()) for _ in shapes]
        self.means: list[Tensor | None] = [None] * len(shapes)
        self.before = [p.clone() for p in self.params]
        self.seen: list[list[Tensor]] = []
        self._new = new

    def step(self, grads: list[Tensor] | None = None, **options) -> None:
        """Steps with new gradients."""
        grads = grads or [torch.randn(p.shape) * 10 ** torch.randn(p.shape) for p in self.params]
        self.grads = [self._new(g, p.dtype) for g, p in zip(grads, self.params)]
        self.seen.append([g.clone() for g in self.grads])
        self.launch(**options)

    def launch(self, **options) -> None:
        lists = (self.params, self.grads, self.exp_avgs, self.exp_avg_sqs, self.steps, self.layouts, self.means)
        for p, g, m, v, layout in zip(self.params, self.grads, self.exp_avgs, self.exp_avg_sqs, self.layouts):
            assert kernels.unsupported(p, g, m, v, layout) is None
        kernels.adam_mini(*lists, **{**RATES, **options})

    def check(self, tolerance: float = 1e-6, **options) -> None:
        """Compares the parameters with the paper's, and looks for writes out of bounds."""
        rates = {**RATES, **options}
        rates["betas"] = rates.pop("beta1"), rates.pop("beta2")
        for number, (before, layout) in enumerate(zip(self.before, self.layouts)):
            index, grads = layout.block_index(before.shape), [grads[number].cpu() for grads in self.seen]
            expected = adam_mini_reference(before.cpu(), grads, index, **rates)
            result = self.params[number].cpu().double()
            torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance, msg=str(layout))
        lists = (self.params, self.exp_avgs, self.exp_avg_sqs, *self.seen)
        inside = sum(t.numel() for tensors in lists for t in tensors)
        assert sum(int((~store.isnan()).sum()) for store in self._stores) == inside


@pytest.mark.parametrize(("offset", "maximize"), [(0, False), (1, True)], ids=["aligned", "unaligned"])
def test_every_kind_of_block_follows_the_paper(offset: int, maximize: bool) -> None:
    tensors = Tensors(list(LAYOUTS.values()), offset=offset)
    for _ in range(3):
        tensors.step(maximize=maximize)
    tensors.check(maximize=maximize)


def test_long_blocks_take_three_phases_and_many_programs() -> None:
    members = [
        *LAYOUTS.values(),
        ((24, 8), Layout.groups(3, 8)),
        ((77,), Layout.whole(77)),
        ((3, 40), Layout.each_row(3)),
        ((5, 30), Layout.groups(10, 3, (1,))),
        ((70,), Layout.elements((70,))),
        ((0, 3), Layout.each_row(0)),
    ]
    with small_programs():
        tensors = Tensors(members)
        for _ in range(2):
            tensors.step()
        kinds = {launch._kernel.__name__ for plan in kernels._PLANS.values() for launch in plan._launches}
    assert kinds == {"_step_blocks", "_square_sums", "_averages", "_descend"}
    tensors.check()


@settings(max_examples=6, deadline=None)
@given(layouts(), layouts(), st.integers(0, 1))
def test_any_layout_follows_the_paper(one: Layout, other: Layout, offset: int) -> None:
    with small_programs():
        tensors = Tensors([(shape_for(layout), layout) for layout in (one, other)], offset=offset)
        tensors.step()
        tensors.step()
    tensors.check()


@pytest.mark.parametrize("state_dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [*ROUNDING, torch.float32])
def test_low_precision_rounds_the_float32_result_once(dtype: torch.dtype, state_dtype: torch.dtype | None) -> None:
    tensors = Tensors([*LAYOUTS.values(), ((5, 33), Layout.each_row(5))], dtype, state_dtype)
    tensors.step()
    for before, grad, result, layout in zip(tensors.before, tensors.seen[0], tensors.params, tensors.layouts):
        rates = {**RATES, "betas": (0.8, 0.95)}
        del rates["beta1"], rates["beta2"]
        expected = adam_mini_reference(before.cpu(), [grad.cpu()], layout.block_index(before.shape), **rates)
        error = (result.cpu().double() - expected).abs()
        assert (error <= ROUNDING.get(dtype, 0) * expected.abs() * (1 + 1e-3) + 1e-6).all()
    for grad, exp_avg in zip(tensors.seen[0], tensors.exp_avgs):
        expected = 0.2 * grad.double()
        assert exp_avg.dtype == (state_dtype or dtype)
        torch.testing.assert_close(
            exp_avg.double(), expected, rtol=ROUNDING.get(exp_avg.dtype, 1e-6) * 1.001, atol=1e-7
        )


@pytest.mark.parametrize("name", ["head", "row of Conv1D", "transposed experts"])
def test_block_means_that_are_known_are_taken_as_they_are(name: str) -> None:
    shape, layout = LAYOUTS[name]
    one, other = Tensors([(shape, layout)]), Tensors([((0, 5), Layout.each_row(9))])
    one.means = [torch.rand(layout.state_shape(shape), device=DEVICE)]
    one.step()
    g, v = one.seen[0][0].double(), (1 - 0.95) * one.means[0].double()
    expected = one.before[0].double() * (1 - 0.02 * 0.1) - 0.02 * g / ((v / (1 - 0.95)).sqrt() + 1e-6)
    torch.testing.assert_close(one.exp_avg_sqs[0].double(), v, rtol=1e-6, atol=0)
    torch.testing.assert_close(one.params[0].double(), expected, rtol=1e-6, atol=1e-6)
    other.step()  # a process without a row


def test_second_moments_are_kept_where_none_of_the_elements_are() -> None:
    # A process may hold no column of a tensor that is cut across its rows, and the rows' second moments all the same.
    tensors = Tensors([((4, 0), Layout.each_row(4)), LAYOUTS["head"]])
    tensors.means[0] = torch.tensor([[1.0], [2.0], [3.0], [4.0]], device=DEVICE)
    tensors.step()
    torch.testing.assert_close(tensors.exp_avg_sqs[0], (1 - 0.95) * tensors.means[0])
    tensors.check()


@pytest.mark.parametrize("size", [1e-18, 1e17, 4e19])
def test_squares_may_be_larger_than_float32_holds_where_what_they_add_is_not(size: float) -> None:
    """Of a square of 3e39, (1 - beta2) = 0.05 counts; of that of one large element, its share in the block."""
    members = [
        *(LAYOUTS[name] for name in ("row", "head", "tensor", "element", "fused")),
        ((24, 8), Layout.groups(3, 8)),
        ((3, 100), Layout.each_row(3)),
    ]
    with small_programs():
        tensors = Tensors(members)
        for _ in range(2):
            grads = [(torch.rand(p.shape) + 0.5) * torch.randn(p.shape).sign() * size / 1.1 for p in tensors.params]
            grads[-1] = torch.zeros(3, 100)
            grads[-1][:, 57] = 10 * size
            tensors.step(grads, eps=0.0)
    tensors.check(eps=0.0)


def test_a_shard_of_rows_that_are_blocks_needs_no_more_than_itself() -> None:
    tensors = Tensors([((3, 5), Layout.each_row(8))])
    tensors.step()
    tensors.layouts = (Layout.each_row(3),)
    tensors.check()


@pytest.mark.parametrize(("beta1", "beta2"), [(0.9, 0.999), (0.5, 0.9999), (0.0, 0.95)])
def test_every_tensor_has_its_own_bias_correction_right_to_float32(beta1: float, beta2: float) -> None:
    """Written as a float32 difference, it would be off by 6e-5 at the first step with beta2 = 0.999."""
    counts = [0, 1, 3, 6, 70, 1200, 10**5]
    tensors = Tensors([((4,), Layout.elements((4,)))] * len(counts))
    for step, v, count in zip(tensors.steps, tensors.exp_avg_sqs, counts):
        step.fill_(count)
        v.fill_(0.5)
    tensors.step(lr=1.0, beta1=beta1, beta2=beta2, weight_decay=0)
    for before, grad, result, count in zip(tensors.before, tensors.grads, tensors.params, counts):
        p, g = before.double(), grad.double()
        m, v = (1 - beta1) * g, beta2 * 0.5 + (1 - beta2) * g * g
        denominator = v.sqrt() / math.sqrt(1 - beta2 ** (count + 1)) + 1e-6
        expected = p - 1 / (1 - beta1 ** (count + 1)) * m / denominator
        torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=1e-6)
    assert [int(step) for step in tensors.steps] == [count + 1 for count in counts]


def test_many_tensors_take_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []
    call = kernels._Launch.__call__

    def counted(self, *arguments) -> None:
        launched.append(self._kernel.__name__)
        call(self, *arguments)

    monkeypatch.setattr(kernels._Launch, "__call__", counted)
    tensors = Tensors([((rows, 16), Layout.each_row(rows)) for rows in range(1, 21)])
    tensors.step()
    assert launched == ["_step_blocks"]
    tensors.check()


def test_tables_are_made_once_and_addresses_sent_when_they_have_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    pinned = kernels._pinned

    def counted(host: Tensor, device: torch.device) -> Tensor:
        sent.append(host.numel())
        return pinned(host, device)

    monkeypatch.setattr(kernels, "_pinned", counted)
    tensors = Tensors([LAYOUTS["row"], LAYOUTS["head"]])
    tensors.step()
    assert sent == [2, 7, 2, 7, 2 * 6]  # a program and a job in each of two launches, two tensors
    sent.clear()
    tensors.launch(lr=1)
    tensors.launch(lr=0.5, beta1=0.3)
    assert sent == []
    tensors.step()
    assert sent == [2 * 6]


def test_plans_of_other_tensors_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_KEPT", 300)
    for rows in range(1, 9):
        Tensors([((rows, 4), Layout.each_row(rows))]).step()
    assert 1 < len(kernels._PLANS) < 8
    assert sum(plan.nbytes for plan in list(kernels._PLANS.values())[:-1]) <= 300


def test_what_changes_from_step_to_step_can_lie_on_the_device() -> None:
    tensors = Tensors([LAYOUTS["row"], LAYOUTS["row of Conv1D"], LAYOUTS["interleaved"]])
    tensors.steps = [step.to(DEVICE) for step in tensors.steps]
    twin = Tensors([LAYOUTS["row"], LAYOUTS["row of Conv1D"], LAYOUTS["interleaved"]])
    for mine, other in zip(tensors.params, twin.params):
        other.copy_(mine)
    lr = torch.tensor(0.02, device=DEVICE)
    for rate in (0.02, 0.01, 0.3):
        lr.fill_(rate)
        tensors.step(lr=lr, capturable=True)
        twin.grads = tensors.grads
        twin.launch(lr=rate)
        assert all(torch.equal(mine, other) for mine, other in zip(tensors.params, twin.params))
    assert [int(step) for step in tensors.steps] == [3, 3, 3]


def test_a_capture_has_to_come_after_a_step_and_leaves_the_tables_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = Tensors([LAYOUTS["row"]])
    tensors.steps = [step.to(DEVICE) for step in tensors.steps]
    capturing = lambda _: True  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "_capturing", capturing)
        with pytest.raises(RuntimeError, match="capturable=True"):
            tensors.step()
        with pytest.raises(RuntimeError, match="take a step outside the capture first"):
            tensors.launch(capturable=True)
    assert int(tensors.steps[0]) == 0
    assert torch.equal(tensors.params[0], tensors.before[0])

    tensors.seen.clear()
    tensors.step(capturable=True)
    plan = next(iter(kernels._PLANS.values()))
    table = plan._tensors.clone()
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "_capturing", capturing)
        patch.setattr(kernels, "_CAPTURED", [])
        tensors.launch(capturable=True)  # the gradients of the warm-up
        tensors.seen.append(tensors.seen[-1])
        tensors.step(capturable=True)  # gradients of its own
        assert torch.equal(plan._tensors, table)
        assert len(kernels._CAPTURED) == 2
        with pytest.raises(RuntimeError, match="take a step outside the capture first"):
            tensors.launch(capturable=True)
    tensors.check()


@pytest.mark.skipif(DEVICE.type != "cuda", reason="graphs are captured on a CUDA device alone")
def test_a_cuda_graph_follows_the_learning_rate() -> None:
    tensors = Tensors([*LAYOUTS.values(), ((300, 200), Layout.whole(300))])
    tensors.steps = [step.to(DEVICE) for step in tensors.steps]
    lr = torch.tensor(0.02, device=DEVICE)
    tensors.step(lr=lr, capturable=True)
    twin = Tensors(list(zip([p.shape for p in tensors.params], tensors.layouts)))
    for of_twin, own in zip(
        twin.params + twin.exp_avgs + twin.exp_avg_sqs, tensors.params + tensors.exp_avgs + tensors.exp_avg_sqs
    ):
        of_twin.copy_(own)
    twin.steps = [torch.ones(()) for _ in twin.params]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tensors.launch(lr=lr, capturable=True)
    for rate in (0.01, 0.3):
        lr.fill_(rate)
        for grad in tensors.grads:
            grad.normal_()
        graph.replay()
        twin.grads = tensors.grads
        twin.launch(lr=rate)
        assert all(torch.equal(mine, other) for mine, other in zip(tensors.params, twin.params))


def mixed(x: int) -> int:
    """MurmurHash3's finalizer."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) % 2**32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) % 2**32
    return x ^ (x >> 16)


def rounded_by_hand(value: float, position: int, seed: int, step: int) -> float:
    """A float32 as bfloat16, by integers alone."""
    noise = mixed((position * 0x9E3779B9 + mixed((seed + 0x9E3779B9 * step) % 2**32)) % 2**32 ^ mixed(position >> 32))
    bits = torch.tensor(value).view(torch.int32).item() % 2**32
    cut = (bits + (noise >> 16)) & 0xFFFF0000
    return torch.tensor(cut - 2**32 if cut >= 2**31 else cut, dtype=torch.int32).view(torch.float32).item()


@pytest.mark.parametrize("name", ["row", "row of Conv1D", "interleaved", "element"])
def test_stochastic_rounding_is_that_of_the_formula(name: str) -> None:
    shape, layout = LAYOUTS[name]
    seeds = [123456789, 0xFFFFFFFF]
    with small_programs():
        tensors = Tensors([(shape, layout)] * 2, torch.bfloat16, torch.float32)
        exact = Tensors([(shape, layout)] * 2)
        for mine, other in zip(exact.params, tensors.params):
            mine.copy_(other)
        tensors.step(stochastic_rounding=True, seeds=seeds)
        exact.grads = [grad.float() for grad in tensors.grads]
        exact.launch(stochastic_rounding=True, seeds=seeds)  # float32 needs no rounding
    for result, values, seed in zip(tensors.params, exact.params, seeds):
        expected = [rounded_by_hand(value, i, seed, 1) for i, value in enumerate(values.flatten().tolist())]
        assert result.flatten().tolist() == expected
    assert not torch.equal(tensors.params[0], exact.params[0].to(torch.bfloat16))


def test_stochastic_rounding_is_right_on_average_and_leaves_infinity_and_nan() -> None:
    tensors = Tensors([((4, 2048), Layout.each_row(4))], torch.bfloat16, torch.float32)
    value = 1 + 2**-7 * 0.3  # between 1 and the next number
    tensors.params[0].fill_(1.0)
    tensors.params[0][3, :3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    tensors.exp_avgs[0].view(torch.int32)[3, 3] = 0x7FFFFFFF  # the NaN that GPUs make: nothing can be added to it
    tensors.grads = [torch.full_like(tensors.params[0], -1.0)]
    tensors.launch(lr=value - 1, eps=0.0, weight_decay=0.0, stochastic_rounding=True, seeds=[7])
    result = tensors.params[0].float()
    assert result[3, :2].tolist() == [torch.inf, -torch.inf]
    assert result[3, 2:4].isnan().all()
    assert set(result[:3].flatten().tolist()) == {1.0, 1 + 2**-7}
    # Of 6144 numbers, the share that goes up has a standard deviation of 0.006.
    assert abs((result[:3].mean().item() - 1) * 2**7 - 0.3) < 0.02


@pytest.mark.parametrize("kernel", ["_step_blocks", "_descend"])
def test_elements_beyond_32_bits_are_found(kernel: str) -> None:
    """The tables place a small tensor's rows so far along that the numbers of its elements need 64 bits."""
    columns, far = 8, 2**30 + 3
    tensors = Tensors([((2, columns), Layout.each_row(2))], torch.bfloat16, torch.float32)
    tensors.grads = [torch.randn_like(tensors.params[0])]
    p, g, m, v = tensors.params[0], tensors.grads[0], tensors.exp_avgs[0], tensors.exp_avg_sqs[0]
    exact = p.float()
    v.fill_(0.25)
    width = {"WIDTH": 8} if kernel == "_step_blocks" else {}
    options = {"P": tl.bfloat16, "G": tl.bfloat16, "M": tl.float32, "ALIGNED": False, "TILE": 32, **width}
    job = kernels._Job(0, far, 2, 1, columns, 1, 0)
    launch = kernels._Launch(getattr(kernels, kernel), [job], [1], DEVICE, **options)
    starts = [t.data_ptr() - far * columns * t.element_size() for t in (p, g, m)]
    table = torch.tensor([[*starts, v.data_ptr() - far * 4, 0, 99]], device=DEVICE)
    beta2 = 0.75 if kernel == "_step_blocks" else 1.0
    numbers = {"lr": 0.3, "step": 1.0, "weight_decay": 0.0, "eps": 1e-30, "sign": 1.0}
    numbers |= {"beta1": 0.0, "rest1": 1.0, "log_beta1": -math.inf}
    numbers |= {"beta2": beta2, "rest2": 1 - beta2, "log_beta2": -math.inf}
    launch(table, {**numbers, "LR_ON_DEVICE": False, "CAPTURABLE": False, "STOCHASTIC": True})
    averages = beta2 * 0.25 + (1 - beta2) * g.float().square().mean(1, keepdim=True)
    exact = (exact - 0.3 / averages.sqrt() * g.float()).flatten().tolist()
    torch.testing.assert_close(v, averages, rtol=1e-6, atol=0)
    for i, (value, result) in enumerate(zip(exact, p.flatten().tolist())):
        # The float32 values may differ in their last bits, on which a rounding hangs once in thousands of times.
        assert result == rounded_by_hand(value, far * columns + i, 99, 1)


def test_versions_tell_autograd_of_the_change() -> None:
    tensors = Tensors([LAYOUTS["row"]])
    before = tensors.params[0]._version
    tensors.step()
    assert tensors.params[0]._version > before


def test_a_step_gives_the_same_bits_again() -> None:
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        with small_programs():
            tensors = Tensors([((30, 7), Layout.whole(30))])
            tensors.step()
        results.append(tensors.params[0].clone())
    assert torch.equal(*results)


def test_what_it_cannot_take_is_said_in_words() -> None:
    shape, layout = LAYOUTS["row"]
    p = torch.zeros(shape, device=DEVICE)
    v = torch.zeros(layout.state_shape(shape), device=DEVICE)
    assert kernels.unsupported(p, p, p, v, layout) is None
    assert kernels.unsupported(p.double(), p, p, v, layout) == "its parameter is torch.float64"
    assert kernels.unsupported(p, p, p, v.half(), layout) == "its second moment is torch.float16"
    strided = torch.zeros(shape[::-1], device=DEVICE).t()
    assert "gradient is not contiguous: strides (1, 6)" in kernels.unsupported(p, strided, p, v, layout)
    meta = p.to("meta")
    assert kernels.unsupported(meta, meta, meta, meta, layout) == "it is on meta"
    assert "its momentum is on meta" in kernels.unsupported(p, p, meta, v, layout)
    between = torch.zeros(2, 3, 4, device=DEVICE)
    assert "axes (1,)" in kernels.unsupported(between, between, between, v, Layout.each_row(3, (1,)))
    wrapped = Wrapper._make_wrapper_subclass(Wrapper, shape, dtype=torch.float32, device=DEVICE)
    assert kernels.unsupported(wrapped, p, p, v, layout) == "its parameter is a Wrapper, which has no memory of its own"


class Wrapper(Tensor):
    """A tensor made of others, as quantized ones are."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(func)


def test_the_compiler_takes_every_kernel_and_reads_vectors(tmp_path: Path) -> None:
    """Down to machine code without a device: what the interpreter runs, the compiler may yet refuse."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    environment.pop("TRITON_INTERPRET", None)
    script = Path(__file__).with_name("triton_compile.py")
    run = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, check=True, timeout=150
    )
    for name, used in json.loads(run.stdout).items():
        assert used["stack"] == 0, f"{name} spills registers"
        assert used["vectors"] > 0 or "aligned" not in name.split(), f"{name} reads single numbers"
