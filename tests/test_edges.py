"""Numbers at the edges of what floating point holds: never worse than torch's AdamW on the same gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from reference import adam_mini_reference
from torch import Tensor, nn
from torch.optim import AdamW

from adam_mini_plugins import AdamMini, kernels, partition
from adam_mini_plugins.kernels import cpu

KINDS = ("element", "neuron", "tensor")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def weights(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Linear(32, 8, bias=False).to(dtype)
    nn.init.uniform_(model.weight, 0.5, 1.0)
    return model


def adam_mini(model: nn.Module, kind: str, **options: Any) -> AdamMini:
    return AdamMini(model.named_parameters(), partition=partition(model, rules=[("*", kind)]), **options)


def gradients(steps: int = 4, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(8, 32, generator=generator, dtype=torch.float64) for _ in range(steps)]


def run(model: nn.Module, optimizer: torch.optim.Optimizer, grads: list[Tensor]) -> Tensor:
    """The weight after a step for each gradient, in float64."""
    for grad in grads:
        model.weight.grad = grad.to(model.weight.dtype)
        optimizer.step()
    return model.weight.detach().double()


@pytest.fixture(params=["eager", "cpu", "triton"])
def fused(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """What makes an optimizer take each of the ways through a step, Triton's in its interpreter."""
    if request.param == "cpu" and cpu.library() is None:
        pytest.skip("this install has no kernel")
    if request.param == "triton":
        pytest.importorskip("triton", minversion="3.4", reason="needs triton, whose interpreter knows numpy 2")
        if torch.cuda.is_available():
            pytest.skip("the interpreter, which takes tensors on a CPU, is not chosen where there is a GPU")
        monkeypatch.setitem(kernels._KERNELS, "cpu", kernels._KERNELS["cuda"])
    return request.param != "eager"


# --- how large and how small gradients may be ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1e-30, 1e-22, 1e-19, 1e-12, 1e-6, 1.0, 1e6, 1e12, 1e17, 1e19, 1e20])
def test_gradients_of_any_size_move_weights_as_in_float64(size: float, kind: str, fused: bool) -> None:
    """Squares of less than 1e-38 are zero in float32, but then eps outweighs their root by far.

    Those of more than 3e38 are infinite; a thousandth of them, which is what beta2 lets in, need not be.
    """
    model, options = weights(), {"lr": 1e-2, "weight_decay": 0.0}
    before, grads = model.weight.detach().clone(), [grad * size for grad in gradients()]
    index = partition(model, rules=[("*", kind)]).block_index("weight")
    moved = run(model, adam_mini(model, kind, fused=fused, **options), grads) - before.double()
    wanted = adam_mini_reference(before, grads, index, **options) - before.double()
    torch.testing.assert_close(moved, wanted, rtol=1e-4, atol=4e-7)  # weights of about one are kept to 6e-8


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1e30, 3e38])
def test_where_squares_overflow_a_block_stands_still_as_an_element_of_adamws_does(
    size: float, kind: str, fused: bool
) -> None:
    model, other = weights(), weights()
    before = model.weight.detach().double()
    grads = [torch.full((8, 32), size)] * 3
    options = {"lr": 1e-2, "weight_decay": 0.0}
    assert torch.equal(run(model, adam_mini(model, kind, fused=fused, **options), grads), before)
    assert torch.equal(run(other, AdamW(other.parameters(), **options), grads), before)


def test_where_squares_overflow_other_blocks_go_on(fused: bool) -> None:
    model, other = weights(), weights()
    spoilt = gradients()
    for grad in spoilt:
        grad[3, 5] = 1e30
    run(model, adam_mini(model, "neuron", fused=fused), spoilt)
    run(other, adam_mini(other, "neuron", fused=fused), gradients())
    others = torch.arange(8) != 3
    assert torch.equal(model.weight[others], other.weight[others])
    assert model.weight.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_subnormal_gradients_are_as_good_as_none(kind: str) -> None:
    smallest = torch.finfo(torch.float32).tiny
    model = weights()
    before = model.weight.detach().double()
    grads = [grad.sign() * smallest / 4 for grad in gradients()]
    assert grads[0].float().abs().min() > 0
    optimizer = adam_mini(model, kind, weight_decay=0.0)
    assert torch.equal(run(model, optimizer, grads), before)
    assert optimizer.state[model.weight]["exp_avg"].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e-7, 6e-5, 1.0, 300.0, 6e4])
def test_low_precision_gradients_whose_squares_their_dtype_cannot_hold(size: float, dtype: torch.dtype) -> None:
    """In float16 squares of 300 overflow and those of 1e-4 are zero, and AdamW's second moment with them."""
    model = weights(dtype)
    before = model.weight.detach().double()
    grads = [torch.full((8, 32), size, dtype=dtype)] * 3
    options = {"lr": 1e-2, "weight_decay": 0.0, "betas": (0.0, 0.999)}  # no momentum, that underflows by itself
    moved = run(model, adam_mini(model, "neuron", **options), grads) - before
    size = grads[0].double().mean().item()  # as the dtype has it
    wanted = torch.full_like(moved, -3 * 1e-2 * size / (size + 1e-8))
    torch.testing.assert_close(moved, wanted, rtol=1e-5, atol=3 * torch.finfo(dtype).eps)


# --- gradients that are zero, or never come -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_block_of_zero_gradients_is_decayed_and_no_more(kind: str, dtype: torch.dtype) -> None:
    for weight_decay in (0.0, 0.1):
        model = weights(dtype)
        before = model.weight.detach().clone().float()
        optimizer = adam_mini(model, kind, lr=0.5, weight_decay=weight_decay)
        run(model, optimizer, [torch.zeros(8, 32)] * 2)
        wanted = before.mul(1 - 0.5 * weight_decay).to(dtype).float().mul(1 - 0.5 * weight_decay).to(dtype)
        assert torch.equal(model.weight, wanted)
        assert not optimizer.state[model.weight]["exp_avg_sq"].any()


def test_a_row_that_never_gets_a_gradient_stays_where_it_is_beside_rows_that_do() -> None:
    """A token that no text has: its block is its own."""
    torch.manual_seed(0)
    model = nn.Embedding(5, 4)
    before = model.weight.detach().clone()
    optimizer = AdamMini.for_model(model, scheme="hessian", lr=0.1, weight_decay=0.0)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.tensor([0, 1, 3])).square().sum().backward()
        optimizer.step()
    assert torch.equal(model.weight[[2, 4]], before[[2, 4]])
    assert not (model.weight[[0, 1, 3]] == before[[0, 1, 3]]).any()


def test_a_block_whose_gradient_comes_late_starts_at_the_count_of_its_tensor() -> None:
    """As an element of AdamW's does: bias correction goes by the tensor's steps."""
    model, other = weights(), weights()
    grads = gradients(6)
    for grad in grads[:4]:
        grad[2] = 0
    index = partition(model, rules=[("*", "neuron")]).block_index("weight")
    wanted = adam_mini_reference(model.weight.detach(), grads, index)
    torch.testing.assert_close(run(model, adam_mini(model, "neuron"), grads), wanted, rtol=1e-5, atol=1e-6)
    run(other, AdamW(other.parameters()), grads)
    assert (model.weight[2] - weights().weight[2]).abs().max() < 3 * (other.weight[2] - weights().weight[2]).abs().max()


# --- numbers that are none, and scalers that notice ------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("unscaled", [True, False])
def test_a_scaler_skips_a_step_whole_and_the_next_one_is_taken(bad: float, fresh: bool, unscaled: bool) -> None:
    model = weights()
    optimizer = adam_mini(model, "neuron")
    if not fresh:
        run(model, optimizer, gradients(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

    def scaled_step(factor: float) -> None:
        optimizer.zero_grad()
        scaler.scale((model.weight.sum(dim=1) * torch.tensor([1.0] * 7 + [factor])).sum()).backward()
        if unscaled:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()

    before = model.weight.detach().clone()
    state = {k: v.clone() for k, v in optimizer.state[model.weight].items()} if not fresh else {}
    optimizer.state.pop(model.weight, None) if fresh else None
    scaled_step(bad)
    assert torch.equal(model.weight, before)
    assert scaler.get_scale() == 4.0
    now = optimizer.state.get(model.weight, {})
    assert now.keys() == state.keys()
    assert all(torch.equal(now[key], state[key]) for key in state)
    scaled_step(1.0)
    assert not (model.weight == before).any()
    assert optimizer.state[model.weight]["step"] == (1 if fresh else 3)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_without_a_scaler_a_bad_gradient_spoils_its_block_and_no_other(bad: float) -> None:
    model = weights()
    grads = gradients(2)
    grads[0][1, 7] = bad
    run(model, adam_mini(model, "neuron"), grads)
    spoilt = model.weight.isnan().any(dim=1)
    assert spoilt.tolist() == [row == 1 for row in range(8)]


# --- hyper-parameters at their ends ----------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [10**6, 2**24])
def test_after_a_million_steps_bias_correction_is_none(steps: int) -> None:
    """Counted in float32, which stops at 2^24: there both corrections have been 1 for long."""
    model = weights()
    optimizer = adam_mini(model, "neuron", lr=1e-2, weight_decay=0.0)
    run(model, optimizer, gradients(1))
    state = optimizer.state[model.weight]
    state["step"].fill_(steps)
    before, grad = model.weight.detach().double(), gradients(2)[1]
    m = state["exp_avg"].double() * 0.9 + 0.1 * grad
    v = state["exp_avg_sq"].double() * 0.999 + 0.001 * grad.float().double().square().mean(dim=1, keepdim=True)
    moved = run(model, optimizer, [grad]) - before
    torch.testing.assert_close(moved, -1e-2 * m / (v.sqrt() + 1e-8), rtol=1e-4, atol=4e-7)
    assert state["step"].item() == min(steps + 1, 2**24)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("betas", [(0.0, 0.0), (0.999999, 0.99999999), (0.0, 0.999)])
def test_betas_at_their_ends_follow_the_paper(betas: tuple[float, float], kind: str) -> None:
    model, grads = weights(), gradients(5)
    index = partition(model, rules=[("*", kind)]).block_index("weight")
    wanted = adam_mini_reference(model.weight.detach(), grads, index, betas=betas)
    got = run(model, adam_mini(model, kind, betas=betas), grads)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_a_learning_rate_of_zero_moves_nothing_and_goes_on_averaging() -> None:
    model, other = weights(), weights()
    before = model.weight.detach().double()
    still, moving = adam_mini(model, "neuron", lr=0.0, weight_decay=0.1), adam_mini(other, "neuron")
    assert torch.equal(run(model, still, gradients()), before)
    run(other, moving, gradients())
    for key, value in moving.state[other.weight].items():
        assert torch.equal(still.state[model.weight][key], value)


@pytest.mark.parametrize("kind", KINDS)
def test_an_eps_of_zero_is_fine_where_a_block_has_a_gradient_and_as_adamw_where_it_has_none(kind: str) -> None:
    model, options = weights(), {"lr": 1e-2, "weight_decay": 0.0, "eps": 0.0}
    grads = gradients()
    index = partition(model, rules=[("*", kind)]).block_index("weight")
    wanted = adam_mini_reference(model.weight.detach(), grads, index, **options)
    torch.testing.assert_close(run(model, adam_mini(model, kind, **options), grads), wanted, rtol=1e-5, atol=1e-6)

    other, zeros = weights(), [torch.zeros(8, 32)]
    assert run(model, adam_mini(model, kind, **options), zeros).isnan().all()  # 0 / 0
    assert run(other, AdamW(other.parameters(), **options), zeros).isnan().all()
    if kind == "neuron":  # one element with a gradient is enough for its block, and not for AdamW's other elements
        model, other = weights(), weights()
        few = torch.zeros(8, 32)
        few[:, 0] = 1.0
        assert run(model, adam_mini(model, kind, **options), [few]).isfinite().all()
        assert run(other, AdamW(other.parameters(), **options), [few]).isnan().any()


@pytest.mark.parametrize("state_dtype", [None, "bfloat16"])
def test_the_second_moment_of_bfloat16_parameters_does_not_stall(state_dtype: str | None) -> None:
    """Of a bfloat16 one a thousandth of the mean, added at each step, soon rounds away."""
    steps = 2000
    model, other = weights(torch.bfloat16), weights(torch.bfloat16)
    options = {"lr": 1e-3, "weight_decay": 0.0}
    optimizer = adam_mini(model, "neuron", state_dtype=state_dtype, **options)
    theirs = AdamW(other.parameters(), foreach=False, **options)
    for m, o in ((model, optimizer), (other, theirs)):
        run(m, o, [torch.ones(8, 32)] * steps)
    wanted = 1 - 0.999**steps
    torch.testing.assert_close(
        optimizer.state[model.weight]["exp_avg_sq"], torch.full((8, 1), wanted), rtol=1e-4, atol=0
    )
    assert theirs.state[other.weight]["exp_avg_sq"].max() < 0.6 * wanted
