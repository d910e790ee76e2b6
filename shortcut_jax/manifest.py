"""manifest.json: what the other files of a folder are, so that they are taken for nothing else."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from shortcut_jax.errors import UserError
from shortcut_jax.files import read_json, write_atomically

NAME = "manifest.json"

Manifest = Mapping[str, Any]


def read(folder: Path, what: str) -> dict[str, Any]:
    """The manifest of a folder of `what`, such as "latents" (UserError if it cannot be read)."""
    return read_json(folder / NAME, f"the manifest of the {what}")


def claim(folder: Path, wanted: Manifest, what: str, pattern: str, fix: str) -> None:
    """Writes the manifest of a new folder; refuses a folder of something else.

    Args:
      folder: to be filled, or partly filled by a process that was killed.
      wanted: what shall be in it; JSON data.
      what: its name in sentences, such as "pairs".
      pattern: of the files that nobody can tell what they are without a manifest.
      fix: what the user may do about other contents.

    Raises:
      UserError: the folder holds something else, or files that no manifest explains, or cannot be
        written.
    """
    if (folder / NAME).exists():
        found = read(folder, what)
        refuse_differences(folder, found, {**dict.fromkeys(found), **wanted}, what, fix)
    elif any(folder.glob(pattern)):
        raise UserError(
            f"{folder} holds {what} but no {NAME} that says which; expected both or neither: "
            "restore it, or remove that folder and start again, which makes them anew."
        )
    elif jax.process_index() == 0:
        write(folder / NAME, json.dumps(wanted, indent=1, sort_keys=True).encode())


def refuse_differences(
    folder: Path, found: Manifest, wanted: Manifest, what: str, fix: str
) -> None:
    """Raises UserError naming every key of `wanted` that `found` has another value of, or lacks."""
    lines = [
        f"{key}: {found.get(key)} -> {wanted[key]}"
        for key in sorted(wanted)
        if found.get(key) != wanted[key]
    ]
    if lines:
        raise UserError(
            f"{folder} holds other {what} than the config asks for (there -> asked for now): "
            f"{'; '.join(lines)}. {fix}; nothing was changed."
        )


def digest(manifest: Manifest) -> str:
    """16 hex digits that name what a manifest describes."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:16]


def write(path: Path, content: bytes) -> None:
    """Writes a file of the folder whole or not at all; UserError if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error}); expected room and permission for "
            f"{len(content) / 2**20:.1f} MiB: make room or choose another folder; finished files "
            "are kept."
        ) from error
