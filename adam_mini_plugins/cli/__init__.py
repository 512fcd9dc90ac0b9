"""The command line, ``adam-mini``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from . import run

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line and runs the command it names."""
    parser = argparse.ArgumentParser(prog="adam-mini", description="Adam-mini for the trainers that people use.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run.add_parser(commands)
    arguments = parser.parse_args(argv)
    arguments.execute(arguments)
