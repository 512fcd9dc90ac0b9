"""Steps in the backward pass: the same training, with one gradient at a time."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from test_hf import arguments, inner, trainer_for
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.checkpoint import checkpoint

from adam_mini_plugins import AdamMini, partition
from adam_mini_plugins.backward import AdamMiniInBackward


def pair(name: str = "llama") -> tuple[nn.Module, nn.Module, zoo.Batch]:
    """A model of the zoo twice, and its batch."""
    model, batch = zoo.CASES[name].build()
    return model, copy.deepcopy(model), batch


def state_of(optimizer: AdamMini) -> list[Tensor]:
    return [value for _, state in sorted(optimizer.state_dict()["state"].items()) for value in state.values()]


def same(some: Any, others: Any) -> bool:
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """As trainers make them: vectors without decay."""
    named = list(model.named_parameters())
    return [
        {"params": [(n, p) for n, p in named if p.dim() > 1], "weight_decay": 0.1},
        {"params": [(n, p) for n, p in named if p.dim() <= 1], "weight_decay": 0.0, "lr": 1e-2},
    ]


# GPT-2 and T5 tie matrices, Mixtral leaves experts without a gradient, Falcon fuses its projections.
@pytest.mark.parametrize(
    ("name", "dtype", "options"),
    [
        ("llama", torch.bfloat16, {"stochastic_rounding": True}),
        ("gpt2", torch.float32, {"fused": False}),
        ("t5", torch.float32, {"state_dtype": "bfloat16"}),
        ("mixtral", torch.float32, {"maximize": True}),
        ("falcon-multi_query", torch.bfloat16, {}),
    ],
)
def test_training_is_bit_for_bit_the_ordinary_one(name: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    early, late, batch = pair(name)
    early, late = early.to(dtype), late.to(dtype)
    ours = AdamMiniInBackward(groups(early), partition=partition(early), **options)
    ordinary = AdamMini(groups(late), partition=partition(late), **options)
    schedulers = [CosineAnnealingLR(optimizer, 4) for optimizer in (ours, ordinary)]
    losses: list[list[float]] = [[], []]
    for step in range(4):
        for seen, model, optimizer, scheduler in zip(losses, (early, late), (ours, ordinary), schedulers):
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            seen.append(loss.item())
        if step == 1:  # each goes on from the other's checkpoint
            saved = copy.deepcopy(ours.state_dict())
            ours.load_state_dict(ordinary.state_dict())
            ordinary.load_state_dict(saved)
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 4
    assert same(early.parameters(), late.parameters())
    assert same(state_of(ours), state_of(ordinary))


@pytest.mark.parametrize(("optimizer_cls", "most"), [(AdamMiniInBackward, 1), (AdamMini, 21)])
def test_one_gradient_is_alive_at_a_time(optimizer_cls: type[AdamMini], most: int) -> None:
    model, _, batch = pair()
    gradients: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def note(parameter: Tensor) -> None:
        gradients.append(weakref.ref(parameter.grad))
        alive.append(sum(gradient() is not None for gradient in gradients))

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(note)
    optimizer = optimizer_cls.for_model(model)
    model(**batch).loss.backward()
    assert len(alive) == len(list(model.parameters())) == 21
    assert max(alive) == most
    optimizer.step()
    assert all(state["step"] == 1 for state in optimizer.state.values())


def test_a_tied_parameter_is_stepped_once_with_its_whole_gradient() -> None:
    embedding = nn.Embedding(5, 4)
    head = nn.Linear(4, 5, bias=False)
    head.weight = embedding.weight
    model = nn.Sequential(embedding, head)
    optimizer = AdamMiniInBackward.for_model(model, scheme="tensor", betas=(0.0, 0.999))
    loss = model(torch.tensor([1, 2])).square().sum()
    (whole,) = torch.autograd.grad(loss, [head.weight], retain_graph=True)
    loss.backward()
    (state,) = optimizer.state.values()
    assert state["step"] == 1
    torch.testing.assert_close(state["exp_avg"], whole, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_that_are_computed_again_are_those_of_the_forward_pass(reentrant: bool) -> None:
    early = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 1))
    late = copy.deepcopy(early)
    x = torch.randn(3, 4, requires_grad=True)
    for model, cls in ((early, AdamMiniInBackward), (late, AdamMini)):
        optimizer = cls.for_model(model, lr=0.1)
        for _ in range(2):
            out = x
            for layer in model:
                out = checkpoint(layer, out, use_reentrant=reentrant)
            out.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert same(early.parameters(), late.parameters())


def test_a_weight_that_is_needed_after_its_step_is_an_error() -> None:
    layer = nn.Linear(4, 4, bias=False)
    optimizer = AdamMiniInBackward.for_model(layer, scheme="tensor")
    x = torch.randn(2, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        layer(x @ layer.weight.detach()).square().sum().backward()
    assert len(optimizer.state) == 1


def test_a_second_backward_pass_before_step_is_an_error() -> None:
    model, _, batch = pair()
    optimizer = AdamMiniInBackward.for_model(model)
    model(**batch).loss.backward()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"lm_head.weight has got a gradient twice .* optimizer.step\(\) after each"):
        model(**batch).loss.backward()
    assert same(before, model.parameters())
    optimizer.zero_grad()
    optimizer.step()
    model(**batch).loss.backward()
    assert all(state["step"] == 2 for state in optimizer.state.values())


def test_a_grad_scaler_is_refused() -> None:
    layer = nn.Linear(4, 1)
    optimizer = AdamMiniInBackward.for_model(layer)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(layer(torch.ones(1, 4)).sum()).backward()
    with pytest.raises(RuntimeError, match=r"GradScaler has scaled the loss.* train in bfloat16"):
        scaler.step(optimizer)
    off = torch.amp.GradScaler("cpu", enabled=False)
    off.step(optimizer)


def test_a_closure_holds_the_backward_pass() -> None:
    early, late, batch = pair()
    ours, ordinary = AdamMiniInBackward.for_model(early), AdamMini.for_model(late)
    for model, optimizer in ((early, ours), (late, ordinary)):

        def closure(model: nn.Module = model, optimizer: AdamMini = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            return loss

        losses = [optimizer.step(closure).item() for _ in range(3)]
        assert losses == sorted(losses, reverse=True)
        assert len(set(losses)) == 3
    assert same(early.parameters(), late.parameters())


def test_parameters_that_thaw_or_are_added_later() -> None:
    early, late, batch = pair()
    for model in (early, late):
        model.lm_head.requires_grad_(False)
    optimizers = []
    for model, cls in ((early, AdamMiniInBackward), (late, AdamMini)):
        blocks = partition(model)
        named = [(n, p) for n, p in model.named_parameters() if "norm" not in n]
        optimizers.append(cls(named, partition=blocks))
        for step in range(3):
            if step == 1:
                model.lm_head.requires_grad_(True)
                norms = [(n, p) for n, p in model.named_parameters() if "norm" in n]
                optimizers[-1].add_param_group({"params": norms, "lr": 1e-2})
            model.zero_grad()
            model(**batch).loss.backward()
            if step == 2 and cls is AdamMiniInBackward:
                assert all(p.grad is None for p in model.parameters())
            optimizers[-1].step()
    assert same(early.parameters(), late.parameters())
    assert same(state_of(optimizers[0]), state_of(optimizers[1]))


def test_the_last_optimizer_made_steps_until_it_is_deleted() -> None:
    model, _, batch = pair()
    first, last = AdamMiniInBackward.for_model(model), AdamMiniInBackward.for_model(model)
    model(**batch).loss.backward()
    assert not first.state
    assert len(last.state) == 21
    del last
    gc.collect()
    model(**batch).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("way", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))], ids=["copy", "pickle"])
def test_a_copy_of_model_and_optimizer_trains_on(way: Any) -> None:
    model, _, batch = pair()
    optimizer = AdamMiniInBackward.for_model(model)
    for step in range(2):
        if step == 1:
            copied, its_optimizer = way((model, optimizer))
            copied(**batch).loss.backward()
            its_optimizer.step()
        model(**batch).loss.backward()
        optimizer.step()
    assert same(model.parameters(), copied.parameters())
    assert same(state_of(optimizer), state_of(its_optimizer))


# --- in trainers ------------------------------------------------------------------------------------


def test_a_trainers_run_is_the_ordinary_one_and_resumes(tmp_path: Path) -> None:
    options = {"max_grad_norm": 0.0, "save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "cosine"}
    runs = {}
    for name, optim_args in (("ordinary", "value=whole"), ("early", "value=whole,in_backward=true")):
        runs[name] = trainer_for("gpt2", arguments(tmp_path / name, optim_args=optim_args, **options))
        runs[name].train()
    assert type(inner(runs["ordinary"])) is AdamMini
    assert type(inner(runs["early"])) is AdamMiniInBackward
    losses = [[log["loss"] for log in run.state.log_history if "loss" in log] for run in runs.values()]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 3
    assert same(runs["ordinary"].model.parameters(), runs["early"].model.parameters())

    resumed = trainer_for("gpt2", arguments(tmp_path / "on", optim_args="value=whole,in_backward=true", **options))
    resumed.train(resume_from_checkpoint=str(tmp_path / "ordinary" / "checkpoint-3"))
    assert same(resumed.model.parameters(), runs["ordinary"].model.parameters())
    assert same(state_of(inner(resumed)), state_of(inner(runs["ordinary"])))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "does not go with max_grad_norm=1.0: .* set max_grad_norm=0"),
        ({"max_grad_norm": 0.0, "gradient_accumulation_steps": 2}, "gradient_accumulation_steps=2.*steps=1, or leave"),
        (
            {"max_grad_norm": 0.0, "optim_args": "in_backward=yes"},
            "in_backward=yes, and in_backward is one of true, false",
        ),
    ],
)
def test_a_trainer_that_wants_gradients_later_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    trainer = trainer_for("llama", arguments(tmp_path, **{"optim_args": "in_backward=true", **options}))
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("fp16", True, "fp16=True: .* set bf16=True"),
        ("world_size", 2, "world_size=2: .* train in one process"),
        ("deepspeed_plugin", object(), "deepspeed: .* train without it"),
    ],
)
def test_settings_that_need_another_machine_are_refused(
    setting: str, value: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = arguments(tmp_path, optim_args="in_backward=true", max_grad_norm=0.0)
    trainer = trainer_for("llama", args)
    monkeypatch.setattr(type(args), setting, value, raising=False)
    monkeypatch.delitem(vars(args), setting, raising=False)
    with pytest.raises(ValueError, match=message):
        trainer.create_optimizer()


def test_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch", reason="the lightning extra is not installed")
    early, late, batch = pair()

    class Module(lightning.LightningModule):
        def __init__(self, model: nn.Module, cls: type[AdamMini]) -> None:
            super().__init__()
            self.model, self.cls = model, cls

        def training_step(self, _: Any) -> Tensor:
            return self.model(**batch).loss

        def configure_optimizers(self) -> Any:
            optimizer = self.cls.for_model(self)
            return [optimizer], [CosineAnnealingLR(optimizer, 2)]

    def fit(module: nn.Module, **options: Any) -> None:
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        quiet |= {"enable_model_summary": False, "accelerator": "cpu", "max_epochs": 2}
        trainer = lightning.Trainer(default_root_dir=tmp_path, **quiet, **options)
        trainer.fit(module, torch.utils.data.DataLoader(range(2)))

    fit(Module(early, AdamMiniInBackward))
    fit(Module(late, AdamMini))
    assert same(early.parameters(), late.parameters())
    with pytest.raises(RuntimeError, match="has got a gradient twice"):
        fit(Module(early, AdamMiniInBackward), accumulate_grad_batches=2)
