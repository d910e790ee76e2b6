"""What devices and host do when, in a stretch of a run, by jax's profiler; docs/host.md.

python -m shortcut_jax.benchmarks.trace --config=configs/digits.py --workdir=/tmp/trace \
    --config.total_steps=300 --config.eval.every=0 --from_step=100 --to_step=300

Trains as `shortcut_jax.main` does and prints a table and a timeline of the steps between. The trace
itself is kept in WORKDIR/trace, for xprof or Perfetto.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
from absl import flags

from shortcut_jax import config_flag, program, train, workdir_flag
from shortcut_jax.errors import UserError
from shortcut_jax.files import check_writable

FROM = flags.DEFINE_integer("from_step", 100, "First step of the stretch.", 0)
TO = flags.DEFINE_integer("to_step", 300, "Step that ends it.", 1)

# What the trainer's thread announces (`Clock.phase` and `train`).
HOST = ("data", "dispatch", "log", "checkpoint", "evaluate")
# On a CPU, the event of a whole program; devices have planes: a TPU's has a line of programs, a
# GPU's a line for each stream, "Stream #7(Compute,MemcpyH2D)", of kernels and transfers.
CPU_PROGRAM = "ThunkExecutor::Execute (wait for completion)"
TPU_PROGRAMS, GPU_STREAM, GPU_TRANSFERS = "XLA Modules", "Stream #", ("Memcpy", "Memset")
WIDTH = 80  # of the timeline, characters

Span = tuple[float, float]  # begin and end, ns


@dataclasses.dataclass(frozen=True)
class Found:
    """Spans of a trace: of what the host did by name, and of what ran on the first device.

    That is programs; of a GPU it is their kernels.
    """

    host: dict[str, list[Span]]
    device: list[Span]

    @property
    def whole(self) -> Span:
        """From the begin of the first program to the end of the last."""
        return self.device[0][0], max(end for _, end in self.device)


def main() -> None:
    """Trains, and prints what the trace says."""
    config, folder = config_flag.CONFIG.value, Path(workdir_flag.workdir())
    if not FROM.value < TO.value <= config.total_steps:
        raise UserError(
            f"--from_step={FROM.value} to --to_step={TO.value} is no stretch of a run of "
            f"total_steps={config.total_steps}; expected 0 <= from < to <= total: change them."
        )
    check_writable("--workdir", folder)
    with mock.patch.object(program, "dispatches", _traced(program.dispatches, folder / "trace")):
        train.train(config, folder)
    print(text(read(folder / "trace"), TO.value - FROM.value))


def _traced(dispatches: Any, folder: Path) -> Any:
    """The same dispatches; a trace is on from that of FROM to that of TO."""

    def traced(config: Any, first: int) -> Iterator[tuple[int, int]]:
        on = False
        for step, count in dispatches(config, first):
            if not on and FROM.value <= step < TO.value:
                options = jax.profiler.ProfileOptions()
                options.python_tracer_level = 0  # which slows the host down
                jax.profiler.start_trace(folder, profiler_options=options)
                on = True
            elif on and step >= TO.value:
                jax.profiler.stop_trace()
                on = False
            yield step, count

    return traced


def read(folder: Path) -> Found:
    """The newest trace in a folder.

    Raises:
      UserError: there is none, or no program ran in it.
    """
    files = sorted(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    host: dict[str, list[Span]] = {name: [] for name in HOST}
    device: list[Span] = []
    for plane in jax.profiler.ProfileData.from_file(str(files[-1])).planes if files else ():
        on_device = plane.name.endswith(":0") and plane.name.startswith("/device:")
        for line in plane.lines:
            for event in line.events:
                span = event.start_ns, event.start_ns + event.duration_ns
                if event.name in host and not on_device:
                    host[event.name].append(span)
                elif event.name == CPU_PROGRAM or (on_device and _computes(line.name, event.name)):
                    device.append(span)
    if not device:
        raise UserError(
            f"{folder} holds no trace in which a program ran; expected one of at least a dispatch: "
            "widen --from_step and --to_step, and use a new --workdir."
        )
    return Found({name: sorted(spans) for name, spans in host.items()}, sorted(device))


def _computes(line: str, event: str) -> bool:
    """Whether an event of a device's plane is a program (TPU), or a kernel of one (GPU)."""
    kernel = line.startswith(GPU_STREAM) and not event.startswith(GPU_TRANSFERS)
    return kernel or line == TPU_PROGRAMS


def text(found: Found, steps: int) -> str:
    """The table, and the timeline of the whole stretch.

    Args:
      found: of a trace.
      steps: in it.
    """
    begin, end = found.whole
    lines = [f"{steps} steps, {(end - begin) / 1e6 / steps:.2f} ms each", ""]
    lines += ["| | ms / step | share |", "|---|---|---|"]
    rows = {"a program on the device": found.device, **found.host}
    for name, spans in rows.items():
        busy = covered(spans, found.whole)
        share = 100 * busy / (end - begin)
        lines.append(f"| {name} | {busy / 1e6 / steps:.3f} | {share:.2f} % |")
    lines += ["", "```", *timeline(rows, found.whole), "```"]
    return "\n".join(lines)


def covered(spans: Sequence[Span], whole: Span) -> float:
    """Length of the union of spans, sorted by their begin, within `whole`."""
    total, reached = 0.0, whole[0]
    for begin, end in spans:
        end = min(end, whole[1])
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def timeline(rows: dict[str, list[Span]], whole: Span) -> Iterable[str]:
    """A line per row: # where something goes on for at least half of a character, . for less."""
    width = (whole[1] - whole[0]) / WIDTH
    for name, spans in rows.items():
        shares = [
            covered(spans, (whole[0] + i * width, whole[0] + (i + 1) * width)) / width
            for i in range(WIDTH)
        ]
        if spans:
            marks = "".join("#" if s >= 0.5 else "." if s > 0 else " " for s in shares)
            yield f"{name:>24} {marks}"


if __name__ == "__main__":
    config_flag.main(main)
