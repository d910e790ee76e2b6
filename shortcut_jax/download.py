"""Downloads a published weight file, and accepts no other bytes than those that were published.

python -m shortcut_jax.download sd-vae-ft-mse --out=vae/diffusion_pytorch_model.safetensors

What has arrived is kept in FILE.part, where the same command continues after an interruption.
"""

import dataclasses
import functools
from pathlib import Path

from absl import flags

from shortcut_jax import cli
from shortcut_jax.errors import UserError
from shortcut_jax.files import check_writable
from shortcut_jax.weights.published import PUBLISHED, fetch

NAME = flags.DEFINE_enum(
    "name", None, list(PUBLISHED), "File to download; --name= may be left out."
)
OUT = flags.DEFINE_string("out", None, "File to write.")
URL = flags.DEFINE_string("url", None, "https address of a mirror, instead of the recorded one.")
SHA256 = flags.DEFINE_string(
    "sha256", None, "Hash that the file must have, instead of the recorded one."
)


def main() -> None:
    """Downloads what the flags name."""
    if NAME.value is None:
        raise UserError(
            f"Nothing to download is named; expected one of {', '.join(PUBLISHED)}: write, for "
            "example, python -m shortcut_jax.download sd-vae-ft-mse --out=FILE."
        )
    if not OUT.value:
        raise UserError("--out is missing; give the file to write, e.g. --out=vae.safetensors.")
    published = PUBLISHED[NAME.value]
    if URL.value is not None:
        published = dataclasses.replace(published, url=_checked_url(URL.value))
    if SHA256.value is not None:  # another file, of unknown size
        published = dataclasses.replace(published, sha256=_checked_sha256(SHA256.value), size=0)
    out = Path(OUT.value).expanduser()
    check_writable("--out", out.parent)
    fetch(published, out)
    print(f"{out} has sha256 {published.sha256}.")


def _checked_url(text: str) -> str:
    if not text.startswith("https://"):
        raise UserError(f"--url={text!r} is no https address; expected one: write https://...")
    return text


def _checked_sha256(text: str) -> str:
    if len(text) != 64 or not set(text.lower()) <= set("0123456789abcdef"):
        raise UserError(
            f"--sha256={text!r} is not a sha256; expected 64 hexadecimal digits, as sha256sum "
            "prints them."
        )
    return text.lower()


if __name__ == "__main__":
    cli.main(main, functools.partial(cli.parse_flags, positional="name"))
