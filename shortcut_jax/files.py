"""Files: read and written whole, and how many may be open."""

import contextlib
import errno
import hashlib
import json
import os
import resource
import tempfile
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


@contextlib.contextmanager
def writing_to(flag: str, folder: Path) -> Iterator[None]:
    """Makes a UserError of an OSError inside: the folder that a flag names cannot be written."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{flag}: the folder {folder} cannot be written ({error}); expected one that can be "
            "created and written to: choose another one or mend its permissions."
        ) from error


def check_writable(flag: str, folder: Path) -> None:
    """Makes the folder and tries to write in it, before work that may take hours.

    Raises:
      UserError: it cannot be written.
    """
    with writing_to(flag, folder):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


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


# ---------------------------------------------------------------------- how many may be open


def open_files_limit() -> int:
    """How many files this process may have open at once: what `ulimit -n` says."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def raise_open_files_limit() -> None:
    """Lets this process, and those it starts, open as many files as the system allows them.

    Shells often give 1,024, and every shard of a data set stays open.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # macOS says that there is no hard limit and takes what its kernel allows, 10,240 at the least.
    for limit in (hard, 65536, 10240):
        if soft == hard or 0 <= limit <= soft:  # "no limit" may be -1
            return
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
            return


def too_many_open(error: Exception) -> bool:
    """Whether an error, of Python or of a C++ library, says that no more files may be open."""
    if isinstance(error, OSError):
        return error.errno in (errno.EMFILE, errno.ENFILE)
    return os.strerror(errno.EMFILE) in str(error)  # which ENFILE's text begins with
