"""What README.md, docs/ and the sources name is there: files, commands, modules, keys, pages."""

import importlib
import importlib.util
import re
from pathlib import Path

from configs import imagenet

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *ROOT.glob("docs/*.md")]
SOURCES = [
    path
    for folder in ("shortcut_jax", "configs", "launch")
    for path in (ROOT / folder).glob("**/*")
    if path.suffix in (".py", ".sh")
]

FILE = r"(?<![\w./-])((?:shortcut_jax|configs|launch|tests|docs)/[\w./-]*\.(?:py|sh|md|json))\b"
COMMAND = r"python3? -m ((?:shortcut_jax|tests)[\w.]*\w)"
IMPORT = r"(?m)^from (shortcut_jax[\w.]*) import ([\w, ]+)"
KEY = r"--config\.([a-z_]+(?:\.[a-z_0-9]+)*)="
LINK = r"\]\((?!https?://|#)([^)#\s]+)"


def named(pattern, paths):
    """(path, what the pattern finds in it), all of them."""
    found = [(path, match) for path in paths for match in re.findall(pattern, path.read_text())]
    assert len(found) > 3  # else the pattern is wrong
    return found


def is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def test_files():
    assert not [n for n in named(FILE, PAGES + SOURCES) if not (ROOT / n[1]).exists()]


def test_links():
    assert not [n for n in named(LINK, PAGES) if not (n[0].parent / n[1]).exists()]


def test_commands():
    assert not [n for n in named(COMMAND, PAGES + SOURCES) if not is_module(n[1])]


def test_imports():
    for path, (module, names) in named(IMPORT, PAGES):
        for name in re.split(r", *", names.strip()):
            assert is_module(f"{module}.{name}") or hasattr(
                importlib.import_module(module), name
            ), (path, module, name)


def test_keys():
    sections = imagenet.get_config()  # it has those of latents, too
    for path, key in named(KEY, PAGES + SOURCES):
        found = sections
        for part in key.split("."):
            assert part in found, (path, key)
            found = found[part]
