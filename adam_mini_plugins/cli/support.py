"""What the commands have in common: errors for users, packages that may be missing, figures as text."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

DPI = 200  # of pictures


class CommandError(Exception):
    """Something for the user to mend: the command line shows the message alone and exits with status 2."""


def need(module: str) -> Any:
    """Imports a module of an optional package.

    Raises:
        CommandError: It can't be imported; the message says what to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        extra = "peft" if package == "peft" else "cli"
        message = f'{package} is needed for this ({error}): pip install "adam-mini-plugins[{extra}]"'
        raise CommandError(message) from error


def console() -> Any:
    """Rich's console; where the output is no terminal, wide enough that no line of a table is broken."""
    rich = need("rich.console")
    plain = {"emoji": False, "markup": False}  # names are shown as they are, model.py:llama: without a llama
    shown = rich.Console(**plain)
    return shown if shown.is_terminal else rich.Console(width=400, **plain)


def print_json(record: Any) -> None:
    """Prints a record for machines."""
    print(json.dumps(record, indent=2))


def save_figure(figure: Any, file: str) -> None:
    """Writes a matplotlib figure.

    Raises:
        CommandError: The file can't be written, or matplotlib doesn't know its format.
    """
    try:
        figure.savefig(file, dpi=DPI)
    except (OSError, ValueError) as error:
        raise CommandError(f"the plot can't be written to {str(Path(file))!r}: {error}") from error


def unit_for(largest: int) -> tuple[str, float]:
    """The decimal unit in which a number of bytes reads best, and its size in bytes."""
    units = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
    return next((unit for unit in units if largest >= unit[1]), units[-1])
