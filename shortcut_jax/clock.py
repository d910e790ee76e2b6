"""Where the time of a run goes, summed over restarts."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping

import jax

PHASES = ("start", "pairs", "compile", "data", "evaluate", "checkpoint")

# Waiting for data slows every step down, so it belongs in the speed. The other phases come a few
# times per run, and would make the speed depend on whether one of them fell in the interval.
_IN_SPEED = ("training", "data")


class Clock:
    """Splits wall time into named phases; what is in no phase is training.

    JAX returns before the devices have finished, so block on the train state before entering
    `phase("evaluate")` or `phase("checkpoint")`; otherwise steps still in flight are booked there.

    Modelled on `Chrono` in https://github.com/google-research/big_vision (`utils.py`).

    Args:
      batch_size: images per step, over all devices.
      total_steps: the step at which the run ends.
      num_devices: devices of the whole run, over all processes.
      now: returns seconds. Where it goes backwards, no time has passed.
    """

    def __init__(
        self,
        batch_size: int,
        total_steps: int,
        num_devices: int,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._batch_size = batch_size
        self._total_steps = total_steps
        self._num_devices = num_devices
        self._now = now
        self._seconds = {name: 0.0 for name in ("training", *PHASES)}
        # Summed on its own because a restart may come back on another number of devices.
        self._device_seconds = 0.0
        self._phase = "training"
        self._last_time = now()
        # (step, seconds that count in the speed): where the interval and this process began.
        self._interval_start = (0.0, 0.0)
        self._process_start = (0.0, 0.0)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Books the time inside the block to `name`, one of `PHASES`; in a nest, to the innermost.

        Raises:
          ValueError: if `name` is not a phase.
        """
        if name not in PHASES:
            raise ValueError(f"unknown phase {name!r}: expected one of {', '.join(PHASES)}")
        self._book()
        outer, self._phase = self._phase, name
        try:
            with jax.profiler.TraceAnnotation(name):  # seen by a profiler, if one is on
                yield
        finally:
            self._book()
            self._phase = outer

    def tick(self, step: int) -> dict[str, float]:
        """Reports the speed since the last tick and the totals since the run began.

        Args:
          step: number of training steps done.

        Returns:
          `seconds/<phase>` and `fraction/<phase>` for every phase and for `training`;
          `core_hours`, the device-hours of training; and, once steps and time have passed,
          `steps_per_second` and `images_per_second_per_device` over the interval and
          `eta_seconds`, the training time left at the mean speed of this process. A speed that
          cannot be measured is left out, so every value is finite and none is negative.
        """
        self._book()
        total = sum(self._seconds.values())
        report = {f"seconds/{name}": value for name, value in self._seconds.items()}
        for name, value in self._seconds.items():
            report[f"fraction/{name}"] = value / total if total else 0.0
        report["core_hours"] = self._device_seconds / 3600

        here = (float(step), self._speed_seconds())
        steps, seconds = _difference(here, self._interval_start)
        if steps > 0 and seconds > 0:
            report["steps_per_second"] = steps / seconds
            report["images_per_second_per_device"] = (
                steps * self._batch_size / seconds / self._num_devices
            )
            self._interval_start = here
        steps, seconds = _difference(here, self._process_start)
        if steps > 0 and seconds > 0:
            report["eta_seconds"] = max(0, self._total_steps - step) * seconds / steps
        return report

    def state_dict(self) -> dict[str, float]:
        """Returns what `load_state_dict` needs, as floats under names that never change."""
        self._book()
        step, seconds = self._interval_start
        return {
            **{f"seconds/{name}": value for name, value in self._seconds.items()},
            "device_seconds": self._device_seconds,
            "interval_start/step": step,
            "interval_start/seconds": seconds,
        }

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Adds the time of the earlier processes to the time of this one so far.

        What `state` lacks counts as zero: an earlier version may not have measured it.

        Time between the checkpoint and the kill is lost with the work done in it.
        """
        self._book()
        # Training time before this call belongs to no step, so it must stay out of the speed.
        before = self._speed_seconds()
        for name in self._seconds:
            self._seconds[name] += float(state.get(f"seconds/{name}", 0.0))
        self._device_seconds += float(state.get("device_seconds", 0.0))
        step, seconds = (state.get(f"interval_start/{name}", 0.0) for name in ("step", "seconds"))
        self._interval_start = self._process_start = (float(step), float(seconds) + before)

    def _book(self) -> None:
        now = self._now()
        elapsed = max(0.0, now - self._last_time)
        self._last_time = now
        self._seconds[self._phase] += elapsed
        if self._phase in _IN_SPEED:
            self._device_seconds += elapsed * self._num_devices

    def _speed_seconds(self) -> float:
        return sum(self._seconds[name] for name in _IN_SPEED)


def _difference(end: tuple[float, float], start: tuple[float, float]) -> tuple[float, float]:
    return end[0] - start[0], end[1] - start[1]
