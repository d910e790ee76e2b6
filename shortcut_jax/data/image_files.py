"""Image files as people have them: in a folder or a zip, with classes in names or in a file."""

import collections
import csv
import dataclasses
import functools
import io
import json
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from shortcut_jax.errors import UserError

# Of a file in a zip, unpacked: nothing larger is unpacked into memory, whatever it claims to be.
MAX_BYTES = 2**28
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


@dataclasses.dataclass(frozen=True)
class Entry:
    """An image file: its path in the source with forward slashes, its bytes, and what would change
    if its content did (time of change in a folder, checksum in a zip)."""

    path: str
    size: int
    stamp: int


@dataclasses.dataclass(frozen=True)
class Source:
    """A folder or a zip file; can be pickled.

    Attributes:
      path: of the folder or zip.
      inside: the folder in it that is meant, with forward slashes; "" for all of it.
    """

    path: Path
    inside: str = ""

    @property
    def kind(self) -> str:
        return "folder" if self.path.is_dir() else "zip"

    def images(self) -> tuple[list[Entry], dict[str, int]]:
        """Lists the image files, sorted by path, and counts by suffix what is none.

        Names that begin with a dot and what macOS adds to zip files are none.

        Raises:
          UserError: there is no such folder or zip, no image in it, or a member of the zip that
            leaves it or unpacks to more than MAX_BYTES.
        """
        prefix = f"{self.inside.strip('/')}/" if self.inside else ""
        images, others = [], collections.Counter[str]()
        for entry in self._files():
            path = PurePosixPath(entry.path)
            if not entry.path.startswith(prefix):
                continue
            hidden = any(part.startswith(".") or part == "__MACOSX" for part in path.parts)
            if path.suffix.lower() in SUFFIXES and not hidden:
                name = entry.path.removeprefix(prefix)
                images.append(dataclasses.replace(entry, path=name))
            else:
                others["hidden" if hidden else path.suffix.lower() or path.name] += 1
        if not images:
            raise UserError(
                f"--source={self.path} has no images in {prefix or 'it'} (other files: "
                f"{dict(others) or 'none'}); expected files with one of {' '.join(SUFFIXES)}: "
                "mend the path."
            )
        return sorted(images, key=lambda entry: entry.path), dict(sorted(others.items()))

    def open(self) -> "Files":
        """Opens the source for reading files.

        The last zip stays open, for this process and all its threads: its list of files is read
        again only if the file has changed. Of ImageNet's that takes 8 s and 0.7 GiB.
        """
        return Files(self)

    def _files(self) -> Iterator[Entry]:
        if self.path.is_dir():
            yield from _walk(self.path, "", ())
        else:
            with _open_zip(self.path) as archive:
                yield from (_check_member(self.path, info) for info in _members(archive))


class Files:
    """Reads files of an open source by their paths."""

    def __init__(self, source: Source) -> None:
        self._archive = None if source.path.is_dir() else _kept_zip(source.path)
        self._root, self._inside = source.path, source.inside.strip("/")

    def read(self, path: str, inside: bool = True) -> bytes:
        """The content of a file.

        Args:
          path: as in `Entry`.
          inside: whether it is relative to `source.inside` or to the whole source.

        Raises:
          OSError, KeyError, ValueError, zipfile.BadZipFile, ...: it cannot be read, or is a file
            of a zip that unpacks to more than MAX_BYTES.
        """
        full = f"{self._inside}/{path}" if inside and self._inside else path
        if self._archive is None:
            return (self._root / full).read_bytes()
        size = self._archive.getinfo(full).file_size  # no more than that is unpacked
        if size > MAX_BYTES:
            raise ValueError(f"it unpacks to {size:,} bytes, more than {MAX_BYTES:,}")
        return self._archive.read(full)


def _walk(folder: Path, prefix: str, above: tuple[str, ...]) -> Iterator[Entry]:
    """Files below a folder; links are followed, but not into a folder they lie in."""
    real = os.path.realpath(folder)
    if real in above:
        return
    try:
        for child in os.scandir(folder):
            if child.is_dir():
                yield from _walk(Path(child.path), f"{prefix}{child.name}/", (*above, real))
            else:
                # A broken link has no status of its own; reading it will say what is wrong.
                status = child.stat(follow_symlinks=os.path.exists(child.path))
                yield Entry(prefix + child.name, status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise UserError(
            f"--source: the folder {folder} cannot be listed ({error}); expected one that can be "
            "read: mend its permissions or the path."
        ) from error


def _open_zip(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(
            f"--source={path} is neither a folder nor a zip file that can be read ({error}); "
            "expected one of them: mend the path, or download the file again."
        ) from error


def _kept_zip(path: Path) -> zipfile.ZipFile:
    try:
        found = path.stat()
    except OSError:
        return _open_zip(path)  # which says what is wrong
    return _keep_zip(path, (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns))


@functools.lru_cache(maxsize=1)
def _keep_zip(path: Path, _: tuple[int, ...]) -> zipfile.ZipFile:
    return _open_zip(path)


def _members(archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    return [info for info in archive.infolist() if not info.is_dir()]


def _check_member(path: Path, info: zipfile.ZipInfo) -> Entry:
    name = info.filename
    pure = PurePosixPath(name.replace("\\", "/"))
    if pure.is_absolute() or ".." in pure.parts or ":" in pure.parts[0]:
        raise UserError(
            f"--source={path} has a member {name!r} that points out of it; expected relative "
            "paths without ..: do not trust that file, or pack it again."
        )
    if info.flag_bits & 1:
        raise UserError(
            f"--source={path} is encrypted ({name}); expected a zip without a password: unpack it "
            "and give the folder."
        )
    if info.file_size > MAX_BYTES and pure.suffix.lower() in SUFFIXES:
        raise UserError(
            f"--source={path} has an image {name!r} that unpacks to {info.file_size:,} bytes; "
            f"expected up to {MAX_BYTES:,}: do not trust that file, or unpack it and give the "
            "folder."
        )
    return Entry(name, info.file_size, info.CRC)


# ---------------------------------------------------------------------- classes


def classes_from_folders(paths: Sequence[str]) -> list[str]:
    """Returns the class name of each file: the first folder below those that all have in common.

    All are of one class, "images", if none lies in a folder then.

    Raises:
      UserError: some lie in folders and some beside them.
    """
    folders = [PurePosixPath(path).parts[:-1] for path in paths]
    common = len(os.path.commonprefix(folders))
    names = {folder[common : common + 1] for folder in folders}
    if names == {()}:
        return ["images"] * len(paths)
    if () in names:
        beside = next(path for path, folder in zip(paths, folders, strict=True)
                      if len(folder) == common)  # fmt: skip
        raise UserError(
            f"--source has images in folders and images beside them ({beside}), so folders do not "
            "tell classes; expected one or the other: move them, give --labels=FILE, or say "
            "--labels=none for one class."
        )
    return [folder[common] for folder in folders]


def classes_from_file(text: str, where: str, paths: Sequence[str]) -> list[str]:
    """Returns the class name of each file, from JSON or CSV.

    JSON is as StyleGAN's tools write it, {"labels": [["folder/a.png", 3], ...]}; {"labels": null}
    is one class. CSV has lines `path,label`, with or without those words as its first line. Labels
    are numbers or names; paths are relative to the source.

    Raises:
      UserError: it is neither, or does not name each image exactly once.
    """
    try:
        listed = _parse_json(text) if text.lstrip().startswith("{") else _parse_csv(text)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{where} cannot be read as labels ({error}); expected JSON "
            '{"labels": [["path", 3], ...]} or lines path,label: mend it.'
        ) from error
    if listed is None:
        return ["images"] * len(paths)
    found = dict(listed)
    absent, unlabelled = sorted(found.keys() - set(paths)), sorted(set(paths) - found.keys())
    if len(found) != len(listed) or absent or unlabelled:
        first = (absent or unlabelled or [path for path, n in _repeated(listed) if n > 1])[0]
        raise UserError(
            f"{where} has {len(listed)} labels, {len(listed) - len(found)} of them repeated and "
            f"{len(absent)} of files that are not there, and leaves {len(unlabelled)} images "
            f"without one (the first: {first}); expected each image once, with its path in the "
            "source: mend it."
        )
    return [found[path] for path in paths]


def class_order(names: set[str]) -> list[str]:
    """Classes in the order of their labels: numbers from 0 to the largest, names sorted."""
    if all(name.isdecimal() for name in names):
        numbers = {int(name) for name in names}
        if {str(number) for number in numbers} == names:  # no 007
            return [str(number) for number in range(max(numbers) + 1)]
    return sorted(names)


def _parse_json(text: str) -> list[tuple[str, str]] | None:
    labels: Any = json.loads(text)["labels"]
    if labels is None:
        return None
    pairs = labels.items() if isinstance(labels, Mapping) else labels
    return [(str(path), _label(label)) for path, label in pairs]


def _parse_csv(text: str) -> list[tuple[str, str]]:
    rows = [row for row in csv.reader(io.StringIO(text)) if row]
    wrong = next((row for row in rows if len(row) != 2), None)
    if wrong is not None or not rows:
        raise ValueError(f"a line has {len(wrong)} values" if wrong else "it is empty")
    body = rows[1:] if [cell.strip().lower() for cell in rows[0]] == ["path", "label"] else rows
    return [(path.strip(), _label(label.strip())) for path, label in body]


def _label(label: Any) -> str:
    if type(label) not in (int, str) or label == "" or (type(label) is int and label < 0):
        raise ValueError(f"the label {label!r}")
    return str(label)


def _repeated(listed: Sequence[tuple[str, str]]) -> list[tuple[str, int]]:
    return sorted(collections.Counter(path for path, _ in listed).items())
