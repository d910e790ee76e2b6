"""A file is written whole or not at all, and what a killed process left is cleared away."""

import os

import pytest

from shortcut_jax import files


def test_an_error_leaves_the_old_content_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    files.write_atomically(path, b"old")
    with pytest.raises(OSError, match="full"), files.replacing(path) as file:
        file.write(b"half of the n")
        raise OSError("full")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    with files.replacing(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


def test_leftovers_of_the_dead_are_removed_and_no_others(tmp_path):
    dead = 2**22 + 1  # above the largest process id
    alive, other = f"metrics.jsonl.{os.getpid()}.tmp", ("a.tmp", "samples.png", "12.tmp.json")
    for name in (alive, *other, f"metrics.jsonl.{dead}.tmp", f"config.json.{dead}.tmp"):
        (tmp_path / name).touch()
    files.remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {alive, *other}
    files.remove_leftovers(tmp_path / "absent")
