"""Settings every test shares, and a way to run Python in a process of its own."""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]

# In the environment, before any import of jax, so that the processes tests start inherit it.
os.environ["JAX_PLATFORMS"] = "cpu"
# Repeated runs find their compiled programs; `rm -r .pytest_cache` starts afresh.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# Machine code in half the time, which takes longer to run: tests compile more than they compute.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

RunPython = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def photographs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory with the prepared set of `tests.photographs`."""
    from tests import photographs

    return photographs.prepare(tmp_path_factory.mktemp("photographs"))


@pytest.fixture
def stand_in(tmp_path: Path) -> Callable[[str, str], Path]:
    """`stand_in(NAME, SCRIPT)` puts an executable first on the PATH that `stand_in.env` has."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def make(name: str, script: str) -> Path:
        path = folder / name
        path.write_text(f"#!/usr/bin/env bash\n{script}\n")
        path.chmod(0o755)
        return path

    make.env = {"PATH": f"{folder}:{os.environ['PATH']}", "AT": str(tmp_path)}
    return make


@pytest.fixture
def quick_compile() -> Iterator[None]:
    """Programs compile in less time and run in more: for tests that compare no number."""
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()  # no other test gets such a program


@pytest.fixture(scope="session")
def run_python() -> RunPython:
    """`run_python(args, env={}, devices=1, timeout=120)`: Python from the repository's root.

    `args` follow the interpreter (`["-m", "shortcut_jax.main", ...]`), `env` is added to this
    process's environment, `devices` is the number of fake CPU devices. Returns the completed
    process with text `stdout` and `stderr`; a failing one has its stderr in the test's report.
    Raises `subprocess.TimeoutExpired` after `timeout` seconds.
    """

    def run(
        args: Sequence[str],
        env: Mapping[str, str] | None = None,
        devices: int = 1,
        timeout: float = 120,
    ) -> subprocess.CompletedProcess[str]:
        flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
        try:
            done = subprocess.run(
                [sys.executable, *args],
                cwd=ROOT,
                env={**os.environ, "XLA_FLAGS": flags, **(env or {})},
                capture_output=True,
                text=True,
                timeout=timeout,
            )
        except subprocess.TimeoutExpired as error:
            # The output collected so far is bytes even with text=True.
            print((error.stderr or b"").decode(errors="replace"), file=sys.stderr)
            raise
        if done.returncode != 0:
            print(done.stderr, file=sys.stderr)
        return done

    return run


@pytest.fixture(scope="session")
def run_quickly(run_python: RunPython) -> RunPython:
    """`run_python` with programs that compile in less time and run in more.

    For tests that compare no number with one of a program that was compiled otherwise.
    """
    return functools.partial(run_python, env={"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"})


@pytest.fixture(scope="session")
def in_turn(run_quickly: RunPython) -> Callable[..., list[dict[str, Any]]]:
    """`in_turn("eval", [argument, ...], ...)`: of each call of shortcut_jax.eval in one process its
    `status`, `out` and `error`, the sentence."""

    def calls(module: str, *commands: Sequence[object]) -> list[dict[str, Any]]:
        arguments = json.dumps([[str(word) for word in command] for command in commands])
        done = run_quickly(["-m", "tests.programs.in_turn", module, arguments], timeout=280)
        assert done.returncode == 0
        return json.loads(done.stdout.splitlines()[-1])

    return calls
