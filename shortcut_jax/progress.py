"""How far a long pass is, in the log."""

import time

from absl import logging


class Progress:
    """Says now and then how far a pass is and when it will end.

    Args:
      what: is counted, "samples in 4 steps".
      total: how many there are.
      done: how many were done before.
      every: seconds between two lines.
    """

    def __init__(self, what: str, total: int, done: int = 0, every: float = 30.0) -> None:
        self._what, self._total, self._every = what, total, every
        self._first, self._begin = done, time.monotonic()
        self._said = self._begin

    def __call__(self, done: int) -> None:
        """Notes that `done` are done in all."""
        now = time.monotonic()
        if now - self._said < self._every:
            return
        self._said = now
        rate = (done - self._first) / (now - self._begin)
        left = (self._total - done) / rate if rate else float("inf")
        logging.info(
            "%s of %s %s, %.3g per second, %.0f min left",
            f"{done:,}", f"{self._total:,}", self._what, rate, left / 60,
        )  # fmt: skip
