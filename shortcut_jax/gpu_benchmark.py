"""Checks and times everything that runs on a GPU, in one command; docs/gpu_speed.md.

python -m shortcut_jax.gpu_benchmark --out=runs/gpu --torch_python=python3 --authors=shortcut-models
python -m shortcut_jax.gpu_benchmark --out=runs/small --small --parts=check,xl2

Every part runs in a process of its own, so that none is left out because another fails or fills
the memory, and writes OUT/PART.json as it goes. The same command goes on where one was stopped:
parts that have ended well are not run again, and compiled programs are kept in OUT/cache. Ends with
status 1 if a check or a part has failed.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

from absl import flags

from shortcut_jax import cli
from shortcut_jax.benchmarks import gpu_parts, gpu_report
from shortcut_jax.errors import UserError
from shortcut_jax.files import check_writable

OUT = flags.DEFINE_string("out", "", "Folder for PART.json, report.txt and compiled programs.")
PARTS = flags.DEFINE_list(
    "parts", list(gpu_parts.PARTS), f"What to run: {', '.join(gpu_parts.PARTS)}."
)
MINUTES = flags.DEFINE_float("minutes", 8.5, "Nothing new is begun after so many.", 0.0)
SMALL = flags.DEFINE_bool("small", False, "Tiny networks, to see that everything runs.")
AGAIN = flags.DEFINE_bool("again", False, "Run parts that have ended before, too.")
IN_PROCESS = flags.DEFINE_bool("in_process", False, "Run the parts in this process.")
REPORT = flags.DEFINE_bool("report", True, "Print and write the report at the end.")
TORCH_PYTHON = flags.DEFINE_string(
    "torch_python", "", "Python of an environment with PyTorch and safetensors, for torch_*."
)
AUTHORS = flags.DEFINE_string(
    "authors", "", "Checkout of github.com/kvfrans/shortcut-models, for authors_*."
)


def main() -> None:
    """Runs the parts, prints the report, and writes it."""
    _check()
    out, deadline = Path(OUT.value), time.monotonic() + 60 * MINUTES.value
    settings = gpu_parts.Settings(SMALL.value, TORCH_PYTHON.value, AUTHORS.value, deadline)
    for part in [name for name in gpu_parts.PARTS if name in PARTS.value]:
        path = out / f"{part}.json"
        if not AGAIN.value and gpu_report.ended(path):
            print(f"{part}: done before, see {path}", flush=True)
        elif missing := gpu_parts.missing(part, settings):
            print(f"{part}: left out, as {missing} is not given", flush=True)
        elif time.monotonic() > deadline:
            print(f"{part}: not begun, as the time is up", flush=True)
        elif IN_PROCESS.value:
            gpu_parts.run_part(part, settings, path)
        else:
            _run_alone(part, path, deadline)
    if not REPORT.value:
        return
    text, good = gpu_report.report(out)
    print(text)
    gpu_report.write_text(out / "report.txt", text)
    if not good:
        sys.exit(1)


def _check() -> None:
    unknown = [part for part in PARTS.value if part not in gpu_parts.PARTS]
    if unknown or not PARTS.value:
        raise UserError(
            f"--parts={','.join(PARTS.value)} {f'holds {unknown[0]!r}' if unknown else 'is empty'};"
            f" expected some of {', '.join(gpu_parts.PARTS)}, joined by commas: choose among them."
        )
    if not OUT.value:
        raise UserError("--out is empty; expected a folder for what is found: set --out=runs/gpu.")
    check_writable("--out", Path(OUT.value).absolute())


def _run_alone(part: str, path: Path, deadline: float) -> None:
    """Runs a part in a process of its own; what it leaves is said to have failed."""
    left = deadline - time.monotonic()
    given = {
        "out": OUT.value, "parts": part, "minutes": f"{left / 60:.2f}",
        "torch_python": TORCH_PYTHON.value, "authors": AUTHORS.value,
    }  # fmt: skip
    command = [sys.executable, "-m", "shortcut_jax.gpu_benchmark", "--in_process", "--again"]
    command += ["--noreport", f"--small={SMALL.value}"]
    command += [f"--{key}={value}" for key, value in given.items()]
    print(f"--- {part}", flush=True)
    variables = gpu_parts.environment(part, path.parent, os.environ)
    try:
        status = gpu_parts.run_group(command, variables, left + gpu_parts.GRACE)
        error = f"its process ended with {status}" if status else ""
    except subprocess.TimeoutExpired:
        error = f"its process was still running {gpu_parts.GRACE} s after the time was up"
    if error:
        gpu_report.add_failure(path, part, error)


if __name__ == "__main__":
    cli.main(main)
