"""Compiled programs are kept from one process to the next: a second start compiles almost nothing.

jax keeps them under a hash of the program, the options, its own version and the devices. What is
read from there is run: only a folder that its user alone can write is used.
"""

import hashlib
import os
import platform
import stat
import sys
from pathlib import Path

from absl import logging

FOLDER = "JAX_COMPILATION_CACHE_DIR"  # jax's own; set but empty, nothing is kept
# Small networks consist of programs that compile in less than jax's default of a second.
SETTINGS = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": 0.1,
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": -1,
}


def use() -> None:
    """Keeps programs in `default_folder`, unless the user has set FOLDER; never an error.

    Processes that are started from here do the same.
    """
    if FOLDER in os.environ:
        return
    folder = default_folder()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError as error:
        logging.info("Compiled programs are not kept: %s cannot be used (%s).", folder, error)
        return
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        logging.warning("Compiled programs are not kept: others can write in %s.", folder)
        return
    for name, value in {FOLDER: str(folder), **SETTINGS}.items():
        if name not in os.environ:
            os.environ[name] = str(value)
            if "jax" in sys.modules:  # which has read the environment
                sys.modules["jax"].config.update(name.lower(), value)


def default_folder() -> Path:
    """$XDG_CACHE_HOME/shortcut_jax/xla/MACHINE, one for each kind of CPU.

    Programs for a CPU use what that one can do, and a home may be shared with others.
    """
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    digest = hashlib.sha256(_cpu().encode()).hexdigest()[:8]
    return Path(base) / "shortcut_jax" / "xla" / f"{platform.machine()}-{digest}"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor()
    names = ("model name", "flags", "Features")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(names)))
