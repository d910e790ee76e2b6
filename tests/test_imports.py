"""What an import brings along: counted in modules, which no load of the machine changes."""

import json
import sys

import pytest

CODE = """
import json, sys
before = set(sys.modules)
import {module}
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def imported(run_python, module):
    """Names of all modules, and of the packages outside of the standard library."""
    done = run_python(["-c", CODE.format(module=module)])
    names = json.loads(done.stdout)
    return names, {name.partition(".")[0] for name in names} - sys.stdlib_module_names


def test_the_package_brings_nothing(run_python):
    names, _ = imported(run_python, "shortcut_jax")
    assert names == ["shortcut_jax"]


def test_the_command_line_needs_no_jax(run_python):
    _, packages = imported(run_python, "shortcut_jax.cli")
    assert packages == {"absl", "shortcut_jax"}


@pytest.mark.parametrize(
    ("module", "without"),
    [
        ("sampling", {"clu", "grain", "optax", "orbax", "tensorflow_datasets", "sklearn", "scipy"}),
        ("main", {"grain", "orbax", "tensorflow_datasets", "sklearn", "scipy"}),
        ("train", {"sklearn", "scipy", "tensorboard", "tensorflow", "torch"}),
    ],
)
def test_what_is_not_needed_yet_is_not_imported(module, without, run_python):
    _, packages = imported(run_python, f"shortcut_jax.{module}")
    assert "jax" in packages and not packages & without
