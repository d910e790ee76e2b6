"""Several processes at once, as a launcher starts them."""

import contextlib
import os
import socket
import subprocess
import sys
import time


def free_port():
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def start_all(commands, devices=1, timeout=100):
    """Runs [(arguments, variables)] at once; returns [(status, stderr)]. None outlives the test."""
    flags = f"--xla_backend_optimization_level=0 --xla_force_host_platform_device_count={devices}"
    with contextlib.ExitStack() as stack:
        processes = []
        for arguments, variables in commands:
            process = subprocess.Popen(
                [sys.executable, *arguments], text=True, stderr=subprocess.PIPE,
                stdout=subprocess.DEVNULL, env={**os.environ, "XLA_FLAGS": flags, **variables},
            )  # fmt: skip
            stack.enter_context(process)
            stack.callback(process.kill)
            processes.append(process)
        until = time.monotonic() + timeout
        ends = [process.communicate(timeout=until - time.monotonic()) for process in processes]
    return [(p.returncode, err) for p, (_, err) in zip(processes, ends, strict=True)]
