"""``adam-mini run``: an unchanged script or module, with ``optim="adam_mini"`` known to transformers.

Python is started anew with a start-up module on its path (``autoload/sitecustomize.py``) that
registers the optimizer as soon as transformers is imported. Processes that the script starts, as
launchers do, inherit it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

AUTOLOAD = Path(__file__).parent / "autoload"


def add_parser(commands: Any) -> None:
    """Adds the command to those of ``adam-mini``."""
    parser = commands.add_parser(
        "run",
        help='run a script or module with optim="adam_mini" known to transformers',
        usage="adam-mini run [-h] (SCRIPT | -m MODULE) ...",
        description='Runs a Python script or module as it is, with optim="adam_mini" known to transformers.',
        epilog="example: adam-mini run trl sft --optim adam_mini --model_name_or_path ...",
    )
    parser.add_argument("-m", dest="module", action="store_true", help="TARGET is a module's name, as for python -m")
    parser.add_argument(
        "target", metavar="TARGET", help="path of a script, name of a command such as trl, or name of a module after -m"
    )
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="its arguments, passed through")
    parser.set_defaults(execute=lambda given: run(given.target, given.arguments, module=given.module))


def run(target: str, arguments: list[str], *, module: bool) -> None:
    """Replaces this process by Python running a script or module.

    Args:
        target: Path of the script, name of the module, or name of a command installed beside Python, such as ``trl``.
        arguments: Its command-line arguments.
        module: Whether ``target`` is a module.
    """
    if not module and not Path(target).exists():
        installed = shutil.which(target, path=os.pathsep.join([str(Path(sys.executable).parent), os.defpath]))
        if installed is None:
            sys.exit(f"adam-mini run: no script {target!r}; to run a module: adam-mini run -m {target} ...")
        target = installed
    command = [sys.executable, *(["-m"] if module else []), target, *arguments]
    paths = [str(AUTOLOAD), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    if os.name == "nt":  # where exec would return to the shell before the script has ended
        sys.exit(subprocess.call(command, env=environment))
    os.execve(sys.executable, command, environment)
