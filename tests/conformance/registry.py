"""The list of checks, and the table of what they found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from conformance.subject import Case, cases

Run = Callable[[Case], None]


@dataclass(frozen=True)
class Check:
    """A property, in words, and what shows it.

    Args:
        says: The property.
        topic: Under which heading it stands.
        stands_for: The tests of torch's that ask for it; none where torch's documentation does.
        run: Raises where it does not hold for a case; `None` where it does not apply.
        only: The settings in which it is looked for, where not in all.
        devices: Where it can be seen.
        reason: Why it does not apply, or not here.
    """

    says: str
    topic: str
    stands_for: tuple[str, ...] = ()
    run: Run | None = None
    only: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cpu", "cuda")
    reason: str = ""


CHECKS: list[Check] = []


def check(
    *stands_for: str, only: tuple[str, ...] = (), devices: tuple[str, ...] = ("cpu", "cuda")
) -> Callable[[Run], Run]:
    """Adds a function to the checks; its docstring is the property.

    Args:
        stands_for: The tests of torch's that ask for it.
        only: The settings in which to look for it, all of them by default.
        devices: Where it can be seen.
    """

    def add(run: Run) -> Run:
        says, topic = (run.__doc__ or "").strip(), run.__module__.rpartition(".")[2]
        CHECKS.append(Check(says, topic, stands_for, run, only, devices))
        return run

    return add


def not_applicable(says: str, *stands_for: str, reason: str, topic: str) -> None:
    """Adds a property that torch asks for and AdamMini does not offer."""
    CHECKS.append(Check(says, topic, stands_for, reason=reason))


def devices() -> list[str]:
    """Where checks can be run on this machine."""
    return ["cpu"] + ["cuda"] * torch.cuda.is_available()


@cache
def ran(number: int, device: str) -> int:
    """Runs a check in all settings on a device, once for all that ask, and returns how many these were.

    Raises:
        Exception: What the check raises, with a note of the setting.
    """
    found = CHECKS[number]
    if found.run is None or device not in found.devices:
        return 0
    settings = [case for case in cases(device) if not found.only or case.setting in found.only]
    for case in settings:
        torch.manual_seed(0)
        try:
            found.run(case)
        except BaseException as error:
            if hasattr(error, "add_note"):  # Python 3.10 has none
                error.add_note(f"{found.says} On {device}, {case.name}: {case.options}")
            raise
    return len(settings)


def table() -> str:
    """What was found on a CPU, as Markdown.

    Raises:
        Exception: A check failed.
    """
    rows, passed, runs, absent = [], 0, 0, 0
    for topic in dict.fromkeys(found.topic for found in CHECKS):
        rows += [
            "",
            f"## {topic.capitalize()}",
            "",
            "| what holds | tests of torch's | result |",
            "| --- | --- | --- |",
        ]
        for number, found in enumerate(CHECKS):
            if found.topic != topic:
                continue
            count = ran(number, "cpu")
            passed, runs, absent = passed + bool(count), runs + count, absent + (not count)
            if count:
                result = f"passed in {count} settings" if count > 1 else "passed"
            else:
                result = f"not applicable: {found.reason or 'it is seen on a GPU alone, and tested where there is one'}"
            names = ", ".join(f"`{name}`" for name in found.stands_for)
            rows.append(f"| {found.says} | {names} | {result} |")
    counts = f"passed {passed} (in {runs} runs), not applicable {absent}, failed 0"
    return "\n".join([f"On a CPU: {counts}.", *rows, ""])
