"""The other side of `shortcut_jax.benchmarks.peer`."""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping


def take_turns(versions: Mapping[str, str], works: Mapping[str, Callable[[], int]]) -> None:
    """Runs the works that are asked for on stdin; each returns how many pieces it did."""
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(content: Mapping[str, object]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    answer(versions)
    for line in sys.stdin:
        work = works[json.loads(line)["run"]]
        work()  # uses up what was made ahead of time while it waited for its turn
        wall, cpu = time.perf_counter(), time.process_time()
        count = work()
        answer(
            {
                "count": count,
                "wall": time.perf_counter() - wall,
                "cpu": time.process_time() - cpu,
            }
        )
