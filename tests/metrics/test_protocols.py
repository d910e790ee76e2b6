"""Protocols: from samples to what the network sees, against what each project does."""

import jax
import numpy as np
import pytest
import scipy.linalg
from PIL import Image

from shortcut_jax.errors import UserError
from shortcut_jax.metrics import Stats, fid, frechet_distance
from shortcut_jax.metrics.protocols import DINOV2, INCEPTION, PLAIN, QUANTISE, quantise

EDGES = np.array([-1.5, -1, -0.9999, 0, 0.00392, 0.9999, 1, 1.5, 1 / 255 - 1, 1.6 / 127.5 - 1])


def as_images(values):
    return np.asarray(values, np.float32).reshape(-1, 1, 1, 1)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        # ADM, scripts/image_sample.py: ((sample + 1) * 127.5).clamp(0, 255).to(torch.uint8)
        ("truncate", [0, 0, 0, 127, 127, 254, 255, 255, 0, 1]),
        ("round", [0, 0, 0, 128, 128, 255, 255, 255, 0, 2]),
    ],
)
def test_samples_become_grey_levels(rule, expected):
    found = quantise(rule, as_images(EDGES))
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found.ravel(), expected)


def test_nothing_is_rounded_or_clipped_where_the_protocol_does_not():
    found = quantise("none", as_images(EDGES))
    np.testing.assert_allclose(found.ravel(), (EDGES + 1) * 127.5, atol=1e-5)


@pytest.mark.parametrize("rule", QUANTISE)
def test_grey_levels_stay_what_they_are(rule):
    levels = np.arange(256, dtype=np.uint8).reshape(4, 8, 8, 1)
    np.testing.assert_array_equal(quantise(rule, levels), levels)


def test_what_is_no_image_is_refused():
    with pytest.raises(UserError, match="int32"):
        quantise("round", np.zeros((1, 2, 2, 3), np.int32))
    with pytest.raises(UserError, match="1 of 2 images .* NaN"):
        quantise("none", np.array([0, np.inf], np.float32).reshape(2, 1, 1, 1))


@pytest.fixture(scope="module")
def samples():
    """Two smooth images that go beyond [-1, 1]."""
    y, x = np.mgrid[:20, :31] / 20
    planes = [np.sin(3 * x + c) + 0.4 * np.cos(5 * y * (c + 1)) for c in range(6)]
    return np.stack(planes, axis=-1).reshape(20, 31, 2, 3).transpose(2, 0, 1, 3).astype(np.float32)


def seen(name, images):
    protocol = INCEPTION[name]
    return np.asarray(fid.preprocess(quantise(protocol.quantise, images), protocol))


def test_authors_resize_floats_and_clip_them(samples):
    """kvfrans/shortcut-models, helper_inference.py: resize, then clip to [-1, 1]."""
    theirs = jax.image.resize(samples, (2, 299, 299, 3), "bilinear", antialias=False).clip(-1, 1)
    np.testing.assert_allclose(seen("authors", samples), theirs, atol=5e-6)
    assert np.abs(theirs).max() == 1 and np.abs(samples).max() > 1.1


def test_clean_resizes_with_pillow_in_floats(samples):
    """clean-fid, mode clean: each channel in Pillow's mode F, bicubic, clipped, not rounded."""
    levels = quantise("round", samples)
    theirs = np.empty((2, 299, 299, 3))
    for n in range(2):
        for c in range(3):
            plane = Image.fromarray(levels[n, ..., c].astype(np.float32))
            resized = plane.resize((299, 299), Image.Resampling.BICUBIC)
            theirs[n, ..., c] = np.clip(np.asarray(resized), 0, 255)
    np.testing.assert_allclose(seen("clean", samples) * 128 + 128, theirs, atol=2e-3)
    assert (theirs == 255).any() and (theirs != np.rint(theirs)).any()


def test_adm_and_pytorch_fid_scale_differently(samples):
    flat = np.full((1, 299, 299, 3), 200, np.uint8)
    assert seen("adm", flat) == pytest.approx((200 - 128) / 128)
    assert seen("pytorch_fid", flat) == pytest.approx(200 / 127.5 - 1)
    assert np.abs(seen("adm", samples) - seen("pytorch_fid", samples)).max() > 0.02


def test_what_is_done_to_samples_before_is_part_of_a_protocol():
    rules = {p.name: p.quantise for p in (*INCEPTION.values(), *DINOV2.values(), PLAIN)}
    assert rules == {
        "adm": "truncate", "pytorch_fid": "round", "clean": "round", "authors": "none",
        "edm2": "round", "dgm_eval": "round", "plain": "round",
    }  # fmt: skip


def test_only_the_authors_add_to_the_diagonal():
    offsets = {p.name: p.offset for p in (*INCEPTION.values(), *DINOV2.values(), PLAIN) if p.offset}
    assert offsets == {"authors": 1e-6}


@pytest.mark.parametrize("offset", [0.0, 1e-6, 1e-2])
def test_the_offset_is_that_of_the_authors(offset):
    """utils/fid.py of kvfrans/shortcut-models, with the root by scipy, in float64."""
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(40, 6)) @ rng.normal(size=(6, 6)) + i for i in range(2))
    mu1, mu2, s1, s2 = a.mean(0), b.mean(0), np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    eye = np.eye(6) * offset
    root = np.real(scipy.linalg.sqrtm((s1 + eye) @ (s2 + eye)))
    theirs = (mu1 - mu2) @ (mu1 - mu2) + np.trace(s1 + s2 - 2 * root)
    ours = frechet_distance(Stats(mu1, s1), Stats(mu2, s2), offset)
    assert ours == pytest.approx(theirs, rel=1e-9)
    if offset:
        assert ours < frechet_distance(Stats(mu1, s1), Stats(mu2, s2)) - offset
