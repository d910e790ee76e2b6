"""What every refusal of bad input must be like, and that it changes nothing."""

from collections.abc import Iterable
from pathlib import Path


def assert_sentence(text: str, fragments: Iterable[str]) -> None:
    """One line, a whole sentence, with all that it has to name."""
    text = text.strip()
    assert "\n" not in text and "Traceback" not in text
    assert text[-1] in ".?", text
    for fragment in fragments:
        assert fragment in text, f"{fragment!r} is not in: {text}"


def contents(folder: Path) -> dict[str, bytes]:
    """Every file in a folder, to compare with what was there before."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
