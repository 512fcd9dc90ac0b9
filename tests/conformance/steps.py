"""What a step does, whatever the tensors look like."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference import adam_mini_reference
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from adam_mini_plugins.kernels import cpu
from conformance.registry import check, not_applicable
from conformance.subject import INFO, Case, Regression, blocks_of, same, trained


def went_the_right_way(case: Case, problem: Regression, optimizer: Any, schedulers: list[Any]) -> None:
    first = problem.loss()
    for _ in range(20):
        loss = problem.loss()
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step(*[loss] * isinstance(scheduler, ReduceLROnPlateau))
    assert (problem.loss() > first) if case.goes_up else (problem.loss() < first)


@check("test_forloop_goes_right_direction")
def right_direction(case: Case) -> None:
    """Twenty steps lower the loss, and raise it with `maximize`; contiguous or not, with and without schedulers."""
    for contiguous in (True, False):
        for constructors in ([], *INFO.scheduler_inputs):
            problem = Regression(case, contiguous=contiguous)
            optimizer = case.optimizer(problem.params)
            went_the_right_way(case, problem, optimizer, [make(optimizer) for make in constructors])


@check("test_tensor_lr")
def tensor_hyperparameters(case: Case) -> None:
    """A learning rate or betas that are tensors of one element, of any number of axes, do what the numbers do."""
    for shape in ((), (1,), (1, 1)):
        by_number, by_tensor = Regression(case), Regression(case)
        numbers = {"lr": 2**-7, "betas": (0.875, 0.96875)}  # the same in any precision
        tensors = {"lr": torch.full(shape, 2**-7), "betas": (torch.full(shape, 0.875), torch.full(shape, 0.96875))}
        left, right = case.optimizer(by_number.params, **numbers), case.optimizer(by_tensor.params, **tensors)
        for _ in range(5):
            assert same(by_number.train(left, 1), by_tensor.train(right, 1))


@check()
def follows_the_paper(case: Case) -> None:
    """Parameters are where the paper's algorithm takes them in float64, for blocks of each kind."""
    options = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2, **case.options}
    options = {key: options[key] for key in ("lr", "betas", "eps", "weight_decay")}
    numbers = {**options, "lr": float(options["lr"]), "betas": tuple(map(float, options["betas"]))}
    for kind in ("row", "tensor", "element"):
        problem = Regression(case, dtype=torch.float64)
        optimizer, before, grads = case.optimizer(problem.params, kind=kind), problem.values, []
        for _ in range(4):
            problem.loss()
            grads.append([p.grad.clone() for p in problem.params])
            optimizer.step()
        for number, (p, value) in enumerate(zip(problem.params, before, strict=True)):
            index = blocks_of(p.shape, kind).block_index(p.shape)
            wanted = adam_mini_reference(
                value.cpu(), [of[number].cpu() for of in grads], index, **numbers, maximize=case.goes_up
            )
            tolerance = 1e-3 if case.options.get("state_dtype") == "bfloat16" else 1e-9
            if case.options.get("capturable"):
                tolerance = 1e-6  # the corrections of bias come from counts in float32, as torch's do
            torch.testing.assert_close(p.detach().cpu(), wanted, rtol=tolerance, atol=tolerance)


@check("test_step_is_noop_when_params_have_no_grad")
def no_gradients(case: Case) -> None:
    """A step of parameters that have no gradient changes nothing, makes no state and returns the closure's value."""
    params = [torch.randn(2, 3, device=case.device) for _ in range(2)]
    before = [p.clone() for p in params]
    optimizer = case.optimizer(params)
    assert optimizer.step(lambda: torch.tensor([1])) == 1
    assert same(params, before)
    assert not optimizer.state


@check("test_step_is_noop_for_zero_grads")
def zero_gradients(case: Case) -> None:
    """A step by gradients of zero takes off the decay, and nothing else."""
    for kind in ("row", "tensor", "element"):
        param = case.randn(5, 1).requires_grad_()
        before = param.detach().clone()
        optimizer = case.optimizer([param], kind=kind)
        param.grad = torch.zeros_like(param)
        optimizer.step()
        group = optimizer.param_groups[0]
        torch.testing.assert_close(param.detach(), before * (1 - float(group["lr"]) * group["weight_decay"]))
        if not group["weight_decay"]:
            assert torch.equal(param, before)


@check()
def gradients_are_read_only(case: Case) -> None:
    """A step writes to no gradient."""
    problem, optimizer = trained(case)
    problem.loss()
    before = [p.grad.clone() for p in problem.params]
    optimizer.step()
    assert same([p.grad for p in problem.params], before)


@check()
def closures(case: Case) -> None:
    """A closure, given by place or by name, runs once and with gradients on; what it returns comes back."""
    problem = Regression(case)
    optimizer = case.optimizer(problem.params)
    calls = []

    def closure() -> str:
        calls.append(torch.is_grad_enabled())
        problem.loss()
        return "the loss"

    with torch.no_grad():
        assert optimizer.step(closure) == optimizer.step(closure=closure) == "the loss"
    assert calls == [True, True]
    assert optimizer.step() is None
    assert optimizer.state[problem.weight]["step"] == 3


@check("test_non_empty_state")
def state_is_made(case: Case) -> None:
    """After a step each parameter with a gradient has state, of the kinds that are promised."""
    problem, optimizer = trained(case, 1)
    assert [list(optimizer.state[p])[:3] for p in problem.params] == [["step", "exp_avg", "exp_avg_sq"]] * 2


@check()
def freezing(case: Case) -> None:
    """Layers that are frozen, thawed or without a gradient for some steps go on as if each had its own optimizer."""

    def run(apart: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 3), nn.Sigmoid(), nn.Linear(3, 1), nn.Sigmoid()).to(case.device)
        scalar = torch.zeros((), device=case.device, requires_grad=True)
        empty = torch.zeros(0, 3, device=case.device, requires_grad=True)
        params = [*model.parameters(), scalar, empty]
        optimizers = [case.optimizer([p]) for p in params] if apart else [case.optimizer(params)]
        for step in range(7):
            model[2].requires_grad_(step not in (3, 4))
            for optimizer in optimizers:
                optimizer.zero_grad()
            if step != 2:
                ((model(torch.ones(3, 2, device=case.device)) + scalar).sum() + empty.sum()).backward()
            for optimizer in optimizers:
                optimizer.step()
        return [p.detach() for p in params]

    assert same(run(False), run(True))


@check("test_mixed_device_dtype")
def mixed_dtypes(case: Case) -> None:
    """Parameters of several dtypes in one optimizer move as each would alone, and none is made to be another's."""
    # The first place is the one alone, too: what is rounded at random hangs on the place.
    dtypes = (torch.bfloat16, torch.float64, torch.float32, torch.float16)

    def values() -> list[Tensor]:
        torch.manual_seed(0)
        return [case.randn(2, 3).to(dtype).requires_grad_() for dtype in dtypes]

    together, apart = values(), values()
    optimizers = [case.optimizer(together), *[case.optimizer([p]) for p in apart]]
    for _ in range(7):
        for left, right in zip(together, apart, strict=True):
            left.grad = torch.randn_like(left)
            right.grad = left.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert [p.dtype for p in together] == list(dtypes)
    assert same(together, apart)


@check("test_mixed_device_dtype", devices=("cuda",))
def mixed_devices(case: Case) -> None:
    """Parameters on several devices in one optimizer move as each would alone."""
    values = torch.randn(2, 3)
    params = [values.clone().to(device).requires_grad_() for device in ("cpu", case.device)]
    optimizer = case.optimizer(params)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    torch.testing.assert_close(params[0], params[1].cpu())


@check()
def strides(case: Case) -> None:
    """Parameters and gradients that are not contiguous, each in its own way, move as contiguous ones."""

    def laid_out(values: Tensor, order: tuple[int, ...]) -> Tensor:
        """The same values, in memory with the axes in another order."""
        return (
            values.permute(order)
            .clone(memory_format=torch.contiguous_format)
            .permute([order.index(axis) for axis in range(len(order))])
        )

    values, gradient = case.randn(4, 6, 2), case.randn(4, 6, 2)
    results = []
    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
        param = laid_out(values, order).requires_grad_()
        optimizer = case.optimizer([param])
        for _ in range(3):
            param.grad = laid_out(gradient, order[::-1])
            optimizer.step()
        assert optimizer.state[param]["exp_avg"].stride() == param.stride()
        results.append(param.detach())
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


@check("test_set_default_dtype_works_with_foreach")
def default_dtype(case: Case) -> None:
    """torch's default dtype changes nothing: steps are counted in float32, second moments are as they were."""
    before = torch.get_default_dtype()
    results = []
    for dtype in (torch.float32, torch.float64, torch.float16):
        try:
            torch.set_default_dtype(dtype)
            problem, optimizer = trained(case, 7)
        finally:
            torch.set_default_dtype(before)
        assert {s["step"].dtype for s in optimizer.state.values()} == {torch.float32}
        assert {s["exp_avg_sq"].dtype for s in optimizer.state.values()} == {torch.float32}
        results.append(problem.values)
    assert same(results[0], results[1])
    assert same(results[0], results[2])


def transient_bytes(device: str, act: Any) -> int:
    """The most memory that a call holds beyond what was there before."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        act()
        return torch.cuda.max_memory_allocated() - held
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        act()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@check("test_peak_memory_foreach")
def peak_memory(case: Case) -> None:
    """A step holds no more than two megabytes besides, and no more for 200 small tensors than for 100."""
    if case.options.get("state_dtype") == torch.float64:
        return  # the momentum is read into float32 and written back, a copy more

    def peak(count: int) -> int:
        params = [case.randn(64, 64).requires_grad_() for _ in range(count)]
        optimizer = case.optimizer(params)
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
        return transient_bytes(case.device, optimizer.step)

    fused = case.options["fused"] is not False  # a fused kernel may need no memory at all
    assert fused or peak(1) > 0
    # Where the parameters are 3.3 MB; what grows with their number is less than a fiftieth of a tensor for each.
    assert peak(200) <= min(2**21, peak(100) + 100 * 64 * 64 * 4 / 50)


@check()
def profiler_names(case: Case) -> None:
    """Under the profiler a step goes by the name of its class, and so does `zero_grad`."""
    problem, optimizer = trained(case, 1)
    problem.loss()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        optimizer.step()
        optimizer.zero_grad()
    names = {event.name for event in profiler.events()}
    assert {
        f"Optimizer.step#{type(optimizer).__name__}.step",
        f"Optimizer.zero_grad#{type(optimizer).__name__}.zero_grad",
    } <= names


@check()
def zero_grad(case: Case) -> None:
    """`zero_grad` takes gradients away, and fills them with zeros when asked to."""
    problem, optimizer = trained(case, 1)
    gradient = problem.weight.grad
    optimizer.zero_grad(set_to_none=False)
    assert problem.weight.grad is gradient
    assert not gradient.any()
    optimizer.zero_grad()
    assert problem.weight.grad is None


@check("test_complex", "test_complex_2d", only=("default",))
def complex_is_refused(case: Case) -> None:
    """Complex parameters are refused when the optimizer is made, and by name."""
    param = torch.randn(5, 5, dtype=torch.complex64, device=case.device, requires_grad=True)
    with pytest.raises(TypeError, match=r"complex parameters.*'p0' is torch.complex64"):
        case.optimizer([param])


@check("test_rosenbrock_sparse")
def sparse_is_refused(case: Case) -> None:
    """A sparse gradient is refused, by name, before any parameter has moved."""
    problem = Regression(case)
    optimizer = case.optimizer(problem.params)
    problem.loss()
    problem.bias.grad = problem.bias.grad.to_sparse()
    before = problem.values
    with pytest.raises(RuntimeError, match=r"sparse gradients, got one for p1: build the layer with sparse=False"):
        optimizer.step()
    assert same(problem.values, before)
    assert not optimizer.state


@check(only=("default",))
def differentiable_is_refused(case: Case) -> None:
    """Arguments of AdamW's that AdamMini has no equal to are no arguments, and no options of a group."""
    for option in ("amsgrad", "differentiable"):
        with pytest.raises(TypeError, match=option):
            case.optimizer([case.randn(2).requires_grad_()], **{option: True})
        with pytest.raises(ValueError, match=f"{option}=True"):
            case.optimizer([{"params": [case.randn(2).requires_grad_()], option: True}])


def has_kernel(case: Case, dtype: torch.dtype) -> bool:
    """Whether a fused kernel can step parameters of a dtype: none knows float64 on a CPU, nor what was not built."""
    doubles = torch.float64 in (dtype, case.options.get("state_dtype"))
    return case.device != "cpu" or (cpu.library() is not None and not doubles)


@check("test_fused_matches_forloop")
def fused_matches_the_loop(case: Case) -> None:
    """`fused=True` is the loop over tensors, to rounding, for each dtype, or an error that names what has no kernel."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        results = []
        if not has_kernel(case, dtype):
            problem = Regression(case, dtype=dtype)
            with pytest.raises(RuntimeError, match="fused=True, but no fused kernel can update p0"):
                problem.train(case.optimizer(problem.params, fused=True))
            continue
        for fused in (False, True):
            problem = Regression(case, dtype=dtype)
            optimizer = case.optimizer(problem.params, fused=fused)
            results.append((problem.train(optimizer, 7), [list(optimizer.state[p].values()) for p in problem.params]))
        torch.testing.assert_close(results[1], results[0], rtol=5e-3 if dtype.itemsize == 2 else 1e-5, atol=5e-3)


@check("test_fused_error_on_params_on_meta", only=("default",))
def fused_on_meta(case: Case) -> None:
    """`fused=True` for parameters on the meta device is an error that says so."""
    param = torch.randn(2, 3, device="meta", requires_grad=True)
    param.grad = torch.randn_like(param)
    with pytest.raises((RuntimeError, ValueError), match="fused"):
        case.optimizer([param], fused=True).step()


@check("test_fused_does_not_step_if_foundinf")
def fused_and_found_inf(case: Case) -> None:
    """A step under a scaler that has found an infinity leaves parameters and state alone."""
    param = case.randn(2, 3).requires_grad_()
    scaler = torch.amp.GradScaler(case.device, init_scale=4.0)
    optimizer = case.optimizer([param])
    before = param.detach().clone()
    scaler.scale(param.sum() * torch.inf).backward()
    scaler.step(optimizer)
    assert torch.equal(param, before)
    assert not optimizer.state


not_applicable(
    "The list-at-a-time implementation is the loop over tensors, and the default on a GPU",
    "test_foreach_matches_forloop",
    "test_foreach_large_tensor",
    "test_defaults_changed_to_foreach",
    reason="AdamMini has no `foreach`: the fast way is `fused`",
    topic="steps",
)
not_applicable(
    "A tensor of 2^32 elements",
    "test_fused_large_tensor",
    reason="it takes 64 GB of memory",
    topic="steps",
)
not_applicable(
    "The fused step on a CPU is the one on a GPU",
    "test_fused_cpu_matches_cuda",
    reason="each is compared with the loop over tensors",
    topic="steps",
)
not_applicable(
    "Parameters on two GPUs",
    "test_forloop_goes_right_direction_multigpu",
    "test_mixed_device_dtype",
    reason="no machine that runs these tests has two; CPU and GPU in one optimizer are tested where there is a GPU",
    topic="steps",
)
not_applicable(
    "A step can be differentiated",
    "TestDifferentiableOptimizer",
    reason="AdamMini has no `differentiable`, and refuses it",
    topic="steps",
)
not_applicable(
    "What the loop returns with any tolerance has one type",
    "test_second_order_optims_return_consistent_types",
    reason="it is for optimizers that need a closure",
    topic="steps",
)
not_applicable(
    "A step can be captured in a CUDA graph",
    "TestCudaOptims.test_graph_optims",
    reason="it takes a GPU; tested with the Triton kernels where there is one",
    topic="steps",
)
not_applicable(
    "A compiled step is the plain one",
    "TestCompiledOptimizers.test_correctness",
    reason="tested with `torch.compile` in tests of its own",
    topic="steps",
)
