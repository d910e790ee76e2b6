"""Talks to a program of another environment that does the same work there (`peers/`).

One JSON object per line: it says what it is when it is ready, is then told {"run": name}, and
answers {"count": pieces, "wall": seconds, "cpu": seconds}. So it takes turns with us.
"""

import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from shortcut_jax.benchmarks.timing import Took
from shortcut_jax.closing import Closing
from shortcut_jax.errors import UserError

FOLDER = Path(__file__).with_name("peers")


def check_backend(torch_python: str) -> None:
    """Raises UserError if there is a --torch_python, which works on a CPU, and jax does not."""
    import jax

    if torch_python and jax.default_backend() != "cpu":
        raise UserError(
            f"--torch_python={torch_python} compares on a CPU, and jax runs on "
            f"{jax.default_backend()}; expected a CPU on both sides: set JAX_PLATFORMS=cpu, or "
            "leave the flag out."
        )


class Peer(Closing):
    """A program of `peers/`; to be used with `with`, which ends it.

    Attributes:
      versions: what it says it runs on.
    """

    def __init__(self, flag: str, python: str, script: str, arguments: dict[str, Any]) -> None:
        """Starts it.

        Args:
          flag: that named the Python, for messages.
          python: the Python of its environment.
          script: file in `peers/`.
          arguments: what it has to know; JSON.

        Raises:
          UserError: it cannot be started, or says so.
        """
        self._said = f"--{flag}={python}"
        # Our path would bring our packages into its environment.
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        # A file, as a pipe that nobody reads would fill up.
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by close)
        try:
            self._process = subprocess.Popen(
                [python, str(FOLDER / script), json.dumps(arguments)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                env=environment,
            )
        except OSError as error:
            raise UserError(
                f"{self._said} cannot be started ({error}); expected the Python of an environment "
                "to compare with: mend the path, or leave the flag out."
            ) from error
        try:
            self.versions: dict[str, str] = self._answer()
        except BaseException:
            self.close()
            raise

    def run(self, name: str) -> Took:
        """Has it do a piece of work and waits.

        Raises:
          UserError: it has died.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"run": name}) + "\n")
            self._process.stdin.flush()
        except OSError:
            pass  # it has died: the answer says why
        return Took(**self._answer())

    def close(self) -> None:
        """Ends it."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        self._process.wait()
        self._errors.seek(0)
        last = self._errors.read().strip().splitlines()[-1:] or ["without a word"]
        raise UserError(
            f"{self._said}: the program to compare with has ended ({last[0]}); expected an "
            "environment with what it imports, see docs/data.md, docs/autoencoder.md and "
            "docs/metrics_speed.md: install that there, or leave the flag out."
        )
