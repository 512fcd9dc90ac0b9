"""What is installed, and what importing it costs."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import adam_mini_plugins

ROOT = Path(__file__).parents[1]


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)


def test_importing_it_imports_torch_alone() -> None:
    done = python(
        "import sys, torch; before = set(sys.modules); import adam_mini_plugins; "
        "new = {name.split('.')[0] for name in set(sys.modules) - before}; "
        "print(*sorted(new - set(sys.stdlib_module_names) - {'torch'}))"
    )
    assert done.stdout.split() == ["adam_mini_plugins"], done.stderr


@pytest.mark.parametrize("module", ["adam_mini_plugins.hf", "adam_mini_plugins.callbacks.hf"])
def test_a_missing_extra_says_what_to_install(module: str) -> None:
    done = python(f"import sys; sys.modules['transformers'] = None; import {module}")
    assert 'pip install "adam-mini-plugins[hf]"' in done.stderr.splitlines()[-1]


def test_the_version_is_the_installed_one() -> None:
    assert metadata.version("adam-mini-plugins") == adam_mini_plugins.__version__


def test_the_callbacks_are_installed_from_the_top_of_the_repository() -> None:
    import adam_mini_plugins.callbacks.hf as installed

    assert Path(installed.__file__) == ROOT / "callbacks" / "hf.py"


def test_a_wheel_holds_everything(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    packaged = {p.relative_to(tmp_path / "site" / "adam_mini_plugins") for p in (tmp_path / "site").rglob("*.py")}
    sources = {p.relative_to(ROOT / "adam_mini_plugins") for p in (ROOT / "adam_mini_plugins").rglob("*.py")}
    assert packaged == sources | {p.relative_to(ROOT) for p in (ROOT / "callbacks").rglob("*.py")}
    assert (tmp_path / "site" / "adam_mini_plugins" / "py.typed").exists()
    # -P and -S keep the checkout and its editable install out of the way.
    done = subprocess.run(
        [sys.executable, "-S", "-c", "import sys; sys.path[:0] = sys.argv[1:]; "
         "import adam_mini_plugins.callbacks.hf as m; print(m.__file__)", str(tmp_path / "site"), *sys.path[1:]],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.stdout.strip() == str(tmp_path / "site" / "adam_mini_plugins" / "callbacks" / "hf.py"), done.stderr


def test_the_library_never_prints_nor_asserts() -> None:
    import ast

    for path in [*(ROOT / "adam_mini_plugins").rglob("*.py"), *(ROOT / "callbacks").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            assert not isinstance(node, ast.Assert), path
            called = getattr(getattr(node, "func", None), "id", None)
            assert called != "print" or "cli" in path.parts, path
