"""The fused kernel for the CPU against the paper's algorithm, and the ways through a step against each other."""

from __future__ import annotations

import copy
import logging
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reference import adam_mini_reference
from test_layout import layouts, shape_for
from test_update import LAYOUTS, OPTIONS, ROUNDING, case, optimizer_for
from torch import Tensor

import adam_mini_plugins.kernels.cpu as cpu
from adam_mini_plugins import AdamMini, Layout, update
from adam_mini_plugins.rounding import fmix32, key_of_step, seed_of_tensor

needs_kernel = pytest.mark.skipif(cpu.library() is None, reason="this install has no kernel")


def run(parameter: Tensor, layout: Layout, grads: list[Tensor], **options) -> tuple[Tensor, AdamMini]:
    """A copy of a parameter after a step for each gradient, and the optimizer."""
    parameter = torch.nn.Parameter(parameter.detach().clone())
    optimizer = optimizer_for(parameter, layout, **options)
    for grad in grads:
        parameter.grad = grad
        optimizer.step()
    return parameter.detach(), optimizer


@pytest.fixture
def small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cuts tensors of a few elements as those of millions are cut."""
    monkeypatch.setattr(cpu, "_TASK", 8)
    monkeypatch.setattr(cpu, "_LONG", 12)


@needs_kernel
@pytest.mark.usefixtures("small_tasks")
@settings(max_examples=80, deadline=None)
@given(
    layouts(),
    st.integers(1, 3),
    st.booleans(),
    st.sampled_from([0.0, 0.1]),
    st.sampled_from([0.0, 0.02]),
    st.booleans(),
)
def test_any_layout_follows_the_paper(
    layout: Layout, steps: int, maximize: bool, weight_decay: float, lr: float, beta_is_small: bool
) -> None:
    shape = shape_for(layout)
    options = {**OPTIONS, "maximize": maximize, "weight_decay": weight_decay, "lr": lr}
    options["betas"] = (0.0, 0.0) if beta_is_small else OPTIONS["betas"]
    parameter, grads = case(shape, steps)
    assume(cpu._runs(layout, shape) is not None)
    expected = adam_mini_reference(parameter.detach(), grads, layout.block_index(shape), **options)
    result, _ = run(parameter, layout, grads, fused=True, **options)
    torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=1e-7)


# Long enough for tiles and tasks of the real sizes, and for what is left over at their ends.
LARGE: dict[str, tuple[tuple[int, ...], Layout]] = {
    "rows of one tile": ((70, 1024), Layout.each_row(70)),
    "rows of tiles and a rest": ((5, 2500), Layout.each_row(5)),
    "narrow rows": ((3001, 7), Layout.each_row(3001)),
    "heads": ((12, 1001), Layout.groups(3, 4)),
    "narrow heads": ((300, 9), Layout.groups(100, 3)),
    "a long block": ((300, 1001), Layout.whole(300)),
    "a long row": ((2, 300_001), Layout.each_row(2)),
    "elements": ((100_003,), Layout.elements((100_003,))),
    "columns": ((130, 1030), Layout.each_row(1030, (1,))),
    "heads of columns": ((70, 1026), Layout.groups(3, 342, (1,))),
    "experts": ((3, 40, 30), Layout.each_row(120, (0, 1))),
    "transposed experts": ((3, 40, 30), Layout.each_row(90, (0, 2))),
    "a vector": ((1001,), Layout.whole(1001)),
}


def expected_of(parameter: Tensor, grads: list[Tensor], layout: Layout, beta2: float = OPTIONS["betas"][1]) -> Tensor:
    """The paper's algorithm in float64, in whole tensors: for many elements the reference takes minutes."""
    index = layout.block_index(parameter.shape).expand(parameter.shape).reshape(-1)
    lr, beta1, eps, decay = OPTIONS["lr"], OPTIONS["betas"][0], OPTIONS["eps"], OPTIONS["weight_decay"]
    p = parameter.double().reshape(-1)
    m, v = torch.zeros_like(p), torch.zeros(layout.num_blocks, dtype=torch.float64)
    count = torch.zeros_like(v).index_add_(0, index, torch.ones_like(p))
    for step, grad in enumerate(grads, start=1):
        g = grad.double().reshape(-1)
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * torch.zeros_like(v).index_add_(0, index, g * g) / count
        root = (v / (1 - beta2**step)).sqrt()[index]
        p = p * (1 - lr * decay) - lr * m / (1 - beta1**step) / (root + eps)
    return p.view(parameter.shape)


@needs_kernel
@pytest.mark.parametrize("name", LARGE)
def test_large_tensors_follow_the_paper(name: str) -> None:
    shape, layout = LARGE[name]
    parameter, grads = case(shape, steps=2)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run(parameter, layout, grads, fused=True)[0])
    torch.testing.assert_close(
        results[0].double(), expected_of(parameter.detach(), grads, layout), rtol=1e-6, atol=1e-6
    )
    assert all(result.equal(results[0]) for result in results)


@needs_kernel
@pytest.mark.parametrize("largest", [1e20, 4e20])
@pytest.mark.parametrize("name", LARGE)
def test_squares_may_be_more_than_float32_holds_where_second_moments_are_not(name: str, largest: float) -> None:
    shape, layout = LARGE[name]
    parameter, grads = case(shape, steps=2)
    grads = [grad / grad.abs().max() * largest for grad in grads]
    assert not grads[0].square().isfinite().all()
    result, _ = run(parameter, layout, grads, fused=True, betas=(0.8, 0.999))
    expected = expected_of(parameter.detach(), grads, layout, beta2=0.999)
    torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=1e-6)


@needs_kernel
@pytest.mark.parametrize("bad", [1e30, float("inf"), float("nan")])
@pytest.mark.parametrize("name", ["rows of one tile", "narrow rows", "narrow heads", "heads", "elements", "columns"])
def test_a_block_whose_second_moment_is_no_number_leaves_others_alone(name: str, bad: float) -> None:
    shape, layout = LARGE[name]
    parameter, grads = case(shape, steps=2)
    spoilt = [grads[0].clone(), grads[1]]
    spoilt[0].view(-1)[2_345] = bad
    index = layout.block_index(shape).expand(shape)
    here = index == index.reshape(-1)[2_345]
    expected, _ = run(parameter, layout, grads, fused=True)
    result, _ = run(parameter, layout, spoilt, fused=True)
    torch.testing.assert_close(result[~here], expected[~here])
    # Squares that are too large are as in AdamW: a step of nothing, but for the decay. What is no number spreads.
    decayed = parameter.detach() * (1 - OPTIONS["lr"] * OPTIONS["weight_decay"]) ** 2
    torch.testing.assert_close(result[here], decayed[here]) if bad == 1e30 else None
    assert result[here].isfinite().all() == (bad == 1e30)


@needs_kernel
@pytest.mark.parametrize("state_dtype", [None, "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(
    "name", ["rows of one tile", "rows of tiles and a rest", "narrow heads", "elements", "columns"]
)
def test_low_precision_rounds_the_float32_result_once(name: str, dtype: torch.dtype, state_dtype: str | None) -> None:
    shape, layout = LARGE[name]
    parameter, grads = case(shape, steps=1, dtype=dtype)
    result, optimizer = run(parameter, layout, grads, fused=True, state_dtype=state_dtype)
    expected = expected_of(parameter.detach(), grads, layout)
    assert ((result.double() - expected).abs() <= ROUNDING[dtype] * expected.abs() * (1 + 1e-3) + 1e-6).all()
    _, of_eager = run(parameter, layout, grads, fused=False, state_dtype=state_dtype)
    mine, theirs = optimizer.state_dict()["state"][0], of_eager.state_dict()["state"][0]
    assert mine["exp_avg"].dtype == theirs["exp_avg"].dtype
    torch.testing.assert_close(mine["exp_avg"], theirs["exp_avg"], rtol=2 * ROUNDING[dtype] * 2, atol=1e-6)
    torch.testing.assert_close(mine["exp_avg_sq"], theirs["exp_avg_sq"], rtol=1e-5, atol=0)


@needs_kernel
@pytest.mark.parametrize("state_dtype", [None, "float32"])  # by the processor's instructions, and without them
def test_every_half_is_read_and_written_as_torch_does(state_dtype: str | None) -> None:
    for dtype in ROUNDING:
        bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
        values = bits.view(dtype)
        parameter = torch.nn.Parameter(values.clone().view(1, -1))
        layout = Layout.each_row(1)
        parameter.grad = torch.zeros_like(parameter)
        optimizer_for(parameter, layout, fused=True, lr=0.0, weight_decay=0.0, state_dtype=state_dtype).step()
        # Nothing moves, so that each number is only read and written; NaN stays NaN.
        result, finite = parameter.detach().view(-1), values.isfinite()
        assert result[finite].equal(values[finite])
        assert result[values.isnan()].isnan().all()
        # A factor makes float32 numbers of all kinds, which are then rounded.
        decayed = torch.nn.Parameter(values.clone().view(1, -1))
        decayed.grad = torch.zeros_like(decayed)
        optimizer_for(decayed, layout, fused=True, lr=0.25, weight_decay=0.3, state_dtype=state_dtype).step()
        factor = torch.tensor(1 - 0.25 * 0.3, dtype=torch.float32)
        torch.testing.assert_close(
            decayed.detach().view(-1), (values.float() * factor).to(dtype), rtol=0, atol=0, equal_nan=True
        )


@needs_kernel
def test_odd_addresses_and_empty_tensors() -> None:
    layout = Layout.each_row(6)
    for dtype in (torch.float32, torch.bfloat16):
        store = torch.randn(31, dtype=dtype)
        parameter = torch.nn.Parameter(store[1:].view(6, 5))  # not aligned to more than an element
        grad = torch.randn(33, dtype=dtype)[3:].view(6, 5)
        expected = expected_of(parameter.detach(), [grad], layout)
        parameter.grad = grad
        optimizer_for(parameter, layout, fused=True).step()
        assert (
            (parameter.detach().double() - expected).abs() <= ROUNDING.get(dtype, 1e-6) * expected.abs() + 1e-6
        ).all()
    result, _ = run(torch.empty(0, 5), Layout.each_row(0), [torch.empty(0, 5)], fused=True)
    assert result.shape == (0, 5)


@needs_kernel
@pytest.mark.parametrize("name", ["head", "row of Conv1D", "transposed experts", "interleaved", "element"])
def test_means_that_are_given_are_taken(name: str) -> None:
    from adam_mini_plugins import update

    shape, layout = LAYOUTS[name]
    results = []
    for module in (update, cpu):
        torch.manual_seed(3)
        p, g, m = torch.randn(shape), torch.randn(shape), torch.randn(shape)
        v, step = torch.rand(layout.state_shape(shape)), torch.tensor(4.0)
        means = torch.rand(layout.state_shape(shape))
        module.adam_mini(
            [p], [g], [m], [v], [step], [layout], [means],
            lr=0.1, beta1=0.9, beta2=0.99, weight_decay=0.1, eps=1e-8, maximize=False,
        )  # fmt: skip
        results.append((p, m, v, step))
    for mine, theirs in zip(*results):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


@needs_kernel
@pytest.mark.parametrize("order", [(True, False, None), (False, True, False)])
def test_switching_between_ways_changes_nothing_but_rounding(order: tuple[bool | None, ...]) -> None:
    shape, layout = LAYOUTS["fused"]
    parameter, grads = case(shape, steps=6)
    expected, _ = run(parameter, layout, grads, fused=False)
    mine = torch.nn.Parameter(parameter.detach().clone())
    state = None
    for number, fused in enumerate(order):
        optimizer = optimizer_for(mine, layout, fused=fused)
        if state is not None:
            optimizer.load_state_dict(state)
        for grad in grads[2 * number : 2 * number + 2]:
            mine.grad = grad
            optimizer.step()
        assert optimizer.param_groups[0]["fused"] is fused
        state = copy.deepcopy(optimizer.state_dict())
    torch.testing.assert_close(mine.detach(), expected, rtol=1e-6, atol=1e-6)


@needs_kernel
def test_whatever_is_swapped_under_the_optimizer_is_noticed() -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))
    twin = copy.deepcopy(model)
    ours = {way: AdamMini.for_model(m, fused=way, **OPTIONS) for way, m in ((True, model), (False, twin))}

    def step(*, without: int | None = None) -> None:
        torch.manual_seed(0)
        grads = [torch.randn_like(p) for p in model.parameters()]
        for network, optimizer in ((model, ours[True]), (twin, ours[False])):
            for number, (p, grad) in enumerate(zip(network.parameters(), grads)):
                p.grad = None if number == without else grad.clone()
            optimizer.step()
        for mine, theirs in zip(model.parameters(), twin.parameters()):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)

    step()
    step(without=2)
    step()
    for network, optimizer in ((model, ours[True]), (twin, ours[False])):
        optimizer.param_groups[0]["lr"] = torch.tensor(0.05)
        network[0].weight.data = network[0].weight.data.clone() + 1
    step()
    for optimizer in ours.values():
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step()
    for optimizer in ours.values():
        state = optimizer.state[optimizer.param_groups[0]["params"][0]]
        state["exp_avg"] = state["exp_avg"] * 2
        state["exp_avg_sq"].data = state["exp_avg_sq"].data * 3
    step()
    for optimizer in ours.values():
        optimizer.state.clear()
    step()
    for network in (model, twin):
        network[1].weight.requires_grad_(False)
    step(without=2)


@pytest.mark.parametrize("key", ["blocks", "params"])
def test_a_group_in_another_order_is_noticed(key: str) -> None:
    """Which blocks a tensor has is told by its place alone."""
    layers = torch.nn.ModuleList(torch.nn.Linear(4, 4, bias=False) for _ in range(2))
    twins = copy.deepcopy(layers)
    rules = [("0.weight", "neuron"), ("1.weight", "tensor")]
    ours, anew = (AdamMini.for_model(model, scheme="tensor", rules=rules, **OPTIONS) for model in (layers, twins))
    for number in range(3):
        grad = torch.randn(4, 4)
        layers[0].weight.grad, twins[0].weight.grad = grad, grad.clone()
        anew._plans = ()
        ours.step()
        anew.step()
        assert layers[0].weight.equal(twins[0].weight)
        if number == 0:
            ours.param_groups[0][key].reverse()
            anew.param_groups[0][key].reverse()


@needs_kernel
def test_other_strides_are_noticed() -> None:
    layer, twin = torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False)
    twin.load_state_dict(layer.state_dict())
    ours, plain = AdamMini.for_model(layer, **OPTIONS), AdamMini.for_model(twin, fused=False, **OPTIONS)

    def step(grad: Tensor) -> None:
        layer.weight.grad, twin.weight.grad = grad, grad.contiguous()
        ours.step()
        plain.step()
        torch.testing.assert_close(layer.weight, twin.weight, rtol=1e-6, atol=1e-6)

    for grad in torch.randn(2, 4, 4):
        step(grad)
        step(grad.t())
        step(grad)
        step(grad[:1].expand(4, 4))
    for network in (layer, twin):
        network.weight.data = network.weight.data.t()  # in the same memory
    step(torch.randn(4, 4))
    layer.weight.grad = torch.randn(4, 4).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        ours.step()


@needs_kernel
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("layout", [Layout.each_row(6), Layout.groups(1, 5, axes=(1,))], ids=str)
def test_gradients_of_which_a_graph_was_made_leave_none_in_the_state(layout: Layout, fused: bool) -> None:
    parameter, grads = case((6, 5))
    grads = [grad.requires_grad_() for grad in grads]
    result, optimizer = run(parameter, layout, grads, fused=fused)
    (state,) = optimizer.state.values()
    assert not any(tensor.requires_grad for tensor in state.values())
    assert result.equal(run(parameter, layout, [grad.detach() for grad in grads], fused=fused)[0])


@needs_kernel
def test_versions_of_what_is_written_move() -> None:
    parameter, grads = case((6, 5))
    optimizer = optimizer_for(parameter, Layout.each_row(6), fused=True)
    parameter.grad = grads[0]
    output = (parameter * parameter).sum()
    optimizer.step()
    state = optimizer.state[parameter]
    before = [t._version for t in (parameter, *state.values())]
    optimizer.step()
    assert all(t._version > old for t, old in zip((parameter, *state.values()), before))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward()


@needs_kernel
def test_copies_go_on_alike() -> None:
    parameter, grads = case((6, 5))
    _, optimizer = run(parameter, Layout.each_row(6), grads[:2], fused=True)
    copies = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer)), optimizer]
    for each in copies:
        (p,) = each.param_groups[0]["params"]
        p.grad = grads[2]
        each.step()
    first, *others = (each.param_groups[0]["params"][0] for each in copies)
    assert all(other.equal(first) for other in others)


def python(code: str) -> str:
    command = [sys.executable, "-W", "ignore:Failed to initialize NumPy", "-c", code]  # torch's, where there is none
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


STEP = """
import logging, torch
from adam_mini_plugins import AdamMini
def step(**options):
    model = torch.nn.Linear(300, 300)
    model(torch.ones(1, 300)).sum().backward()
    optimizer = AdamMini.for_model(model, **options)
    optimizer.step()
    return optimizer
"""


@needs_kernel
def test_the_floating_point_unit_keeps_its_mode() -> None:
    code = STEP + "step(fused=True); tiny = torch.tensor(1e-40); print((tiny * 0.5).item() > 0, 1e-310 * 0.5 > 0)"
    assert python(code).split() == ["True", "True"]


@needs_kernel
def test_a_process_that_forks_after_a_step_steps_on() -> None:
    code = (
        STEP
        + """
import os
torch.set_num_threads(2)
step(fused=True)
child = os.fork()
if not child:
    torch.set_num_threads(1)
    step(fused=True)
    os._exit(0)
print(os.waitpid(child, 0)[1])
"""
    )
    assert python(code).split() == ["0"]


@pytest.mark.parametrize(
    "why",
    [
        "it was not built: reinstall",
        "ADAM_MINI_NO_KERNEL is set",
        "lacks the C interface",
        "it was built before .*cpu.c changed: reinstall",
    ],
)
def test_without_the_library_one_line_says_so(
    why: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    library = tmp_path / "_cpu.so"
    library.touch()
    if "before" in why:
        (tmp_path / "cpu.c").touch()
        os.utime(library, (0, 0))
    monkeypatch.delenv("ADAM_MINI_NO_KERNEL", raising=False)
    if "set" in why:
        monkeypatch.setenv("ADAM_MINI_NO_KERNEL", "1")
    monkeypatch.setattr(cpu, "_path", lambda: None if "not built" in why else str(library))
    monkeypatch.setattr(cpu, "_QUERIES", ("no_such_thing",))
    cpu.library.cache_clear()
    cpu._interface.cache_clear()
    try:
        parameter, grads = case((6, 5))
        with caplog.at_level(logging.INFO):
            result, _ = run(parameter, Layout.each_row(6), grads)
        (record,) = (record for record in caplog.records if record.name == cpu.__name__)
        assert "without its fused kernel" in record.getMessage()
        assert re.search(why, record.getMessage())
        assert result.equal(run(parameter, Layout.each_row(6), grads, fused=False)[0])
        with pytest.raises(RuntimeError, match=f"no fused kernel can update weight: .*{why}"):
            run(parameter, Layout.each_row(6), grads, fused=True)
    finally:
        cpu.library.cache_clear()
        cpu._interface.cache_clear()


@needs_kernel
@pytest.mark.parametrize(
    ("parameter", "why"),
    [
        (torch.randn(6, 5, dtype=torch.float64), "it is torch.float64"),
        (torch.randn(5, 6).t(), "it is not contiguous"),
    ],
)
def test_insisting_on_what_is_not_there_is_an_error(parameter: Tensor, why: str) -> None:
    parameter = torch.nn.Parameter(parameter)
    before = parameter.detach().clone()
    parameter.grad = torch.ones_like(parameter)
    with pytest.raises(RuntimeError, match=f"fused=True, but no fused kernel can update weight: {why}"):
        optimizer_for(parameter, Layout.each_row(6), fused=True).step()
    assert parameter.detach().equal(before)
    optimizer_for(parameter, Layout.each_row(6)).step()
    assert not parameter.detach().equal(before)


@pytest.mark.parametrize(("option", "value"), [("fused", "yes"), ("seed", 0.5), ("seed", True)])
def test_wrong_options_are_errors(option: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{option} must be .*, got {value!r}"):
        optimizer_for(torch.nn.Parameter(torch.ones(6, 5)), Layout.each_row(6), **{option: value})


def test_states_older_than_the_options_load() -> None:
    parameter, grads = case((6, 5))
    _, optimizer = run(parameter, Layout.each_row(6), grads)
    old = optimizer.state_dict()
    for option in ("fused", "stochastic_rounding", "seed", "capturable"):
        del old["param_groups"][0][option]
    _, other = run(parameter, Layout.each_row(6), grads[:1], fused=False, stochastic_rounding=True, seed=7)
    other.load_state_dict(old)
    group = other.param_groups[0]
    assert (group["fused"], group["stochastic_rounding"], group["seed"], group["capturable"]) == (False, True, 7, False)


def random_bits(seed: int, number: int, step: int, index: int) -> int:
    """The 16 random bits as the definition writes them, with plain numbers."""
    mask = 2**32 - 1
    key = fmix32((seed_of_tensor(seed, number) + 0x9E3779B9 * step) & mask)
    return fmix32(((index & mask) * 0x9E3779B9 + key & mask) ^ fmix32(index >> 32)) >> 16


def test_mixing_is_murmurs() -> None:
    # From the public test vectors of MurmurHash3_x86_32: of no data, the hash is fmix32 of the seed.
    assert [fmix32(0), fmix32(1), fmix32(0xFFFFFFFF)] == [0, 0x514E28B7, 0x81F16F39]
    assert key_of_step(5, 3) == key_of_step(5, torch.tensor(3.0))


@pytest.mark.parametrize("fused", [False, pytest.param(True, marks=needs_kernel)])
@pytest.mark.parametrize("shape", [(4, 9), (2, 1500)])
def test_rounding_at_random_follows_its_definition(shape: tuple[int, int], fused: bool) -> None:
    # The weights don't move but for the decay, which makes float32 numbers between two of bfloat16.
    parameter = torch.randn(shape, dtype=torch.bfloat16)
    grads = [torch.zeros(shape, dtype=torch.bfloat16)]
    result, _ = run(parameter, Layout.each_row(shape[0]), grads, fused=fused, stochastic_rounding=True, seed=11)
    exact = parameter.float() * torch.tensor(1 - OPTIONS["lr"] * OPTIONS["weight_decay"], dtype=torch.float32)
    bits = exact.view(torch.int32).reshape(-1).tolist()
    expected = [(b % 2**32 + random_bits(11, 0, 1, i)) >> 16 for i, b in enumerate(bits)]
    assert [b % 2**16 for b in result.view(torch.int16).reshape(-1).tolist()] == expected


@needs_kernel
@pytest.mark.parametrize(
    "name", ["rows of one tile", "rows of tiles and a rest", "narrow heads", "columns", "a long block"]
)
def test_all_ways_round_alike(name: str) -> None:
    shape, layout = LARGE[name]
    parameter, grads = case(shape, steps=1, dtype=torch.bfloat16)
    results = [run(parameter, layout, grads, fused=fused, stochastic_rounding=True)[0] for fused in (False, True)]
    # The same bits are added to float32 numbers that may differ in the last place.
    assert (results[0] != results[1]).double().mean() < 1e-3


@pytest.mark.parametrize("fused", [False, pytest.param(True, marks=needs_kernel)])
def test_rounding_at_random_is_right_on_average(fused: bool) -> None:
    parameter = torch.nn.Parameter(torch.ones(64, 512, dtype=torch.bfloat16))
    optimizer = optimizer_for(
        parameter, Layout.each_row(64), fused=fused, stochastic_rounding=True, lr=1e-4, weight_decay=0.1
    )
    for _ in range(50):
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    # A decay of 1e-5 is a 400th of the distance to the next number: rounded to the nearest, nothing would move.
    moves = torch.tensor(1 - (1 - 1e-5) ** 50)
    spread = (50 * 1e-5 * 2**-8 / parameter.numel()) ** 0.5
    assert abs(1 - parameter.detach().double().mean() - moves) < 4 * spread
    assert parameter.detach().unique().numel() > 1


@needs_kernel
def test_rounding_at_random_resumes() -> None:
    shape, layout = LAYOUTS["head"]
    parameter, grads = case(shape, steps=6, dtype=torch.bfloat16)
    options = {"stochastic_rounding": True, "seed": 5}
    whole, _ = run(parameter, layout, grads, **options)
    half, optimizer = run(parameter, layout, grads[:3], **options)
    resumed = torch.nn.Parameter(half.clone())
    again = optimizer_for(resumed, layout)
    again.load_state_dict(optimizer.state_dict())
    for grad in grads[3:]:
        resumed.grad = grad
        again.step()
    assert resumed.detach().equal(whole)
    other, _ = run(parameter, layout, grads, stochastic_rounding=True, seed=6)
    assert not other.equal(whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_capturable_reads_no_number_and_changes_nothing(dtype: torch.dtype) -> None:
    shape, layout = LAYOUTS["interleaved"]
    parameter, grads = case(shape, dtype=dtype)
    options = {"fused": False, "stochastic_rounding": dtype == torch.bfloat16}
    expected, _ = run(parameter, layout, grads, **options)
    result, _ = run(parameter, layout, grads, **options, capturable=True, lr=torch.tensor(OPTIONS["lr"]))
    torch.testing.assert_close(result, expected, rtol=1e-5 if dtype == torch.float32 else 2.0**-7, atol=1e-6)


@pytest.mark.parametrize("way", [update, cpu])
def test_second_moments_are_kept_where_none_of_the_elements_are(way: ModuleType) -> None:
    # A process may hold no column of a tensor that is cut across its rows, and the rows' second moments all the same.
    nothing = [torch.empty(4, 0) for _ in range(3)]
    exp_avg_sq, means = torch.zeros(4, 1), torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    way.adam_mini(
        *([tensor] for tensor in (*nothing, exp_avg_sq, torch.zeros(()), Layout.each_row(4), means)),
        lr=1e-3, beta1=0.9, beta2=0.95, weight_decay=0.1, eps=1e-8, maximize=False,
    )  # fmt: skip
    torch.testing.assert_close(exp_avg_sq, 0.05 * means)
