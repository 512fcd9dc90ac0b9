"""The command line: ``python -m examples.paper NAME [flags]``."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

import torch
from rich.console import Console

from . import __doc__ as overview
from .experiments import EXPERIMENTS
from .frame import options, run, write_table
from .workers import Workers, cores


def main(arguments: list[str] | None = None) -> None:
    """Runs what is named and writes the table."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.paper", description=overview, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--output-dir", type=Path, default=Path("runs/paper"), help="where results, picture, table go")
    common.add_argument("--fresh", action="store_true", help="measure all cases again")
    common.add_argument(
        "--jobs",
        type=int,
        default=1 if torch.cuda.is_available() else cores(),
        help="processes that measure side by side, each on its share of the cores (default: %(default)s here)",
    )
    commands = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    for kind in EXPERIMENTS:
        about = f"{kind.shows}: {kind.claim}"
        command = commands.add_parser(kind.name, parents=[common], help=about, description=about)
        for name, option in options(kind):
            command.add_argument(name, **option)
    commands.add_parser("all", parents=[common], help="all experiments at their default sizes")
    commands.add_parser("table", parents=[common], help="the table of what has been run")
    args = parser.parse_args(arguments)

    console = Console(soft_wrap=True)
    try:
        with Workers(args.jobs) as workers:
            for kind in EXPERIMENTS:
                if args.name in (kind.name, "all"):
                    given = {option.name: getattr(args, option.name, option.default) for option in fields(kind)}
                    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
                    run(kind(**given), args.output_dir, args.fresh, console, workers)
    except KeyboardInterrupt:
        raise SystemExit("stopped; the cases that were complete are kept, the same command goes on") from None
    args.output_dir.mkdir(parents=True, exist_ok=True)
    console.print(f"Table: {write_table(EXPERIMENTS, args.output_dir)}", highlight=False)


if __name__ == "__main__":
    main()
