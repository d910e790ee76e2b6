"""Weight files of the autoencoder: what is read, and what is refused."""

import hashlib
import math
import os
import pickle
import zipfile

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from shortcut_jax.errors import UserError
from shortcut_jax.models.autoencoder import SD, TINY
from shortcut_jax.weights import autoencoder_weights as lib
from tests.sentences import assert_sentence

# Of random weights; golden outputs depend on them.
BIASES = [-0.09460142254829407, 0.16805608570575714, 0.058146435767412186]
DIGEST = "2c023034021c588a042984302f34bcb2b8cbfaf159b56c8d50bcd085e9907e9c"

ATTENTION = "encoder.mid_block.attentions.0"
CONV = "decoder.up_blocks.2.resnets.0.conv_shortcut.weight"


@pytest.fixture
def tensors():
    return lib.random_weights(TINY, seed=3)


@pytest.fixture
def path(tmp_path):
    return tmp_path / lib.FILE_NAME


def assert_same(found, tensors):
    expected = jax.tree.leaves_with_path(lib.to_params(tensors, TINY))
    for (place, a), (other_place, b) in zip(
        jax.tree.leaves_with_path(found.params), expected, strict=True
    ):
        assert place == other_place and a.dtype == np.float32
        np.testing.assert_array_equal(a, b)


def old_names(tensors, attention_shape=()):
    """As diffusers wrote them before 0.17; `attention_shape` is appended to that of matrices."""
    renamed = {}
    for name, tensor in tensors.items():
        for old, new in lib.OLD_NAMES.items():
            if f".attentions.0.{new}." in name:
                name = name.replace(f".{new}.", f".{old}.")
                if tensor.ndim == 2:
                    tensor = tensor.reshape(*tensor.shape, *attention_shape)
        renamed[name] = tensor
    assert f"{ATTENTION}.proj_attn.weight" in renamed and f"{ATTENTION}.to_q.bias" not in renamed
    return renamed


# ------------------------------------------------------------------ what is read


def test_a_file_and_its_folder(tensors, path):
    save_file(tensors, path)
    for given in (path, path.parent):
        found = lib.load(str(given), "tiny")
        assert_same(found, tensors)
        assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_home_folder(tensors, path, monkeypatch):
    monkeypatch.setenv("HOME", str(path.parent))
    save_file(tensors, path)
    assert_same(lib.load(f"~/{lib.FILE_NAME}", "tiny"), tensors)


@pytest.mark.parametrize("attention_shape", [(), (1, 1)], ids=["linear", "1x1"])
def test_names_of_both_generations(tensors, path, attention_shape):
    save_file(old_names(tensors, attention_shape), path)
    assert_same(lib.load(str(path), "tiny"), tensors)


def test_half_precision_files(tensors, path):
    half = {name: tensor.astype(np.float16) for name, tensor in tensors.items()}
    save_file(half, path)
    assert_same(lib.load(str(path), "tiny"), half)


def test_layout(tensors):
    params = lib.to_params(tensors, TINY)
    kernel = params["decoder"]["up_blocks_2"]["resnets_0"]["conv_shortcut"]["kernel"]
    assert kernel.shape == (1, 1, 16, 8)
    np.testing.assert_array_equal(kernel[0, 0], tensors[CONV][:, :, 0, 0].T)
    conv = params["encoder"]["down_blocks_0"]["downsamplers_0"]["conv"]["kernel"]
    assert (
        conv[0, 2, 3, 5] == tensors["encoder.down_blocks.0.downsamplers.0.conv.weight"][5, 3, 0, 2]
    )
    dense = params["encoder"]["mid_block"]["attentions_0"]["to_out_0"]["kernel"]
    np.testing.assert_array_equal(dense, tensors[f"{ATTENTION}.to_out.0.weight"].T)
    norm = params["encoder"]["conv_norm_out"]["scale"]
    np.testing.assert_array_equal(norm, tensors["encoder.conv_norm_out.weight"])


# ------------------------------------------------------------------ random weights


def test_random_weights_are_the_same_everywhere():
    tensors = lib.random_weights(TINY, seed=7)
    assert tensors["encoder.conv_in.bias"][:3].tolist() == BIASES
    assert lib.load("random", "tiny").sha256 == DIGEST


def test_random_weights_differ_in_every_tensor():
    one, other = lib.random_weights(TINY, seed=0), lib.random_weights(TINY, seed=1)
    assert set(one) == set(lib.tensor_shapes(TINY))
    assert not any(np.array_equal(one[name], other[name]) for name in one)
    assert len({tensor.tobytes() for tensor in one.values()}) == len(one)


def test_random_weights_have_the_stated_moments():
    tensors = lib.random_weights(TINY, seed=0)
    matrices = [
        a.ravel() * math.sqrt(math.prod(a.shape[1:])) for a in tensors.values() if a.ndim > 1
    ]
    biases = [a for name, a in tensors.items() if name.endswith("bias")]
    scales = [a for name, a in tensors.items() if name.endswith("weight") and a.ndim == 1]
    for group, mean, deviation in ((matrices, 0, 1), (biases, 0, 0.1), (scales, 1, 0.1)):
        values = np.concatenate(group)
        assert values.mean() == pytest.approx(mean, abs=4 * deviation / math.sqrt(values.size))
        assert values.std() == pytest.approx(deviation, rel=0.1)


# ------------------------------------------------------------------ refused


def refused(weights, kind="tiny"):
    with pytest.raises(UserError) as error:
        lib.load(str(weights), kind)
    return str(error.value)


def test_nothing_given():
    assert_sentence(refused(""), ("autoencoder.weights is empty", "shortcut_jax.download"))


def test_an_unknown_kind():
    assert_sentence(refused("random", "sdxl"), ("autoencoder.kind='sdxl'", "sd, tiny"))


@pytest.mark.parametrize("name", ["", "other.safetensors"])
def test_no_file(tmp_path, name):
    said = refused(tmp_path / name)
    assert_sentence(said, (str(tmp_path / (name or lib.FILE_NAME)), "does not exist", "download"))


@pytest.mark.parametrize("kind", ["zip", "pickle"])
def test_a_pickle_is_not_opened(path, kind):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(path.parent / "ran"),)

    pickled = pickle.dumps(Evil(), protocol=2)
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickled)
    else:
        path.write_bytes(pickled)
    assert_sentence(refused(path), (str(path), "pickled", "expected a safetensors file"))
    assert not (path.parent / "ran").exists()


@pytest.mark.parametrize("keep", [0, 5, 100, -1, -1000])
def test_a_cut_file(tensors, path, keep):
    save_file(tensors, path)
    path.write_bytes(path.read_bytes()[:keep])
    assert_sentence(refused(path), (str(path), "cannot be read as safetensors", "cut"))


def test_another_kind_of_file(path):
    path.write_bytes(b"<!DOCTYPE html>" * 100)
    assert_sentence(refused(path), (str(path), "cannot be read as safetensors"))


@pytest.mark.parametrize("change", ["missing", "extra", "both names"])
def test_wrong_names(tensors, path, change):
    if change == "missing":
        del tensors[CONV], tensors["quant_conv.bias"]
        fragments = ["lacks 2,", CONV, "has no others"]
    elif change == "extra":
        tensors["loss.logvar"] = np.zeros(1, np.float32)
        fragments = ["lacks none", "has 1 others, loss.logvar for one"]
    else:
        tensors[f"{ATTENTION}.query.bias"] = tensors[f"{ATTENTION}.to_q.bias"]
        fragments = [f"both {ATTENTION}.to_q.bias", ATTENTION, "one of the two"]
    save_file(tensors, path)
    assert_sentence(refused(path), (str(path), *fragments))


def test_a_file_of_another_architecture(tensors, path):
    save_file(tensors, path)
    said = refused(path, "sd")
    assert_sentence(said, ("lacks", "decoder.up_blocks.0.resnets.2", "the 248 tensors"))
    assert len(lib.tensor_shapes(SD)) == 248


def test_a_wrong_shape(tensors, path):
    tensors[CONV] = tensors[CONV][:, :3]
    save_file(tensors, path)
    assert_sentence(refused(path), (str(path), CONV, "(8, 3, 1, 1)", "expected (8, 16, 1, 1)"))


@pytest.mark.parametrize("dtype", ["float64", "int8"])
def test_a_wrong_type(tensors, path, dtype):
    tensors[CONV] = tensors[CONV].astype(dtype)
    save_file(tensors, path)
    assert_sentence(refused(path), (str(path), CONV, dtype, "float32 or float16"))
