"""One step against the paper's algorithm, written out slowly, and against torch's AdamW."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import adam_mini_reference
from test_layout import layouts, shape_for
from torch import Tensor

import adam_mini_plugins.update as update_module
from adam_mini_plugins import AdamMini, Layout, partition
from adam_mini_plugins.blocks import Grid

OPTIONS = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}

LAYOUTS: dict[str, tuple[tuple[int, ...], Layout]] = {
    "row": ((6, 5), Layout.each_row(6)),
    "row of Conv1D": ((5, 6), Layout.each_row(6, (1,))),
    "head": ((6, 5), Layout.groups(3, 2)),
    "head of Conv1D": ((5, 6), Layout.groups(3, 2, (1,))),
    "tensor": ((6, 5), Layout.whole(6)),
    "convolution": ((4, 2, 3, 3), Layout.whole(4)),
    "element": ((6, 5), Layout.elements((6, 5))),
    "bias": ((6,), Layout.elements((6,))),
    "norm": ((6,), Layout.whole(6)),
    "scalar": ((), Layout.elements(())),
    "position table": ((1, 6, 5), Layout.each_row(6, (1,))),
    "experts": ((2, 3, 4), Layout.each_row(6, (0, 1))),
    "transposed experts": ((2, 4, 3), Layout.each_row(6, (0, 2))),
    "fused": (
        (10, 3),
        Layout((0,), (Grid((2, 2), (False, True)), Grid((1, 2), (False, True)), Grid((4,), (False,)))),
    ),
    "interleaved": (
        (12, 3),
        Layout(
            (0,), (Grid((2, 2, 2), (False, False, True)), Grid((2, 1), (False, True)), Grid((2, 1), (True, True))), 1
        ),
    ),
}


def optimizer_for(parameter: Tensor, layout: Layout, **options) -> AdamMini:
    """An optimizer of one parameter with a given layout."""
    model = torch.nn.Module()
    model.weight = parameter
    return AdamMini.for_model(model, rules=[("weight", layout)], **{**OPTIONS, **options})


def trained(parameter: torch.nn.Parameter, layout: Layout, grads: list[Tensor], **options) -> torch.nn.Parameter:
    optimizer = optimizer_for(parameter, layout, **options)
    for grad in grads:
        parameter.grad = grad.to(parameter.dtype)
        optimizer.step()
    return parameter


def case(shape: tuple[int, ...], steps: int = 4, dtype: torch.dtype = torch.float32):
    """A parameter and gradients of very different sizes from row to row."""
    parameter = torch.nn.Parameter(torch.randn(shape, dtype=dtype))
    grads = [(torch.randn(shape) * 10 ** torch.randn(shape)).to(dtype) for _ in range(steps)]
    return parameter, grads


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_kind_of_block_follows_the_paper(name: str, maximize: bool, fused: bool | None) -> None:
    shape, layout = LAYOUTS[name]
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-13)):
        parameter, grads = case(shape, dtype=dtype)
        expected = adam_mini_reference(
            parameter.detach(), grads, layout.block_index(shape), maximize=maximize, **OPTIONS
        )
        result = trained(parameter, layout, grads, maximize=maximize, fused=fused)
        torch.testing.assert_close(result.detach().double(), expected, rtol=tolerance, atol=tolerance)


@settings(max_examples=60, deadline=None)
@given(layouts(), st.integers(1, 3))
def test_any_layout_follows_the_paper(layout: Layout, steps: int) -> None:
    shape = shape_for(layout)
    parameter, grads = case(shape, steps, torch.float64)
    expected = adam_mini_reference(parameter.detach(), grads, layout.block_index(shape), **OPTIONS)
    torch.testing.assert_close(trained(parameter, layout, grads).detach(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["row", "head of Conv1D", "tensor", "transposed experts", "interleaved"])
@pytest.mark.parametrize("limit", [1, 7, 12])
def test_cutting_tensors_into_chunks_changes_nothing(name: str, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, layout = LAYOUTS[name]
    parameter, grads = case(shape)
    whole = trained(torch.nn.Parameter(parameter.detach().clone()), layout, grads, fused=False)
    monkeypatch.setattr(update_module, "_CHUNK_CPU", limit)
    monkeypatch.setattr(update_module, "_COPIED_CPU", limit)
    monkeypatch.setattr(update_module, "_SMALL", 0)
    torch.testing.assert_close(trained(parameter, layout, grads, fused=False), whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [1e19, 1e20])
@pytest.mark.parametrize("name", ["row", "head", "tensor", "element", "interleaved", "norm"])
def test_gradients_whose_squares_overflow_follow_the_paper_as_far_as_adamw_does(name: str, size: float) -> None:
    # A second moment takes (1 - beta2) of the squares, so that float32 holds those of gradients up to 5.8e20.
    shape, layout = LAYOUTS[name]
    options = {**OPTIONS, "betas": (0.9, 0.999)}
    parameter, grads = torch.nn.Parameter(torch.randn(shape)), [torch.randn(shape).sign() * size for _ in range(3)]
    expected = adam_mini_reference(parameter.detach(), grads, layout.block_index(shape), **options)
    result = trained(parameter, layout, grads, fused=False, **options)
    torch.testing.assert_close(result.detach().double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", LAYOUTS)
def test_tensors_that_are_alike_step_together_as_each_by_itself(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape, layout = LAYOUTS[name]
    monkeypatch.setattr(update_module, "_COPIED_CPU", 50)  # stacks of three and more, and what is left over

    def stepped(small: int) -> list[Tensor]:
        monkeypatch.setattr(update_module, "_SMALL", small)
        torch.manual_seed(3)
        members = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for _ in range(8)]
        model = torch.nn.ParameterList(members)
        optimizer = AdamMini.for_model(model, rules=[("*", layout)], fused=False, **OPTIONS)
        for number in range(3):
            for place, parameter in enumerate(members):
                # Some come late, so that their counts differ.
                parameter.grad = torch.randn(shape).to(dtype) if number or place % 3 else None
            optimizer.step()
        states = [optimizer.state[p] for p in members]
        return [t.detach() for p, state in zip(members, states) for t in (p, *state.values())]

    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2.0**-7, torch.float64: 1e-14}[dtype]
    for mine, other in zip(stepped(2**14), stepped(0)):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance / 10)


# One rounding of the parameter a step: half a unit in the last place, in steps of this size.
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("state_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("name", LAYOUTS)
def test_low_precision_rounds_the_float32_result_once(
    name: str, dtype: torch.dtype, state_dtype: torch.dtype | None, fused: bool | None
) -> None:
    shape, layout = LAYOUTS[name]
    parameter, grads = case(shape, steps=1, dtype=dtype)
    expected = adam_mini_reference(parameter.detach(), grads, layout.block_index(shape), **OPTIONS)
    result = trained(parameter, layout, grads, state_dtype=state_dtype, fused=fused)
    assert result.dtype == dtype
    # float32 may fall on the other side of a tie; all but those must be the nearest number there is.
    error = (result.detach().double() - expected).abs()
    assert (error <= ROUNDING[dtype] * expected.abs() * (1 + 1e-3) + 1e-7).all()


@pytest.mark.parametrize("dtype", ROUNDING)
def test_low_precision_stays_near_the_paper_over_many_steps(dtype: torch.dtype) -> None:
    shape, layout = LAYOUTS["head"]
    parameter, grads = case(shape, steps=20, dtype=dtype)
    expected = adam_mini_reference(parameter.detach(), grads, layout.block_index(shape), **OPTIONS)
    result = trained(parameter, layout, grads, state_dtype="float32")
    torch.testing.assert_close(result.detach().double(), expected, rtol=0, atol=20 * ROUNDING[dtype] * 3)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_blocks_of_one_element_are_torchs_adamw(dtype: torch.dtype, tolerance: float, maximize: bool) -> None:
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3)).to(dtype)
    twin = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3)).to(dtype)
    twin.load_state_dict(model.state_dict())
    ours = AdamMini.for_model(model, rules=[("*", "element")], maximize=maximize, **OPTIONS)
    torchs = torch.optim.AdamW(twin.parameters(), maximize=maximize, foreach=False, **OPTIONS)
    for _ in range(20):
        x = torch.randn(4, 5, dtype=dtype)
        for network, optimizer in ((model, ours), (twin, torchs)):
            optimizer.zero_grad()
            network(x).square().mean().backward()
            optimizer.step()
    for mine, other in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)


def test_a_step_by_hand() -> None:
    # Two rows in one block; all numbers chosen so that the arithmetic can be done on paper:
    # mean of squares (9 + 1 + 1 + 1) / 4 = 3 and at the first step both corrections undo the betas.
    parameter = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.float64))
    parameter.grad = torch.tensor([[3.0, 1.0], [-1.0, 1.0]], dtype=torch.float64)
    optimizer = optimizer_for(parameter, Layout.whole(2), lr=0.1, eps=0.0, weight_decay=0.0)
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), -0.1 * parameter.grad / 3**0.5)
    state = optimizer.state[parameter]
    torch.testing.assert_close(state["exp_avg"], 0.2 * parameter.grad)
    torch.testing.assert_close(state["exp_avg_sq"], torch.full((2, 1), 0.05 * 3, dtype=torch.float64))
    assert state["step"] == 1


def allocated_bytes(function: Callable[[], None]) -> int:
    """The largest amount of memory that a function holds beyond what was there before, on a CPU."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    changes = [e.nbytes() for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for change in changes:
        held += change
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", ["neuron", "tensor", "64 heads"])
def test_a_step_makes_no_temporary_of_the_parameters_size(rule: str, dtype: torch.dtype, fused: bool | None) -> None:
    model = torch.nn.Linear(4096, 4096, bias=False).to(dtype)
    optimizer = AdamMini(model.named_parameters(), partition=partition(model, rules=[("weight", rule)]), fused=fused)
    model.weight.grad = torch.randn_like(model.weight)
    optimizer.step()
    # In float32 under 1% of the weights; in bfloat16 chunks of p, g and m in float32, whatever the weights' size.
    allowed = 640_000 if dtype == torch.float32 else 3 * 4 * update_module._COPIED_CPU + 2**17
    assert allocated_bytes(optimizer.step) <= allowed
