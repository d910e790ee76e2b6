"""What decides results beside the config: versions of packages, and of this one."""

import functools
import hashlib
import importlib.metadata
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent


def recorded() -> dict[str, str]:
    """What is written with results: versions, and the commit if this runs from a git checkout."""
    return _installed() | {"commit": _commit()}


def compared() -> dict[str, str]:
    """What processes of one run must have in common, with a digest of this package's files."""
    found = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        found.update(f"{path.relative_to(PACKAGE)} ".encode() + path.read_bytes())
    return {"version of python": sys.version.split()[0], "code": found.hexdigest()[:16]} | {
        f"version of {name}": version for name, version in _installed().items()
    }


def _installed() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")}


@functools.cache  # a process is of one commit, and every number is written with it
def _commit() -> str:
    """The commit of the source tree, "+dirty" if it was changed, or "unknown"."""
    try:
        head = subprocess.run(
            ["git", "describe", "--always", "--dirty=+dirty", "--abbrev=12", "--match="],
            cwd=PACKAGE, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return head.stdout.strip()
