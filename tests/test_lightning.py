"""The door into Lightning: what the callback makes of `configure_optimizers`, and that nothing else changes."""

from __future__ import annotations

import copy
import importlib
import logging
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, lr_scheduler
from torch.utils.data import DataLoader, TensorDataset
from transformers import get_cosine_schedule_with_warmup

pytest.importorskip("lightning", reason="the lightning extra is not installed")
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Callback,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.tuner import Tuner

from adam_mini_plugins import AdamMini, PartitionError, partition
from adam_mini_plugins.lightning import AdamMiniOptimizer

STEPS = 6
Make = Callable[..., Optimizer]


@pytest.fixture(autouse=True)
def _schedulers_warn_of_nothing() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(lr_scheduler|optimizer.step|learning rate).*")
        yield


class Block(nn.Module):
    """Attention of torch's, of 4 heads, and a head for three classes."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 4, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.classes = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.classes(self.norm(self.attention(x, x, x, need_weights=False)[0]).mean(dim=1))


class Plain(LightningModule):
    """A module whose optimizers the test gives, and which notes the learning rates of every step."""

    def __init__(self, configure: Callable[[Make, Plain], Any], make: Make = AdamW) -> None:
        super().__init__()
        self.block = Block()
        self.configure, self.make, self.batch_size, self.lr = configure, make, 4, 1e-2
        self.rates: list[list[float]] = []

    def configure_optimizers(self) -> Any:
        return self.configure(self.make, self)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.rates.append([float(group["lr"]) for o in self.trainer.optimizers for group in o.param_groups])
        loss = nn.functional.cross_entropy(self.block(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def train_dataloader(self) -> DataLoader:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(24, 5, 8, generator=generator)
        return DataLoader(TensorDataset(x, (x.sum(dim=(1, 2)) > 0).long()), batch_size=self.batch_size)


class Manual(Plain):
    """The same with manual optimisation and two optimizers that take turns, as in a GAN; it holds the first itself."""

    automatic_optimization = False

    def configure_optimizers(self) -> Any:
        configured = super().configure_optimizers()
        first = configured[0]
        self.first = first[0] if isinstance(first, list) else first["optimizer"] if isinstance(first, dict) else first
        return configured

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        for optimizer in self.optimizers():
            loss = super().training_step(batch, batch_idx)
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)
        for scheduler in self.lr_schedulers() or []:
            scheduler.step()


def groups(module: nn.Module) -> list[dict[str, Any]]:
    """Two groups, as with weight decay for matrices alone; one has a learning rate and betas of its own."""
    decayed = [p for p in module.parameters() if p.ndim > 1]
    others = [p for p in module.parameters() if p.ndim < 2]
    return [
        {"params": decayed, "weight_decay": 0.1},
        {"params": others, "weight_decay": 0.0, "lr": 5e-3, "betas": (0.8, 0.95), "eps": 1e-6, "name": "others"},
    ]


def one(make: Make, module: Plain) -> Optimizer:
    return make(groups(module), lr=module.lr)


def each_step(scheduler: Any) -> dict[str, Any]:
    return {"scheduler": scheduler, "interval": "step"}


def scheduled(build: Callable[[Optimizer], Any], **more: Any) -> Callable[[Make, Plain], Any]:
    def configure(make: Make, module: Plain) -> dict[str, Any]:
        optimizer = one(make, module)
        return {"optimizer": optimizer, "lr_scheduler": {**each_step(build(optimizer)), **more}}

    return configure


def lists(make: Make, module: Plain) -> Any:
    optimizer = one(make, module)
    return [optimizer], [each_step(lr_scheduler.CosineAnnealingLR(optimizer, STEPS))]


def plateau(make: Make, module: Plain) -> Any:
    optimizer = one(make, module)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=10.0)
    return {"optimizer": optimizer, "lr_scheduler": {**each_step(scheduler), "monitor": "loss"}}


def warmed_up(optimizer: Optimizer) -> Any:
    first = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2)
    return lr_scheduler.SequentialLR(optimizer, [first, lr_scheduler.CosineAnnealingLR(optimizer, 4)], [2])


def chained(optimizer: Optimizer) -> Any:
    parts = [lr_scheduler.ExponentialLR(optimizer, 0.9), lr_scheduler.StepLR(optimizer, 2)]
    return lr_scheduler.ChainedScheduler(parts, optimizer)


def two(make: Make, module: Plain) -> list[Optimizer]:
    return [make(module.block.attention.parameters(), lr=1e-2), make(module.block.classes.parameters(), lr=1e-3)]


def two_scheduled(make: Make, module: Plain) -> Any:
    optimizers = two(make, module)
    return optimizers, [lr_scheduler.StepLR(optimizer, 2) for optimizer in optimizers]


def two_dicts(make: Make, module: Plain) -> Any:
    optimizers, schedulers = two_scheduled(make, module)
    return [{"optimizer": o, "lr_scheduler": s} for o, s in zip(optimizers, schedulers)]


FORMS: dict[str, tuple[type[Plain], Callable[[Make, Plain], Any]]] = {
    "optimizer": (Plain, one),
    "list": (Plain, lambda make, module: [one(make, module)]),
    "tuple": (Plain, lambda make, module: (one(make, module),)),
    "two lists": (Plain, lists),
    "dict": (Plain, lambda make, module: {"optimizer": one(make, module)}),
    "list of dicts": (Plain, lambda make, module: [scheduled(warmed_up)(make, module)]),
    "named parameters": (Plain, lambda make, module: make(module.named_parameters(), lr=1e-2)),
    "tensor rate": (Plain, lambda make, module: make(module.parameters(), lr=torch.tensor(1e-2))),
    "ascent": (Plain, lambda make, module: make(module.parameters(), lr=1e-3, maximize=True)),
    "cosine": (Plain, scheduled(lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS))),
    "lambda": (Plain, scheduled(lambda o: lr_scheduler.LambdaLR(o, [lambda s: 0.9**s, lambda s: 1 / (s + 1)]))),
    "transformers": (Plain, scheduled(lambda o: get_cosine_schedule_with_warmup(o, 2, STEPS))),
    "one cycle": (Plain, scheduled(lambda o: lr_scheduler.OneCycleLR(o, [0.1, 0.2], total_steps=STEPS + 1))),
    "sequential": (Plain, scheduled(warmed_up)),
    "chained": (Plain, scheduled(chained)),
    "plateau": (Plain, plateau),
    "two optimizers": (Manual, two),
    "two lists of two": (Manual, two_scheduled),
    "two dicts": (Manual, two_dicts),
}


def fit(module: LightningModule, *callbacks: Callback, ckpt_path: str | None = None, **options: Any) -> Trainer:
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    settings = {"accelerator": "cpu", "max_steps": STEPS, "logger": False, **quiet, **options}
    if isinstance(module, Manual):  # Lightning counts a step for each optimizer
        settings["max_steps"] *= 2
    trainer = Trainer(callbacks=list(callbacks), **settings)
    trainer.fit(module, ckpt_path=ckpt_path)
    return trainer


def built(cls: type[Plain], configure: Callable[[Make, Plain], Any], written_out: bool = False) -> Plain:
    """A module with the weights of seed 0, which returns AdamW or the same written out as AdamMini."""
    torch.manual_seed(0)
    module = cls(configure)
    if written_out:
        module.make = lambda params, **options: AdamMini(params, partition=partition(module), **options)
    return module


def assert_alike(one: nn.Module, other: nn.Module) -> None:
    expected = other.state_dict()
    assert expected
    for name, value in one.state_dict().items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("form", FORMS)
def test_each_form_ends_bit_for_bit_where_adam_mini_written_out_does(form: str) -> None:
    start, converted, written, plain = (built(*FORMS[form], written_out=i == 2) for i in range(4))
    ours, theirs, adamw = fit(converted, AdamMiniOptimizer()), fit(written), fit(plain)
    for optimizer, expected in zip(ours.optimizers, theirs.optimizers, strict=True):
        assert type(optimizer) is AdamMini
        for group, other in zip(optimizer.param_groups, expected.param_groups, strict=True):
            assert {k: v for k, v in group.items() if k != "params"} == {
                k: v for k, v in other.items() if k != "params"
            }
        assert all(state["step"] == STEPS for state in optimizer.state.values())
        assert len(optimizer.state) == sum(len(group["params"]) for group in optimizer.param_groups)
    assert_alike(converted, written)
    assert any(not torch.equal(p, q) for p, q in zip(start.parameters(), converted.parameters()))
    assert any(not torch.equal(p, q) for p, q in zip(plain.parameters(), converted.parameters()))
    # Value by value the learning rates are what AdamW had.
    assert converted.rates == plain.rates
    assert [type(o) for o in adamw.optimizers] == [AdamW] * len(adamw.optimizers)
    if isinstance(converted, Manual):
        assert converted.first is ours.optimizers[0]


def test_two_groups_under_a_cosine_have_the_rates_of_the_formula() -> None:
    module = built(*FORMS["cosine"])
    fit(module, AdamMiniOptimizer())
    cosine = [
        (1 + torch.cos(torch.tensor(torch.pi * step / STEPS, dtype=torch.float64)).item()) / 2 for step in range(6)
    ]
    assert module.rates == [pytest.approx([1e-2 * factor, 5e-3 * factor]) for factor in cosine]


OPTIONS: dict[str, dict[str, Any]] = {
    "bf16-mixed": {"precision": "bf16-mixed"},
    "bf16-true": {"precision": "bf16-true"},
    "accumulation": {"accumulate_grad_batches": 2},
    "clipped by norm": {"gradient_clip_val": 0.1},
    "clipped by value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    "clipped, mixed": {"gradient_clip_val": 0.1, "precision": "bf16-mixed"},
    "64-true": {"precision": "64-true"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_trainer_options_work_as_with_adam_mini_written_out(name: str) -> None:
    converted, written, without = (built(*FORMS["cosine"], written_out=i == 1) for i in range(3))
    ours = fit(converted, AdamMiniOptimizer(), **OPTIONS[name])
    fit(written, **OPTIONS[name])
    fit(without, AdamMiniOptimizer())
    assert_alike(converted, written)
    assert any(not torch.equal(p, q) for p, q in zip(converted.parameters(), without.parameters()))
    for parameter, state in ours.optimizers[0].state.items():
        assert state["exp_avg"].dtype == parameter.dtype
        assert state["exp_avg_sq"].dtype == (torch.float64 if name == "64-true" else torch.float32)
    assert next(converted.parameters()).dtype == {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(
        name, torch.float32
    )


def test_16_mixed_scales_as_it_does_for_an_optimizer_that_is_not_fused() -> None:
    """Lightning leaves unscaling to an optimizer that says it does it, as fused AdamW; AdamMini does not."""
    from lightning.pytorch.plugins import MixedPrecision

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    module = built(Plain, lambda make, module: make(groups(module), lr=1e-2, fused=make is AdamW))
    written = built(Plain, one, written_out=True)
    for it, callbacks in ((module, [AdamMiniOptimizer()]), (written, [])):
        plugin = MixedPrecision("16-mixed", "cpu", scaler=copy.deepcopy(scaler))
        fit(it, *callbacks, plugins=[plugin], gradient_clip_val=0.1)
    assert_alike(module, written)
    assert not any(torch.equal(p, q) for p, q in zip(module.parameters(), built(*FORMS["optimizer"]).parameters()))


@pytest.mark.parametrize("written_out", [False, True], ids=["callback", "for_model"])
def test_a_resumed_run_ends_bit_for_bit_where_an_uninterrupted_one_ends(written_out: bool, tmp_path: Path) -> None:
    callbacks = [] if written_out else [AdamMiniOptimizer()]
    whole, rest = (built(*FORMS["sequential"], written_out=written_out) for _ in range(2))
    for module in (whole, rest):
        module.batch_size = 24 * 2 // STEPS  # two epochs: Lightning resumes at the start of one
    options = {"enable_checkpointing": True, "max_steps": -1, "max_epochs": 2}
    save = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=STEPS // 2)
    ours = fit(whole, *callbacks, save, **options)
    resumed = fit(rest, *callbacks, copy.deepcopy(save), ckpt_path=str(tmp_path / "step=3.ckpt"), **options)
    assert resumed.global_step == STEPS
    assert rest.rates == whole.rates[STEPS // 2 :]
    assert_alike(rest, whole)
    for p, q in zip(rest.parameters(), whole.parameters()):
        for key, value in ours.optimizers[0].state[q].items():
            assert torch.equal(resumed.optimizers[0].state[p][key], value), key


def test_an_adamw_checkpoint_is_refused_with_the_way_out(tmp_path: Path) -> None:
    stopped = fit(built(*FORMS["optimizer"]), max_steps=2)
    stopped.save_checkpoint(tmp_path / "adamw.ckpt")
    with pytest.raises(ValueError, match="not AdamMini's but Adam's or AdamW's"):
        fit(built(*FORMS["optimizer"]), AdamMiniOptimizer(), ckpt_path=str(tmp_path / "adamw.ckpt"))


@pytest.mark.parametrize("written_out", [False, True], ids=["callback", "for_model"])
def test_weight_averaging(written_out: bool) -> None:
    module = built(*FORMS["optimizer"], written_out=written_out)
    averaging = StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=2, annealing_epochs=1)
    starts: list[list[Tensor]] = []

    class Starts(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            starts.append([p.detach().clone() for p in pl_module.parameters()])

    callbacks = [] if written_out else [AdamMiniOptimizer()]
    trainer = fit(module, averaging, Starts(), *callbacks, max_steps=-1, max_epochs=4)
    assert type(trainer.optimizers[0]) is AdamMini
    # Lightning averages the weights at the starts of the epochs, from the second on.
    for parameter, *of_epochs in zip(module.parameters(), *starts[1:]):
        torch.testing.assert_close(parameter, torch.stack(of_epochs).mean(dim=0))
        assert not torch.equal(of_epochs[0], of_epochs[1])


@pytest.mark.parametrize("as_callback", [True, False])
def test_the_learning_rate_finder(as_callback: bool, tmp_path: Path) -> None:
    def settled(written_out: bool) -> Plain:
        module = built(Plain, one, written_out)
        mini = [] if written_out else [AdamMiniOptimizer()]
        if as_callback:
            finder = LearningRateFinder(1e-4, 1e-1, num_training_steps=24)
            fit(module, finder, *mini, default_root_dir=tmp_path)
        else:
            quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
            trainer = Trainer(
                max_steps=STEPS, accelerator="cpu", logger=False, callbacks=mini, default_root_dir=tmp_path, **quiet
            )
            Tuner(trainer).lr_find(module, min_lr=1e-4, max_lr=1e-1, num_training=24)
            trainer.fit(module)
        return module

    converted, written = settled(False), settled(True)
    assert converted.lr == written.lr != 1e-2
    assert_alike(converted, written)


def test_the_batch_size_finder(tmp_path: Path) -> None:
    modules = [built(*FORMS["cosine"], written_out=written_out) for written_out in (False, True)]
    for module, callbacks in zip(modules, ([AdamMiniOptimizer()], [])):
        finder = BatchSizeFinder(steps_per_trial=1, init_val=2, max_trials=3)
        trainer = fit(module, finder, *callbacks, default_root_dir=tmp_path)
        assert type(trainer.optimizers[0]) is AdamMini
    assert modules[0].batch_size == modules[1].batch_size == 8
    assert_alike(*modules)


class Words(LightningModule):
    """A LightningModule around a model of transformers'."""

    def __init__(self, case: str = "llama") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model, self.batch = zoo.CASES[case].build()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.model(**self.batch).loss

    def train_dataloader(self) -> DataLoader:
        return DataLoader(range(STEPS))

    def configure_optimizers(self) -> Any:
        return AdamW(self.parameters(), lr=1e-2)


class WordsBuiltLate(Words):
    def __init__(self) -> None:
        super().__init__()
        self.late, self.model = self.model, None

    def __setattr__(self, name: str, value: Any) -> None:  # keeps the layers out of sight until configure_model
        vars(self).__setitem__(name, value) if name == "late" else super().__setattr__(name, value)

    def configure_model(self) -> None:
        if self.model is None:
            self.model = self.late


class WordsWrittenOut(Words):
    def configure_optimizers(self) -> Any:
        return AdamMini.for_model(self, lr=1e-2)


@pytest.mark.parametrize("late", [False, True])
def test_a_model_of_transformers(late: bool) -> None:
    converted, written = WordsBuiltLate() if late else Words(), WordsWrittenOut()
    trainer = fit(converted, AdamMiniOptimizer())
    fit(written)
    assert_alike(converted, written)
    blocks = trainer.optimizers[0].partition
    direct = partition(zoo.CASES["llama"].build()[0])
    assert len(blocks) == len(direct)
    for name in direct:
        assert blocks[f"model.{name}"].layout == direct[name].layout


def test_options_reach_the_partition_and_the_state() -> None:
    rules = [["model.model.layers.*.mlp.up_proj.weight", "4 heads"]]
    module = Words()
    trainer = fit(module, AdamMiniOptimizer(value="whole", rules=rules, state_dtype="bfloat16"))
    blocks = trainer.optimizers[0].partition
    assert blocks.num_blocks("model.model.layers.0.self_attn.v_proj.weight") == 1
    assert blocks.num_blocks("model.model.layers.1.mlp.up_proj.weight") == 4
    assert all(state["exp_avg"].dtype == torch.bfloat16 for state in trainer.optimizers[0].state.values())
    assert fit(Words(), AdamMiniOptimizer("tensor")).optimizers[0].partition.scheme == "tensor"


class OtherAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.towards, self.onto = nn.Linear(8, 8), nn.Linear(8, 8)


def test_attention_that_nobody_knows_is_an_error_until_rules_tell() -> None:
    def with_attention() -> Plain:
        module = built(Plain, lambda make, module: make(module.parameters()))
        module.block.add_module("own", OtherAttention())
        return module

    message = r"no blocks for block.own.towards.weight .*Say what its blocks are with\s+rules=\[\('block.own"
    with pytest.raises(PartitionError, match=message):
        fit(with_attention(), AdamMiniOptimizer())
    fit(with_attention(), AdamMiniOptimizer(rules=[("*.towards.weight", "4 heads"), ("*.onto.weight", "4 heads")]))


class OwnAdamW(AdamW):
    pass


REFUSED: dict[str, tuple[Callable[[nn.Module], Any], type[Exception], str]] = {
    "sgd": (lambda m: SGD(m.parameters(), 0.1), TypeError, "Plain returned torch.optim.sgd.SGD, .*others=\"keep\""),
    "derived": (lambda m: OwnAdamW(m.parameters()), TypeError, "returned test_lightning.OwnAdamW"),
    "one of two": (lambda m: [AdamW(m.parameters()), SGD(m.parameters(), 0.1)], TypeError, "torch.optim.sgd.SGD"),
    "amsgrad": (lambda m: AdamW(m.parameters(), amsgrad=True), ValueError, "group 0 .* amsgrad=True.*amsgrad=False"),
    "differentiable": (lambda m: AdamW(m.parameters(), differentiable=True), ValueError, "differentiable=True"),
    "l2": (lambda m: Adam([{"params": m.parameters(), "weight_decay": 0.1}]), ValueError, "weight_decay=0.1.*AdamW"),
    "not the module's": (lambda m: AdamW([nn.Parameter(torch.ones(3))]), ValueError, "not know a tensor of shape"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_converted_is_an_error_and_is_left_as_it_was(name: str) -> None:
    build, error, message = REFUSED[name]
    made: list[Any] = []

    def configure(make: Make, module: Plain) -> Any:
        made.append(build(module))
        return made[0]

    module = built(Plain, configure)
    with pytest.raises(error, match=message):
        fit(module, AdamMiniOptimizer())
    twin = build(built(Plain, configure))
    for optimizer, other in zip(*(it if isinstance(it, list) else [it] for it in (made[0], twin))):
        assert type(optimizer) is type(other)
        assert [group.keys() for group in optimizer.param_groups] == [group.keys() for group in other.param_groups]
    assert "configure_optimizers" not in vars(module)


def test_an_optimizer_that_has_stepped_goes_on_from_there() -> None:
    def stepped(make: Make, module: Plain) -> Optimizer:
        optimizer = make(module.parameters())
        for p in module.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        return optimizer

    trainer = fit(built(Plain, stepped), AdamMiniOptimizer())
    assert {float(state["step"]) for state in trainer.optimizers[0].state.values()} == {STEPS + 1.0}


def test_an_optimizer_that_has_another_step_is_an_error() -> None:
    def replaced(make: Make, module: Plain) -> Optimizer:
        optimizer = make(module.parameters())
        optimizer.step = lambda closure=None: None
        return optimizer

    with pytest.raises(ValueError, match=r"has been replaced by .*replaced.<locals>.<lambda>"):
        fit(built(Plain, replaced), AdamMiniOptimizer())


def test_others_may_be_kept() -> None:
    def configure(make: Make, module: Plain) -> list[Optimizer]:
        return [make(module.block.attention.parameters()), SGD(module.block.classes.parameters(), 0.1)]

    trainer = fit(built(Manual, configure), AdamMiniOptimizer(others="keep"))
    assert [type(optimizer) for optimizer in trainer.optimizers] == [AdamMini, SGD]
    with pytest.raises(ValueError, match="others must be one of 'error', 'keep', got 'drop'"):
        AdamMiniOptimizer(others="drop")


@pytest.mark.parametrize("cls", [Adam, AdamW])
def test_adam_without_decay_and_fused_adamw_convert(cls: type[Optimizer]) -> None:
    options = {"weight_decay": 0.0, "fused": True}
    module = built(Plain, lambda make, module: cls(module.parameters(), lr=1e-2, **options))
    written = built(Plain, lambda make, module: make(module.parameters(), lr=1e-2, weight_decay=0.0), written_out=True)
    trainer = fit(module, AdamMiniOptimizer())
    fit(written)
    assert_alike(module, written)
    (optimizer,) = trainer.optimizers
    assert not {"_step_supports_amp_scaling", "foreach"} & {*vars(optimizer), *optimizer.param_groups[0]}
    assert optimizer.param_groups[0]["fused"] is None  # AdamW's is none of AdamMini's business


def test_hooks_and_attributes_of_the_optimizer_survive() -> None:
    calls: list[str] = []

    def configure(make: Make, module: Plain) -> Optimizer:
        optimizer = make(module.parameters())
        optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
        optimizer.register_step_post_hook(lambda *_: calls.append("post"))
        optimizer.mine = 7
        return optimizer

    trainer = fit(built(Plain, configure), AdamMiniOptimizer())
    assert calls == ["pre", "post"] * STEPS
    assert trainer.optimizers[0].mine == 7


def test_no_optimizer_is_none() -> None:
    with pytest.warns(UserWarning, match="this fit will run with no optimizer"):
        fit(built(Plain, lambda make, module: None), AdamMiniOptimizer(), max_steps=-1, max_epochs=1)


def test_fitting_again_and_testing_leave_the_module_as_it_was() -> None:
    callback = AdamMiniOptimizer()
    module = built(*FORMS["cosine"])
    for _ in range(2):
        assert type(fit(module, callback).optimizers[0]) is AdamMini
        assert "configure_optimizers" not in vars(module)
    assert type(fit(module).optimizers[0]) is AdamW
    own = lambda: AdamW(module.parameters())  # noqa: E731 (as LightningCLI sets one)
    module.configure_optimizers = own
    assert type(fit(module, callback).optimizers[0]) is AdamMini
    assert module.configure_optimizers is own


def test_what_was_converted_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "adam_mini_plugins"):
        fit(built(*FORMS["two optimizers"]), AdamMiniOptimizer())
    blocks = (4 + 4 + 8) + 24 + 8 + 8 + 1 + 8 + 3 + 3  # query, key and value; then weight and bias of each layer
    assert [r.message for r in caplog.records if "converted" in r.message] == [
        f"2 of 2 optimizers converted: Partition(scheme='hessian', 8 tensors, {blocks} blocks)"
    ]


CONFIG = """
trainer:
  max_epochs: 1
  limit_train_batches: 3
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  callbacks:
    - class_path: adam_mini_plugins.lightning.AdamMiniOptimizer
      init_args: {scheme: hessian, rules: [[layer.weight, tensor]], state_dtype: bfloat16}
    - class_path: adam_mini_plugins.callbacks.lightning.OptimizerMemoryMonitor
optimizer:
  class_path: torch.optim.AdamW
  init_args: {lr: 0.01, weight_decay: 0.2}
lr_scheduler:
  class_path: torch.optim.lr_scheduler.ExponentialLR
  init_args: {gamma: 0.5}
"""


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_lightning_cli_takes_the_callbacks_from_yaml(
    package: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("jsonargparse", reason="jsonargparse, which LightningCLI needs, is not installed")
    monkeypatch.setattr(sys, "argv", ["program"])
    for name in ("lightning_base", "lightning", "callbacks.lightning"):  # the CLI imports them, after Lightning
        monkeypatch.delitem(sys.modules, f"adam_mini_plugins.{name}", raising=False)
    their = importlib.import_module(package)

    class Module(their.LightningModule):
        def __init__(self, width: int = 4) -> None:
            super().__init__()
            self.layer = nn.Linear(width, 2)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.layer(batch).square().mean()

        def train_dataloader(self) -> DataLoader:
            return DataLoader(torch.ones(8, 4))

    (tmp_path / "config.yaml").write_text(CONFIG)
    command_line = ["fit", "--config", str(tmp_path / "config.yaml")]
    cli_class = importlib.import_module(f"{package}.cli").LightningCLI
    with caplog.at_level(logging.INFO):
        cli = cli_class(Module, args=command_line, save_config_callback=None, auto_configure_optimizers=True)
    (optimizer,) = cli.trainer.optimizers
    (group,) = optimizer.param_groups
    assert type(optimizer) is AdamMini
    assert (group["lr"], group["initial_lr"], group["weight_decay"]) == (0.005, 0.01, 0.2)
    assert [optimizer.partition.num_blocks(name) for name in ("layer.weight", "layer.bias")] == [1, 2]
    assert {state["exp_avg"].dtype for state in optimizer.state.values()} == {torch.bfloat16}
    assert sum("Memory of the optimizers' state" in record.message for record in caplog.records) == 1


PROGRAM = """
from adam_mini_plugins.lightning import AdamMiniOptimizer
from adam_mini_plugins.callbacks.lightning import OptimizerMemoryMonitor
from PACKAGE import Callback, LightningModule, Trainer
import logging, torch

class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 2)
    def training_step(self, batch, batch_idx):
        return self.layer(batch).square().mean()
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())

callbacks = [AdamMiniOptimizer(), OptimizerMemoryMonitor()]
assert all(isinstance(callback, Callback) for callback in callbacks)
options = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
trainer = Trainer(max_steps=2, accelerator="cpu", callbacks=callbacks, **options)
logging.getLogger("PACKAGE").setLevel(logging.ERROR)  # as people silence it
trainer.fit(Module(), torch.utils.data.DataLoader(torch.ones(8, 4)))
print(type(trainer.optimizers[0]).__name__, type(callbacks[0]).__name__, callbacks[1].memory.state_bytes)
"""


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_either_lightning_takes_callbacks_that_were_imported_before_it(package: str) -> None:
    code = PROGRAM.replace("PACKAGE", package)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    # Momenta of 8 + 2 numbers, a second moment for each of 2 + 2 rows, two counts.
    assert done.stdout.split() == ["AdamMini", "AdamMiniOptimizer", str(4 * (10 + 4 + 2))], done.stderr
    assert "Memory of" not in done.stderr
