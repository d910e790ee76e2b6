"""Preparing: killed half-way, several processes at once, folders that cannot be used."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from shortcut_jax.data import digits, open_dataset, sources
from shortcut_jax.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]


def start(script: str, **kwargs) -> subprocess.Popen:
    command = [sys.executable, "-c", textwrap.dedent(script)]
    return subprocess.Popen(command, cwd=REPOSITORY, **kwargs)


@pytest.fixture
def on_disk(digits_dir):
    """The training split of digits, read from disk as needed."""
    builder = sources.prepare(digits.Digits, digits_dir)
    return sources.on_disk("digits", "train", builder.as_data_source(split="train"), builder)


def test_on_disk_and_in_memory_give_the_same_rows(digits_dir, on_disk):
    in_memory = open_dataset(dict(name="digits", split="train", data_dir=str(digits_dir)))
    indices = np.array([5, 0, 1441, 5])
    for key in ("image", "label"):
        a, b = on_disk.rows(indices)[key], in_memory.rows(indices)[key]
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype
    assert (on_disk.size, on_disk.image_shape, on_disk.num_classes) == (1442, (8, 8, 1), 10)
    assert (in_memory.size, in_memory.image_shape, in_memory.num_classes) == (1442, (8, 8, 1), 10)


@pytest.mark.parametrize("index", [-1, 1442])
def test_rows_out_of_range(on_disk, index):
    with pytest.raises(IndexError, match="0..1441"):
        on_disk.rows(np.array([0, index]))


def test_fingerprint_tells_contents_apart(on_disk, digits_dir):
    builder = sources.prepare(digits.Digits, digits_dir)
    rows = on_disk.rows(np.arange(10))
    other_pixel = {**rows, "image": rows["image"].copy()}
    other_pixel["image"][3, 2, 1, 0] += 1
    other_label = {**rows, "label": rows["label"][::-1]}
    prints = [
        sources.in_memory("digits", split, changed, builder).fingerprint
        for split, changed in [
            ("train", rows),
            ("train", other_pixel),
            ("train", other_label),
            ("test", rows),
        ]
    ]
    assert len({*prints, on_disk.fingerprint}) == 5
    assert sources.in_memory("digits", "train", rows, builder).fingerprint == prints[0]


@pytest.mark.parametrize(
    "kill_at",
    [
        # While the rows of the second split are generated: the first one is already written.
        """
        generate = sources.ArraysBuilder._generate_examples
        def kill(self, images, labels):
            for index, row in enumerate(generate(self, images, labels)):
                if len(images) < 1000 and index == 100:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield row
        sources.ArraysBuilder._generate_examples = kill
        """,
        # When all is written and only the last rename is missing.
        """
        sources._move = lambda generated, final: os.kill(os.getpid(), signal.SIGKILL)
        """,
    ],
    ids=["generating", "renaming"],
)
def test_killed_while_preparing_then_opened_again(tmp_path, kill_at):
    imports = "import os, signal\nfrom shortcut_jax.data import open_dataset, sources\n"
    opening = f'\nopen_dataset(dict(name="digits", split="train", data_dir={str(tmp_path)!r}))\n'
    killed = start(imports + textwrap.dedent(kill_at) + opening)
    assert killed.wait(timeout=60) == -signal.SIGKILL
    assert [path.name[:18] for path in tmp_path.iterdir()] == ["incomplete.digits."]
    assert (
        open_dataset(dict(name="digits", split="train+test", data_dir=str(tmp_path))).size == 1797
    )


def test_processes_that_finish_at_the_same_time(tmp_path):
    # Each waits until the other has generated its files too, so one of them renames second.
    script = f"""
        import os, pathlib, random, time
        from shortcut_jax.data import open_dataset, sources
        random.seed(0)  # As a program may do: TFDS names its temporary directories from this.
        meeting = pathlib.Path({str(tmp_path / "meeting")!r})
        generate = sources._generate
        def generate_and_wait(builder):
            generate(builder)
            (meeting / str(os.getpid())).touch()
            until = time.monotonic() + 30
            while len(list(meeting.iterdir())) < 2 and time.monotonic() < until:
                time.sleep(0.01)
        sources._generate = generate_and_wait
        data_dir = {str(tmp_path / "tfds")!r}
        print(open_dataset(dict(name="digits", split="train", data_dir=data_dir)).fingerprint)
    """
    (tmp_path / "meeting").mkdir()
    processes = [start(script, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs[0] == outputs[1] != ""
    assert [path.name for path in (tmp_path / "tfds").iterdir()] == ["digits"]


def test_prepared_data_are_only_read(digits_dir, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("wrote to a prepared data directory")

    monkeypatch.setattr(sources.tempfile, "TemporaryDirectory", refuse)
    monkeypatch.setattr(Path, "mkdir", refuse)
    assert open_dataset(dict(name="digits", split="test", data_dir=str(digits_dir))).size == 355


def test_preparing_is_silent(tmp_path, capfd):
    open_dataset(dict(name="digits", split="test", data_dir=str(tmp_path)))
    assert tuple(capfd.readouterr()) == ("", "")


def test_data_dir_that_is_not_a_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data\.data_dir=.*file/data .*set it"):
        open_dataset(dict(name="digits", split="train", data_dir=str(tmp_path / "file" / "data")))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere: run as another user")
def test_data_dir_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="data_dir=.*Permission denied"):
        open_dataset(dict(name="digits", split="train", data_dir=str(tmp_path)))


def test_something_else_in_the_place_of_the_data(tmp_path):
    (tmp_path / "digits" / "1.0.0").mkdir(parents=True)
    (tmp_path / "digits" / "1.0.0" / "notes.txt").touch()
    with pytest.raises(UserError, match="digits cannot be written to data.data_dir=.*not empty"):
        open_dataset(dict(name="digits", split="train", data_dir=str(tmp_path)))
