"""Files: read and written whole."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from shortcut_jax.errors import UserError


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write in the place of another: it takes that place when the `with` ends well.

    A kill leaves the old content, never half of the new; an error leaves nothing else behind.
    """
    path = Path(path)
    # Of this process: two that write the same file must not take each other's away.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes the file whole or not at all: see `replacing`."""
    with replacing(path) as file:
        file.write(data)


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
