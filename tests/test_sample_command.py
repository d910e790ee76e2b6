"""python -m shortcut_jax.sample, as a process: what it prints, writes and refuses."""

import numpy as np
import pytest
from PIL import Image

from shortcut_jax import pictures, sampling
from tests.sentences import assert_sentence

CONFIG = "--config=configs/digits.py:small"


@pytest.fixture(scope="module")
def workdir(run_python, tmp_path_factory):
    """A trained run that was evaluated, with its samples in evaluated_{1,4}.npz."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    train = [CONFIG, f"--workdir={folder}", "--config.eval.every=0"]
    assert run_python(["-m", "shortcut_jax.main", *train], timeout=280).returncode == 0
    evaluate = [CONFIG, f"--workdir={folder}", f"--save_samples={folder}/evaluated.npz"]
    evaluate.append("--config.eval.seed=3")
    assert run_python(["-m", "shortcut_jax.eval", *evaluate], timeout=280).returncode == 0
    return folder


@pytest.fixture(scope="module")
def sample(run_python, workdir):
    """sample("--steps=1", ...): the finished process."""
    return lambda *flags: run_python(["-m", "shortcut_jax.sample", f"--workdir={workdir}", *flags])


def test_arrays_are_the_samples_of_an_evaluation(sample, workdir, tmp_path):
    out = tmp_path / "deep" / "samples.npz"
    done = sample("--num=50", "--seed=3", f"--out={out}")  # in the run's eval.steps
    assert done.returncode == 0 and str(out) in done.stdout and "step 8" in done.stdout
    with np.load(out) as found:
        assert found["arr_0"].shape == (100, 8, 8, 1) and found["arr_0"].dtype == np.uint8
        assert found["steps"].tolist() == [1] * 50 + [4] * 50
        for steps in (1, 4):
            with np.load(workdir / f"evaluated_{steps}.npz") as evaluated:
                rows = found["steps"] == steps
                np.testing.assert_array_equal(found["arr_0"][rows], evaluated["arr_0"])
                np.testing.assert_array_equal(found["arr_1"][rows], evaluated["arr_1"])


def test_the_grid_has_a_row_for_each_label(sample, workdir, tmp_path):
    flags = ("--steps=4,1,128", "--labels=7,0,7", "--step=4", "--params=online", "--seed=2")
    done = sample(*flags, f"--out={tmp_path}/grid.png")
    assert done.returncode == 0 and f"{tmp_path}/grid.png" in done.stdout
    model = sampling.load(workdir, step=4, params="online")
    samples = {n: model.sample(num_steps=n, labels=[7, 0, 7], seed=2) for n in (1, 4, 128)}
    names = ["class 7", "class 0", "class 7"]
    expected = pictures.sample_grid(samples, tmp_path / "expected.png", names=names)
    np.testing.assert_array_equal(read(tmp_path / "grid.png"), expected)


@pytest.fixture(scope="module")
def strips(workdir):
    """(label, steps) -> the library's interpolation."""
    model = sampling.load(workdir)
    return {
        (label, n): model.interpolate(num=5, label=label, num_steps=n, seed=2)
        for label in (3, 8)
        for n in (1, 4)
    }


INTERPOLATE = ("--interpolate=5", "--labels=3,8", "--steps=1,4", "--seed=2")


def test_interpolations_are_a_row_for_each_label_and_number_of_steps(sample, strips, tmp_path):
    assert sample(*INTERPOLATE, f"--out={tmp_path}/strip.png").returncode == 0
    rows = {f"class {label}, {n} step{'s'[: n - 1]}": strip for (label, n), strip in strips.items()}
    assert list(rows)[:2] == ["class 3, 1 step", "class 3, 4 steps"]
    expected = pictures.interpolation(rows, tmp_path / "expected.png")
    np.testing.assert_array_equal(read(tmp_path / "strip.png"), expected)


def test_interpolations_as_arrays(sample, strips, tmp_path):
    assert sample(*INTERPOLATE, f"--out={tmp_path}/strip.npz").returncode == 0
    with np.load(tmp_path / "strip.npz") as found:
        np.testing.assert_array_equal(found["arr_0"], np.concatenate(list(strips.values())))
        assert found["arr_1"].tolist() == [3] * 10 + [8] * 10
        assert found["steps"].tolist() == ([1] * 5 + [4] * 5) * 2


def test_the_figure_of_interpolations(tmp_path):
    images = np.random.default_rng(0).integers(0, 200, (2, 11, 8, 8, 3), np.uint8)
    picture = pictures.interpolation({"a": images[0], "b": images[1]}, tmp_path / "p.png", scale=4)
    np.testing.assert_array_equal(read(tmp_path / "p.png"), picture)
    cell = 32 + pictures.GAP
    left = picture.shape[1] - 11 * cell  # names are left of it
    assert left > pictures.GAP
    for row in range(2):
        for column in range(11):
            y, x = pictures.LABEL_HEIGHT + row * cell, left + column * cell
            found = picture[y : y + 32 : 4, x : x + 32 : 4]
            np.testing.assert_array_equal(found, images[row, column])
    with pytest.raises(ValueError):
        pictures.interpolation({"a": images[0], "b": images[1][:5]}, tmp_path / "other.png")


def read(path):
    with Image.open(path) as picture:
        return np.asarray(picture)


# ------------------------------------------------------------------ refusals


@pytest.fixture(scope="module")
def refused(in_turn, workdir, tmp_path_factory):
    """Sentence for each list of flags in WRONG."""
    folder = tmp_path_factory.mktemp("out")
    (folder / "file").write_text("")
    lists = [
        [f"--workdir={workdir}", f"--out={folder}/s.png", *(f.format(folder) for f in flags)]
        for flags, _ in WRONG
    ]
    done = in_turn("sample", *lists)
    assert [call["status"] for call in done] == [2] * len(WRONG)
    assert [path.name for path in folder.iterdir()] == ["file"]  # refused before sampling
    return [call["error"] for call in done]


WRONG = [
    (["--steps=1,3"], ("--steps holds 3;", "1, 2, 4, 8, 16, 32, 64, 128")),
    (["--steps=1,x"], ("--steps=1,x", "whole numbers", "--steps=1,4")),
    (["--labels=3,10"], ("--labels=[3, 10]", "0 to 9")),
    (["--labels=dog"], ("--labels=dog", "whole numbers")),
    (["--labels=1,2", "--num=3"], ("--num=3", "2 labels")),
    (["--num=0"], ("--num=0", "from 1")),
    (["--seed=-1"], ("--seed=-1", "from 0")),
    (["--cfg_scale=2"], ("--cfg_scale=2.0", "in the weights", "expected 1.0")),
    (["--interpolate=1"], ("--interpolate=1", "at least 2")),
    (["--interpolate=4", "--num=3"], ("--interpolate=4", "--num")),
    (["--interpolate=4", "--labels=11"], ("--labels=[11]", "0 to 9")),
    (["--step=5"], ("step=5", "4, 8")),
    (["--params=best"], ("params='best'", "ema, online, ema_RATE")),
    (["--params=power_0.1"], ("params=power_0.1", "one of ema, online:", "averages.power")),
    (["--workdir=/nowhere"], ("/nowhere/config.json",)),
    (["--workdir="], ("--workdir is missing",)),
    (["--out={}/s.gif"], ("--out=", "s.gif", ".png", ".npz")),
    (["--out={}/file/s.png"], ("--out", "file", "cannot be written")),
]


@pytest.mark.parametrize("i", range(len(WRONG)), ids=[" ".join(flags) for flags, _ in WRONG])
def test_refusals_name_the_flag_and_what_would_do(i, refused):
    assert_sentence(refused[i], WRONG[i][1])


def test_a_refusal_is_one_sentence_and_status_2(sample, tmp_path):
    done = sample("--steps=5", f"--out={tmp_path}/s.png")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and lines[0].startswith("error: --steps holds 5; ")
    assert not list(tmp_path.iterdir())
