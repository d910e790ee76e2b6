"""Compiled programs are kept, where that is safe and wanted."""

import os
import stat
import types

import pytest

from shortcut_jax import compilation_cache
from shortcut_jax.compilation_cache import FOLDER, SETTINGS

# What the binaries do, in a process that has jax already or gets it later.
PROGRAM = """
{first}
from shortcut_jax import compilation_cache
compilation_cache.use()
import jax
jax.jit(lambda a: a @ a + 1)(jax.numpy.ones((64, 64)))
print(jax.config.jax_compilation_cache_dir)
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in (FOLDER, *SETTINGS):
        monkeypatch.delenv(name, raising=False)
    # Set in `use`, to be gone after the test.
    monkeypatch.setattr(os, "environ", dict(os.environ))
    # This process's jax stays as it is.
    monkeypatch.setattr(compilation_cache, "sys", types.SimpleNamespace(modules={}))
    return tmp_path


@pytest.mark.parametrize("first", ["", "import jax"], ids=["before jax", "after jax"])
def test_programs_are_kept_for_the_next_process(first, run_python, tmp_path, monkeypatch):
    for name in (FOLDER, *SETTINGS):
        monkeypatch.delenv(name, raising=False)
    env = {"XDG_CACHE_HOME": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    done = run_python(["-c", PROGRAM.format(first=first)], env=env)
    folder = compilation_cache.default_folder().relative_to(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    )
    assert done.stdout.strip() == str(tmp_path / folder)
    assert any((tmp_path / folder).iterdir())
    assert stat.S_IMODE((tmp_path / folder).stat().st_mode) == 0o700


@pytest.mark.parametrize("value", ["", "/elsewhere"])
def test_what_the_user_has_set_stays(value, home):
    os.environ[FOLDER] = value
    compilation_cache.use()
    assert os.environ[FOLDER] == value and not list(home.iterdir())


def test_a_folder_that_others_can_write_is_not_used(home):
    folder = compilation_cache.default_folder()
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    compilation_cache.use()
    assert FOLDER not in os.environ
    folder.chmod(0o700)
    compilation_cache.use()
    assert os.environ[FOLDER] == str(folder)


def test_a_home_that_cannot_be_written_is_no_error(home):
    (home / "shortcut_jax").write_text("a file")
    compilation_cache.use()
    assert FOLDER not in os.environ


def test_machines_that_differ_in_their_cpu_do_not_share(home, monkeypatch):
    here = compilation_cache.default_folder()
    monkeypatch.setattr(compilation_cache, "_cpu", lambda: "flags: sse2")
    assert compilation_cache.default_folder() not in (here, here.parent)


def test_every_binary_keeps_them(home, run_python, monkeypatch):
    code = (
        "import os; from shortcut_jax import cli\n"
        f"cli.main(lambda: print(os.environ.get({FOLDER!r})))"
    )
    monkeypatch.undo()
    env = {name: value for name, value in os.environ.items() if name != FOLDER}
    monkeypatch.setattr(os, "environ", env)
    done = run_python(["-c", code], env={"XDG_CACHE_HOME": str(home)})
    assert done.stdout.strip().startswith(str(home / "shortcut_jax" / "xla"))
