"""Runs a worker script on several processes of this machine, without a GPU, and returns what it found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
# Processes that wait for one another wait for ever. The first launch of DeepSpeed compiles, for a minute or two.
SECONDS = int(os.environ.get("ENGINE_SECONDS", "300"))


def launch(script: str, processes: int, *arguments: str, launcher: Sequence[str] = (), **environment: str) -> Any:
    """The figures that process 0 of a script in this folder passed to `workers.report`.

    Args:
        script: The script.
        processes: On how many processes.
        *arguments: The script's own, as `workers.arguments` gives them.
        launcher: The module that launches it and its options, torch's own by default.
        **environment: Variables for all processes.

    Raises:
        AssertionError: A process failed, or they were not done in time.
    """
    with tempfile.TemporaryDirectory() as folder:
        torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))
        command = [sys.executable, "-m", *(launcher or torchrun), str(HERE / script), folder, *arguments]
        env = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "passive",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
            **environment,
        }
        log = Path(folder) / "log"
        with log.open("w") as output:
            running = subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT)
            try:
                code = running.wait(SECONDS)
                verdict = f"failed with {code}"
            except subprocess.TimeoutExpired:
                # On this signal the launcher ends its workers, which are not its process group's.
                running.terminate()
                code = running.wait()
                verdict = f"was not done in {SECONDS} s"
        figures = Path(folder) / "figures.json"
        ended = code == 0 and figures.exists()
        assert ended, f"{script} on {processes} processes {verdict}\n{log.read_text()[-8000:]}"
        return json.loads(figures.read_text())
