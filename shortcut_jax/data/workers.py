"""Processes that run one function, for work that holds Python's lock, such as decoding images."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import Any

from shortcut_jax.errors import UserError

_function: Callable[..., Any]  # of a worker process


class Workers:
    """Calls a function in processes that start once, when they are first needed.

    They end with `close`, when the object is collected, and when this process ends, even by SIGKILL
    (a worker watches it). They are spawned, not forked: the threads of jax do not survive a fork.
    A program that uses them must not do its work on import (`if __name__ == "__main__"`).

    Args:
      function: picklable; sent to each process once.
      count: number of processes.
      key: the config key or flag that says how many, for messages.
    """

    def __init__(self, function: Callable[..., Any], count: int, key: str) -> None:
        self._said = f"{key}={count}"
        self._executor = ProcessPoolExecutor(
            count, multiprocessing.get_context("spawn"), initializer=_start, initargs=(function,)
        )

    def __call__(self, *args: Any) -> Any:
        """Calls the function in one of the processes and waits; what it raises is raised here.

        Raises:
          UserError: a worker process has died.
        """
        return self.result(self.submit(*args))

    def submit(self, *args: Any) -> Future[Any]:
        """Has the function called without waiting for it; to be given to `result`.

        Raises:
          UserError: a worker process has died.
        """
        try:
            return self._executor.submit(_call, *args)
        except BrokenProcessPool as error:
            raise self._died() from error

    def result(self, future: Future[Any]) -> Any:
        """Waits for what the function returns or raises.

        Raises:
          UserError: a worker process has died.
        """
        try:
            return future.result()
        except BrokenProcessPool as error:
            raise self._died() from error

    def close(self) -> None:
        """Ends the processes after what they are doing now; what waits is dropped."""
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _died(self) -> UserError:
        return UserError(
            f"{self._said}: a worker process died without an exception (killed, perhaps for memory,"
            " or unable to start); expected it to live as long as this one: lower that number or "
            "set it to 0, which needs no processes."
        )


def _start(function: Callable[..., Any]) -> None:
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _call(*args: Any) -> Any:
    return _function(*args)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
