"""The crops against a second implementation, and every kind of image made RGB as said."""

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from shortcut_jax.data import crops

GOLDEN = Path(__file__).parents[1] / "golden" / "crops.npz"


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as arrays:
        return dict(arrays)


CASES = sorted({key.split("/")[0] for key in np.load(GOLDEN).files})


def test_golden_pixels_cover_halving_enlarging_and_both_shapes(golden):
    ratios = [min(golden[f"{c}/source"].shape[:2]) / len(golden[f"{c}/adm"]) for c in CASES]
    assert max(ratios) >= 4 and any(2 <= r < 4 for r in ratios) and min(ratios) < 1 and 1 in ratios
    shapes = [golden[f"{case}/source"].shape for case in CASES]
    assert {np.sign(height - width) for height, width, _ in shapes} == {-1, 0, 1}


@pytest.mark.parametrize("case", CASES)
def test_adm_has_the_golden_pixels(golden, case):
    expected = golden[f"{case}/adm"].astype(int)
    found = crops.adm(Image.fromarray(golden[f"{case}/source"]), len(expected)).astype(int)
    # Pillow keeps the weights in fixed point, so a value next to a tie may be rounded differently.
    assert np.abs(found - expected).max() <= 1
    assert (found != expected).mean() < 0.004


@pytest.mark.parametrize("case", CASES)
def test_authors_crop_is_half_a_level_from_the_golden_values(golden, case):
    expected = golden[f"{case}/authors"].astype(float)
    found = crops.authors(Image.fromarray(golden[f"{case}/source"]), len(expected))
    assert np.abs(found - expected).max() <= 0.5 + 1e-4


def test_golden_pixels_tell_the_crops_apart(golden):
    apart = [np.abs(golden[f"{case}/adm"] - golden[f"{case}/authors"]).max() for case in CASES]
    assert sum(difference > 10 for difference in apart) >= 5


@settings(max_examples=60, deadline=None)
@given(width=st.integers(1, 90), height=st.integers(1, 90), size=st.integers(1, 33))
def test_any_image_gives_a_square_of_its_own_colour(width, height, size):
    image = Image.new("RGB", (width, height), (10, 200, 77))
    for crop in crops.CROPS.values():
        found = crop(image, size)
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, np.broadcast_to([10, 200, 77], (size, size, 3)))


def encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


PIXELS = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3) * 3


def decoded(data: bytes) -> np.ndarray:
    image = crops.decode(data)
    assert image.mode == "RGB"
    return np.asarray(image)


def test_transparency_is_dropped():
    alpha = np.full((4, 6, 1), 7, np.uint8)
    data = encode(Image.fromarray(np.concatenate([PIXELS, alpha], -1)), "PNG")
    np.testing.assert_array_equal(decoded(data), PIXELS)


@pytest.mark.parametrize("mode", ["L", "LA", "1"])
def test_grey_has_three_equal_bands(mode):
    grey = PIXELS[..., 0] if mode != "1" else np.where(PIXELS[..., 0] > 99, 255, 0).astype(np.uint8)
    data = encode(Image.fromarray(grey).convert(mode), "PNG")
    np.testing.assert_array_equal(decoded(data), np.repeat(grey[..., None], 3, -1))


def test_a_palette_becomes_its_colours():
    few = (PIXELS // 64) * 64
    data = encode(Image.fromarray(few).quantize(64), "PNG")
    assert Image.open(io.BytesIO(data)).mode == "P"
    np.testing.assert_array_equal(decoded(data), few)


def test_cmyk_jpeg():
    red = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert np.abs(decoded(encode(red, "JPEG")).astype(int) - [255, 0, 0]).max() <= 3


def test_sixteen_bits_of_grey_are_scaled_not_clipped():
    levels = np.array([[0, 257, 30000, 65535]], np.uint16)
    expected = np.rint(levels / 257).astype(np.uint8)
    for kind in ("PNG", "TIFF"):
        found = decoded(encode(Image.fromarray(levels), kind))
        np.testing.assert_array_equal(found[..., 0], expected)


def test_orientation_of_a_camera_is_not_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    data = encode(Image.fromarray(PIXELS), "PNG", exif=exif)
    assert Image.open(io.BytesIO(data)).getexif()[0x0112] == 6
    np.testing.assert_array_equal(decoded(data), PIXELS)


def test_the_first_of_several_frames():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(decoded(data)[0, 0], [255, 0, 0])


JPEG = encode(Image.fromarray(PIXELS).resize((60, 60)), "JPEG")


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (JPEG[: len(JPEG) // 2], "(?i)truncated"),
        (b"", "no image of a known format"),
        (b"<html>404</html>", "no image of a known format"),
        (encode(Image.fromarray(np.zeros((2, 2), np.float32)), "TIFF"), "mode F"),
    ],
)
def test_what_cannot_be_decoded_says_why(data, why):
    with pytest.raises(ValueError, match=why):
        crops.decode(data)
