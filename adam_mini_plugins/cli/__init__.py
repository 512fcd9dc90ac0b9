"""The command line, ``adam-mini``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from . import inspect, plan, run
from .support import CommandError

__all__ = ["main"]

EPILOG = """\
examples:
  adam-mini plan llama-3-8b --dtype bf16          what will it take, beside AdamW and others?
  adam-mini inspect llama-3-8b                    which blocks does it have, and why?
  adam-mini run train.py --optim adam_mini ...    train with it, the script unchanged

Each command has its own --help."""


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line and runs the command it names."""
    parser = argparse.ArgumentParser(
        prog="adam-mini",
        description="Adam-mini for the trainers that people use: half of AdamW's optimizer state.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (plan, inspect, run):
        command.add_parser(commands)
    arguments = parser.parse_args(argv)
    try:
        arguments.execute(arguments)
    except CommandError as error:
        parser.exit(2, f"adam-mini {arguments.command}: {error}\n")
