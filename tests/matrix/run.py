"""Tests of the oldest and the newest versions that pyproject.toml allows, and of torch alone, each in its environment.

    python tests/matrix/run.py [ENVIRONMENT ...]        all of them by default

An environment is made by uv in a temporary folder from what `pip install .` says, which its tests then use: the wheel,
not the source tree. `oldest` has each direct dependency at its lower bound (`uv --resolution lowest-direct`), so that
the bounds are true or the tests fail.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
TESTS = ["pytest>=8.0", "hypothesis>=6.100", "expecttest>=0.2", "pytest-xdist>=3.6", "setuptools>=77"]
CORE = ["test_layout.py", "test_update.py", "test_edges.py", "test_conformance.py", "test_fuzz.py"]
DOORS = ["matrix/test_doors.py"]
SHOW_VERSIONS = """
from importlib import metadata, util
names = ("torch", "transformers", "accelerate", "peft", "trl", "lightning")
print(*(f"{name} {metadata.version(name)}" for name in names if util.find_spec(name)), sep=", ")
"""


class Environment(NamedTuple):
    """What is installed, and which tests it has to pass."""

    resolution: str
    extras: str
    tests: list[str]


ENVIRONMENTS = {
    "torch alone, oldest": Environment("lowest-direct", "", [*CORE, *DOORS]),
    "oldest": Environment("lowest-direct", "[hf,peft,trl,lightning,cli]", ["test_optimizer.py", *DOORS]),
    "newest": Environment("highest", "[hf,peft,trl,lightning,cli]", ["test_optimizer.py", *CORE, *DOORS]),
}


def run(*command: str | Path, **environment: str) -> None:
    """Runs a command, and ends the program where it fails."""
    done = subprocess.run(list(map(str, command)), env={**os.environ, **environment})
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}: exit {done.returncode}")


def passes(name: str, folder: Path) -> None:
    """Builds an environment and runs its tests in a copy of the tests that no source tree stands beside."""
    environment, start = ENVIRONMENTS[name], time.monotonic()
    uv = (sys.executable, "-m", "uv")
    python = folder / "bin" / "python"
    run(*uv, "venv", "--quiet", "--python", sys.executable, folder)
    package = f"adam-mini-plugins{environment.extras} @ {ROOT.as_uri()}"
    run(*uv, "pip", "install", "--quiet", "--python", python, "--resolution", environment.resolution, package, *TESTS)
    built = time.monotonic()
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "docs", folder / "docs")
    shutil.copy(ROOT / "pyproject.toml", folder)
    run(python, "-c", SHOW_VERSIONS)
    tests = [folder / "tests" / test for test in environment.tests]
    run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", folder, *tests)
    print(f"{name}: built in {built - start:.0f} s, tested in {time.monotonic() - built:.0f} s", flush=True)


def main(names: list[str]) -> None:
    """Runs the environments named, one after the other."""
    unknown = [name for name in names if name not in ENVIRONMENTS]
    if unknown:
        sys.exit(f"no environment {unknown[0]!r}; there are {', '.join(map(repr, ENVIRONMENTS))}")
    for name in names or ENVIRONMENTS:
        with tempfile.TemporaryDirectory() as folder:
            passes(name, Path(folder) / "venv")


if __name__ == "__main__":
    main(sys.argv[1:])
