"""Images are resized as Pillow does it; corner and half_pixel: see also test_inception.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from shortcut_jax.metrics import resize as lib
from shortcut_jax.metrics.resize import interpolation_matrix

# Of 255 grey levels: weights and sums are float32 here, weights and sums float64 in Pillow, which
# stores float32 between its two passes. Found: 4e-7.
TOLERANCE = 2e-6

SIZES = st.integers(1, 96)


def pillow(image, height, width):
    """float32 [h, w] -> float32 [height, width] by Pillow in mode "F"."""
    assert image.dtype == np.float32
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def picture(height, width):
    """float32 [height, width], grey levels, all frequencies, full black and white."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width))
    return np.where(pixels % 3 == 0, 255 * (pixels % 2), pixels).astype(np.float32)


@settings(deadline=None, max_examples=200)
@given(height=SIZES, width=SIZES, out_height=SIZES, out_width=SIZES)
@example(height=1, width=96, out_height=96, out_width=1)
@example(height=37, width=64, out_height=16, out_width=64)
def test_pil_bicubic_is_that_of_pillow(height, width, out_height, out_width):
    image = picture(height, width)
    rows = interpolation_matrix(height, out_height, "pil_bicubic")
    columns = interpolation_matrix(width, out_width, "pil_bicubic")
    found = np.float64(rows) @ image @ np.float64(columns.T)
    assert np.abs(found - pillow(image, out_height, out_width)).max() <= 255 * TOLERANCE


@pytest.mark.parametrize(
    "size", [(8, 8), (224, 224), (256, 256), (299, 299), (301, 173), (17, 640)]
)
def test_images_are_resized_as_pillow_does(size):
    """Both passes, the channels and the batch, compiled; smaller, larger, odd, equal."""
    images = np.stack([picture(*size), 255 - picture(*size)[::-1]])[..., None]
    images = np.concatenate([images, images[:, ::-1], images[:, :, ::-1]], axis=-1)
    found = jax.jit(lib.resize, static_argnums=(1, 2))(images.astype(np.uint8), 299, "pil_bicubic")
    expected = np.stack(
        [np.stack([pillow(c, 299, 299) for c in np.moveaxis(i, -1, 0)], -1) for i in images]
    )
    assert found.shape == (2, 299, 299, 3) and found.dtype == np.float32
    assert np.abs(np.asarray(found) - expected).max() <= 255 * TOLERANCE
    if size == (299, 299):
        np.testing.assert_array_equal(found, images)


def test_bicubic_goes_beyond_the_range_of_its_input():
    """So clean-fid clips; a rule that clipped by itself would hide that."""
    edge = np.zeros((1, 16, 16, 1), np.uint8)
    edge[:, :, 8:] = 255
    resized = np.asarray(lib.resize(jnp.asarray(edge), 299, "pil_bicubic"))
    assert resized.min() < -5 and resized.max() > 260


@pytest.mark.parametrize("rule", lib.RULES)
@pytest.mark.parametrize("out_size", [224, 299])
@pytest.mark.parametrize("size", [1, 2, 64, 256, 299, 1024])
def test_rows_of_an_interpolation_sum_to_one(rule, size, out_size):
    matrix = interpolation_matrix(size, out_size, rule)
    assert matrix.shape == (out_size, size) and matrix.dtype == np.float32
    np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-6)
    if size == out_size:
        np.testing.assert_array_equal(matrix, np.eye(size))
    if rule != "pil_bicubic":
        assert (matrix >= 0).all() and (np.count_nonzero(matrix, axis=1) <= 2).all()


def test_shrinking_looks_at_every_pixel():
    """Without antialiasing, 1024 -> 224 leaves out a pixel in two."""
    assert (interpolation_matrix(1024, 224, "pil_bicubic") != 0).any(axis=0).all()
    assert not (interpolation_matrix(1024, 224, "half_pixel") != 0).any(axis=0).all()


def test_an_unknown_rule_is_no_rule():
    with pytest.raises(KeyError):
        interpolation_matrix(8, 16, "bicubic")


def test_resizing_has_the_highest_precision():
    images = jax.ShapeDtypeStruct((2, 32, 48, 3), np.uint8)
    text = jax.jit(lib.resize, static_argnums=(1, 2)).lower(images, 224, "pil_bicubic").as_text()
    lines = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert len(lines) == 2 and all(line.count("HIGHEST") == 2 for line in lines)
