"""Settings for all tests."""

import os
from pathlib import Path

# Nothing here may reach for a hub; and two workers with a thread each beat one with two.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import settings
from matrix import proves, pytest_addoption

__all__ = ["proves", "pytest_addoption"]
pytest_plugins = ["pytester"]

# Without a GPU the Triton kernels run in Triton's interpreter, which has to be chosen before triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile("tests", deadline=None, derandomize=True)
settings.load_profile("tests")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def text(tmp_path: Path) -> str:
    """A folder of Python source to train on: few words, so that all of them are in a small vocabulary."""
    for number in range(40):
        names = [f"name_{(number * 7 + k) % 11}" for k in range(30)]
        (tmp_path / f"{number}.py").write_text("\n".join(f"def {name}({name}):\n    return {name}" for name in names))
    return str(tmp_path)
