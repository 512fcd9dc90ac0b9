"""AdamMini passes what torch's tests ask of torch's optimizers, and docs/conformance.md says which checks these are.

`python tests/test_conformance.py` writes the document.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

TOPICS = ("steps", "groups", "states", "hooks", "schedules")
DOCUMENT = Path(__file__).parents[1] / "docs" / "conformance.md"
HEAD = """\
# Conformance with torch's optimizers

`AdamMini` is described as torch describes its own optimizers (an `OptimizerInfo` of
`torch.testing._internal.common_optimizers`), and every property that torch's tests ask of its optimizers
(`TestOptimRenewed` in its test/test_optim.py, and the tests of schedulers and of averaged weights) is checked on it, in
each setting: learning rates and betas as tensors, `maximize`, momentum of another dtype and so on, each by the fused
kernel and by plain torch. The checks are in `tests/conformance/`; where the second column is empty, no test of that
class asks for what torch's documentation promises. `python tests/test_conformance.py` writes this page, and a test
compares it with what is found.
"""

for module in ("subject", "registry", *TOPICS):
    pytest.register_assert_rewrite(f"conformance.{module}")
pytest.importorskip("expecttest", reason="torch.testing._internal needs it")

from conformance import registry  # noqa: E402
from conformance.subject import INFO  # noqa: E402
from torch.testing._internal.common_methods_invocations import DecorateInfo  # noqa: E402
from torch.testing._internal.common_optimizers import optim_db  # noqa: E402

for topic in TOPICS:
    importlib.import_module(f"conformance.{topic}")


def label(number: int) -> str:
    found = registry.CHECKS[number]
    return f"{found.topic}-{found.run.__name__}" if found.run else f"{found.topic}-{number}"


RUN = [number for number, found in enumerate(registry.CHECKS) if found.run]


@pytest.mark.parametrize("device", registry.devices())
@pytest.mark.parametrize("number", RUN, ids=label)
def test_it_holds(number: int, device: str) -> None:
    registry.ran(number, device)


def document() -> str:
    return f"{HEAD}\n{registry.table()}"


def test_the_document_is_what_was_found() -> None:
    assert DOCUMENT.read_text() == document(), "run python tests/test_conformance.py"


def test_no_property_is_left_out_without_a_reason() -> None:
    assert all(found.says.endswith((".", ":")) or not found.run for found in registry.CHECKS)
    assert all(bool(found.run) != bool(found.reason) for found in registry.CHECKS)


def test_all_tests_that_torch_names_in_its_table_are_here() -> None:
    named = {
        decorator.test_name
        for info in optim_db
        for decorator in info.decorators
        if isinstance(decorator, DecorateInfo) and decorator.cls_name == "TestOptimRenewed" and decorator.test_name
    }
    covered = {test for found in registry.CHECKS for test in found.stands_for}
    assert len(named) > 10
    assert named <= covered


def test_it_is_described_as_torchs_own_are() -> None:
    assert INFO.name == "Partitioned"
    assert not INFO.supports_complex
    assert not INFO.supports_sparse
    assert INFO.supported_impls == ("fused",)


if __name__ == "__main__":
    DOCUMENT.write_text(document())
