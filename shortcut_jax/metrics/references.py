"""Reference statistics: made from images, stored with what they are, refused where they do not fit.

A file is an .npz. `about` is JSON, a list with the facts of each part; the arrays of part i are
called i/SUMMARY/OUTPUT/ARRAY. Files of others (ADM's, pytorch-fid's, the authors') hold a mean and
a covariance and say nothing of how they were made: `foreign` reads them.
"""

import dataclasses
import functools
import hashlib
import json
import zipfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shortcut_jax.data.sources import Dataset
from shortcut_jax.errors import UserError
from shortcut_jax.files import replacing, sha256_of
from shortcut_jax.metrics import gauges as gauges_lib
from shortcut_jax.metrics.frechet import Stats
from shortcut_jax.metrics.gauges import Gauge, Key
from shortcut_jax.metrics.summaries import Moments, Rows

FORMAT = 1
ORIGIN = ("builder", "split", "crop")  # keys of `data.origin`


@dataclasses.dataclass(frozen=True)
class Reference:
    """What samples are compared with, through one network under one protocol.

    Attributes:
        facts: network ("extractor", "extractor_sha256"), "protocol", "image_shape", "num_images"
            (None if not known), "source" and "fingerprint" of the images, and those of ORIGIN (None
            if not known; files of older versions lack them).
        summaries: `Stats` and complete `Rows` by what they are of.
    """

    facts: Mapping[str, Any]
    summaries: Mapping[Key, Stats | Rows]

    @functools.cached_property
    def sha256(self) -> str:
        """Of all numbers: 64 hexadecimal digits."""
        digest = hashlib.sha256()
        for name, array in sorted(_arrays(self.summaries).items()):
            digest.update(name.encode() + np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def measure(
    gauges: Sequence[Gauge],
    images: Dataset | None,
    workers: int,
    origin: Mapping[str, str | None] | None = None,
) -> list[Reference]:
    """References of a data set, in one pass over its rows.

    Args:
        gauges: networks and metrics.
        images: uint8 or float32 images; may be None if no metric compares with any.
        workers: processes that decode, 0 for threads.
        origin: of the images, from `data.origin`; None if no config names them.
    """
    if images is None or not any(gauge.reference_keys() for gauge in gauges):
        return [Reference({}, {}) for _ in gauges]
    collections = [gauge.of_reference(images.size) for gauge in gauges]
    gauges_lib.measure(gauges, collections, images, workers)
    return [
        Reference(
            {
                **identity(gauge),
                "image_shape": list(images.image_shape),
                "num_images": images.size,
                "source": f"{images.name}/{images.split}" if images.split else images.name,
                "fingerprint": images.fingerprint,
                **(origin or dict.fromkeys(ORIGIN)),
            },
            {key: _frozen(summary) for key, summary in collection.summaries.items()},
        )
        for gauge, collection in zip(gauges, collections, strict=True)
    ]


def identity(gauge: Gauge) -> dict[str, str]:
    """What a reference and the samples that it is compared with have in common."""
    extractor = gauge.extractor
    return {
        "extractor": extractor.name,
        "extractor_sha256": extractor.sha256,
        "protocol": extractor.protocol.name,
    }


# ---------------------------------------------------------------------- files


def save(path: Path, references: Sequence[Reference]) -> None:
    """Writes references to one .npz, whole or not at all."""
    about = [{"format": FORMAT, **reference.facts} for reference in references]
    arrays = {
        f"{i}/{name}": array
        for i, reference in enumerate(references)
        for name, array in _arrays(reference.summaries).items()
    }
    with replacing(path) as file:
        np.savez(file, about=np.array(json.dumps(about)), **arrays)  # type: ignore[arg-type]


def load(path: Path) -> list[Reference]:
    """Reads what `save` wrote.

    Raises:
        UserError: it cannot be read, or is somebody else's file.
    """
    found = read_npz(path)
    if "about" not in found:
        raise UserError(
            f"{path} holds {', '.join(sorted(found)) or 'nothing'} and does not say how its "
            "statistics were made; expected a file of this program: turn it into one with python "
            "-m shortcut_jax.eval ref --images=FILE --out=FILE."
        )
    try:
        parts = json.loads(str(found["about"]))
        formats = {part["format"] for part in parts}
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path} has facts that cannot be read ({error}); expected those that eval ref writes: "
            "make the file again."
        ) from error
    if formats != {FORMAT}:
        raise UserError(
            f"{path} has the format {sorted(formats)}, expected {FORMAT}: make it again with this "
            "version."
        )
    references = []
    for i, facts in enumerate(parts):
        del facts["format"]
        own = {k.removeprefix(f"{i}/"): a for k, a in found.items() if k.startswith(f"{i}/")}
        references.append(Reference(facts, _summaries(own)))
    return references


def choose(path: Path, references: Sequence[Reference], gauge: Gauge) -> Reference:
    """The part of a file that was made as a gauge measures, and has what its metrics need.

    Raises:
        UserError: there is none; or it lacks what a metric needs.
    """
    wanted = identity(gauge)
    near = [r for r in references if r.facts["extractor"] == wanted["extractor"]]
    fitting = [r for r in near if wanted.items() <= r.facts.items()]
    if not fitting:
        there = [{key: r.facts[key] for key in wanted} for r in near or references]
        raise UserError(
            f"{path} holds statistics of {' and '.join(map(_text, there))}, but {_text(wanted)} is "
            "measured; expected equal ones: make such a file with python -m shortcut_jax.eval ref, "
            "or measure with that protocol and those weights."
        )
    missing = [key for key in gauge.reference_keys() if key not in fitting[0].summaries]
    if missing:
        raise UserError(
            f"{path} holds no {_what(missing[0])}, which {', '.join(gauge.names)} need; expected "
            "them: make the file from images with python -m shortcut_jax.eval ref and these "
            "metrics, or leave out those that need them."
        )
    return fitting[0]


def check_shape(path: Path, reference: Reference, image_shape: Sequence[int]) -> None:
    """Raises UserError unless the images of a reference have the size of those measured."""
    found, wanted = tuple(reference.facts["image_shape"]), tuple(image_shape)
    if found != wanted:
        raise UserError(
            f"{path} was made of images of shape {found}, but those measured are {wanted}; "
            "expected equal ones: make statistics of images of that size."
        )


def check_origin(path: Path, reference: Reference, origin: Mapping[str, str | None]) -> None:
    """Refuses statistics of other images than a config names, as far as both are known.

    Args:
        path: of the file.
        reference: from it.
        origin: from `data.origin`.

    Raises:
        UserError: another builder, split or crop.
    """
    differences = [
        f"data.{key}={found!r} where this config has {wanted!r}"
        for key, wanted in origin.items()
        if (found := reference.facts.get(key)) not in (None, wanted) and wanted is not None
    ]
    if differences:
        raise UserError(
            f"{path} was made with {' and '.join(differences)}; expected statistics of the images "
            "that the config names: make them with it, by python -m shortcut_jax.eval ref, or "
            "evaluate with the keys that they were made with."
        )


def foreign(
    path: Path,
    found: Mapping[str, NDArray[Any]],
    gauge: Gauge,
    facts: Mapping[str, Any],
    of_images: Mapping[Key, Stats | Rows],
) -> Reference:
    """A reference from a file of others: mu and sigma of 2048 features, mu_s and sigma_s of ADM's.

    Args:
        path: of the file.
        found: its arrays.
        gauge: says how its statistics were made, which it does not know itself.
        facts: "image_shape", "num_images".
        of_images: what was measured of the images in the file, if there are any.

    Raises:
        UserError: it is no such file.
    """
    # mu and sigma are of more images than are in the file.
    summaries = {key: rows for key, rows in of_images.items() if key.summary != "moments"}
    names = {"features": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
    for output, (mean, cov) in names.items():
        if mean in found and cov in found:
            stats = Stats(found[mean].astype(np.float64), found[cov].astype(np.float64))
            _check_stats(path, mean, stats)
            summaries[Key("moments", output)] = stats
    fingerprint = sha256_of(path)[:16]
    return Reference(
        {
            **identity(gauge),
            **facts,
            "source": path.name,
            "fingerprint": fingerprint,
            **dict.fromkeys(ORIGIN),
        },
        summaries,
    )


def npz_names(path: Path) -> list[str]:
    """Names of the arrays in an .npz, none of which is read (UserError as `read_npz`)."""
    return list(_read_npz(path, lambda name: False))


def read_npz(path: Path, names: Collection[str] | None = None) -> dict[str, NDArray[Any]]:
    """Arrays of an .npz; nothing in it is executed.

    Args:
        path: of the file.
        names: of the arrays to read, which may be large; those that it lacks are left out. None
            reads all.

    Raises:
        UserError: it is missing, truncated, or no such file.
    """
    found = _read_npz(path, lambda name: names is None or name in names)
    return {name: array for name, array in found.items() if array is not None}


def _read_npz(path: Path, wanted: Callable[[str], bool]) -> dict[str, NDArray[Any] | None]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] if wanted(name) else None for name in arrays.files}
    except (OSError, ValueError, EOFError, KeyError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} cannot be read as an .npz file ({' '.join(str(error).split())}); expected a "
            "whole one: mend the path, or get the file again."
        ) from error


def _arrays(summaries: Mapping[Key, Stats | Rows]) -> dict[str, NDArray[Any]]:
    found: dict[str, NDArray[Any]] = {}
    for key, summary in summaries.items():
        if isinstance(summary, Stats):
            own = {"mean": summary.mean, "cov": summary.cov}
        else:
            own = summary.arrays()
        found |= {f"{key.summary}/{key.output}/{name}": array for name, array in own.items()}
    return found


def _summaries(arrays: Mapping[str, NDArray[Any]]) -> dict[Key, Stats | Rows]:
    parts: dict[Key, dict[str, NDArray[Any]]] = {}
    for path, array in arrays.items():
        summary, output, name = path.split("/")
        parts.setdefault(Key(summary, output), {})[name] = array
    return {
        key: Stats(own["mean"], own["cov"]) if key.summary == "moments" else Rows.from_arrays(own)
        for key, own in parts.items()
    }


def _frozen(summary: Any) -> Stats | Rows:
    return Stats(summary.mean, summary.cov) if isinstance(summary, Moments) else summary


def _check_stats(path: Path, name: str, stats: Stats) -> None:
    d = stats.mean.size
    good = stats.mean.shape == (d,) and stats.cov.shape == (d, d) and d > 0
    if not (good and np.isfinite(stats.mean).all() and np.isfinite(stats.cov).all()):
        raise UserError(
            f"{path}: {name} of shape {stats.mean.shape} and its covariance of shape "
            f"{stats.cov.shape} are not the mean and covariance of features; expected finite "
            "numbers of shapes (d,) and (d, d): get the file again."
        )


def _text(facts: Mapping[str, str]) -> str:
    return f"{facts['extractor']} ({facts['extractor_sha256'][:8]}) under {facts['protocol']!r}"


def _what(key: Key) -> str:
    what = {"moments": "mean and covariance", "rows": "rows"}[key.summary]
    return f"{what} of {key.output}"


def describe(references: Iterable[Reference]) -> str:
    """One line for each."""
    return "\n".join(
        f"{_text(r.facts)}: {r.facts['num_images'] or 'an unknown number of'} images "
        f"{tuple(r.facts['image_shape'])} of {r.facts['source']}, sha256 {r.sha256[:16]}"
        for r in references
    )
