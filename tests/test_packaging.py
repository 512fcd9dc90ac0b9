"""What is installed, and what importing it costs."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import setuptools.build_meta

import adam_mini_plugins
from adam_mini_plugins.kernels import building

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


@pytest.mark.parametrize(
    ("extra", "packages", "modules"),
    [
        ("hf", ["transformers"], ["hf", "callbacks.hf"]),
        ("lightning", ["lightning", "pytorch_lightning", "lightning_utilities"], ["lightning", "callbacks.lightning"]),
    ],
)
def test_a_missing_extra_says_what_to_install(extra: str, packages: list[str], modules: list[str]) -> None:
    for module in modules:
        done = python(f"import sys; sys.modules.update(dict.fromkeys({packages})); import adam_mini_plugins.{module}")
        assert f'pip install "adam-mini-plugins[{extra}]"' in done.stderr.splitlines()[-1]


def test_the_version_is_the_installed_one() -> None:
    assert metadata.version("adam-mini-plugins") == adam_mini_plugins.__version__


IMPORTS = """
import adam_mini_plugins.callbacks.hf as hf, adam_mini_plugins.callbacks.lightning as lightning
import adam_mini_plugins.lightning
hf.OptimizerMemoryCallback(), lightning.OptimizerMemoryMonitor(), adam_mini_plugins.lightning.AdamMiniOptimizer()
print(hf.__file__, lightning.__file__, sep="\\n")
"""


def imported_from(folder: Path, *, within: Path) -> list[Path]:
    """Where the callbacks come from in a new virtual environment that has this one's packages, all but ours.

    Args:
        folder: What is added to the import path.
        within: Where the environment is made.
    """
    pytest.importorskip("lightning", reason="the lightning extra is not installed")
    venv.create(within / "env", symlinks=True)
    (site,) = (within / "env").rglob("site-packages")
    others = [path for path in sys.path if path.endswith("site-packages")]  # without the .pth files that lie there
    (site / "paths.pth").write_text("\n".join([str(folder), *others]))
    command = [str(within / "env" / "bin" / "python"), "-I", "-c", IMPORTS]
    done = subprocess.run(command, capture_output=True, text=True, cwd=within)
    assert done.returncode == 0, done.stderr
    return [Path(line) for line in done.stdout.split()]


def test_an_editable_install_has_the_callbacks_of_the_top_of_the_repository() -> None:
    pytest.importorskip("lightning", reason="the lightning extra is not installed")
    for name in ("hf", "lightning"):
        module = importlib.import_module(f"adam_mini_plugins.callbacks.{name}")
        assert Path(str(module.__file__)).resolve() == ROOT / "callbacks" / f"{name}.py"


def test_a_source_tree_has_the_callbacks(tmp_path: Path) -> None:
    files = imported_from(ROOT, within=tmp_path)
    assert [file.resolve() for file in files] == [ROOT / "callbacks" / "hf.py", ROOT / "callbacks" / "lightning.py"]


def test_a_wheel_holds_everything(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*-cp310-abi3-*.whl")  # for all versions of Python from 3.10 on
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    package = tmp_path / "site" / "adam_mini_plugins"
    packaged = {p.relative_to(package) for p in package.rglob("*.py")}
    sources = {p.relative_to(ROOT / "adam_mini_plugins") for p in (ROOT / "adam_mini_plugins").rglob("*.py")}
    assert packaged == sources | {p.relative_to(ROOT) for p in (ROOT / "callbacks").rglob("*.py")}
    assert (package / "py.typed").exists()
    assert list((package / "kernels").glob("_cpu*.so"))
    assert not list(package.rglob("*.c"))  # an install would write it after the library, which would then look old
    files = imported_from(tmp_path / "site", within=tmp_path)
    assert files == [package / "callbacks" / "hf.py", package / "callbacks" / "lightning.py"]


@pytest.mark.parametrize(
    ("path", "named", "wanted"),
    [(os.defpath, None, []), ("/no-such-folder", None, ["ziglang>=0.13"]), ("/no-such-folder", "mycc", [])],
    ids=["a compiler", "none", "another, by name"],
)
def test_a_build_takes_a_compiler_from_pypi_where_there_is_none(
    path: str, named: str | None, wanted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", path)
    monkeypatch.setenv("CC", named) if named else monkeypatch.delenv("CC", raising=False)
    usual = setuptools.build_meta.get_requires_for_build_wheel()
    assert building.get_requires_for_build_wheel() == [*usual, *wanted]
    assert building.get_requires_for_build_editable() == [*usual, *wanted]


@pytest.mark.parametrize("free", [0, 1])
@pytest.mark.parametrize("given", [None, {"--build-option": "--quiet"}, {"--build-option": ["--quiet"]}])
def test_a_wheel_is_for_all_versions_of_python_but_those_without_a_lock(
    given: dict[str, Any] | None, free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of these setuptools refuses to build it."""
    usual = sysconfig.get_config_var
    monkeypatch.setattr(sysconfig, "get_config_var", lambda name: free if name == "Py_GIL_DISABLED" else usual(name))
    passed: list[Any] = []
    monkeypatch.setattr(setuptools.build_meta, "build_wheel", lambda *arguments: passed.append(arguments[1]))
    building.build_wheel("folder", given)
    options = ["--py-limited-api=cp310", *(["--quiet"] if given else [])]
    assert passed == [given if free else {"--build-option": options}]


def test_the_library_never_prints_nor_asserts() -> None:
    import ast

    for path in [*(ROOT / "adam_mini_plugins").rglob("*.py"), *(ROOT / "callbacks").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            assert not isinstance(node, ast.Assert), path
            called = getattr(getattr(node, "func", None), "id", None)
            assert called != "print" or "cli" in path.parts, path
