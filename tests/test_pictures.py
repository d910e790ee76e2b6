"""Pictures, checked pixel by pixel where the layout says what a pixel must be."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shortcut_jax.pictures import GAP, LABEL_HEIGHT, curve, sample_grid

ROOT = Path(__file__).parents[1]


def random_samples(step_counts, shape=(3, 8, 8, 1)):
    # Below 200, so that a sample is never mistaken for the white around it.
    rng = np.random.default_rng(0)
    return {k: rng.integers(0, 200, shape, dtype=np.uint8) for k in step_counts}


def read(path):
    with Image.open(path) as picture:
        assert picture.format == "PNG" and picture.mode == "RGB"
        return np.asarray(picture)


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_puts_sample_r_of_each_step_count_in_row_r(tmp_path, channels):
    # Keys out of order: columns go by step count.
    samples = random_samples([4, 1, 128], (3, 8, 10, channels))
    returned = sample_grid(samples, tmp_path / "grid.png", scale=5)
    picture = read(tmp_path / "grid.png")
    np.testing.assert_array_equal(picture, returned)
    assert picture.shape == (LABEL_HEIGHT + 3 * (40 + GAP), GAP + 3 * (50 + GAP), 3)
    for column, steps in enumerate([1, 4, 128]):
        for row in range(3):
            top, left = LABEL_HEIGHT + row * (40 + GAP), GAP + column * (50 + GAP)
            cell = picture[top : top + 40, left : left + 50]
            expected = np.broadcast_to(samples[steps][row], (8, 10, 3))
            np.testing.assert_array_equal(cell[2::5, 2::5], expected)
            np.testing.assert_array_equal(cell, np.kron(expected, np.ones((5, 5, 1), np.uint8)))
            assert (picture[top + 40 : top + 40 + GAP] == 255).all()


def test_grid_labels_every_column(tmp_path):
    picture = sample_grid(random_samples([1, 2, 128], (1, 8, 8, 1)), tmp_path / "g.png", scale=8)
    strip = picture[:LABEL_HEIGHT].min(axis=(0, 2)) < 128
    widths = []
    for column in range(3):
        left = GAP + column * (64 + GAP)
        ink = np.flatnonzero(strip[left : left + 64])
        assert abs((ink[0] + ink[-1]) / 2 - 32) < 4, "not centred"
        widths.append(ink[-1] - ink[0])
    assert widths[2] > 2 * widths[1]
    rest = LABEL_HEIGHT - 1
    assert (picture[rest] == 255).all(), "a label reaches into the samples"


def test_grid_enlarges_small_samples_and_leaves_large_ones(tmp_path):
    digits = sample_grid(random_samples([1], (1, 8, 8, 1)), tmp_path / "g.png")
    assert digits.shape == (LABEL_HEIGHT + 64 + GAP, GAP + 64 + GAP, 3)
    large = sample_grid(random_samples([1], (1, 96, 80, 3)), tmp_path / "g.png")
    assert large.shape == (LABEL_HEIGHT + 96 + GAP, GAP + 80 + GAP, 3)


def test_grid_of_tiny_samples_keeps_labels_apart(tmp_path):
    picture = sample_grid(random_samples([64, 128], (1, 4, 4, 1)), tmp_path / "g.png", scale=1)
    strip = picture[:LABEL_HEIGHT].min(axis=(0, 2)) < 200
    ink = np.flatnonzero(strip)
    # Two numbers of 2 and 3 digits: no ink lost at the right edge, and a gap between them.
    assert ink[-1] < picture.shape[1] - 1
    assert np.diff(ink).max() > 1


def test_grid_draws_at_most_rows_and_at_most_what_is_there(tmp_path):
    samples = random_samples([1, 2], (5, 8, 8, 1))
    samples[2] = samples[2][:2]

    def height(rows):
        return (sample_grid(samples, tmp_path / "g.png", 8, rows).shape[0] - LABEL_HEIGHT) // 66

    assert [height(rows) for rows in (1, 3, 5, 9)] == [1, 3, 5, 5]
    picture = read(tmp_path / "g.png")
    third_row = picture[LABEL_HEIGHT + 2 * 66 : LABEL_HEIGHT + 3 * 66]
    assert (third_row[:, GAP : GAP + 64][:64] < 200).all()
    assert (third_row[:, GAP + 66 :] == 255).all()


@pytest.mark.parametrize(
    "samples,found",
    [
        ({}, "missing"),
        ({1: np.zeros((2, 8, 8, 1), np.float32)}, "float32"),
        ({1: np.zeros((2, 8, 8), np.uint8)}, r"\[n, 8, 8\]"),
        ({1: np.zeros((2, 8, 8, 4), np.uint8)}, r"\[n, 8, 8, 4\]"),
        (
            {1: np.zeros((2, 8, 8, 1), np.uint8), 2: np.zeros((2, 9, 8, 1), np.uint8)},
            "8, 8.* and .*9",
        ),
    ],
)
def test_grid_refuses_other_samples(tmp_path, samples, found):
    with pytest.raises(ValueError, match=found):
        sample_grid(samples, tmp_path / "g.png")
    assert os.listdir(tmp_path) == []


def test_pictures_replace_whole_files_only(tmp_path, monkeypatch):
    sample_grid(random_samples([1]), tmp_path / "p.png")
    before = (tmp_path / "p.png").read_bytes()

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            sample_grid(random_samples([1, 2]), tmp_path / "p.png")
        with pytest.raises(KeyboardInterrupt):
            curve({"a": [(1, 2.0)]}, tmp_path / "p.png", "y", "t")
    assert (tmp_path / "p.png").read_bytes() == before
    sample_grid(random_samples([1, 2]), tmp_path / "p.png")
    assert os.listdir(tmp_path) == ["p.png"]


@pytest.fixture
def drawn_axes(monkeypatch):
    """The axes of every figure that is saved, to look at lines and ticks instead of pixels."""
    from matplotlib.figure import Figure

    seen = []
    save = Figure.savefig

    def spy(figure, *args, **kwargs):
        seen.append(figure.axes[0])
        return save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", spy)
    return seen


@pytest.fixture(autouse=True)
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_curve_axes_ticks_and_lines(tmp_path, drawn_axes):
    points = {"shortcut": [(128, 2.0), (1, 40.0), (4, 10.0)], "flow": [(1, 300.0), (16, 20.0)]}
    curve(points, tmp_path / "c.png", ylabel="FID-10k", title="Digits")
    assert read_size(tmp_path / "c.png") == (900, 600)
    (axes,) = drawn_axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert list(axes.get_xticks()) == [1, 4, 16, 128]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "4", "16", "128"]
    assert len(axes.get_xticks(minor=True)) == 0
    assert (axes.get_ylabel(), axes.get_title()) == ("FID-10k", "Digits")
    assert "10" in [label.get_text() for label in axes.get_yticklabels()]
    shortcut, flow = axes.get_lines()
    assert list(zip(*shortcut.get_data(), strict=True)) == [(1, 40.0), (4, 10.0), (128, 2.0)]
    assert list(zip(*flow.get_data(), strict=True)) == [(1, 300.0), (16, 20.0)]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["shortcut", "flow"]


def read_size(path):
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        picture.load()
        return picture.size


def test_curve_shows_zero_and_negative_below_the_rest_with_their_values(tmp_path, drawn_axes):
    curve({"kid": [(1, 8.0), (2, 0.0), (4, -0.25), (8, 4.0)]}, tmp_path / "c.png", "KID", "t")
    (axes,) = drawn_axes
    line, *marks = axes.get_lines()
    assert list(line.get_ydata()) == [8.0, 2.0, 2.0, 4.0]
    assert [mark.get_marker() for mark in marks] == ["v", "v"]
    assert [text.get_text() for text in axes.texts] == ["0", "-0.25"]
    bottom, top = axes.get_ylim()
    assert 0 < bottom < 2.0 and top > 8.0


def test_curve_with_no_positive_distance_is_linear(tmp_path, drawn_axes):
    curve({"a": [(1, 0.0), (2, -1.0)]}, tmp_path / "c.png", "KID", "t")
    (axes,) = drawn_axes
    assert axes.get_yscale() == "linear"
    assert list(axes.get_lines()[0].get_ydata()) == [0.0, -1.0]


def test_curve_of_one_point(tmp_path, drawn_axes):
    curve({"a": [(4, 3.0)]}, tmp_path / "c.png", "FID", "t")
    (axes,) = drawn_axes
    left, right = axes.get_xlim()
    assert left < 4 < right
    assert list(axes.get_xticks()) == [4]


def test_curve_leaves_out_what_is_not_finite(tmp_path, drawn_axes):
    points = {"a": [(1, float("nan")), (2, 3.0), (4, float("inf"))], "b": [(8, float("nan"))]}
    curve(points, tmp_path / "c.png", "FID", "t")
    (axes,) = drawn_axes
    assert list(axes.get_lines()[0].get_ydata()) == [3.0]
    assert list(axes.get_xticks()) == [2]
    with pytest.raises(ValueError, match="nothing to draw"):
        curve({"a": [(1, float("nan"))]}, tmp_path / "c.png", "FID", "t")


def test_pictures_import_lightly_and_leave_pyplot_alone(tmp_path):
    code = f"""
import sys
from shortcut_jax.pictures import curve
assert "matplotlib" not in sys.modules and "PIL" not in sys.modules
curve({{"a": [(1, 2.0)]}}, {str(tmp_path / "c.png")!r}, "y", "t")
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
