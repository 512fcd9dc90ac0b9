"""Models for the commands, from whatever a user names them by, on the meta device: shapes without weights.

A source is a preset (``llama-3-8b``), a model on the hub (``owner/name``), a folder with a ``config.json``, such
a file itself, or a factory of one's own (``package.module:function``, ``path/to/file.py:function``).
"""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import os
import sys
import sysconfig
import textwrap
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ..blocks import Partition, PartitionError, partition
from ..blocks.partition import SCHEMES, VALUES
from .presets import PRESETS
from .support import CommandError, need

KINDS = (
    "a preset, a model on the hub (owner/name), a folder or file with a config (config.json), or a function that "
    "returns a model (package.module:function, file.py:function)"
)
# For a config that doesn't say which class it is of: the first of these tasks that it has a class for.
TASKS = ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MASKED_LM", "IMAGE_CLASSIFICATION")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say which model it is, and how it is partitioned."""
    parser.add_argument("source", metavar="MODEL", help=KINDS)
    parser.add_argument("--lora", metavar="RANK", type=positive, help="with LoRA of this rank on all linear layers")
    parser.add_argument("--scheme", choices=SCHEMES, default="auto", help="as for partition() (default: auto)")
    parser.add_argument("--value", choices=VALUES, default="neuron", help="as for partition() (default: neuron)")
    parser.add_argument(
        "--rule",
        dest="rules",
        metavar="PATTERN=BLOCKS",
        type=_rule,
        action="append",
        default=[],
        help="a rule of your own, tried first: 'neuron', 'tensor', 'element' or '16 heads' for names like PATTERN",
    )
    names = "\n  ".join(textwrap.wrap(", ".join(PRESETS), width=90, break_on_hyphens=False))
    parser.epilog = f"{parser.epilog or ''}\n\npresets:\n  {names}".strip()
    parser.formatter_class = argparse.RawDescriptionHelpFormatter


def load(arguments: argparse.Namespace, dtype: torch.dtype | None = None) -> tuple[nn.Module, Partition]:
    """Builds the model that the options name, and its partition.

    Args:
        arguments: Parsed options of :func:`add_options`.
        dtype: The dtype to which floating-point parameters are cast before adapters are added; as they
            come by default.

    Raises:
        CommandError: There is no such model, it can't be built, or its blocks can't be told.
    """
    model = build(arguments.source)
    if dtype is not None:
        model = model.to(dtype)
    if arguments.lora is not None:
        model = _with_lora(model, arguments.lora)
    try:
        return model, partition(model, arguments.scheme, arguments.value, arguments.rules)
    except PartitionError as error:
        raise CommandError(f"{error}. Here rules are options: --rule 'PATTERN=BLOCKS'") from error


def build(source: str) -> nn.Module:
    """Builds a model without weights.

    Raises:
        CommandError: There is no such model, or it can't be built.
    """
    path = Path(source)
    if path.exists():
        model = _from_config(_config_at(path))
    elif ":" in source:
        model = _from_factory(source)
    elif source.lower() in PRESETS:
        architecture, sizes = PRESETS[source.lower()]
        cls = getattr(need("transformers"), architecture)
        model = _from_config(cls.config_class(architectures=[architecture], **sizes))
    elif source.count("/") == 1 and not source.endswith((".json", ".py", "/")):
        model = _from_config(_read_config(source))
    else:
        close = difflib.get_close_matches(source.lower(), PRESETS, n=3, cutoff=0.4)
        nearest = f"; the nearest presets are {', '.join(close)}" if close else ""
        raise CommandError(f"no preset and no path {source!r}{nearest}. A model is {KINDS}")
    if not any(True for _ in model.parameters()):
        raise CommandError(f"{source}: {type(model).__name__} has no parameters")
    if any(nn.parameter.is_lazy(p) for p in model.parameters()):
        raise CommandError(f"{source}: {type(model).__name__} has lazy layers, whose shapes a first batch decides")
    return model


def tiny(source: str) -> tuple[nn.Module, dict[str, Any]]:
    """Builds a tiny instance of a model's architecture, with weights, and a batch that it takes.

    Raises:
        CommandError: The source is no model of transformers, or there is no tiny instance of it that runs.
    """
    model = build(source)
    if not isinstance(model, need("transformers").PreTrainedModel):
        raise CommandError(
            f"{source} is a {type(model).__name__}, and only of transformers' models a tiny instance can be made; of "
            "your own make one yourself: partition(model, probe=batch) reads its heads off its attention, and "
            "adam_mini_plugins.hessian.measure_hessian takes its Hessian"
        )
    from .tiny import CannotRunError
    from .tiny import build as make_tiny

    try:
        small, batch = make_tiny(type(model), model.config)
    except CannotRunError as error:
        raise CommandError(f"no tiny instance of {type(model).__name__} can be built: {error}") from error
    if isinstance(batch, CannotRunError):
        raise CommandError(f"no input was found that a tiny {type(model).__name__} takes: {batch}")
    return small, batch


def describe(source: str, model: nn.Module) -> dict[str, Any]:
    """What is said of a model beside any figures about it."""
    base: Any = getattr(model, "get_base_model", None)  # what stands under adapters
    inner = base() if callable(base) else model
    return {
        "source": source,
        "class": type(inner).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def headline(model: dict[str, Any]) -> str:
    """The same in a line."""
    frozen = "" if model["trainable"] == model["parameters"] else f", {model['trainable']:,} of them trained"
    return f"{model['source']}: {model['class']}, {model['parameters']:,} parameters{frozen}"


def _config_at(path: Path) -> Any:
    if path.is_dir() and not (path / "config.json").exists():
        raise CommandError(f"the folder {str(path)!r} has no config.json")
    if path.is_file() and path.suffix != ".json":
        hint = f"; for a model that it makes: {path}:FUNCTION" if path.suffix == ".py" else ""
        raise CommandError(f"{str(path)!r} is not a config.json{hint}")
    return _read_config(str(path))


def _read_config(name: str) -> Any:
    auto = need("transformers").AutoConfig
    return _attempt(f"the config of {name}", lambda: auto.from_pretrained(name, trust_remote_code=False))


def _from_config(config: Any) -> nn.Module:
    """The model of the class that the config names, so that its head is included."""
    transformers = need("transformers")
    named = list(getattr(config, "architectures", None) or ())
    cls = next((getattr(transformers, name) for name in named if hasattr(transformers, name)), None)
    if named and cls is None:
        raise CommandError(
            f"transformers {transformers.__version__} has no class {', '.join(named)}; if it is code of your own, "
            "give a function that returns the model: file.py:function"
        )
    mappings = [getattr(transformers, f"MODEL_FOR_{task}_MAPPING") for task in TASKS] + [transformers.MODEL_MAPPING]
    cls = cls or next((mapping[type(config)] for mapping in mappings if type(config) in mapping), None)
    if cls is None:
        raise CommandError(f"transformers has no model class for a {type(config).__name__} without architectures")
    return _on_meta(f"a {cls.__name__} of this {type(config).__name__}", lambda: cls(config))


def _from_factory(source: str) -> nn.Module:
    """What a function of the user's returns, or a model that a module holds."""
    place, _, name = source.rpartition(":")
    module = _import_file(Path(place)) if place.endswith(".py") else _import_module(place)
    if not hasattr(module, name):
        close = difflib.get_close_matches(name, vars(module), n=1)
        raise CommandError(f"{place} has no {name!r}{f'; it has {close[0]!r}' if close else ''}")
    found = getattr(module, name)
    model = found if isinstance(found, nn.Module) or not callable(found) else _on_meta(f"{source}()", found)
    if not isinstance(model, nn.Module):
        what = f"is a {type(found).__name__}" if model is found else f"returned a {type(model).__name__}"
        raise CommandError(f"{source} {what}; what is needed is a torch.nn.Module or a function that returns one")
    return model


def _import_file(path: Path) -> ModuleType:
    if not path.exists():
        raise CommandError(f"no file {str(path)!r}")
    sys.path.insert(0, str(path.resolve().parent))  # as for a script, so that it finds its neighbours
    # A name of its own: a file called types.py must not take the place of another module.
    spec = importlib.util.spec_from_file_location("__model__", path)
    if spec is None or spec.loader is None:
        raise CommandError(f"{str(path)!r} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    _attempt(f"importing {path}", lambda: spec.loader.exec_module(module))  # type: ignore[union-attr]
    return module


def _import_module(name: str) -> ModuleType:
    sys.path.insert(0, os.getcwd())  # as for python -m
    return _attempt(f"importing {name}", lambda: importlib.import_module(name))


def _with_lora(model: nn.Module, rank: int) -> nn.Module:
    peft = need("peft")
    config = peft.LoraConfig(r=rank, target_modules="all-linear")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft at transformers' API; nothing that a user could mend
        return _on_meta("LoRA", lambda: peft.get_peft_model(model, config, low_cpu_mem_usage=True))


def _on_meta(what: str, make: Callable[[], Any]) -> Any:
    def make_on_meta() -> Any:
        with torch.device("meta"):
            return make()

    return _attempt(what, make_on_meta)


def _attempt(what: str, call: Callable[[], Any]) -> Any:
    """Calls code of others; what it raises becomes a message, with the user's own line that led there.

    Raises:
        CommandError: It raises anything, an exit included.
    """
    try:
        return call()
    except (Exception, SystemExit) as error:
        # The user's own line, where there is one: not that of a library deeper down.
        frames = traceback.extract_tb(error.__traceback__)
        libraries = (__file__, sysconfig.get_paths()["stdlib"], "<frozen")
        own = [f for f in frames if "site-packages" not in f.filename and not f.filename.startswith(libraries)]
        place = f"\n  at {own[-1].filename}:{own[-1].lineno}, in {own[-1].name}" if own else ""
        raise CommandError(f"{what}: {type(error).__name__}: {error}{place}") from error


def positive(text: str) -> int:
    """A whole number of 1 or more, for an option."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {number}")
    return number


def _rule(text: str) -> tuple[str, str]:
    pattern, equals, blocks = text.rpartition("=")
    if not (pattern and equals and blocks):
        raise argparse.ArgumentTypeError(f"must be PATTERN=BLOCKS, as in '*.mixer.weight=16 heads', got {text!r}")
    return pattern, blocks
