"""Files and settings from outside are data: nothing in them runs, escapes or takes all memory.

Hostile pickles are in weights/test_restricted_pickle.py and weights/test_torch_file.py, hashes of
downloads in weights/test_published.py, names that leave a zip in data/test_prepare.py.
"""

import ast
import contextlib
import gzip
import io
import json
import pickle
import shutil
import stat
import struct
import sys
import urllib.error
import urllib.request
import zipfile
import zlib
from email.message import Message
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from configs import digits
from shortcut_jax import config as config_lib
from shortcut_jax import pairs, run
from shortcut_jax.data import crops, fashion_mnist, image_files, images
from shortcut_jax.errors import UserError
from shortcut_jax.weights import published, restricted_pickle, torch_file
from tests.sentences import assert_sentence

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [*sorted((ROOT / "shortcut_jax").rglob("*.py")), *sorted((ROOT / "configs").glob("*.py"))]

# ------------------------------------------------------------------ what the code may not do

NEVER = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "subprocess.getoutput",
    "subprocess.getstatusoutput", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "marshal.load",
    "marshal.loads", "shelve.open", "joblib.load", "torch.load", "pd.read_pickle",
    "shutil.unpack_archive", "tempfile.mktemp",
}  # fmt: skip
METHODS_NEVER = {"extractall", "extract"}  # of an archive
# The code of others that is run because --authors says so, as another Python is by --torch_python.
RUNS_A_CHECKOUT = "shortcut_jax/benchmarks/authors.py"
# What only these files may use, because they check what comes in.
ONLY_IN = {
    "pickle": {"shortcut_jax/weights/restricted_pickle.py", "shortcut_jax/weights/torch_file.py"},
    "zipfile": {
        "shortcut_jax/data/image_files.py",
        "shortcut_jax/weights/torch_file.py",
        "shortcut_jax/metrics/references.py",
        "shortcut_jax/evaluation/sample_files.py",  # an error, a writer
    },
    "urllib.request": {"shortcut_jax/weights/published.py"},
    "tarfile": set(),
    "requests": set(),
    "dill": set(),
    "cloudpickle": set(),
}


def offences(source, path):
    """(line, what) of everything in a file that may not be there."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            words = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if name in NEVER or name.rpartition(".")[2] in METHODS_NEVER:
                yield node.lineno, name
            if name in ("np.load", "numpy.load") and words.get("allow_pickle") != "False":
                yield node.lineno, "np.load without allow_pickle=False"
            if words.get("shell", "False") != "False":
                yield node.lineno, "shell"
        elif isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None)
            names = [f"{module}.{n.name}" if module else n.name for n in node.names]
            for only, files in ONLY_IN.items():
                used = any(f"{name}.".startswith(f"{only}.") for name in names)
                if used and path not in files:
                    yield node.lineno, only
        elif isinstance(node, ast.Constant) and str(node.value).startswith("http://"):
            yield node.lineno, "http://"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_code_runs_nothing_from_outside(path):
    name = path.relative_to(ROOT).as_posix()
    found = [what for _, what in offences(path.read_text(), name)]
    assert set(found) == ({"exec", "compile"} if name == RUNS_A_CHECKOUT else set())


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from pickle import loads", "import os\nos.system('x')", "eval('1')",
        "np.load(f)", "np.load(f, allow_pickle=True)", "subprocess.run('x', shell=True)",
        "yaml.load(f)", "import zipfile", "archive.extractall()", "URL = 'http://x'",
        "from urllib.request import urlopen", "import urllib.request as r", "import tarfile",
        "exec(text)", "torch.load(f)",
    ],
)  # fmt: skip
def test_what_is_looked_for_is_found(source):
    assert list(offences(source, "shortcut_jax/new.py"))


def test_pickles_are_read_by_the_two_restricted_readers_alone():
    """Neither calls pickle's own functions; both decide what a name means."""
    for path in ONLY_IN["pickle"]:
        tree = ast.parse((ROOT / path).read_text())
        calls = {ast.unparse(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)}
        assert not {"pickle.load", "pickle.loads", "pickle.Unpickler"} & calls
    for unpickler in (restricted_pickle.Unpickler, torch_file._Unpickler):
        assert unpickler.find_class is not pickle.Unpickler.find_class
        assert unpickler.persistent_load is not getattr(pickle.Unpickler, "persistent_load", None)


# ------------------------------------------------------------------ pickles that take memory

NOTED = b"\x80\x02Nr" + struct.pack("<I", 2**32 - 1) + b"."  # 64 GB to note one None
LONG = b"\x80\x05\x96" + struct.pack("<Q", 2**36) + b"."  # a bytearray that is not there


@pytest.mark.parametrize(
    "content", [NOTED, b"Np4294967295\n.", LONG], ids=["binary", "text", "bytes"]
)
def test_a_short_pickle_does_not_take_all_memory(content, tmp_path):
    with pytest.raises(UserError) as error:
        restricted_pickle.load(io.BytesIO(content), "FILE", "a checkpoint")
    assert_sentence(str(error.value), ["FILE", "expected a checkpoint"])
    with zipfile.ZipFile(tmp_path / "w.pth", "w") as archive:
        archive.writestr("a/data.pkl", content)
    (tmp_path / "old.pth").write_bytes(content)
    for name in ("w.pth", "old.pth"):
        with pytest.raises(UserError) as error:
            torch_file.read(tmp_path / name)
        assert_sentence(str(error.value), [name, "expected a state dict"])


def test_a_thousand_tensors_of_one_storage_are_refused(tmp_path):
    """As `torch.save` would write them; each would get a copy."""
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000"
    storage += b"X\x03\x00\x00\x00cpuM\x00\x04tQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage
    tensor += b"K\x00M\x00\x04\x85K\x01\x85\x89)tR"

    def write(count):
        names = [b"X\x04\x00\x00\x00" + f"{i:04d}".encode() for i in range(count)]
        pickled = b"\x80\x02}(" + b"".join(name + tensor for name in names) + b"u."
        with zipfile.ZipFile(tmp_path / "w.pth", "w") as archive:
            archive.writestr("a/data.pkl", pickled)
            archive.writestr("a/data/0", bytes(4096))
        return tmp_path / "w.pth"

    assert len(torch_file.read(write(2))) == 2  # tied weights
    with pytest.raises(UserError) as error:
        torch_file.read(write(1000))
    assert_sentence(str(error.value), ["w.pth", "the size of all tensors"])


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_arrays_on_disk_hold_no_pickles(tmp_path, suffix):
    class Run:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    objects = np.array([Run(), Run()], object)
    path = tmp_path / f"00000{suffix}"
    (np.save if suffix == ".npy" else np.savez)(path, objects)
    with pytest.raises(UserError) as error:
        pairs._open_shard(path, 2, np.dtype("f4"))
    assert_sentence(str(error.value), [str(path), "remove that file"])
    assert not (tmp_path / "ran").exists()


# ------------------------------------------------------------------ archives and images


def zip_of(path, *members, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for member, content in members:
            archive.writestr(member, content)
    return image_files.Source(path)


def test_a_link_in_a_zip_is_not_followed(tmp_path):
    (tmp_path / "secret.png").write_bytes(b"secret")
    link = zipfile.ZipInfo("a.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    source = zip_of(tmp_path / "a.zip", (link, str(tmp_path / "secret.png")))
    (entry,), _ = source.images()
    # Its own content, where it leads to, and not b"secret".
    assert source.open().read(entry.path) == str(tmp_path / "secret.png").encode()


def test_a_member_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(image_files, "MAX_BYTES", 2**16)
    source = zip_of(tmp_path / "a.zip", ("b.png", bytes(2**20)), ("labels.json", bytes(2**20)))
    assert source.path.stat().st_size < 2**12
    with pytest.raises(UserError) as error:
        source.images()
    assert_sentence(str(error.value), ["a.zip", "'b.png'", "1,048,576", "65,536"])
    with pytest.raises(ValueError, match="unpacks to 1,048,576 bytes"):
        source.open().read("labels.json", inside=False)


def test_a_member_that_lies_about_its_size_gives_no_more(tmp_path):
    source = zip_of(tmp_path / "a.zip", ("b.png", bytes(2**20)))
    data = source.path.read_bytes()
    real, claimed = struct.pack("<I", 2**20), struct.pack("<I", 100)
    assert data.count(real) == 2  # in the header and in the directory
    source.path.write_bytes(data.replace(real, claimed))
    (entry,), _ = source.images()
    assert entry.size == 100
    with pytest.raises(zipfile.BadZipFile):
        source.open().read(entry.path)


def test_an_image_of_too_many_pixels_is_refused():
    def chunk(kind, content):
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(2**16))
    bomb = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )
    with pytest.raises(ValueError, match="exceeds limit"):
        crops.decode(bomb)
    assert Image.MAX_IMAGE_PIXELS is not None and 2 * Image.MAX_IMAGE_PIXELS < 179 * 10**6


def test_a_gzip_file_that_unpacks_to_too_much(tmp_path):
    path = tmp_path / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(bytes(2**26)))
    with pytest.raises(UserError) as error:
        fashion_mnist.read_idx_split(tmp_path, "test")
    assert "t10k-images" in str(error.value)  # which is missing; the other one is read alone:
    with pytest.raises(UserError) as error:
        fashion_mnist._read_idx_file(tmp_path, "t10k-labels-idx1-ubyte", (10_000,))
    assert_sentence(str(error.value), [str(path), "magic number"])


# ------------------------------------------------------------------ data sets and configs of others


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """A module that can be imported and notes that it was: path of the note."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "trap_module.py").write_text(
        "from pathlib import Path\nPath(__file__).with_name('ran').touch()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    yield tmp_path / "code" / "ran"
    sys.modules.pop("trap_module", None)


@pytest.mark.parametrize("key", ["pythonClassName", "python_class_name", "type"])
def test_a_data_set_names_no_module_to_import(photographs_dir, tmp_path, trap, key):
    shutil.copytree(photographs_dir / "photographs", tmp_path / "data" / "photographs")
    path = tmp_path / "data" / "photographs" / "1.0.0" / "features.json"
    features = json.loads(path.read_text())
    inner = features["featuresDict"]["features"]["image"]
    inner.pop("pythonClassName")
    inner[key] = "trap_module.Image"
    path.write_text(
        json.dumps({"type": "x", "content": {}} | features if key == "type" else features)
    )
    section = {"builder": "photographs", "split": "train", "image_size": 16, "crop": "adm"}
    with pytest.raises(UserError) as error:
        images.open_split(section | {"num_classes": 2}, tmp_path / "data")
    assert_sentence(str(error.value), ["features.json names", "no feature of TFDS"])
    assert not trap.exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"data.name": "trap_module"},
        {"eval.metrics": ["trap_module"]},
        {"objective.name": "trap_module"},
        {"eval.metrics": ["../trap_module"]},
        {"__class__": "trap_module"},
        {"data.__init__": "trap_module"},
        {"model.dtype": "__import__('trap_module')"},
        {"data.name": {"a": 1}},
        {"get.update": 3},
    ],
    ids=str,
)
def test_the_config_of_a_workdir_is_data(tmp_path, trap, changes):
    (tmp_path / "config.json").write_text(json.dumps(FLAT | changes))
    with pytest.raises(UserError) as error:
        run.restore_config(tmp_path)
    assert_sentence(str(error.value), [str(tmp_path / "config.json")])
    assert not trap.exists() and "trap_module" not in sys.modules


FLAT = config_lib.flatten(digits.get_config("small"))
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
)


@settings(deadline=None, max_examples=60)
@given(key=st.sampled_from(sorted(FLAT)) | st.text(max_size=9), value=ANY_JSON)
def test_any_value_in_the_config_of_a_workdir_is_taken_or_refused(key, value):
    path = Path("config.json")
    with contextlib.suppress(UserError):
        run.resolve(json.loads(json.dumps(FLAT | {key: value})), path)


@pytest.mark.parametrize("content", ["[" * 200_000, '{"a":' * 200_000, "import os", "!!python/x"])
def test_a_config_that_is_no_json(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError) as error:
        run.restore_config(tmp_path)
    assert_sentence(str(error.value), ["config.json", "cannot be read as JSON"])


# ------------------------------------------------------------------ downloads


@pytest.mark.parametrize("scheme", ["http://127.0.0.1:9/x", "ftp://127.0.0.1/x", "data:,x", "file"])
def test_only_https_is_opened(tmp_path, scheme):
    (tmp_path / "f").write_text("local")
    url = (tmp_path / "f").as_uri() if scheme == "file" else scheme
    with pytest.raises(urllib.error.URLError, match="unknown url type"):
        published._opener().open(url, timeout=5)


@pytest.mark.parametrize(
    "target", ["http://cdn.example.org/x", "file:///etc/hostname", "ftp://h/x"]
)
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_away_from_https_are_refused(target, status):
    opener, headers = published._opener(), Message()
    headers["Location"] = target
    request = urllib.request.Request("https://example.org/file")
    request.timeout = 5
    with pytest.raises(urllib.error.URLError):
        opener.error("http", request, io.BytesIO(), status, "Moved", headers)


def test_an_address_that_is_not_https_is_no_download(tmp_path):
    file = published.Published((tmp_path / "f").as_uri(), "0" * 64, 0)
    with pytest.raises(UserError) as error:
        published.fetch(file, tmp_path / "out")
    assert_sentence(str(error.value), ["cannot be downloaded", "unknown url type"])
    assert not (tmp_path / "out").exists()
