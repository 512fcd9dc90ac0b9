"""`adam-mini run` starts an unchanged program with the optimizer registered."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os, sys
from transformers import TrainingArguments
args = TrainingArguments("unused", optim="adam_mini", use_cpu=True)
print("ran", __name__, args.optim.value, os.path.basename(sys.argv[0]), *sys.argv[1:])
"""

LAUNCHER = """
import subprocess, sys
assert "transformers" not in sys.modules and "torch" not in sys.modules
sys.exit(subprocess.call([sys.executable, "-m", "program", *sys.argv[1:]]))
"""


def adam_mini(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "adam_mini_plugins", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "program.py").write_text(SCRIPT)
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    return tmp_path


def test_the_script_fails_without_it(folder: Path) -> None:
    done = subprocess.run([sys.executable, "program.py"], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 1
    assert "adam_mini is not a valid OptimizerNames" in done.stderr


@pytest.mark.parametrize(
    ("target", "name"),
    [(["program.py"], "program.py"), (["-m", "program"], "program.py"), (["launcher.py"], "program.py")],
    ids=["script", "module", "through a launcher"],
)
def test_it_runs_a_program_with_its_arguments_as_they_are(target: list[str], name: str, folder: Path) -> None:
    done = adam_mini("run", *target, "-m", "--flag", "a b", cwd=folder)
    assert done.stdout.splitlines()[-1:] == [f"ran __main__ adam_mini {name} -m --flag a b"], done.stderr


def test_it_runs_an_installed_command_by_its_name(folder: Path) -> None:
    done = adam_mini("run", "accelerate", "env", "--help", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "usage: accelerate" in done.stdout.lower()


def test_the_exit_status_is_the_programs(folder: Path) -> None:
    (folder / "failing.py").write_text("raise SystemExit(7)")
    assert adam_mini("run", "failing.py", cwd=folder).returncode == 7


def test_a_sitecustomize_of_ones_own_still_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text("print('mine')")
    monkeypatch.setenv("PYTHONPATH", str(folder / "site"))
    done = adam_mini("run", "program.py", cwd=folder)
    assert "ran __main__ adam_mini program.py" in done.stdout, done.stderr
    assert done.stdout.count("mine") == 2  # once in the process that starts it, once in the program


def test_a_script_that_is_not_there_is_named(folder: Path) -> None:
    done = adam_mini("run", "nothing.py", cwd=folder)
    assert done.returncode == 1
    assert "adam-mini run: no script 'nothing.py'; to run a module: adam-mini run -m" in done.stderr
    done = adam_mini("run", "-m", "no_such_module", cwd=folder)
    assert done.returncode == 1
    assert "No module named no_such_module" in done.stderr


def test_without_a_command_it_shows_the_commands(folder: Path) -> None:
    done = adam_mini(cwd=folder)
    assert done.returncode == 2
    assert "usage: adam-mini" in done.stderr
