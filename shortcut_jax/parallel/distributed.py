"""Several processes as one run: they find each other, agree on what they do, and end together.

A process that starts alone on one machine needs none of this and pays for none of it. On a pod
every process runs the same command; who the others are is said by flags or environment variables,
or found by jax.distributed from what TPU VMs, SLURM, Open MPI and Kubernetes say. Whatever is
missing or different ends every process, with one sentence and status 2.
"""

import contextlib
import dataclasses
import importlib.util
import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import logging

from shortcut_jax.errors import UserError
from shortcut_jax.parallel import roll_call

AGREE_SECONDS = 1800  # one process may read a large data set for the first time, the rest wait
SEE_SECONDS = 60  # until every process sees a file that another has written
LINGER_SECONDS = 10  # how long a process that failed waits for the others to end as well
FINISH_SECONDS = 24 * 3600  # how long one that is done waits for those that still work


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a process stands among those of a run, as the user says it."""

    coordinator: str  # HOST:PORT of process 0
    count: int
    index: int


# ---------------------------------------------------------------------- the start


def launched_with_others(env: Mapping[str, str], dev: Path = Path("/dev")) -> bool:
    """Whether jax.distributed should be asked who else there is.

    It is not asked on a plain machine, because its answer there is an error; nor for the one task
    of a SLURM or MPI job, for which it would hide all but one accelerator.

    Args:
      env: environment variables.
      dev: where the kernel shows TPU chips.
    """
    if "SLURM_STEP_NODELIST" in env:  # absent where a job runs something without srun
        return int(env["SLURM_NTASKS"]) > 1
    if "OMPI_COMM_WORLD_SIZE" in env:
        return int(env["OMPI_COMM_WORLD_SIZE"]) > 1
    if "JOB_COMPLETION_INDEX" in env and "KUBERNETES_SERVICE_HOST" in env:
        return True  # a pod of an indexed Job or JobSet
    if env.get("JAX_PLATFORMS") and "tpu" not in env["JAX_PLATFORMS"]:
        return False
    hosts = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES")
    if hosts is not None:  # Kubernetes' TPU pods
        return len(hosts.split(",")) > 1 or int(env.get("MEGASCALE_NUM_SLICES") or 1) > 1
    # On a TPU VM jax.distributed reads from its metadata how many there are.
    chips = any(dev.glob("accel[0-9]*")) or any((dev / "vfio").glob("[0-9]*"))
    return chips and importlib.util.find_spec("libtpu") is not None


def join(place: Place | None, timeout: float) -> None:
    """Starts jax.distributed and says who is there.

    Args:
      place: of this process; None lets jax.distributed find out.
      timeout: seconds to wait for the others.

    Raises:
      UserError: a process is missing, or has no accelerator or another number of devices. If
        jax.distributed waits in vain, the process ends here with that sentence: it cannot be
        interrupted.
    """
    if place is not None:
        roll_call.answer(place.coordinator, place.count, place.index, timeout)
    import jax  # heavy

    if jax.distributed.is_initialized():
        return
    known: dict[str, Any] = {}
    if place is not None:
        known = {
            "coordinator_address": place.coordinator,
            "num_processes": place.count,
            "process_id": place.index,
            "cluster_detection_method": "deactivate",
        }
    elif (devices := slurm_devices(os.environ)) is not None:
        known = {"local_device_ids": devices}
    alone = (
        f"the other processes of this run did not come within {timeout:g} s; expected every worker "
        "to run this command: start it on all of them at once, wait longer with --init_timeout, or "
        "run on this one alone with --num_processes=1."
    )
    with deadline(timeout, alone):
        try:
            # jax.distributed aborts when its own time is up; so that comes later.
            jax.distributed.initialize(initialization_timeout=int(timeout) + 60, **known)
        except (RuntimeError, ValueError, OSError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"the other processes of this run were not found ({reason}); expected a launcher "
                "that jax.distributed knows: give --coordinator, --num_processes and --process_id, "
                "or --num_processes=1 to run alone."
            ) from error
        found = Counter(device.process_index for device in _devices())
    expected = jax.process_count()
    logging.info(
        "Process %d: %d of %d processes are here, with %s = %d devices.",
        jax.process_index(),
        len(found),
        expected,
        " + ".join(str(found[i]) for i in range(expected)),
        sum(found.values()),
    )
    usual = max(found.values())
    fewer = [f"process {i} has {found[i]}" for i in range(expected) if found[i] != usual]
    if fewer:
        raise UserError(
            f"{', '.join(fewer)} devices and others have {usual}; expected the same number on "
            "each: mend or leave out that host."
        )


def _devices() -> Sequence[Any]:
    """All devices of the run, which jax lists together where all have the same kind.

    A process that has none of that kind must not go on: jax would compute on its CPU, and all
    would wait for each other.

    Raises:
      UserError: the accelerators of this process do not work.
    """
    import jax

    platforms = os.environ.get("JAX_PLATFORMS", "")
    if reason := _unusable():
        raise UserError(
            f"the devices of this process cannot be used (JAX_PLATFORMS={platforms}: {reason}); "
            "expected every host of a run to have the same kind: mend the driver of this host, "
            "leave it out, or see whether another one says more."
        )
    devices = jax.devices()
    if devices[0].platform == "cpu" and platforms.split(",")[0] != "cpu":
        raise UserError(
            "this process found no accelerator and would compute on its CPU (JAX_PLATFORMS="
            f"{platforms}); expected every host of a run to have the same kind of device: mend the "
            "driver of this host, leave it out, or set JAX_PLATFORMS=cpu on all to use CPUs."
        )
    return devices


def _unusable() -> str:
    """Why jax finds no devices, if so; else ""."""
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter, wordless, for want of a GPU
        return " ".join(str(error).split())[:300] or "there is none"
    return ""


@contextlib.contextmanager
def devices_named() -> Iterator[None]:
    """Says in a sentence that there is nothing of what JAX_PLATFORMS names.

    What jax itself raises, as late as it is first asked for a device, may be without a word.

    Raises:
      UserError: the devices cannot be used, in the place of what is raised within.
    """
    try:
        yield
    except (RuntimeError, AssertionError) as error:
        platforms = os.environ.get("JAX_PLATFORMS", "")
        # (jax without devices is what it says: nothing that was computed could have failed.)
        if not platforms or "jax" not in sys.modules or not (reason := _unusable()):
            raise
        raise UserError(
            f"JAX_PLATFORMS={platforms} asks for devices that cannot be used here ({reason}); "
            "expected a machine that has them, with their driver and what jax needs for them, such "
            "as pip install -e '.[cuda]': mend that, or set JAX_PLATFORMS=cpu to use the CPU."
        ) from error


def slurm_devices(env: Mapping[str, str]) -> list[int] | None:
    """Which GPUs a SLURM task uses, where jax.distributed would guess wrong; else None.

    It takes one GPU per task, that with the number of the task on its node. A task alone on its
    node has all of them, and one that SLURM shows a single GPU has that.
    """
    visible = env.get("CUDA_VISIBLE_DEVICES")
    if not visible or "SLURM_STEP_NODELIST" not in env:
        return None
    count, tasks = len(visible.split(",")), int(env["SLURM_NTASKS"])
    alone_on_node = tasks == int(env.get("SLURM_STEP_NUM_NODES", 0))
    return list(range(count)) if alone_on_node or count == 1 else None


# ---------------------------------------------------------------------- agreement


def several() -> bool:
    """Whether this run has joined others; touches no back end and imports nothing."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def writes() -> bool:
    """Whether this is process 0, which writes for all."""
    import jax

    return jax.process_index() == 0


def gather(value: Any) -> list[Any]:
    """The JSON data that every process gives, by process; all must call it, in the same order.

    If one does not, the process ends with a sentence after AGREE_SECONDS.
    """
    value = json.loads(json.dumps(value))
    if not several():
        return [value]
    import numpy as np
    from jax.experimental import multihost_utils

    late = (
        f"another process did not come to an agreement within {AGREE_SECONDS} s; expected all to "
        "work at the same pace: look for the first error in the logs of the others."
    )
    with deadline(AGREE_SECONDS, late):
        text = np.frombuffer(json.dumps(value).encode(), np.uint8)
        sizes = multihost_utils.process_allgather(np.int32(len(text)))
        padded = np.zeros(-(-sizes.max() // 4096) * 4096, np.uint8)  # few sizes: few programs
        padded[: len(text)] = text
        rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def of_process_0(value: Any) -> Any:
    """The JSON data that process 0 gives: for decisions by what a file system shows to each."""
    return gather(value)[0]


def agree(facts: Mapping[str, Any]) -> None:
    """Refuses to go on unless every process gives the same JSON data (UserError on all)."""
    first, *others = gather(dict(facts))
    for index, found in enumerate(others, start=1):
        lines = [
            f"{key}: {found.get(key, '(absent)')} there and {first.get(key, '(absent)')} on "
            "process 0"
            for key in sorted(first.keys() | found.keys())
            if (key in found, found.get(key)) != (key in first, first.get(key))
        ]
        if lines:
            raise UserError(
                f"process {index} was started with something else ({'; '.join(lines)}); expected "
                "the same command, code and data on every host: start all of them the same way."
            )


def check_shared(folder: str | os.PathLike[str], name: str) -> None:
    """Refuses a folder in which some processes do not see what process 0 wrote there (UserError).

    To be called when process 0 has written it, which `together` makes sure of.
    """
    path, patience = Path(folder) / name, time.monotonic() + SEE_SECONDS
    with together():
        while not path.exists():  # network file systems may remember that it was not there
            if time.monotonic() > patience:
                raise UserError(
                    f"{folder} is not shared: a process does not see {name} there, which process 0 "
                    "wrote; expected a folder that all hosts see: use a network file system."
                )
            time.sleep(0.5)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A UserError of one process is raised on all, so that none waits for one that has ended."""
    own = None
    try:
        yield
    except UserError as error:
        own = error
    sentences = gather(str(own) if own else "")
    if own:
        raise own
    for index, sentence in enumerate(sentences):
        if sentence:
            raise UserError(f"process {index} ended with: {sentence}")


# ---------------------------------------------------------------------- the end


@contextlib.contextmanager
def deadline(seconds: float, sentence: str) -> Iterator[None]:
    """Ends the process with status 2 and the sentence if what is inside takes longer.

    For calls that wait in C++ for other processes and cannot be interrupted.
    """

    def stop() -> None:
        print(f"error: {sentence}", file=sys.stderr, flush=True)
        os._exit(2)

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def wait_for_others() -> None:
    """Waits until every process has come to the end of its work, or failed; alone, for nothing.

    A process that ends lets jax.distributed wait 5 minutes for the others, which cannot be changed
    for all of them, and then aborts them at their work. So none ends before all are done. One that
    dies is not waited for: jax.distributed sees it and ends the others.

    Raises:
      RuntimeError: another process has died.
    """
    if not several():
        return
    import orbax.checkpoint as ocp  # heavy; gives jax's barrier without devices a public name

    late = (
        f"another process still worked {FINISH_SECONDS // 3600} h after this one was done; "
        "expected all to end: look into its log for what it waits for."
    )
    with deadline(FINISH_SECONDS, late):
        wait = ocp.multihost.get_barrier_sync_fn()
        wait(key="shortcut_jax end", timeout_ms=(FINISH_SECONDS + 60) * 1000)


def end(status: int) -> NoReturn:
    """Ends this process: at once if it is alone, else when the others end, too, or soon after.

    Without waiting, the end of process 0 would abort the others before they say why they end. With
    waiting for ever, one that failed alone would keep all others waiting for it.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if several():
        import jax

        timer = threading.Timer(LINGER_SECONDS, os._exit, (status,))
        timer.daemon = True
        timer.start()
        try:
            wait_for_others()  # those that are done wait for this one there
            jax.distributed.shutdown()
        finally:
            os._exit(status)
    sys.exit(status)
