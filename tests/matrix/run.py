"""Tests of the oldest and the newest versions that pyproject.toml allows, and of torch alone, each in its environment.

    python tests/matrix/run.py [ENVIRONMENT ...]        all of them by default

An environment is made by uv in a temporary folder from what `pip install .` says, which its tests then use: the wheel,
not the source tree. The oldest have each direct dependency at its lower bound (`uv --resolution lowest-direct`) and
the oldest Python that is at hand, so that the bounds are true or the tests fail. What is downloaded lies in uv's cache
and is linked from there: `UV_CACHE_DIR` says where.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
SOURCES = {"adam_mini_plugins", "callbacks", "pyproject.toml", "README.md", "LICENSE"}
BUILT = shutil.ignore_patterns("__pycache__", "_cpu*.so")
UV = (sys.executable, "-m", "uv")
OLDEST_PYTHON = "3.10"
TESTING = ["pytest>=8.0", "hypothesis>=6.100", "setuptools>=77"]
TRAINERS = "[hf,peft,trl,lightning,cli]"
# What these import is torch alone, without so much as numpy.
CORE = [f"test_{name}.py" for name in ("layout", "update", "edges", "fuzz", "fused", "flat", "zero")]
DOORS = ["matrix/test_doors.py"]
# Torch's own tests of optimizers, which need numpy, and tests that train a model of transformers.
MODELS = ["test_optimizer.py", "test_conformance.py"]
SHOW_VERSIONS = """
import platform, sys
from importlib import metadata, util
names = ("torch", "transformers", "accelerate", "peft", "trl", "lightning")
found = (f"{name} {metadata.version(name)}" for name in names if util.find_spec(name))
kernel = util.find_spec("adam_mini_plugins.kernels._cpu") is not None
print(f"Python {platform.python_version()}", *found, f"kernel for the CPU: {kernel}", sep=", ", flush=True)
sys.exit(kernel != (sys.argv[1] == "True"))
"""


class Environment(NamedTuple):
    """What is installed, which tests it has to pass with what else, and what environment variables there are.

    And whether it has a kernel for the CPU by then.
    """

    resolution: str
    extras: str
    tests: list[str]
    testing: tuple[str, ...] = ()
    variables: Mapping[str, str] = {}
    kernel: bool = True


ENVIRONMENTS = {
    # With no compiler to be found, the build takes one from PyPI.
    "torch": Environment("lowest-direct", "", [*CORE, *DOORS], variables={"PATH": "/no-such-folder"}),
    "no kernel": Environment(
        "lowest-direct", "", ["test_edges.py", *DOORS], variables={"CC": "no-such-compiler"}, kernel=False
    ),
    "oldest": Environment("lowest-direct", TRAINERS, [*MODELS, *DOORS], ("expecttest>=0.2",)),
    "newest": Environment("highest", TRAINERS, [*CORE, *MODELS, *DOORS], ("expecttest>=0.2",)),
}


def run(folder: Path, *command: str | Path, **environment: str) -> None:
    """Runs a command in a folder, and ends the program where it fails."""
    done = subprocess.run(list(map(str, command)), cwd=folder, env={**os.environ, **environment})
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}: exit {done.returncode}")


def python_for(resolution: str) -> str:
    """The interpreter of an environment: the oldest allowed, where there is one, or this one."""
    command = [*UV, "python", "find", "--no-python-downloads", OLDEST_PYTHON]
    shims = {**os.environ, "PYENV_VERSION": OLDEST_PYTHON}  # pyenv's start no version that it isn't told of
    found = subprocess.run(command, capture_output=True, text=True, env=shims)
    return found.stdout.strip() if resolution != "highest" and found.returncode == 0 else sys.executable


def not_sources(folder: str, names: list[str]) -> set[str]:
    """What a build does not need, or would take from an earlier one, as `shutil.copytree` asks for it."""
    return set(names) - SOURCES if Path(folder) == ROOT else BUILT(folder, names)


def passes(name: str, folder: Path) -> None:
    """Builds an environment and runs its tests in a copy of the tests that no source tree stands beside."""
    environment, start = ENVIRONMENTS[name], time.monotonic()
    source, tests, python = folder / "source", folder / "tests", folder / "venv" / "bin" / "python"
    shutil.copytree(ROOT, source, ignore=not_sources)
    run(folder, *UV, "venv", "--quiet", "--python", python_for(environment.resolution), folder / "venv")
    wanted = [f"adam-mini-plugins{environment.extras} @ {source.as_uri()}", *TESTING, *environment.testing]
    options = ("--quiet", "--python", python, "--resolution", environment.resolution)
    run(folder, *UV, "pip", "install", *options, *wanted, **environment.variables)
    built = time.monotonic()
    shutil.copytree(ROOT / "tests", tests, ignore=BUILT)
    shutil.copytree(ROOT / "docs", folder / "docs")
    shutil.copy(ROOT / "pyproject.toml", folder)
    # From here, and not from the repository: python -c and -m import from where they are started.
    run(folder, python, "-c", SHOW_VERSIONS, str(environment.kernel))
    files = [tests / test for test in environment.tests]
    pytest = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", folder)
    run(folder, python, *pytest, *files, **environment.variables)
    print(f"{name}: built in {built - start:.0f} s, tested in {time.monotonic() - built:.0f} s", flush=True)


def main(names: list[str]) -> None:
    """Runs the environments named, one after the other."""
    unknown = [name for name in names if name not in ENVIRONMENTS]
    if unknown:
        sys.exit(f"no environment {unknown[0]!r}; there are {', '.join(map(repr, ENVIRONMENTS))}")
    for name in names or ENVIRONMENTS:
        with tempfile.TemporaryDirectory() as folder:
            passes(name, Path(folder))


if __name__ == "__main__":
    main(sys.argv[1:])
