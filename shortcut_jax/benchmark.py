"""Measures how fast parts of shortcut_jax are here; docs/speed.md has a line for each part.

python -m shortcut_jax.benchmark --parts=data,vae --out=benchmark.json
taskset -c 1 python -m shortcut_jax.benchmark --parts=data --tf_python=/envs/tf/bin/python

Medians of several rounds, in which what is compared takes turns. CPU seconds count all threads and
are little disturbed by other work on the machine; for rates per core, give it one CPU (taskset).
"""

import dataclasses
import importlib
import json
import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from absl import flags

from shortcut_jax import benchmarks, cli
from shortcut_jax.errors import UserError
from shortcut_jax.files import check_writable, write_atomically

PARTS = flags.DEFINE_list(
    "parts", list(benchmarks.PARTS), f"What to measure: {', '.join(benchmarks.PARTS)}."
)
OUT = flags.DEFINE_string("out", "", "JSON file that gets everything measured.")
REPEATS = flags.DEFINE_integer("repeats", 5, "Rounds, of which the median counts.", 1)
SMALL = flags.DEFINE_bool("small", False, "Tiny inputs, to see that everything runs.")
TF_PYTHON = flags.DEFINE_string(
    "tf_python", "", "Python of an environment with TensorFlow: compares data with tf.data there."
)
TORCH_PYTHON = flags.DEFINE_string(
    "torch_python",
    "",
    "Python of an environment with diffusers or torch-fidelity: compares vae or metrics there.",
)
AUTHORS = flags.DEFINE_string(
    "authors", "", "Checkout of the authors' code: compares digits with it."
)

# Flag -> the parts that it has an effect on.
COMPARES = {"tf_python": ("data",), "torch_python": ("vae", "metrics"), "authors": ("digits",)}

WIDTH = 56  # of the names in the table

PACKAGES = (
    "jax",
    "jaxlib",
    "numpy",
    "scipy",
    "pillow",
    "array-record",
    "grain",
    "tensorflow-datasets",
)


def main() -> None:
    """Measures the parts asked for, prints each number, and writes all of them."""
    check_parts(PARTS.value)
    check_comparisons(PARTS.value)
    if OUT.value:
        check_writable("--out", Path(OUT.value).absolute().parent)
    options = benchmarks.Options(
        REPEATS.value, SMALL.value, TF_PYTHON.value, TORCH_PYTHON.value, AUTHORS.value
    )
    about = machine()
    print(_line(about), flush=True)
    print(f"{'':{WIDTH}} {'median':>10}  {'from':>10} {'to':>10}", flush=True)
    found: list[dict[str, Any]] = []
    for part in [part for part in benchmarks.PARTS if part in PARTS.value]:
        for measurement in importlib.import_module(benchmarks.PARTS[part]).measure(options):
            print(row(measurement), flush=True)
            found.append(dataclasses.asdict(measurement))
        about |= devices()
        if OUT.value:  # after every part, so that none is lost if a later one fails
            write(Path(OUT.value), about, options, found)
    print(_line(devices()))


def write(
    path: Path, about: dict[str, Any], options: benchmarks.Options, found: list[dict[str, Any]]
) -> None:
    """Writes all that was measured so far."""
    content = {"machine": about, "options": dataclasses.asdict(options), "measurements": found}
    write_atomically(path, json.dumps(content, indent=1).encode())


def check_parts(parts: Sequence[str]) -> None:
    """Raises UserError unless there is one part or more, and all are known."""
    unknown = [part for part in parts if part not in benchmarks.PARTS]
    if unknown or not parts:
        raise UserError(
            f"--parts={','.join(parts)} {f'holds {unknown[0]!r}' if unknown else 'is empty'}; "
            f"expected some of {', '.join(benchmarks.PARTS)}, joined by commas: choose among them."
        )


def check_comparisons(parts: Sequence[str]) -> None:
    """Raises UserError for something to compare with that none of the parts is compared with."""
    for name, compared in COMPARES.items():
        if flags.FLAGS[name].value and not set(compared) & set(parts):
            raise UserError(
                f"--{name} is given for the parts {' and '.join(compared)}, of which "
                f"--parts={','.join(parts)} has none; expected one: add it, or leave out --{name}."
            )


def machine() -> dict[str, Any]:
    """What the numbers depend on: versions, CPUs, and how busy these are at the start."""
    return {
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in PACKAGES},
        "cpu": _cpu_model(),
        "cpus": os.cpu_count(),
        "cpus_usable": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 1),
    }


def devices() -> dict[str, Any]:
    """And the devices, which this process keeps from then on."""
    import jax

    found = jax.devices()
    return {"backend": jax.default_backend(), "device": found[0].device_kind, "devices": len(found)}


def row(measurement: benchmarks.Measurement) -> str:
    """A line of the table."""
    low, high = measurement.spread
    value = f"{measurement.value:>10.4g}  {low:>10.4g} {high:>10.4g}"
    return f"{measurement.name:<{WIDTH}} {value}  {measurement.unit}"


def _line(facts: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in facts.items())


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


if __name__ == "__main__":
    cli.main(main)
