"""Published weight files, and fetching them: no other bytes are accepted than were published."""

import dataclasses
import fcntl
import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import logging

from shortcut_jax.errors import UserError
from shortcut_jax.files import sha256_of

CHUNK = 2**20  # bytes
TIMEOUT = 60  # seconds without a byte


@dataclasses.dataclass(frozen=True)
class Published:
    """A file somebody published.

    Attributes:
      url: https address, of one revision where there are any.
      sha256: of the file.
      size: bytes; 0 if unknown.
    """

    url: str
    sha256: str
    size: int


# sha256 and size as https://huggingface.co/stabilityai/NAME shows them for this revision.
PUBLISHED = {
    "sd-vae-ft-mse": Published(
        "https://huggingface.co/stabilityai/sd-vae-ft-mse/resolve/"
        "31f26fdeee1355a5c34592e401dd41e45d25a493/diffusion_pytorch_model.safetensors",
        "a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815",
        334_643_276,
    ),
    "sd-vae-ft-ema": Published(
        "https://huggingface.co/stabilityai/sd-vae-ft-ema/resolve/"
        "f04b2c4b98319346dad8c65879f680b1997b204a/diffusion_pytorch_model.safetensors",
        "32db726da04f06c1b6b14c0043ce115cc87a501482945c5add89a40d838fcb46",
        334_643_276,
    ),
    # The FID's network, which pytorch-fid and torch-fidelity both load, made from TensorFlow's of
    # 2015-12-05. torch-fidelity's release v0.2.0 has the same bytes.
    "inception-2015-12-05": Published(
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
        "pt_inception-2015-12-05-6726825d.pth",
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
        95_628_359,
    ),
    # FD-DINOv2's network. Meta publishes neither revisions nor hashes: sha256 and size are those
    # that projects which verify this address pin (docs/dinov2.md).
    "dinov2-vitl14": Published(
        "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
        "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
        1_217_586_395,
    ),
}

# (request with url and headers, timeout=seconds) -> response, a context manager with `read`.
Open = Callable[..., Any]


def fetch(published: Published, out: Path, open_url: Open | None = None) -> None:
    """Makes `out` the published file, unless it is that already.

    Args:
      published: what to download.
      out: file to write; its folder exists.
      open_url: as `urllib.request.urlopen`, by which it can be replaced in tests.

    Raises:
      UserError: `out` is another file, the address cannot be reached, the disk is full, or other
        bytes arrive than were published. `out` is then as it was.
    """
    if out.exists():
        if not out.is_file() or sha256_of(out) != published.sha256:
            raise UserError(
                f"--out={out} exists and is not the file with sha256 {published.sha256}; nothing "
                "was overwritten: name another file, or remove that one."
            )
        return
    part = out.with_name(out.name + ".part")
    try:
        with part.open("ab") as file:
            _lock(file, part)
            _transfer(published, file, open_url or _opener().open)
            file.flush()
            os.fsync(file.fileno())
            found = sha256_of(part)
            if found != published.sha256:
                part.unlink()
                raise UserError(
                    f"{published.url} gave a file with sha256 {found}, expected "
                    f"{published.sha256}; it was removed: try again, or get the file elsewhere and "
                    "pass its path."
                )
            os.replace(part, out)
    except (OSError, http.client.HTTPException) as error:
        if part.is_file() and not part.stat().st_size:
            part.unlink()
        room = f"{published.size / 1e6:.0f} MB of room" if published.size else "room for the file"
        raise UserError(
            f"{published.url} cannot be downloaded to {out} ({error}); expected a connection to it "
            f"and {room}: mend that and run the same command, which "
            f"goes on with {part.name} if there is one, give a mirror as --url, or copy the file "
            "from elsewhere."
        ) from error


def _lock(file: Any, part: Path) -> None:
    # A second process would append to the first one's file, even after it was checked.
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not part.exists() or not os.path.samestat(os.fstat(file.fileno()), part.stat()):
            raise BlockingIOError("the other has just finished, and this is its file")
    except BlockingIOError as error:
        raise UserError(
            f"{part} is being written by another process; expected to be alone: wait for it, or "
            "name another --out."
        ) from error


def _transfer(published: Published, file: Any, open_url: Open) -> None:
    """Appends to `file` what it lacks."""
    have = file.tell()
    headers = {"User-Agent": "shortcut_jax", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    try:
        response = open_url(urllib.request.Request(published.url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if have and error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            return  # nothing is left to send: the hash tells whether it is the file
        raise
    with response:
        if have and response.status != http.client.PARTIAL_CONTENT:
            file.truncate(0)  # the server sends the whole file again
            have = 0
        total = have + int(response.headers.get("Content-Length", published.size - have))
        if published.size and total != published.size:
            raise ConnectionError(f"it has {total} bytes, expected {published.size}")
        logged = 0
        while chunk := response.read(CHUNK):
            file.write(chunk)
            have += len(chunk)
            if total and 10 * have // total > logged:
                logged = 10 * have // total
                logging.info("%.1f of %.1f MB.", have / 1e6, total / 1e6)
    if have < total:
        raise ConnectionError(f"the connection ended after {have} of {total} bytes")


class _HttpsRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to https addresses only."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):  # type: ignore[no-untyped-def]
        if not newurl.startswith("https://"):
            raise urllib.error.URLError(f"it redirects to {newurl}, which is not https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener() -> urllib.request.OpenerDirector:
    """Opens https addresses; what `build_opener` adds for http, ftp, file and data is left out."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.UnknownHandler,
        _HttpsRedirects,
    ):
        opener.add_handler(handler())
    return opener
