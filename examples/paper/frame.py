"""What experiments have in common: flags, cases that are measured one by one, a verdict, a line of the table."""

from __future__ import annotations

import inspect
import json
import math
import os
import platform
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .workers import Workers

LIBRARIES = ("torch", "transformers", "pytorch_optimizer")
DIGITS = 5  # that are kept of a float: losses in a file that people read
STYLE = ["tableau-colorblind10", {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}]

HEAD = """# The paper's claims

The claims of "Adam-mini: Use Fewer Learning Rates To Gain More", each measured again in small and without network.
The rule that says whether a claim holds here stands in the code; its figures stand below the table: median over seeds
(least to most).

    python -m examples.paper {example}     # one of them; --help after the name shows its flags
    python -m examples.paper all           # all of them

What is measured is kept case by case: a run that was stopped goes on where it stopped. A core-minute is one core for a
minute; together they are {total:.0f}, and a machine of n cores takes about 1/n of that. This page is written by
`python -m examples.paper table`.
"""

Case = dict[str, Any]


@dataclass(frozen=True)
class Result:
    """What was measured of one case, and the seconds that it took: of all cores together, whatever else ran on them."""

    case: Case
    found: dict[str, Any]
    seconds: float


@dataclass(frozen=True)
class Verdict:
    """Whether the claim held, ``None`` where this machine can't tell, and the figures that say so in one line."""

    held: bool | None
    line: str


def flag(default: Any, text: str) -> Any:
    """A field that is an option of the command line; a tuple takes several values."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Experiment(ABC):
    """One claim of the paper. The fields are its flags.

    A case is all that a measurement depends on, as plain values: with machine and versions it says what was measured,
    and what is drawn and judged comes from the file alone.
    """

    name: ClassVar[str]
    shows: ClassVar[str]  # the paper's figure or table
    claim: ClassVar[str]
    libraries: ClassVar[tuple[str, ...]] = ()  # that are measured with, besides those of all
    parallel: ClassVar[bool] = True  # False where time is measured: one case after the other, on all cores

    @abstractmethod
    def cases(self) -> list[Case]:
        """The cases, in the order in which they are measured."""

    @abstractmethod
    def measure(self, case: Case) -> dict[str, Any]:
        """Measures one case."""

    @abstractmethod
    def draw(self, results: Sequence[Result]) -> Figure:
        """The picture of all cases."""

    @abstractmethod
    def judge(self, results: Sequence[Result]) -> Verdict:
        """Whether the claim held in them."""

    @property
    def command(self) -> str:
        """What to type for these flags."""
        given = []
        for option in fields(self):
            value = getattr(self, option.name)
            if value != option.default:
                values = value if isinstance(value, tuple) else (value,)
                given += [f"--{option.name.replace('_', '-')}", *map(str, values)]
        return " ".join(["python -m examples.paper", self.name, *given])


def run(experiment: Experiment, folder: Path, fresh: bool, console: Console, workers: Workers | None = None) -> Verdict:
    """Measures the cases that the folder doesn't have yet; then draws, judges and writes the results.

    Args:
        experiment: The experiment with its flags.
        folder: Where ``NAME.json`` and ``NAME.png`` go.
        fresh: Drop what the folder has.
        console: Where progress and verdict are printed.
        workers: The processes that measure; this one by default.

    Raises:
        SystemExit: The folder holds what other flags or another machine have measured.
    """
    workers = workers if workers and experiment.parallel else Workers()
    path = folder / f"{experiment.name}.json"
    record = _record(experiment, workers.threads)
    old = json.loads(path.read_text()) if path.exists() and not fresh else {"results": []}
    kept = {_key(result["case"]): Result(**result) for result in old["results"]}
    cases = {_key(case): case for case in experiment.cases()}
    left = [case for key, case in cases.items() if key not in kept]
    if kept.keys() - cases.keys():
        raise SystemExit(f"{path} holds cases of other flags ({old['command']}): --fresh drops them, or --output-dir")
    if kept and left and old["environment"] != record["environment"]:
        raise SystemExit(
            f"{path} was begun on another machine, with other versions or with other threads a worker "
            f"({old['environment'].get('threads')}, here {workers.threads}): --fresh begins anew"
        )
    if kept:
        record["environment"] = old["environment"]

    folder.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(experiment.name, total=len(cases), completed=len(cases) - len(left))
        for result in workers.completed(partial(_measured, experiment), left):
            kept[_key(result.case)] = result
            label = ", ".join(f"{name} {value}" for name, value in result.case.items() if value != "")
            console.print(f"{experiment.name}: {label}  ({result.seconds:.0f} s)", highlight=False, style="dim")
            bar.advance(task)
            _write(path, {**record, "results": [asdict(kept[key]) for key in cases if key in kept]})

    results = [kept[key] for key in cases]
    verdict = experiment.judge(results)
    _write(path, {**record, "verdict": asdict(verdict), "results": [asdict(result) for result in results]})
    plt.switch_backend("Agg")
    with plt.style.context(STYLE):
        figure = experiment.draw(results)
        figure.savefig(folder / f"{experiment.name}.png", dpi=150)
        plt.close(figure)
    console.print(f"{experiment.name}: {_said(verdict)}: {verdict.line}", highlight=False)
    return verdict


def write_table(experiments: Sequence[type[Experiment]], folder: Path) -> Path:
    """Writes the summary of what the folder holds: a line an experiment, then a section each that has been run."""
    machines: list[str] = []
    rows, sections, total = [], [], 0.0
    for experiment in experiments:
        path = folder / f"{experiment.name}.json"
        record = json.loads(path.read_text()) if path.exists() else {"results": []}
        name, held, seeds, minutes = experiment.name, "not yet run", "", ""
        if record["results"]:
            held = f"stopped after {len(record['results'])} cases"
        if "verdict" in record:
            verdict = Verdict(**record["verdict"])
            total += _core_minutes(record)
            found = {result["case"]["seed"] for result in record["results"] if "seed" in result["case"]}
            name, held = f"[{experiment.name}](#{experiment.name})", f"**{_said(verdict)}**"
            seeds, minutes = str(len(found) or ""), f"{_core_minutes(record):.1f}"
            machine = _machine(record["environment"])
            if machine not in machines:
                machines.append(machine)
            own = "".join(f", {library} {record['environment'][library]}" for library in experiment.libraries)
            sections += [
                "",
                f"## {experiment.name}",
                "",
                f"{experiment.shows}. {inspect.cleandoc(experiment.__doc__ or '')}",
                "",
                f"Claim: {experiment.claim}. **{_said(verdict).capitalize()}:** {verdict.line}.",
                "",
                f"`{record['command']}` on machine {machines.index(machine) + 1}{own}; "
                f"[all figures]({experiment.name}.json)",
                "",
                f"![{experiment.claim}]({experiment.name}.png)",
            ]
        cells = (cell.replace("|", "\\|") for cell in (name, experiment.shows, experiment.claim, held, seeds, minutes))
        rows.append(f"| {' | '.join(cells)} |")
    head = HEAD.format(total=total, example=experiments[0].name)
    columns = ["| name | paper | claim | held here | seeds | core-minutes |", "| --- | --- | --- | --- | ---: | ---: |"]
    listed = ["", "Machines:", "", *(f"{number}. {machine}" for number, machine in enumerate(machines, 1))]
    target = folder / "README.md"
    target.write_text("\n".join([head, *columns, *rows, *listed, *sections]) + "\n")
    return target


def median(values: Iterable[float]) -> float:
    """The median; a run that has diverged counts as infinite."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def spread(values: Iterable[float], form: str = ".3g") -> str:
    """Median, least and most as text."""
    values = list(values)
    return f"{median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def options(experiment: type[Experiment]) -> list[tuple[str, dict[str, Any]]]:
    """The flags of an experiment, as ``add_argument`` takes them."""
    found = []
    for option in fields(experiment):
        default, text = option.default, option.metadata["help"]
        assert default is not MISSING
        one = default[0] if isinstance(default, tuple) else default
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        kind: dict[str, Any] = {"type": type(one), "default": default, "help": f"{text} (default: {shown})"}
        if isinstance(default, tuple):
            kind["nargs"] = "+"
        found.append((f"--{option.name.replace('_', '-')}", kind))
    return found


def _said(verdict: Verdict) -> str:
    return {True: "yes", False: "no", None: "not to be told here"}[verdict.held]


def _measured(experiment: Experiment, case: Case) -> Result:
    began = time.process_time()
    found = experiment.measure(case)
    return Result(case, _rounded(found), round(time.process_time() - began, 1))


def _key(case: Case) -> str:
    return json.dumps(case, sort_keys=True)


def _record(experiment: Experiment, threads: int) -> dict[str, Any]:
    environment = {
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "cpu_cores": os.cpu_count(),
        "threads": threads,  # of torch, in each process that measured
        "python": platform.python_version(),
        **{library: version(library) for library in (*LIBRARIES, *experiment.libraries, "adam-mini-plugins")},
    }
    return {"experiment": experiment.name, "command": experiment.command, "environment": environment}


def _core_minutes(record: dict[str, Any]) -> float:
    return sum(result["seconds"] for result in record["results"]) / 60


def _machine(environment: dict[str, Any]) -> str:
    """One line of text for it."""
    versions = [f"{name} {environment[name]}" for name in ("python", *LIBRARIES, "adam-mini-plugins")]
    cores = f"{environment['device']}, {environment['cpu_cores']} cores, threads a process: {environment['threads']}"
    return f"{environment['platform']} ({cores}); {', '.join(versions)}"


def _rounded(value: Any) -> Any:
    """The value with floats of a few digits, and ``None`` where one isn't finite, as JSON has no word for it."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return [_rounded(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _write(path: Path, record: dict[str, Any]) -> None:
    """Writes all or nothing: whoever stops a run finds the cases that were complete. A result takes a line."""
    results = ",\n".join(json.dumps(result) for result in record["results"])
    head = json.dumps({key: value for key, value in record.items() if key != "results"}, indent=2)
    text = f'{head[:-2]},\n  "results": [\n{results}\n  ]\n}}\n'
    json.loads(text)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(text)
    unfinished.replace(path)
