"""Downloads from a server on this machine: what arrives, what is continued, what is refused."""

import contextlib
import dataclasses
import hashlib
import http.server
import re
import threading
import urllib.error
import urllib.request

import pytest

from shortcut_jax.errors import UserError
from shortcut_jax.weights import published as lib
from tests.sentences import assert_sentence, contents

CONTENT = bytes(range(256)) * 20_000  # 5 MB: several chunks
FILE = lib.Published("https://example.org/vae", hashlib.sha256(CONTENT).hexdigest(), len(CONTENT))


class Server(http.server.BaseHTTPRequestHandler):
    content = CONTENT
    cut_after = None  # bytes after which the connection ends
    ranges = True
    asked: list[str | None] = []

    def do_GET(self):
        cls = type(self)
        wanted = self.headers["Range"]
        cls.asked.append(wanted)
        body, status = cls.content, 200
        if wanted and cls.ranges:
            begin = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
            if begin >= len(body):
                self.send_response(416)
                self.end_headers()
                return
            body, status = body[begin:], 206
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # of a client that has seen enough
            self.wfile.write(body[: cls.cut_after])

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    """The handler's class, whose attributes say how it behaves; it has `open_url`."""

    class Handler(Server):
        asked: list[str | None] = []

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()

        def open_url(request, timeout):
            here = f"http://127.0.0.1:{running.server_port}/"
            assert request.full_url == FILE.url
            return urllib.request.urlopen(
                urllib.request.Request(here, headers=dict(request.header_items())), timeout=5
            )

        Handler.open_url = staticmethod(open_url)
        yield Handler
        running.shutdown()


@pytest.fixture
def out(tmp_path):
    return tmp_path / "vae.safetensors"


def refused(server, out, file=FILE):
    with pytest.raises(UserError) as error:
        lib.fetch(file, out, server.open_url)
    return str(error.value)


def test_the_file_and_nothing_else(server, out):
    lib.fetch(FILE, out, server.open_url)
    assert contents(out.parent) == {out.name: CONTENT}
    lib.fetch(FILE, out, server.open_url)
    assert server.asked == [None]  # it is there already


@pytest.mark.parametrize("ranges", [True, False])
def test_an_interrupted_download_goes_on(server, out, ranges):
    server.cut_after = 3_000_000
    said = refused(server, out)
    assert_sentence(said, (FILE.url, str(out), "3000000 of 5120000", f"{out.name}.part"))
    assert list(contents(out.parent)) == [f"{out.name}.part"]
    server.cut_after, server.ranges = None, ranges
    lib.fetch(FILE, out, server.open_url)
    assert contents(out.parent) == {out.name: CONTENT}
    assert server.asked == [None, "bytes=3000000-"]


def test_a_kill_between_the_last_byte_and_the_check(server, out):
    out.with_name(f"{out.name}.part").write_bytes(CONTENT)
    lib.fetch(FILE, out, server.open_url)
    assert contents(out.parent) == {out.name: CONTENT}


@pytest.mark.parametrize("part", [b"", b"begins otherwise"])
def test_other_bytes_are_never_accepted(server, out, part):
    if part:
        out.with_name(f"{out.name}.part").write_bytes(part)
    else:
        server.content = CONTENT[:-1] + b"x"
    said = refused(server, out)
    assert_sentence(said, (FILE.url, FILE.sha256, "it was removed", "try again"))
    assert contents(out.parent) == {}
    server.content = CONTENT
    lib.fetch(FILE, out, server.open_url)  # as it says
    assert out.read_bytes() == CONTENT


def test_another_size_is_refused_before_it_is_transferred(server, out):
    server.content = CONTENT + b"x"
    assert_sentence(refused(server, out), ("5120001 bytes, expected 5120000",))
    assert contents(out.parent) == {}


def test_an_unknown_size(server, out):
    lib.fetch(dataclasses.replace(FILE, size=0), out, server.open_url)
    assert out.read_bytes() == CONTENT


def test_an_existing_file_is_kept(server, out):
    out.write_bytes(b"mine")
    said = refused(server, out)
    assert_sentence(said, (str(out), FILE.sha256, "nothing was overwritten"))
    assert contents(out.parent) == {out.name: b"mine"}
    assert server.asked == []


def test_two_at_once(server, out):
    reached, go = threading.Event(), threading.Event()

    def slow(request, timeout):
        reached.set()
        go.wait(10)
        return server.open_url(request, timeout)

    first = threading.Thread(target=lib.fetch, args=(FILE, out, slow))
    first.start()
    assert reached.wait(10)
    assert_sentence(refused(server, out), (f"{out.name}.part", "another process"))
    go.set()
    first.join()
    assert contents(out.parent) == {out.name: CONTENT}


@pytest.mark.parametrize(
    "error",
    [
        urllib.error.URLError("Name or service not known"),
        TimeoutError("timed out"),
        urllib.error.HTTPError(FILE.url, 404, "Not Found", None, None),  # type: ignore[arg-type]
    ],
    ids=lambda error: type(error).__name__,
)
def test_no_connection(out, error):
    def open_url(request, timeout):
        raise error

    with pytest.raises(UserError) as said:
        lib.fetch(FILE, out, open_url)
    assert_sentence(str(said.value), (FILE.url, str(error), "5 MB of room", "same command"))
    assert contents(out.parent) == {}


def test_redirects_stay_on_https():
    handler = lib._HttpsRedirects()
    request = urllib.request.Request(FILE.url, headers={"Range": "bytes=5-"})
    to = "https://cdn.example.org/x"
    followed = handler.redirect_request(request, None, 302, "Found", {}, to)
    assert followed.full_url == to and followed.get_header("Range") == "bytes=5-"
    with pytest.raises(urllib.error.URLError, match="not https"):
        handler.redirect_request(request, None, 302, "Found", {}, "http://cdn.example.org/x")
    assert any(isinstance(h, lib._HttpsRedirects) for h in lib._opener().handlers)


@pytest.mark.parametrize("name", lib.PUBLISHED)
def test_the_registry(name):
    file = lib.PUBLISHED[name]
    assert file.url.startswith("https://") and re.fullmatch("[0-9a-f]{64}", file.sha256)
    assert file.size > 10**6
    # The bytes at the address do not change: a revision, or a file of a release named by its hash.
    # Meta has neither.
    one_revision = re.search("/resolve/[0-9a-f]{40}/", file.url) or file.sha256[:8] in file.url
    assert one_revision or name == "dinov2-vitl14"


# ------------------------------------------------------------------ the command


NOWHERE = {"https_proxy": "http://127.0.0.1:9"}  # nothing listens there


@pytest.mark.parametrize(
    ("flags", "fragments"),
    [
        ((), ("Nothing to download is named", "sd-vae-ft-mse")),
        (("sd-vae",), ("--name='sd-vae'", "sd-vae-ft-mse")),
        (("sd-vae-ft-mse",), ("--out is missing",)),
        (("sd-vae-ft-mse", "other"), ("'sd-vae-ft-mse' is not a flag",)),
        (("sd-vae-ft-mse", "--sha256=12"), ("--sha256='12'", "64 hexadecimal")),
        (("sd-vae-ft-mse", "--url=http://mirror/x"), ("--url='http://mirror/x'", "https")),
        (("sd-vae-ft-mse",), ("sd-vae-ft-mse/resolve", "335 MB of room", "--url")),
        (("--name=sd-vae-ft-ema", "--url=https://mirror/x"), ("https://mirror/x cannot",)),
    ],
)
def test_what_the_command_refuses(run_python, tmp_path, flags, fragments):
    out = [] if fragments[0] == "--out is missing" else [f"--out={tmp_path / 'f'}"]
    done = run_python(["-m", "shortcut_jax.download", *flags, *out], env=NOWHERE)
    assert done.returncode == 2
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert_sentence(line, fragments)
    assert "Traceback" not in done.stderr and contents(tmp_path) == {}


def test_the_command_needs_no_network_for_a_file_that_is_there(run_python, tmp_path):
    out = tmp_path / "file"
    out.write_bytes(b"published")
    digest = hashlib.sha256(b"published").hexdigest()
    flags = ["sd-vae-ft-mse", f"--out={out}", f"--sha256={digest.upper()}"]
    done = run_python(["-m", "shortcut_jax.download", *flags], env=NOWHERE)
    assert done.returncode == 0 and digest in done.stdout
