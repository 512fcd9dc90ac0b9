"""Builds the package as setuptools does; where the machine has no C compiler, with one that comes from PyPI.

The build backend of ``pyproject.toml``, which runs before anything is installed: slim containers have no compiler, and
get the kernel for the CPU at full speed all the same. What is fetched is gone after the build. ``CC`` names a compiler
of one's own, or one that isn't there, to go without the kernel.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

_Settings = Mapping[str, Any] | None


def get_requires_for_build_wheel(config_settings: _Settings = None) -> list[str]:
    """What a wheel's build takes."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_compiler()]


def get_requires_for_build_editable(config_settings: _Settings = None) -> list[str]:
    """What an editable install's build takes."""
    return [*build_meta.get_requires_for_build_editable(config_settings), *_compiler()]


def build_wheel(wheel_directory: str, config_settings: _Settings = None, metadata_directory: str | None = None) -> str:
    """Builds a wheel, and tells its file's name."""
    with _with_compiler():
        return build_meta.build_wheel(wheel_directory, _for_all_pythons(config_settings), metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: _Settings = None, metadata_directory: str | None = None
) -> str:
    """Builds a wheel for an editable install, and tells its file's name."""
    with _with_compiler():
        return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)


def _for_all_pythons(config_settings: _Settings) -> _Settings:
    """Has one wheel serve all versions of Python: the library calls nothing of Python's but through torch."""
    if sysconfig.get_config_var("Py_GIL_DISABLED"):  # free-threaded Pythons have wheels of their own
        return config_settings
    settings = dict(config_settings or {})
    given = settings.get("--build-option", [])
    settings["--build-option"] = ["--py-limited-api=cp310", *([given] if isinstance(given, str) else given)]
    return settings


def _compiler() -> list[str]:
    """Zig's C compiler, where there is no other and nobody has named one."""
    own = (sysconfig.get_config_var("CC") or "cc").split()[0]
    needed = os.name == "posix" and "CC" not in os.environ and shutil.which(own) is None
    return ["ziglang>=0.13"] if needed else []


@contextmanager
def _with_compiler() -> Iterator[None]:
    if not _compiler():
        yield
        return
    # For any processor of the kind, as other compilers have it; Zig's own default is the one at hand.
    compiler = f"{sys.executable} -m ziglang cc -mcpu=baseline"
    before = dict(os.environ)
    with tempfile.TemporaryDirectory() as cache:
        os.environ.update(CC=compiler, LDSHARED=f"{compiler} -shared -Wl,-s", ZIG_GLOBAL_CACHE_DIR=cache)
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)
