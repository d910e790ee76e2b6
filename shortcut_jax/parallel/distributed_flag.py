"""The flags that say which processes make up a run, for the binaries that compute on devices.

An environment variable stands in for a flag that is not given: launchers that start the same
command everywhere can only tell processes apart by those.
"""

import os
from collections.abc import Mapping

from absl import flags

from shortcut_jax.errors import UserError
from shortcut_jax.parallel import distributed

flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0 [JAX_COORDINATOR_ADDRESS].")
flags.DEFINE_integer(
    "num_processes", None, "Processes of the run; 1: run alone [JAX_NUM_PROCESSES].", 1
)
flags.DEFINE_integer("process_id", None, "Which of them this is, 0 ... N-1 [JAX_PROCESS_ID].", 0)
INIT_TIMEOUT = flags.DEFINE_integer(
    "init_timeout", 300, "Seconds to wait for the other processes at the start.", 1
)

VARIABLES = {
    "coordinator": "JAX_COORDINATOR_ADDRESS",
    "num_processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}


def start() -> None:
    """Joins the other processes, if there are any; before anything that touches a back end.

    Raises:
      UserError: flags or variables contradict each other, or a process is missing.
    """
    given = {name: flags.FLAGS[name].value for name in VARIABLES}
    place, alone = read_place(given, os.environ)
    if place or not alone and distributed.launched_with_others(os.environ):
        distributed.join(place, INIT_TIMEOUT.value)


def read_place(
    given: Mapping[str, str | int | None], environ: Mapping[str, str]
) -> tuple[distributed.Place | None, bool]:
    """Which process of which run this is said to be.

    Args:
      given: values of the flags.
      environ: environment variables.

    Returns:
      The place, None if nothing is said; and whether the process is said to run alone.

    Raises:
      UserError: some flags are missing, or a variable holds no number.
    """
    found: dict[str, str] = {}
    for name, variable in VARIABLES.items():
        value = environ.get(variable) if given[name] is None else given[name]
        if value is not None:
            found[name] = str(value)
        if name != "coordinator" and not found.get(name, "0").isdigit():
            raise UserError(
                f"{variable}={value} is no number; expected a whole one: mend that variable."
            )
    if not found or found.get("num_processes") == "1":
        return None, bool(found)
    missing = [f"--{name}" for name in VARIABLES if name not in found]
    if missing:
        words = " ".join(f"--{name}={value}" for name, value in found.items())
        raise UserError(
            f"{words} came without {' and '.join(missing)}; expected all three of them, or none "
            "where the launcher tells jax.distributed: add what is missing."
        )
    numbers = int(found["num_processes"]), int(found["process_id"])
    return distributed.Place(found["coordinator"], *numbers), False
