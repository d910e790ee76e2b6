"""What a run writes down while it trains: JSON lines, TensorBoard events, one line to read."""

import io
import json
import math
import os
import re
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from shortcut_jax.closing import Closing
from shortcut_jax.errors import UserError
from shortcut_jax.files import write_atomically

# Scalars in the progress line; all of them are in metrics.jsonl.
HEADLINE = ("loss", "loss/empirical", "bootstrap_target_rms", "grad_norm")


class JsonLines:
    """Appends one JSON object per line, none of which a kill after `append` has returned loses.

    Every line is strictly valid JSON, which has no NaN and no infinity: both become `null`.
    A last line that a kill cut in half is dropped when the file is opened, so that the next one is
    not glued to it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._file = self._path.open("ab")
        self.truncate_after(math.inf)

    def append(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes `{"step": step, **values}`; values are JSON data or zero-dimensional arrays."""
        line = json.dumps({"step": step, **_strict_json(values)}, allow_nan=False)
        self._file.write(line.encode() + b"\n")
        self._file.flush()

    def truncate_after(self, step: float) -> int:
        """Drops the lines of later steps and those that are not whole; returns how many."""
        self._file.close()
        content = self._path.read_bytes()
        lines = content.splitlines()
        kept = [line for line in lines if _step_of(line) <= step]
        kept_content = b"".join(line + b"\n" for line in kept)
        if kept_content != content:
            write_atomically(self._path, kept_content)
        self._file = self._path.open("ab")
        return len(lines) - len(kept)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _step_of(line: bytes) -> float:
    """Returns the step of a JSON line; NaN, which is `<=` no step, for a damaged one."""
    try:
        record = json.loads(line)
    except ValueError:
        return math.nan
    return record.get("step", math.nan) if isinstance(record, dict) else math.nan


def _strict_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _strict_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict_json(item) for item in value]
    if hasattr(value, "item"):  # NumPy and JAX scalars
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


class TensorBoard:
    """Writes scalars and images as TensorBoard events, without TensorFlow.

    Uses the record writer of the `tensorboard` package on a plain file. Its `EventFileWriter` would
    import TensorFlow wherever that is installed, which takes seconds and can grab the accelerator,
    and may hold events back for minutes, which a kill would lose.

    Args:
      logdir: created if absent.
      restart_step: the step this run resumes from, or None for a run from scratch. Events that an
        earlier process wrote for later steps are no longer shown.

    Raises:
      UserError: if package `tensorboard` is not installed.
    """

    def __init__(self, logdir: str | os.PathLike[str], restart_step: int | None = None) -> None:
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ImportError as error:
            raise UserError(
                "log.tensorboard is True, which needs package tensorboard, but importing it failed "
                f"({error}): expected an installed package; run `pip install tensorboard`, or set "
                "log.tensorboard=False."
            ) from error
        self._event = event_pb2.Event
        self._summary = summary_pb2.Summary

        Path(logdir).mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files of a directory in the order of their names, and a purge acts
        # on what was read before it; microseconds keep the order for a restart within a second.
        began = max([time.time(), *(at + 1e-6 for at in self._begun(Path(logdir)))])  # a clock lies
        name = f"events.out.tfevents.{began:017.6f}.{socket.gethostname()}.{os.getpid()}"
        self._writer = RecordWriter((Path(logdir) / name).open("xb"))
        self._add(file_version="brain.Event:2")
        # START hides the events read so far from its own step on, hence +1. TensorBoard takes the
        # first START of a directory for the beginning, so a run from scratch must write one too.
        first_new_step = 0 if restart_step is None else restart_step + 1
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._add(step=first_new_step, session_log=start)

    @staticmethod
    def _begun(logdir: Path) -> list[float]:
        """When the files that are there say that they were begun."""
        times = (
            re.match(r"events\.out\.tfevents\.(\d+\.\d{6})\.", p.name) for p in logdir.iterdir()
        )
        return [float(found[1]) for found in times if found]

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one number per tag; a `/` in a tag puts it in a group."""
        summary = self._summary()
        for tag, value in values.items():
            summary.value.add(tag=tag, simple_value=float(value))
        self._add(step=step, summary=summary)

    def image(self, step: int, tag: str, image: np.ndarray) -> None:
        """Writes a picture, uint8 `[height, width, channels]` with 1 (grey) or 3 (RGB) channels.

        Raises:
          ValueError: if `image` is something else.
        """
        from PIL import Image

        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] not in (1, 3):
            raise ValueError(
                f"image {tag!r} is {image.dtype}{list(image.shape)}: expected uint8 [H, W, 1 or 3]"
            )
        height, width, channels = image.shape
        png = io.BytesIO()
        Image.fromarray(image[..., 0] if channels == 1 else image).save(png, format="PNG")
        picture = self._summary.Image(
            height=height, width=width, colorspace=channels, encoded_image_string=png.getvalue()
        )
        self._add(step=step, summary=self._summary(value=[{"tag": tag, "image": picture}]))

    def close(self) -> None:
        """Closes the event file."""
        self._writer.close()

    def _add(self, **fields: Any) -> None:
        event = self._event(wall_time=time.time(), **fields)
        self._writer.write(event.SerializeToString())
        self._writer.flush()


def progress_line(
    step: int,
    total_steps: int,
    scalars: Mapping[str, float],
    clock_info: Mapping[str, float],
) -> str:
    """Returns one line for people: progress, the scalars in their order, speed and time left.

    Args:
      clock_info: what `Clock.tick` returned; empty where no speed was measured.
    """
    # Rounded down, because 100% must mean that the run is over.
    parts = [f"step {step:,}/{total_steps:,} ({100 * step // total_steps}%)"]
    parts += [f"{name} {_short(float(value))}" for name, value in scalars.items()]
    if "images_per_second_per_device" in clock_info:
        speed = _short(clock_info["images_per_second_per_device"])
        parts.append(f"{speed} img/s/device")
    if "eta_seconds" in clock_info:
        parts.append(f"ETA {_duration(clock_info['eta_seconds'])}")
    return "  ".join(parts)


def _short(value: float) -> str:
    """Three significant digits; all digits before the point."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.3g}"


def _duration(seconds: float) -> str:
    """The two largest units, such as `1m 12s` or `2d 03h`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours:02d}h"
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {seconds:02d}s" if minutes else f"{seconds}s"


class MetricLogger(Closing):
    """Sends metrics to `metrics.jsonl` and `tensorboard/` in the workdir, and to the log.

    Args:
      workdir: created if absent.
      total_steps: the step at which the run ends, for the progress line.
      tensorboard: whether to write TensorBoard events as well.
      write: False on processes other than 0, where every method does nothing.
      restart_step: the step this run resumes from, or None for a run from scratch. What an earlier
        process wrote for later steps (from scratch: for any step) is dropped, because this run
        writes those steps again. Only the process that trains may therefore own this object.

    Raises:
      UserError: if `tensorboard` is set and the package is not installed.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        total_steps: int,
        *,
        tensorboard: bool,
        write: bool,
        restart_step: int | None,
    ) -> None:
        self._total_steps = total_steps
        self._jsonl: JsonLines | None = None
        self._tensorboard: TensorBoard | None = None
        if not write:
            return
        workdir = Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        if tensorboard:
            self._tensorboard = TensorBoard(workdir / "tensorboard", restart_step)
        self._jsonl = JsonLines(workdir / "metrics.jsonl")
        dropped = self._jsonl.truncate_after(-1 if restart_step is None else restart_step)
        if dropped:
            logging.info("Dropped %d lines of metrics.jsonl that this run writes again", dropped)

    def scalars(
        self,
        step: int,
        values: Mapping[str, float],
        clock_info: Mapping[str, float] | None = None,
    ) -> None:
        """Writes named numbers, with those of `Clock.tick` under their own names.

        With `clock_info` it is also shown as a progress line, with the scalars in `HEADLINE`.
        """
        if self._jsonl is None:
            return
        clock_info = clock_info or {}
        everything = {**values, **clock_info}
        self._jsonl.append(step, everything)
        if self._tensorboard is not None:
            self._tensorboard.scalars(step, everything)
        if clock_info:  # training, not an evaluation
            shown = {name: values[name] for name in HEADLINE if name in values}
            logging.info("%s", progress_line(step, self._total_steps, shown, clock_info))

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Shows a picture, uint8 `[height, width, 1 or 3]`, in TensorBoard."""
        if self._tensorboard is not None:
            self._tensorboard.image(step, name, image)

    def close(self) -> None:
        """Closes the files."""
        if self._jsonl is not None:
            self._jsonl.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
