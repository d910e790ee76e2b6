"""The installation: version ranges, pins, what the entry point imports, the launch scripts."""

import ast
import runpy
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = sorted((ROOT / "constraints").glob("*.txt"))
SCRIPTS = sorted([*(ROOT / "launch").glob("*.s[hb]*"), ROOT / ".ci" / "run"])
FORBIDDEN = {"keras", "tensorflow", "tensorflow-cpu", "tf-nightly", "torch", "torchvision"}


@pytest.fixture
def setup_arguments(monkeypatch: pytest.MonkeyPatch) -> dict:
    """The arguments setup.py passes to setup()."""
    arguments: dict = {}
    monkeypatch.setattr(setuptools, "setup", lambda **kwargs: arguments.update(kwargs))
    monkeypatch.chdir(ROOT)  # find_packages looks in the working directory.
    runpy.run_path(str(ROOT / "setup.py"))
    return arguments


def requirements(setup_arguments: dict, extra: str | None = None) -> list[Requirement]:
    lines = setup_arguments["install_requires"]
    if extra is not None:
        lines = lines + setup_arguments["extras_require"][extra]
    return [Requirement(line) for line in lines]


def read_pins(constraints: Path) -> dict[str, str]:
    """Canonical name to version; every line is `name==version` or a comment."""
    pins = {}
    for line in constraints.read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            pins[canonicalize_name(name)] = version
    return pins


@pytest.mark.parametrize(
    ("version", "accepted"),
    [
        ("0.9.2", False),
        ("0.10.2", True),
        ("0.11.2", True),
        ("0.12.0", True),
        ("0.12.0.1", True),
        ("0.13.0", False),
    ],
)
def test_jax_range(setup_arguments: dict, version: str, accepted: bool) -> None:
    (jax,) = [r for r in requirements(setup_arguments) if r.name == "jax"]
    assert jax.specifier.contains(version) is accepted


@pytest.mark.parametrize("constraints", CONSTRAINTS, ids=lambda path: path.stem)
def test_pins_are_within_the_ranges(setup_arguments: dict, constraints: Path) -> None:
    pins = read_pins(constraints)
    for requirement in requirements(setup_arguments, "test"):
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)])


def test_there_are_pins_for_the_oldest_python(setup_arguments: dict) -> None:
    assert setup_arguments["python_requires"] == ">=3.11"
    assert [path.name for path in CONSTRAINTS] == ["py311.txt", "py312.txt"]


@pytest.mark.parametrize("constraints", CONSTRAINTS, ids=lambda path: path.stem)
def test_pins_hold_everything_that_gets_installed(setup_arguments: dict, constraints: Path) -> None:
    """Follows the requirements of what is installed here, with this Python's markers."""
    version = f"{sys.version_info.major}{sys.version_info.minor}"
    if constraints.stem != f"py{version}":
        pytest.skip(f"needs the Python of {constraints.name}: PYTHON=... bash launch/test.sh")
    pins = read_pins(constraints)
    todo = requirements(setup_arguments, "test")
    seen = set()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if (name, *sorted(requirement.extras)) in seen:
            continue
        seen.add((name, *sorted(requirement.extras)))
        assert name in pins, f"{name} is not pinned: regenerate {constraints.name}"
        if metadata.version(name) != pins[name]:
            pytest.skip(f"{name} here is not the pinned version: other versions, other needs")
        for line in metadata.requires(name) or []:
            needed = Requirement(line)
            marker = needed.marker
            extras = ["", *requirement.extras]
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras):
                todo.append(needed)
    assert {name for name, *_ in seen} == set(pins), "pins that nothing needs"


@pytest.mark.parametrize("constraints", CONSTRAINTS, ids=lambda path: path.stem)
def test_constraints_name_no_host(constraints: Path) -> None:
    text = constraints.read_text()
    assert "://" not in text
    assert "index-url" not in text


def test_neither_tensorflow_nor_torch(setup_arguments: dict) -> None:
    without = {"parity", "tfds-prepare"}
    for extra in {None, *setup_arguments["extras_require"]} - without:
        names = {canonicalize_name(r.name) for r in requirements(setup_arguments, extra)}
        assert not names & FORBIDDEN, extra
    for constraints in CONSTRAINTS:
        assert not read_pins(constraints).keys() & FORBIDDEN, constraints.name


def test_every_requirement_has_its_reason(setup_arguments: dict) -> None:
    text = (ROOT / "setup.py").read_text()
    (keyword,) = [
        node
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.keyword) and node.arg == "install_requires"
    ]
    assert isinstance(keyword.value, ast.List)
    assert len(keyword.value.elts) == len(setup_arguments["install_requires"])
    for element in keyword.value.elts:
        rest = text.splitlines()[element.lineno - 1][element.end_col_offset :]
        assert rest.startswith(",  # "), f"no reason in setup.py: {ast.unparse(element)}"


def test_every_module_is_in_a_package(setup_arguments: dict) -> None:
    """A folder without __init__.py works from a checkout and is missing from an installation."""
    folders = {path.parent for path in (ROOT / "shortcut_jax").rglob("*.py")}
    expected = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert set(setup_arguments["packages"]) == expected


def test_the_entry_point_imports_nothing_heavy(run_python) -> None:
    code = "import sys, shortcut_jax.main; print(*sorted(sys.modules))"
    done = run_python(["-c", code])
    assert done.returncode == 0
    heavy = {"matplotlib", "sklearn", "tensorboard", "tensorflow", "torch"}
    assert not heavy & set(done.stdout.split())


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.skipif(
    shutil.which("shellcheck") is None, reason="needs shellcheck: apt-get install shellcheck"
)
def test_scripts_pass_shellcheck() -> None:
    done = subprocess.run(
        ["shellcheck", "--external-sources", *SCRIPTS], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
