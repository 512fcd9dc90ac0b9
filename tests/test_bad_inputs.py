"""Bad input: each is an error of ours that names the thing and says what to do, and leaves everything as it was.

`python tests/test_bad_inputs.py` writes docs/errors.md, the table of what was tried and what it said.
"""

from __future__ import annotations

import contextlib
import copy
import io
import os
import re
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from alike import alike
from torch import Tensor, nn

import adam_mini_plugins
from adam_mini_plugins import AdamMini, partition
from adam_mini_plugins.convert import adam_mini_

DOCUMENT = Path(__file__).parents[1] / "docs" / "errors.md"
PACKAGE = str(Path(adam_mini_plugins.__file__).parent)
HEAD = """\
# What bad input says

Each of these was tried on a model and an optimizer in the middle of a training: the error came before anything had
changed, in the model, in the optimizer's groups or in its state. `python tests/test_bad_inputs.py` writes this page,
and a test compares it with what is said.
"""


@dataclass
class World:
    """A model and its optimizer after a step."""

    model: nn.Sequential = field(init=False)
    optimizer: AdamMini = field(init=False)

    def __post_init__(self) -> None:
        self.model = network()
        self.optimizer = AdamMini.for_model(self.model, scheme="hessian", lr=0.1)
        trained(self.model, self.optimizer)

    @property
    def blocks(self) -> Any:
        return self.optimizer.partition

    def saved(self) -> dict[str, Any]:
        return copy.deepcopy(self.optimizer.state_dict())


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3))


class Odd(nn.Module):
    """A parameter of a form that no layer has."""

    def __init__(self) -> None:
        super().__init__()
        self.odd = nn.Parameter(torch.ones(2, 3, 4, 5))


def trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    model(torch.ones(2, 4)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


Act = Callable[[World], Any]


@dataclass(frozen=True)
class Bad:
    """A bad input.

    Args:
        what: In words.
        provoke: Gives it.
        error: The type of the error.
        names: What the message has to say, in this order: the thing, and what to do.
    """

    what: str
    provoke: Act
    error: type[BaseException]
    names: tuple[str, ...]


def made(**options: Any) -> Act:
    return lambda world: AdamMini(world.model.named_parameters(), partition=world.blocks, **options)


def of(params: Callable[[World], Any]) -> Act:
    return lambda world: AdamMini(params(world), partition=world.blocks)


def cut(**options: Any) -> Act:
    return lambda world: partition(world.model, **options)


def added(group: Callable[[World], Any]) -> Act:
    return lambda world: world.optimizer.add_param_group(group(world))


def loaded(change: Callable[[dict[str, Any]], Any]) -> Act:
    """Loads a state after a change, or what the change returns."""

    def load(world: World) -> None:
        state_dict = world.saved()
        changed = change(state_dict)
        world.optimizer.load_state_dict(state_dict if changed is None else changed)

    return load


def other_state(cls: type[torch.optim.Optimizer], **options: Any) -> Act:
    def load(world: World) -> None:
        model = network()
        world.optimizer.load_state_dict(trained(model, cls(model.parameters(), **options)).state_dict())

    return load


def in_group(**entries: Any) -> Act:
    return loaded(lambda saved: saved["param_groups"][0].update(entries))


def in_state(**entries: Any) -> Act:
    return loaded(lambda saved: saved["state"][0].update(entries))


def resized(world: World) -> None:
    flat = nn.Parameter(torch.zeros(24))
    flat.grad = torch.ones(24)
    optimizer = AdamMini.for_model(network(), scheme="hessian")
    optimizer.param_groups[0]["params"][0] = flat
    optimizer.step()


def marked(mark: str) -> Act:
    def act(world: World) -> None:
        model = network()
        setattr(model[0].weight, mark, True)
        AdamMini(model.named_parameters(), partition=partition(model))

    return act


def merged(world: World) -> None:
    optimizer = AdamMini.for_model(network(), scheme="hessian")
    optimizer.param_groups[0]["params"] = [nn.Parameter(torch.zeros(99))]
    optimizer.step()


def gradient(name: str, value: Callable[[Tensor], Tensor]) -> Act:
    """A step with a gradient that can't be used."""

    def act(world: World) -> None:
        parameter = world.model.get_parameter(name)
        parameter.grad = value(parameter.detach())
        try:
            world.optimizer.step()
        finally:
            parameter.grad = None

    return act


def converted(cls: type[torch.optim.Optimizer], step: Callable[[], None] | None = None, **options: Any) -> Act:
    def act(world: World) -> None:
        model = network()
        optimizer = cls(model.parameters(), **options)
        if step is not None:
            optimizer.step = step
        adam_mini_(optimizer, partition(model))

    return act


def trainer(optim_args: str) -> Act:
    """transformers' Trainer, about to train."""

    def act(world: World) -> None:
        pytest.importorskip("transformers", reason="the hf extra is not installed")
        from transformers import Trainer, TrainingArguments

        import adam_mini_plugins.hf  # noqa: F401

        with tempfile.TemporaryDirectory() as folder:
            args = TrainingArguments(folder, optim="adam_mini", optim_args=optim_args, use_cpu=True, report_to=[])
            Trainer(world.model, args).create_optimizer()

    return act


def lightning(configured: Callable[[Any], Any], **options: Any) -> Act:
    """Lightning's Trainer, about to train."""

    def act(world: World) -> None:
        pytest.importorskip("lightning", reason="the lightning extra is not installed")
        from lightning.pytorch import LightningModule, Trainer

        from adam_mini_plugins.lightning import AdamMiniOptimizer

        class Module(LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.net = network()

            def training_step(self, batch: Any, _: int) -> Tensor:
                return self.net(batch[0]).sum()

            def configure_optimizers(self) -> Any:
                return configured(self)

        data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(2, 4)))
        silent = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = Trainer(
            max_steps=1,
            accelerator="cpu",
            callbacks=[AdamMiniOptimizer(**options)],
            enable_checkpointing=False,
            **silent,
        )
        trainer.fit(Module(), data)

    return act


def command(*arguments: str) -> Act:
    """The command line, in a folder with a file of Python and an empty folder."""

    def act(world: World) -> None:
        pytest.importorskip("transformers", reason="the cli extra is not installed")
        from adam_mini_plugins.cli import main

        said, here = io.StringIO(), Path.cwd()
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(said):
            os.chdir(folder)
            try:
                Path("model.py").write_text("from torch import nn\n\ndef build():\n    return nn.Linear(3, 3)\n")
                Path("empty").mkdir()
                main(arguments)
            except SystemExit as exit:
                exit.args = (said.getvalue().strip().splitlines()[-1],)
                raise
            finally:
                os.chdir(here)

    return act


def adamw(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters())


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters())


V, T, R = ValueError, TypeError, RuntimeError
LOAD = "the state to load"
ANEW = "Load an earlier checkpoint, or start with the model's weights alone"
TABLE: dict[str, list[Bad]] = {
    "Building the optimizer": [
        Bad("a negative learning rate", made(lr=-1.0), V, ("lr must be 0 or more", "-1.0")),
        Bad("a learning rate that is no number", made(lr=float("nan")), V, ("lr must be 0 or more", "nan")),
        Bad("an infinite learning rate", made(lr=float("inf")), V, ("lr must be finite", "inf")),
        Bad("a learning rate as text, as YAML reads 1e-3", made(lr="1e-3"), T, ("lr must be a number", "'1e-3'")),
        Bad("a learning rate for each of two", made(lr=torch.ones(2)), V, ("lr", "must have one element", "(2,)")),
        Bad("one beta", made(betas=0.9), V, ("betas must be two numbers", "0.9")),
        Bad("three betas", made(betas=(0.9, 0.9, 0.9)), V, ("betas must be two numbers", "(0.9, 0.9, 0.9)")),
        Bad("a beta of 1", made(betas=(1.0, 0.9)), V, ("betas[0] must be at least 0 and less than 1", "1.0")),
        Bad("a beta as text", made(betas=(0.9, "b")), T, ("betas[1] must be a number", "'b'")),
        Bad("no eps", made(eps=None), T, ("eps must be a number", "None")),
        Bad("a negative decay", made(weight_decay=-0.1), V, ("weight_decay must be 0 or more", "-0.1")),
        Bad("`fused` in words", made(fused="yes"), V, ("fused must be None, True or False", "'yes'")),
        Bad("a seed that is no whole number", made(seed=0.5), V, ("seed must be a whole number", "0.5")),
        Bad("a state of integers", made(state_dtype=torch.int8), V, ("state_dtype must be", "torch.bfloat16", "int8")),
        Bad("a dtype that is none", made(state_dtype="bf16"), V, ("state_dtype must be", "torch.bfloat16", "'bf16'")),
        Bad("no partition", lambda w: AdamMini(w.model.parameters()), V, ("AdamMini needs the blocks", "for_model(")),
        Bad(
            "a model as partition",
            lambda w: AdamMini(w.model.parameters(), partition=w.model),  # type: ignore[arg-type]
            T,
            ("partition must be a Partition, got Sequential", "for_model("),
        ),
        Bad(
            "a set of parameters",
            of(lambda w: set(w.model.parameters())),
            T,
            ("parameters need an order", "pass a list"),
        ),
        Bad("a mapping", of(lambda w: dict(w.model.named_parameters())), T, ("got str", "its items()")),
        Bad("numbers for parameters", of(lambda w: [1.0]), T, ("got float", "pass tensors")),
        Bad("a pair the wrong way round", of(lambda w: [(w.model[0].weight, "w")]), T, ("(name, tensor)", "'str'")),
        Bad(
            "a result for a parameter",
            of(lambda w: [w.model[0].weight * 2]),
            V,
            ("non-leaf", "pass what it is made of"),
        ),
        Bad(
            "a parameter in two groups",
            of(lambda w: [{"params": [w.model[0].weight]}, {"params": [w.model[0].weight]}]),
            V,
            ("more than one parameter group: 0.weight", "leave them in one"),
        ),
        Bad("a group without parameters", of(lambda w: [{"lr": 0.1}]), T, ("needs 'params'", "['lr']")),
        Bad(
            "a group with `amsgrad`",
            of(lambda w: [{"params": w.model.parameters(), "amsgrad": True}]),
            V,
            ("amsgrad", "leave it out"),
        ),
        Bad(
            "another model's partition", of(lambda w: nn.Linear(3, 3).named_parameters()), V, ("'weight'", "for_model(")
        ),
        Bad(
            "a layer of another size",
            of(lambda w: [("0.weight", nn.Parameter(torch.ones(6, 5)))]),
            V,
            ("'0.weight'", "(6, 5)", "(6, 4)", "for_model("),
        ),
        Bad(
            "complex parameters",
            of(lambda w: [("c", torch.ones(2, dtype=torch.cfloat, requires_grad=True))]),
            T,
            ("complex", "'c'"),
        ),
        Bad(
            "a model all frozen",
            lambda w: AdamMini.for_model(network().requires_grad_(False)),
            V,
            ("all 6 are frozen", "requires_grad_(True)"),
        ),
        Bad(
            "parameters for the model",
            lambda w: AdamMini.for_model(w.model.parameters()),
            T,
            ("torch.nn.Module, got generator", "pass the model"),
        ),  # type: ignore[arg-type]
    ],
    "Adding a group": [
        Bad("a list", added(lambda w: [torch.ones(2)]), T, ("must be a dict", "list")),
        Bad(
            "a parameter that the model did not have",
            added(lambda w: {"params": nn.Parameter(torch.ones(2))}),
            V,
            ("shape (2,)", "partition(model)"),
        ),
        Bad(
            "a parameter that it has",
            added(lambda w: {"params": w.model[0].weight}),
            V,
            ("0.weight", "leave them in one"),
        ),
        Bad("an option out of range", added(lambda w: {"params": [], "lr": -1}), V, ("lr must be 0 or more", "-1")),
    ],
    "Partitioning a model": [
        Bad("an unknown scheme", cut(scheme="best"), V, ("scheme must be one of 'auto'", "'best'")),
        Bad("an unknown cut of values", cut(value="half"), V, ("value must be one of 'neuron'", "'half'")),
        Bad(
            "rules as a mapping",
            cut(rules={"*": "neuron"}),
            T,
            ("rules must be a list of pairs", "list(rules.items())"),
        ),
        Bad(
            "a rule of three",
            cut(rules=[("*", "neuron", 1)]),
            T,
            ("rules must be a list of pairs", "('*', 'neuron', 1)"),
        ),
        Bad(
            "a rule that matches nothing",
            cut(rules=[("0.wieght", "neuron")]),
            V,
            ("'0.wieght' matches no parameter", "nearest is '0.weight'"),
        ),
        Bad("blocks that are none", cut(rules=[("*", "columns")]), V, ("'columns'", "'neuron', 'tensor', 'element'")),
        Bad(
            "heads that do not divide",
            cut(rules=[("0.weight", "5 heads")]),
            V,
            ("'5 heads'", "0.weight of shape (6, 4)"),
        ),
        Bad("no heads", cut(rules=[("0.weight", "0 heads")]), V, ("'0 heads'", "0.weight of shape (6, 4)")),
        Bad(
            "a probe of a model without attention",
            cut(probe=torch.ones(1, 4)),
            V,
            ("no attention in Sequential", "leave probe= out"),
        ),
        Bad(
            "a tensor that no rule fits",
            lambda w: partition(Odd(), scheme="hessian"),
            V,
            ("odd of shape (2, 3, 4, 5)", "rules=[('odd', ...)]"),
        ),
    ],
    "Loading a state": [
        Bad("a path", loaded(lambda _: "optimizer.pt"), T, (LOAD, "got str", "torch.load first")),
        Bad("nothing", loaded(lambda _: {}), V, (LOAD, "no 'state'", "nothing", "pass what state_dict() returned")),
        Bad(
            "a model's weights",
            loaded(lambda _: network().state_dict()),
            V,
            (LOAD, "'0.weight'", "pass what state_dict()"),
        ),
        Bad(
            "a whole checkpoint",
            loaded(lambda s: {"model": {}, "optimizer": s}),
            V,
            ("'model', 'optimizer'", "the optimizer's part"),
        ),
        Bad(
            "a state without groups",
            loaded(lambda s: {"state": s["state"]}),
            V,
            ("no 'param_groups'", "pass what state_dict()"),
        ),
        Bad(
            "a list of states",
            loaded(lambda s: s.update(state=[])),
            V,
            ("no 'state' that is a dict", "pass what state_dict()"),
        ),
        Bad("AdamW's state", other_state(torch.optim.AdamW), V, (LOAD, "Adam's or AdamW's", "AdamMini.from_adamw(")),
        Bad(
            "SGD's state",
            other_state(torch.optim.SGD, momentum=0.9),
            V,
            (LOAD, "momentum_buffer", "Resume with what saved it"),
        ),
        Bad(
            "no groups",
            loaded(lambda s: s.update(param_groups=[])),
            V,
            ("0 parameter groups, this optimizer 1", "build"),
        ),
        Bad("a group that is none", loaded(lambda s: s.update(param_groups=[1])), V, ("group 0", ANEW)),
        Bad(
            "a group that lacks a parameter",
            loaded(lambda s: (s["param_groups"][0]["params"].pop(), s["state"].pop(5), None)[-1]),
            V,
            ("5 parameters", "has 6", "build it with"),
        ),
        Bad(
            "a group with one more",
            loaded(lambda s: s["param_groups"][0]["params"].append(6)),
            V,
            ("7 parameters", "has 6", "build it with"),
        ),
        Bad("a parameter counted twice", in_group(params=[0, 1, 2, 3, 4, 4]), V, ("5 different parameters", ANEW)),
        Bad(
            "state of a parameter in no group",
            loaded(lambda s: s["state"].update({6: s["state"][0]})),
            V,
            ("state for 1", ANEW),
        ),
        Bad("blocks for fewer parameters", in_group(blocks=["0: 6"]), V, ("group 0", "'blocks'", ANEW)),
        Bad("names for fewer parameters", in_group(param_names=["a"]), V, ("group 0", "'param_names'", ANEW)),
        Bad(
            "other blocks",
            loaded(lambda _: AdamMini.for_model(network(), scheme="tensor").state_dict()),
            V,
            ("0.weight has blocks '0: 6', but '0: (6)'", "scheme, value, rules"),
        ),
        Bad(
            "a group without a learning rate",
            loaded(lambda s: s["param_groups"][0].pop("lr") and None),
            V,
            ("group 0", "no 'lr'", ANEW),
        ),
        Bad("a negative learning rate", in_group(lr=-1.0), V, ("group 0", "lr must be 0 or more", ANEW)),
        Bad("betas out of range", in_group(betas=(2.0, 3.0)), V, ("group 0", "betas[0]", ANEW)),
        Bad("a momentum of no dtype", in_group(state_dtype="junk"), V, ("group 0", "state_dtype", "'junk'", ANEW)),
        Bad(
            "a state without the second moment",
            loaded(lambda s: s["state"][0].pop("exp_avg_sq") is None or None),
            V,
            ("no 'exp_avg_sq' for 0.weight", ANEW),
        ),
        Bad(
            "a state that is none", loaded(lambda s: s["state"].update({0: 5})), V, ("no 'exp_avg' for 0.weight", ANEW)
        ),
        Bad(
            "a momentum of another shape",
            in_state(exp_avg=torch.zeros(3, 3)),
            V,
            ("exp_avg of 0.weight", "(3, 3)", "(6, 4)", "saved with this model"),
        ),
        Bad(
            "AdamW's second moment",
            in_state(exp_avg_sq=torch.zeros(6, 4)),
            V,
            ("exp_avg_sq of 0.weight", "(6, 4)", "(6, 1)", "saved with this model"),
        ),
        Bad("a momentum as a list", in_state(exp_avg=[0.0]), V, ("exp_avg of 0.weight", "list", ANEW)),
        Bad(
            "a momentum of integers",
            in_state(exp_avg=torch.zeros(6, 4, dtype=torch.int)),
            V,
            ("exp_avg of 0.weight", "torch.int32", ANEW),
        ),
        Bad(
            "a momentum without its numbers",
            in_state(exp_avg=torch.zeros(6, 4, device="meta")),
            V,
            ("exp_avg of 0.weight", "meta", ANEW),
        ),
        Bad(
            "negative mean squares",
            in_state(exp_avg_sq=-torch.ones(6, 1)),
            V,
            ("exp_avg_sq of 0.weight", "negative", ANEW),
        ),
        Bad(
            "a count that is no number", in_state(step=torch.tensor(float("nan"))), V, ("step of 0.weight", "nan", ANEW)
        ),
        Bad("a negative count", in_state(step=-1.0), V, ("step of 0.weight", "-1.0", ANEW)),
        Bad("a count of two", in_state(step=torch.ones(2)), V, ("step of 0.weight", "(2,)", "saved with this model")),
        Bad("a count in words", in_state(step="three"), V, ("step of 0.weight", "str", ANEW)),
    ],
    "Making a step": [
        Bad("a sparse gradient", gradient("2.weight", lambda p: p.to_sparse()), R, ("2.weight", "sparse=False")),
        Bad("a parameter that was resized", resized, R, ("0.weight has shape (24,)", "use FSDP2")),
        Bad("parameters that DeepSpeed ZeRO has merged", merged, R, ("1 tensors for 6 names", "use FSDP2")),
        Bad("parameters of FSDP1", marked("_fsdp_flattened"), R, ("0.weight", "FSDP1", "use FSDP2")),
    ],
    "Turning AdamW into AdamMini": [
        Bad("SGD", converted(torch.optim.SGD), T, ("torch's Adam and AdamW", "got SGD")),
        Bad(
            "AdamW whose `step` was replaced",
            converted(torch.optim.AdamW, step=print),
            V,
            ("step of this AdamW has been replaced by print", "replace it afterwards"),
        ),
        Bad("`amsgrad`", converted(torch.optim.AdamW, amsgrad=True), V, ("amsgrad=True", "set amsgrad=False")),
        Bad(
            "Adam's decay, that is not decoupled",
            converted(torch.optim.Adam, weight_decay=0.1),
            V,
            ("weight_decay=0.1", "use torch.optim.AdamW"),
        ),
    ],
    "transformers' Trainer": [
        Bad("an unknown option", trainer("valeu=whole"), V, ("'valeu'", "scheme, value, state_dtype")),
        Bad("an unknown choice", trainer("value=rows"), V, ("value must be one of", "'rows'")),
        Bad(
            "a dtype that is none", trainer("state_dtype=bf16"), V, ("state_dtype must be", "torch.bfloat16", "'bf16'")
        ),
    ],
    "Lightning's Trainer": [
        Bad("an argument that is no choice", lightning(adamw, others="drop"), V, ("others must be one of", "'drop'")),
        Bad("SGD", lightning(sgd), T, ("SGD", 'others="keep"')),
        Bad(
            "a rule that matches nothing",
            lightning(adamw, rules=[("net.9.*", "neuron")]),
            V,
            ("'net.9.*' matches no parameter",),
        ),
        Bad("an unknown scheme", lightning(adamw, scheme="best"), V, ("scheme must be one of", "'best'")),
    ],
    "The command line": [
        Bad(
            "a preset misspelt",
            command("plan", "lama-3-8b"),
            SystemExit,
            ("no preset and no path 'lama-3-8b'", "A model is"),
        ),
        Bad("a folder without a config", command("inspect", "empty"), SystemExit, ("'empty' has no config.json",)),
        Bad(
            "a file without a function", command("inspect", "model.py"), SystemExit, ("'model.py'", "model.py:FUNCTION")
        ),
        Bad(
            "a function that is not there",
            command("inspect", "model.py:biuld"),
            SystemExit,
            ("no 'biuld'", "it has 'build'"),
        ),
        Bad("a file that is not there", command("plan", "nothing.py:build"), SystemExit, ("no file 'nothing.py'",)),
        Bad(
            "a rule without blocks",
            command("inspect", "model.py:build", "--rule", "weight"),
            SystemExit,
            ("--rule", "PATTERN=BLOCKS", "'weight'"),
        ),
        Bad(
            "a rule that matches nothing",
            command("inspect", "model.py:build", "--rule", "wieght=neuron"),
            SystemExit,
            ("'wieght'", "nearest is 'weight'", "--rule"),
        ),
        Bad(
            "no processes",
            command("plan", "model.py:build", "--shards", "0"),
            SystemExit,
            ("--shards", "must be 1 or more", "0"),
        ),
    ],
}

ROWS = [bad for rows in TABLE.values() for bad in rows]


def is_ours(error: BaseException) -> bool:
    """Whether the error was raised in this package, or by argparse for an error of ours."""
    raised = traceback.extract_tb(error.__traceback__)[-1].filename
    ours = raised.startswith(PACKAGE) or "callbacks" in raised
    return ours or (isinstance(error, SystemExit) and error.__context__ is not None)


@cache
def said(bad: Bad) -> str:
    """What a bad input says.

    Raises:
        AssertionError: It says nothing, not of what is wrong or not what to do, or something has changed.
    """
    world = World()
    state, weights = world.saved(), copy.deepcopy(world.model.state_dict())
    held = [p for group in world.optimizer.param_groups for p in group["params"]]
    with pytest.raises(bad.error) as caught:
        bad.provoke(world)
    assert is_ours(caught.value), traceback.format_exception(caught.value)
    message = str(caught.value)
    assert re.search(".*?".join(map(re.escape, bad.names)), message, re.DOTALL), message
    now = [p for group in world.optimizer.param_groups for p in group["params"]]
    assert all(p is q for p, q in zip(held, now, strict=True))
    assert alike(world.optimizer.state_dict(), state)
    assert alike(world.model.state_dict(), weights)
    trained(world.model, world.optimizer)  # and it goes on
    return message


@pytest.mark.parametrize("number", range(len(ROWS)), ids=lambda number: ROWS[number].what)
def test_it_says_what_is_wrong_and_changes_nothing(number: int) -> None:
    said(ROWS[number])


def document() -> str:
    lines = [HEAD, f"{len(ROWS)} inputs."]
    for title, rows in TABLE.items():
        lines += ["", f"## {title}", "", "| what was given | error | what it said |", "| --- | --- | --- |"]
        for bad in rows:
            message = said(bad).replace("|", "\\|").replace("\n", " ")
            error = "exit 2" if bad.error is SystemExit else f"`{bad.error.__name__}`"
            lines.append(f"| {bad.what} | {error} | {message} |")
    return "\n".join([*lines, ""])


def test_the_document_is_what_was_said() -> None:
    assert DOCUMENT.read_text() == document(), "run python tests/test_bad_inputs.py"


def test_there_are_enough_of_them_and_no_two_alike() -> None:
    assert len({(title, bad.what) for title, rows in TABLE.items() for bad in rows}) == len(ROWS) >= 40


if __name__ == "__main__":
    DOCUMENT.write_text(document())
