"""Runs a worker script on several processes of this machine, without a GPU, and returns what it found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SECONDS = 150  # processes that wait for one another wait for ever


def launch(script: str, processes: int, *arguments: str, **environment: str) -> dict[str, Any]:
    """The figures that process 0 of a script in this folder passed to `workers.report`.

    Raises:
        AssertionError: A process failed, or they were not done in time.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)),
            *(str(HERE / script), folder, *arguments),
        ]
        env = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "passive",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
            **environment,
        }
        # A session of its own, so that the end of the launcher is the end of its workers.
        running = subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        try:
            output, _ = running.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, 9)
            output, _ = running.communicate()
            raise AssertionError(f"{script} on {processes} processes: not done in {SECONDS} s\n{output}") from None
        assert running.returncode == 0, f"{script} on {processes} processes failed\n{output}"
        return json.loads((Path(folder) / "figures.json").read_text())
