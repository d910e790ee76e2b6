"""A file is written whole or not at all, leftovers are cleared, and many files may be open."""

import errno
import os
import resource

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


def test_commands_may_open_as_many_files_as_the_system_allows(run_python):
    code = (
        "import resource, sys; from shortcut_jax import cli, files\n"
        "hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (hard // 2, hard))\n"
        "cli.main(lambda: print(files.open_files_limit() == hard))"
    )
    assert run_python(["-c", code]).stdout == "True\n"


@pytest.mark.parametrize(
    ("before", "kernel", "after"),
    [
        ((256, resource.RLIM_INFINITY), 24576, 10240),  # macOS
        ((256, resource.RLIM_INFINITY), 245760, 65536),
        ((99999, resource.RLIM_INFINITY), 245760, 99999),  # never lowered
        ((1024, 4096), 0, 1024),  # refused
        ((resource.RLIM_INFINITY,) * 2, 0, resource.RLIM_INFINITY),
    ],
)
def test_a_limit_that_the_kernel_does_not_take_is_no_error(monkeypatch, before, kernel, after):
    found = [before]

    def set_limit(_, limits):
        if not 0 <= limits[0] <= kernel:
            raise ValueError("current limit exceeds maximum limit")
        found.append(limits)

    monkeypatch.setattr(resource, "getrlimit", lambda _: before)
    monkeypatch.setattr(resource, "setrlimit", set_limit)
    files.raise_open_files_limit()
    assert found[-1] == (after, before[1])


def test_what_says_that_too_many_files_are_open():
    assert files.too_many_open(OSError(errno.EMFILE, "x"))
    assert files.too_many_open(RuntimeError("open() failed: Too many open files; opening a"))
    assert not files.too_many_open(FileNotFoundError(errno.ENOENT, "Too many open files"))
    assert not files.too_many_open(RuntimeError("no magic number"))
