"""Leaving when asked: SIGTERM, and what a platform makes of it, ends training at the next step.

The run saves on all processes, waits until the checkpoint is whole, and ends with EXIT_STATUS, at
which a launcher starts the same command again.
"""

import os
import signal
import threading
from types import FrameType
from typing import Any

from absl import logging

from shortcut_jax.parallel import distributed

EXIT_STATUS = os.EX_TEMPFAIL  # 75: not done, try again


class Preempted(Exception):
    """Training ended early because it was asked to; the same command continues it."""


class Notice:
    """Whether the run is asked to leave: `with Notice() as notice: ... notice.reached()`.

    Alone, this process listens for SIGTERM itself, in the main thread; further ones change nothing,
    so that none interrupts the last save. Among several, jax.distributed listens from the start and
    lets all processes agree on the call, whichever of them was signalled.
    """

    def __init__(self) -> None:
        self._asked = False
        self._calls = 0
        self._before: Any = None

    def __enter__(self) -> "Notice":
        if threading.current_thread() is threading.main_thread() and not distributed.several():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def reached(self) -> bool:
        """Whether to save and leave now; all processes must ask before the same steps."""
        self._calls += 1  # and not the step: numbers that are left out may be what is agreed on
        if distributed.several():
            from jax.experimental import multihost_utils

            return multihost_utils.reached_preemption_sync_point(self._calls)
        return self._asked

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self._asked:
            logging.warning("Asked to leave (signal %d): saving at the next step.", number)
        self._asked = True


def heed_no_longer() -> None:
    """Lets SIGTERM end the process at once, which jax.distributed prevents: for what saves none."""
    if distributed.several():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
