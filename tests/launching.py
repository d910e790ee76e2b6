"""Runs the launchers as processes, for their tests."""

import os
import signal
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RUN = ["--", "--config=configs/digits.py:small", "--workdir=runs/x"]  # flags of the program
TPU = ["--name=sj", "--zone=z", "--type=v5litepod-16", "--version=v2-alpha-tpuv5-lite"]


def launch(script, *args, env=None, root=ROOT, timeout=250):
    """A launcher as a process; nothing that it started is left behind."""
    command, variables = ["bash", f"launch/{script}", *args], {**os.environ, **(env or {})}
    with subprocess.Popen(
        command, cwd=root, env=variables, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)
