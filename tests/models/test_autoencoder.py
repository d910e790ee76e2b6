"""The autoencoder against diffusers' own module, and what must hold for any weights.

tests/golden/autoencoder.npz holds what diffusers gives for the same weights; the case of the real
size takes minutes and is marked slow: bash launch/test.sh -m slow tests/models/test_autoencoder.py
"""

import functools
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shortcut_jax.errors import UserError
from shortcut_jax.models import autoencoder as lib
from shortcut_jax.weights import autoencoder_weights as weights_lib
from tests.golden import make_autoencoder as golden
from tests.sentences import assert_sentence

# Largest difference over the largest value, in float32.
TOLERANCE = 1e-4


def jitted(function, architecture):
    return jax.jit(functools.partial(function, architecture=architecture), static_argnames="dtype")


tiny_encode, tiny_decode = jitted(lib.encode, lib.TINY), jitted(lib.decode, lib.TINY)


@pytest.fixture(scope="module")
def expected():
    """case -> array name -> array."""
    cases: dict[str, dict[str, np.ndarray]] = {case: {} for case in golden.CASES}
    with np.load(golden.OUT) as arrays:
        for name in set(arrays.files) - {"origin"}:
            case, _, leaf = name.rpartition("/")
            cases[case][leaf] = arrays[name]
    return cases


@pytest.fixture(scope="module")
def params():
    return weights_lib.load("random", "tiny").params


def error(found, reference):
    assert found.shape == reference.shape and found.dtype == np.float32
    return np.max(np.abs(np.asarray(found) - reference)) / np.max(np.abs(reference))


def errors(case, images, reference):
    """The largest relative error of each output; the decoder gets the reference's mean."""
    architecture = lib.ARCHITECTURES[case.split("/")[0]]
    params = weights_lib.to_params(golden.case_weights(case), architecture)
    mean, logvar = jitted(lib.encode, architecture)(params, golden.to_network(images))
    decoded = jitted(lib.decode, architecture)(params, reference["mean"])
    stride = golden.STRIDE if case.startswith("sd/") else 1
    return {
        "mean": error(mean, reference["mean"]),
        "logvar": error(logvar, reference["logvar"]),
        "decoded": error(decoded[:, ::stride, ::stride], reference["decoded"]),
        "norm": abs(np.linalg.norm(np.float64(decoded)) / reference["norm"] - 1),
    }


# ------------------------------------------------------------------ parity


@pytest.mark.parametrize("case", [case for case in golden.CASES if case.startswith("tiny/")])
def test_a_small_one_equals_diffusers(case, expected):
    found = errors(case, expected[case]["images"], expected[case])
    print(case, found)
    assert max(found.values()) <= TOLERANCE, found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_real_size_equals_diffusers(expected):
    (case,) = (case for case in golden.CASES if case.startswith("sd/"))
    images = golden.case_images(case)
    assert hashlib.sha256(images.tobytes()).hexdigest() == str(expected[case]["sha256"]), (
        "this Pillow decodes the photograph to other pixels than those of the golden outputs"
    )
    found = errors(case, images, expected[case])
    print(case, found)
    assert max(found.values()) <= TOLERANCE, found


def test_golden_outputs_are_of_order_one_and_depend_on_place(expected):
    """Otherwise agreement would mean little."""
    for case, arrays in expected.items():
        for name in ("mean", "logvar", "decoded"):
            assert 0.1 < arrays[name].std(axis=(1, 2)).mean() < 10, (case, name)
    assert golden.OUT.stat().st_size < 200_000


# ------------------------------------------------------------------ any weights


def test_sizes_are_those_of_the_published_files():
    shapes = weights_lib.tensor_shapes(lib.SD)
    assert len(shapes) == 248
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 83_653_863
    assert shapes["encoder.down_blocks.1.resnets.0.conv_shortcut.weight"] == (256, 128, 1, 1)
    assert shapes["decoder.mid_block.attentions.0.to_out.0.weight"] == (512, 512)
    assert shapes["decoder.conv_in.weight"] == (512, 4, 3, 3)
    assert lib.SD.factor == lib.TINY.factor == 8


def test_rows_are_independent(params):
    images = np.random.default_rng(0).uniform(-1, 1, (2, 32, 32, 3)).astype(np.float32)
    both, _ = tiny_encode(params, images)
    other, _ = tiny_encode(params, np.stack([images[1], -images[1]]))
    np.testing.assert_allclose(both[1], other[0], rtol=0, atol=1e-6)
    assert np.abs(other[1] - other[0]).max() > 0.1


def test_the_variance_is_clipped(params):
    kernel = params["quant_conv"]["kernel"]
    huge = {**params, "quant_conv": {"kernel": kernel * 1e4, "bias": np.zeros(8, np.float32)}}
    images = np.random.default_rng(0).uniform(-1, 1, (2, 32, 32, 3)).astype(np.float32)
    mean, logvar = tiny_encode(huge, images)
    assert (logvar.min(), logvar.max()) == (-30, 20)
    assert np.abs(mean).max() > 100  # the mean is not


@pytest.mark.parametrize(("height", "width"), [(32, 36), (20, 32)])
def test_indivisible_images_are_refused(params, height, width):
    with pytest.raises(UserError) as error:
        lib.encode(params, jnp.zeros((1, height, width, 3)), lib.TINY)
    assert_sentence(str(error.value), (f"{height}x{width}", "multiples of 8", "data.image_size"))


def products(jaxpr):
    """(precision, operand types) of every product in a jaxpr and in what it calls."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            types = {str(v.aval.dtype) for v in equation.invars}
            yield equation.params["precision"], types
        for value in equation.params.values():
            if hasattr(value, "jaxpr"):
                yield from products(value.jaxpr)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_float32_is_float32_on_every_back_end(params, dtype):
    def both(params, images):
        mean, _ = lib.encode(params, images, lib.TINY, jnp.dtype(dtype))
        return lib.decode(params, mean, lib.TINY, jnp.dtype(dtype))

    found = list(products(jax.make_jaxpr(both)(params, jnp.zeros((1, 16, 16, 3))).jaxpr))
    # 4 products of dense layers and 2 of the attention, twice; the others are convolutions
    assert (
        len(found)
        == sum(len(shape) > 1 for shape in weights_lib.tensor_shapes(lib.TINY).values()) + 2 * 2
    )
    assert all(types == {dtype} for _, types in found)
    if dtype == "float32":
        highest = jax.lax.Precision.HIGHEST
        assert all(precision == (highest, highest) for precision, _ in found)


def test_bfloat16_is_close_and_gives_float32(params):
    images = np.random.default_rng(0).uniform(-1, 1, (2, 32, 32, 3)).astype(np.float32)
    exact, _ = tiny_encode(params, images)
    mean, _ = tiny_encode(params, images, dtype=jnp.bfloat16)
    assert 1e-4 < error(mean, np.asarray(exact)) < 0.1
    decoded = jax.eval_shape(lambda: lib.decode(params, exact, lib.TINY, jnp.bfloat16))
    assert decoded.dtype == jnp.float32
