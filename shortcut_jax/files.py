"""Files: read and written whole."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from shortcut_jax.errors import UserError


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes the file whole or not at all: a kill leaves the old content, never half of the new."""
    path = Path(path)
    # Of this process: two that write the same file must not take each other's away.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def remove_leftovers(folder: Path) -> None:
    """Removes what killed processes of this machine left of `write_atomically` in a folder."""
    for path in folder.glob("*.tmp"):
        pid = path.name.split(".")[-2]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            path.unlink(missing_ok=True)


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      UserError: it cannot be read; `what` says what it should be.
    """
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}")
        return found
    except (OSError, ValueError, RecursionError) as error:  # the last: brackets in brackets in ...
        raise UserError(
            f"{path} cannot be read as JSON ({error}); expected {what}: restore it, or use "
            "another --workdir."
        ) from error


def sha256_of(path: Path) -> str:
    """The sha256 of a file, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
