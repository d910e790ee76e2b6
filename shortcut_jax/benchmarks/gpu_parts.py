"""The parts of `shortcut_jax.gpu_benchmark`, and how one is run."""

import contextlib
import dataclasses
import math
import os
import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shortcut_jax import compilation_cache
from shortcut_jax.benchmarks import Failure, Measurement, Options, gpu_report
from shortcut_jax.errors import UserError

Piece = Callable[[], Iterator[Measurement | Failure]]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the flags say.

    Attributes:
      small: tiny networks.
      torch_python: Python of an environment with PyTorch, or "".
      authors: checkout of the authors' code, or "".
      deadline: of time.monotonic(), after which nothing new is begun.
    """

    small: bool
    torch_python: str
    authors: str
    deadline: float = math.inf


# The batch with which implementations are compared: every one of them holds it on 80 GB.
NETWORKS = {"xl2": ("XL/2", 64), "b2": ("B/2", 256)}


def _network(name: str, small: bool) -> tuple[Any, int]:
    from shortcut_jax.benchmarks import workloads

    return (workloads.TINY, 16) if small else NETWORKS[name]


def _checks(settings: Settings) -> dict[str, Piece]:
    from shortcut_jax.benchmarks import correct

    return dict(correct.checks(settings.small))


def _variants(name: str, settings: Settings) -> dict[str, Piece]:
    from shortcut_jax.benchmarks.variants import Sweep

    network, batch_size = _network(name, settings.small)
    few = {"repeats": 1, "steps": 1} if settings.small else {}
    sweep = Sweep(name, network, batch_size, settings.deadline, small=settings.small, **few)
    return {name: sweep.run}


def _torch(name: str, settings: Settings) -> dict[str, Piece]:
    from shortcut_jax.benchmarks import torch_step, workloads

    configs = workloads.contenders(*_network(name, settings.small), torch_step.OBJECTIVES)
    small = {"repeats": 1, "steps": 1, "side": 256, "dtype": "float32", "compile_step": False}

    def piece() -> Iterator[Measurement | Failure]:
        yield from torch_step.measure_step(
            f"torch_{name}", configs, python=settings.torch_python,
            **(small if settings.small else {"repeats": 3, "steps": 5}),
        )  # fmt: skip

    return {f"torch_{name}": piece}


def _authors(name: str, settings: Settings) -> dict[str, Piece]:
    from shortcut_jax.benchmarks import authors_step

    network, batch_size = _network(name, settings.small)
    few = {"repeats": 1, "steps": 1} if settings.small else {}

    def piece() -> Iterator[Measurement | Failure]:
        yield from authors_step.measure_step(
            f"authors_{name}", Path(settings.authors), network, batch_size,
            small=settings.small, **few,
        )  # fmt: skip

    return {f"authors_{name}": piece}


def _sample(settings: Settings) -> dict[str, Piece]:
    from shortcut_jax.benchmarks import sample

    options = Options(repeats=1 if settings.small else 2, small=settings.small)
    return {"sample": lambda: sample.measure(options)}


def _features(settings: Settings) -> dict[str, Piece]:
    from shortcut_jax.benchmarks import metrics

    options = Options(repeats=2, small=settings.small)
    return {"features": lambda: metrics.features(options)}


TORCH = "torch_"  # begins the names of those in which another process computes
MEMORY = {"XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"}  # today's name, the old one
GRACE = 60  # seconds that a part may take beyond the time that it was given

# Name -> what makes its pieces; in the order in which they run, what matters most first.
PARTS: Mapping[str, Callable[[Settings], dict[str, Piece]]] = {
    "check": _checks,
    "xl2": lambda settings: _variants("xl2", settings),
    "torch_xl2": lambda settings: _torch("xl2", settings),
    "authors_xl2": lambda settings: _authors("xl2", settings),
    "b2": lambda settings: _variants("b2", settings),
    "torch_b2": lambda settings: _torch("b2", settings),
    "authors_b2": lambda settings: _authors("b2", settings),
    "features": _features,
    "sample": _sample,
}


def missing(part: str, settings: Settings) -> str:
    """The flag without which a part cannot run, if it is not given."""
    needed = {"torch": "torch_python", "authors": "authors"}.get(part.partition("_")[0], "")
    return f"--{needed}" if needed and not getattr(settings, needed) else ""


def environment(part: str, out: Path, given: Mapping[str, str]) -> dict[str, str]:
    """Variables of the process of a part.

    Args:
      part: its name. The GPU is PyTorch's alone in its parts.
      out: folder whose folder `cache` keeps compiled programs.
      given: variables of this process, of which one that says how much memory jax takes is heeded.
    """
    found = {**given, compilation_cache.FOLDER: str(out.absolute() / "cache")}
    if not MEMORY & given.keys():
        found["XLA_CLIENT_MEM_FRACTION"] = "0.94"  # the batch shall fill it
    platforms = "cpu" if part.startswith(TORCH) else given.get("JAX_PLATFORMS", "")
    if platforms:  # with the CPU, which the checks compare with
        found["JAX_PLATFORMS"] = platforms if "cpu" in platforms else f"{platforms},cpu"
    return found


def run_group(command: Sequence[str], variables: Mapping[str, str], timeout: float) -> int:
    """Runs a command, after which none of the processes that it began is left, as PyTorch's.

    Returns:
      its exit status; negative: the signal that ended it.

    Raises:
      subprocess.TimeoutExpired: it was killed after `timeout` seconds.
    """
    process = subprocess.Popen(command, env=variables, start_new_session=True)
    try:
        return process.wait(timeout)
    finally:
        with contextlib.suppress(ProcessLookupError):  # all have ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_part(part: str, settings: Settings, path: Path) -> None:
    """Runs the pieces of a part; the file has all that was found at any time."""
    import jax

    from shortcut_jax import versions

    start = time.monotonic()
    devices = jax.devices()
    about = {**versions.recorded(), "device": devices[0].device_kind, "devices": len(devices)}
    content = gpu_report.Content(part, about)
    pieces: dict[str, Piece] = {}
    try:
        _check_device(devices[0], part, settings)
        pieces = PARTS[part](settings)
    except Exception as error:
        _failed(content, path, part, error)
    for name, piece in pieces.items():
        if time.monotonic() > settings.deadline:
            content.add(path, Failure(name, "not begun: the time is up"))
            continue
        try:
            for found in piece():
                print(gpu_report.line(found), flush=True)
                content.add(path, found)
        except Exception as error:  # whatever it is, the other pieces go on
            _failed(content, path, name, error)
    content.end(path, time.monotonic() - start)


def _check_device(device: Any, part: str, settings: Settings) -> None:
    """Refuses networks of this size on a CPU, which jax falls back to if its GPU does not work."""
    if device.platform == "cpu" and not settings.small and not part.startswith(TORCH):
        raise UserError(
            "jax runs on a CPU, which would take hours; expected a GPU: install the extra cuda and "
            "mend the driver until python -c 'import jax; jax.devices(\"cuda\")' works, or see "
            "with --small that everything runs."
        )


def _failed(content: "gpu_report.Content", path: Path, name: str, error: Exception) -> None:
    traceback.print_exc()
    failure = Failure(name, f"{type(error).__name__}: {error}"[:1000])
    print(gpu_report.line(failure), flush=True)
    content.add(path, failure)
