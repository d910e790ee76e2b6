"""Writes launch_dry_runs.txt: what the launchers print with --dry-run, for the commands in it.

python tests/golden/make_launch.py

A line that begins with "$ " is a command, given in the root of the repository, and what follows it
is what it printed. Add a command there, run this, and read what has changed (git diff).
"""

import os
import shlex
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILE = Path(__file__).with_name("launch_dry_runs.txt")


def read() -> dict[str, str]:
    """The printed text by command."""
    blocks = f"\n{FILE.read_text()}".split("\n$ ")[1:]
    return {command: text for command, _, text in (block.partition("\n") for block in blocks)}


def run(command: str) -> str:
    """What a command prints today, with ROOT for the path of the repository."""
    others = ("SLURM_", "XLA_", "JAX_", "ENV_")
    variables = {k: v for k, v in os.environ.items() if not k.startswith(others)}
    done = subprocess.run(
        shlex.split(command), cwd=ROOT, env=variables, capture_output=True, text=True, check=True
    )
    return done.stdout.replace(str(ROOT), "ROOT")


def main() -> None:
    FILE.write_text("".join(f"$ {command}\n{run(command)}\n" for command in read()))


if __name__ == "__main__":
    main()
