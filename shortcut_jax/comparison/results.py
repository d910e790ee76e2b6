"""Makes docs/results.md from the JSON of finished comparisons.

python -m shortcut_jax.comparison.results --tables=docs/results/digits.json --ablations=... \\
    --out=FILE.md
"""

import os
from pathlib import Path

from absl import flags

from shortcut_jax import cli
from shortcut_jax.errors import UserError

TABLES = flags.DEFINE_list(
    "tables",
    [],
    "table1.json files, a section each; the pictures of X.json are X_curves.png and X_samples.png.",
)
ABLATIONS = flags.DEFINE_list("ablations", [], "ablations.json files, one section each.")
NOTES = flags.DEFINE_string("notes", None, "Markdown to put between the tables and the ablations.")
OUT = flags.DEFINE_string("out", None, "Markdown file to write.", required=True)


def main() -> None:
    """Writes the page."""
    from shortcut_jax.comparison import ablations, table1_report
    from shortcut_jax.files import read_json, write_atomically

    if not TABLES.value + ABLATIONS.value:
        raise UserError("--tables and --ablations are empty; give the JSON files to show.")
    command = [f"--tables={','.join(TABLES.value)}", f"--ablations={','.join(ABLATIONS.value)}"]
    command += [f"--notes={NOTES.value}"] if NOTES.value else []
    parts = [
        "# Results",
        "Generated, not written: `python -m shortcut_jax.comparison.results "
        f"{' '.join(command)} --out={OUT.value}`.",
    ]
    for path in TABLES.value:
        summary = read_json(Path(path), "a table1.json")
        parts.append(f"## Table 1 on {summary['data']}")
        for kind in ("curves", "samples"):
            picture = Path(path).with_name(f"{Path(path).stem}_{kind}.png")
            if picture.exists():
                link = os.path.relpath(picture, Path(OUT.value).parent)
                parts.append(f"![{kind}]({link})")
        parts.append(table1_report.markdown(summary).strip())
    if NOTES.value:
        parts.append(Path(NOTES.value).read_text().strip())
    for path in ABLATIONS.value:
        summary = read_json(Path(path), "an ablations.json")
        parts += [f"## Ablations on {summary['data']}", ablations.markdown(summary).strip()]
    write_atomically(Path(OUT.value), ("\n\n".join(parts) + "\n").encode())
    print(f"Wrote {OUT.value}.")


if __name__ == "__main__":
    cli.main(main)
