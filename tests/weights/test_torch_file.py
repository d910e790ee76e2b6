"""Weight files are read without PyTorch; a hostile one builds nothing."""

import collections
import io
import os
import pickle
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shortcut_jax.errors import UserError
from shortcut_jax.weights import torch_file
from tests.sentences import assert_sentence

GOLDEN = Path(__file__).parents[1] / "golden"
FORMATS = ("torch_zip.pth", "torch_legacy.pth")


def assert_same(found, expected):
    assert list(found) == list(expected)
    for name in expected:
        assert found[name].shape == expected[name].shape, name
        np.testing.assert_array_equal(found[name].astype(expected[name].dtype), expected[name])


def expected_arrays():
    with np.load(GOLDEN / "torch_files.npz") as arrays:
        return {name: arrays[name] for name in arrays.files}


def assert_refused(path, *fragments):
    with pytest.raises(UserError) as error:
        torch_file.read(path)
    assert_sentence(str(error.value), (str(path), *fragments))


# ------------------------------------------------------------------ what PyTorch wrote


@pytest.mark.parametrize("name", FORMATS)
def test_files_of_pytorch(name):
    found = torch_file.read(GOLDEN / name)
    assert_same(found, expected_arrays())
    assert found["half"].dtype == np.float16 and found["brain"].dtype.name == "bfloat16"
    assert all(array.flags.writeable for array in found.values())
    assert "torch" not in sys.modules


def test_safetensors(tmp_path):
    from safetensors.numpy import save_file

    arrays = {name: np.array(a, order="C") for name, a in sorted(expected_arrays().items())}
    save_file(arrays, tmp_path / "w.safetensors")
    found = torch_file.read(tmp_path / "w.safetensors")
    assert_same(dict(sorted(found.items())), arrays)


# ------------------------------------------------------------------ damaged files


def test_a_missing_file(tmp_path):
    assert_refused(tmp_path / "none.pth", "expected weights", "mend the path")


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=60, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255), cut=st.booleans())
def test_a_damaged_file_is_refused_or_read(tmp_path_factory, name, place, value, cut):
    content = bytearray((GOLDEN / name).read_bytes())
    at = int(place * len(content))
    content[at:] = b"" if cut else bytes([value]) + content[at + 1 :]
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(content)
    try:
        found = torch_file.read(path)
    except UserError as error:
        assert_sentence(str(error), (str(path), "get the file again"))
    else:
        assert not cut and all(isinstance(array, np.ndarray) for array in found.values())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_something_else(tmp_path, suffix):
    path = tmp_path / f"page{suffix}"
    path.write_text("<html>not found</html>")
    assert_refused(path, "expected a state dict", "get the file again")


# ------------------------------------------------------------------ hostile files


class Call:
    """Pickled as a call of `function`."""

    def __init__(self, function, *args):
        self.reduced = (function, args)

    def __reduce__(self):
        return self.reduced


def write_zip(path, pickled, compression=zipfile.ZIP_STORED, **storages):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("a/data.pkl", pickled)
        for name, content in storages.items():
            archive.writestr(f"a/data/{name.strip('_')}", content)
    return path


def tensor(count=4, offset=0, shape=(2, 2), strides=(2, 1), key="0", dtype="FloatStorage"):
    """Pickle of {"w": a tensor} as PyTorch would write it."""
    content = io.BytesIO()
    content.write(b"\x80\x02}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n(")
    content.write(b"(X\x07\x00\x00\x00storagectorch\n" + dtype.encode() + b"\n")
    for value in (key, "cpu", count):
        content.write(pickle.dumps(value, 0)[:-1])
    content.write(b"tQ")  # a persistent id
    for value in (offset, shape, strides, False, collections.OrderedDict()):
        content.write(pickle.dumps(value, 0)[:-1])
    content.write(b"tRs.")
    return content.getvalue()


FOUR = np.arange(4, dtype=np.float32).tobytes()


def test_the_files_made_here_are_what_pytorch_writes(tmp_path):
    found = torch_file.read(write_zip(tmp_path / "w.pth", tensor(), _0=FOUR))
    np.testing.assert_array_equal(found["w"], [[0, 1], [2, 3]])


@pytest.mark.parametrize("function", [os.system, eval, getattr, np.frombuffer, io.open])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_function_is_not_called(tmp_path, function, legacy):
    victim = tmp_path / "victim"
    pickled = pickle.dumps({"w": Call(function, f"touch {victim}")}, 2)
    path = tmp_path / "w.pth"
    if legacy:
        header = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
        path.write_bytes(b"".join(pickle.dumps(part, 2) for part in header) + pickled)
    else:
        write_zip(path, pickled)
    assert_refused(path, f".{function.__name__}, which no state dict needs")
    assert not victim.exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"offset": 1},
        {"offset": -1},
        {"shape": (2, 3)},
        {"shape": (2, -2)},
        {"strides": (4, 1)},
        {"strides": (-2, 1)},
        {"strides": (1,)},
        {"shape": (2**40,), "strides": (0,)},  # a terabyte out of one number
        {"shape": (2.0, 2.0)},
        {"count": 8},
        {"count": 2},
        {"key": "1"},
        {"key": "../../0"},
        {"dtype": "DoubleStorage"},
        {"dtype": "QUInt8Storage"},
    ],
)
def test_a_tensor_that_does_not_fit_its_storage(tmp_path, changes):
    path = write_zip(tmp_path / "w.pth", tensor(**changes), _0=FOUR)
    assert_refused(path, "cannot be read as weights")


@pytest.mark.parametrize(
    "value", [[], {}, {"w": 1}, {"w": {}}, {1: 2}, 5, {"w": collections.OrderedDict}]
)
def test_what_is_no_state_dict(tmp_path, value):
    assert_refused(write_zip(tmp_path / "w.pth", pickle.dumps(value, 2)), "expected a state dict")


def test_a_compressed_archive(tmp_path):
    path = write_zip(tmp_path / "w.pth", tensor(), zipfile.ZIP_DEFLATED, _0=FOUR)
    assert_refused(path, "the compression")
