"""Worker processes: same rows, whole errors, and none left behind."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from shortcut_jax.data import open_dataset, pipeline
from shortcut_jax.data.workers import Workers
from shortcut_jax.errors import UserError
from tests.data.photographs import encoded, make_tfds
from tests.sentences import assert_sentence

REPOSITORY = Path(__file__).resolve().parents[2]
BROKEN = 11


@pytest.fixture(scope="module")
def section(tmp_path_factory) -> dict:
    """Photographs, of which the last cannot be decoded."""
    features = {"image": tfds.features.Image(), "file_name": tfds.features.Text()}
    rows = [
        {"image": encoded(seed)[: 200 if seed == BROKEN else None], "file_name": f"{seed}.png"}
        for seed in range(BROKEN + 1)
    ]
    data_dir = tmp_path_factory.mktemp("data")
    make_tfds(data_dir, "toy", "1.0.0", features, {"good": rows[:BROKEN], "bad": rows[BROKEN:]})
    return {
        "name": "images", "split": "good", "data_dir": str(data_dir), "builder": "toy",
        "image_size": 8, "crop": "adm", "num_classes": 1, "workers": 2,
    }  # fmt: skip


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def children() -> set[int]:
    """Processes that this one has started and that run."""
    found = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    listed = {int(pid) for path in found for pid in path.read_text().split()}
    command = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in listed if alive(pid)}
    return {pid for pid, line in command.items() if b"spawn_main" in line}


def all_end(pids: set[int], seconds: float = 20) -> bool:
    until = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < until:
        time.sleep(0.05)
    return not any(map(alive, pids))


def test_same_batches_from_processes_that_start_once_and_end(section):
    dataset = open_dataset(section)
    run = {"batch_size": 4, "seed": 3, "start_step": 2, "num_steps": 12, "flip": True}
    with pipeline.batches(dataset, **run) as threads:
        expected = list(threads)
    with pipeline.batches(dataset, **run, num_workers=2, prefetch=2) as batches:
        found = [next(batches)]
        started = children()
        found += batches
        assert children() == started and 1 <= len(started) <= 2
    assert all_end(started)
    assert len(found) == len(expected) == 12
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a["image"], b["image"])
        np.testing.assert_array_equal(a["label"], b["label"])


def test_an_exception_in_a_worker_names_the_record_and_nothing_is_left(section):
    dataset = open_dataset({**section, "split": "good+bad"})
    run = {"batch_size": 4, "seed": 0, "start_step": 0, "num_steps": 10**6, "num_workers": 1}
    started: set[int] = set()
    with pytest.raises(UserError) as error, pipeline.batches(dataset, **run) as batches:
        for _ in batches:
            started |= children()
    assert_sentence(str(error.value), ("toy 1.0.0, bad, record 0", "(11.png)", "cannot be decoded"))
    assert all_end(started | children())


def test_a_killed_worker_is_a_sentence():
    workers = Workers(signal.raise_signal, 1, "data.workers")
    try:
        with pytest.raises(UserError) as error:
            workers(signal.SIGKILL)
    finally:
        workers.close()
    assert_sentence(str(error.value), ("data.workers=1", "died", "set it to 0"))


def test_workers_end_with_a_killed_main_process(section, tmp_path):
    script = tmp_path / "main.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys, time
        sys.path.insert(0, {str(REPOSITORY)!r})
        from shortcut_jax.data import open_dataset, pipeline
        from tests.data.test_workers import children
        if __name__ == "__main__":
            batches = pipeline.batches(
                open_dataset({section!r}), batch_size=4, seed=0, start_step=0, num_steps=10**9,
                num_workers=1, prefetch=1,
            )
            next(batches)
            print(*children(), flush=True)
            time.sleep(600)
        """)
    )
    main = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    try:
        assert main.stdout is not None
        started = {int(pid) for pid in main.stdout.readline().split()}
        assert len(started) == 1 and all(map(alive, started))
    finally:
        main.kill()
        main.wait()
    assert all_end(started)
