"""Samples as files, written batch by batch, and gone on with after a kill."""

import numpy as np
import pytest
from PIL import Image

from shortcut_jax.evaluation.sample_files import Npz, Pngs
from shortcut_jax.metrics.protocols import quantise

IMAGES = np.random.default_rng(0).uniform(-1.1, 1.1, (7, 4, 5, 3)).astype(np.float32)
LABELS = np.arange(7, dtype=np.int32)[::-1]
BATCHES = ((0, 3), (3, 6), (6, 7))


def write(sink, batches):
    for first, last in batches:
        sink.write(first, IMAGES[first:last], LABELS[first:last])


@pytest.mark.parametrize("rule", ["truncate", "round", "none"])
def test_an_npz_holds_all_in_order(tmp_path, rule):
    path = tmp_path / "s.npz"
    write(Npz(path, 7, rule), BATCHES[:2])
    assert not path.exists()
    again = Npz(path, 7, rule)  # after a kill
    assert again.resumes
    write(again, BATCHES[1:])
    again.close()
    with np.load(path) as found:
        assert found.files == ["arr_0", "arr_1"]
        expected = IMAGES if rule == "none" else quantise(rule, IMAGES)
        assert found["arr_0"].dtype == expected.dtype
        np.testing.assert_array_equal(found["arr_0"], expected)
        np.testing.assert_array_equal(found["arr_1"], LABELS)
    assert [p.name for p in tmp_path.iterdir()] == ["s.npz"]
    assert not Npz(path, 7, rule).resumes


@pytest.mark.parametrize("rule", ["truncate", "none"])
def test_a_folder_of_pngs_holds_all_in_order(tmp_path, rule):
    folder = tmp_path / "s"
    write(Pngs(folder, 7, rule), BATCHES[:2])
    again = Pngs(folder, 7, rule)
    assert again.resumes and not (folder / "labels.csv").exists()
    write(again, BATCHES[1:])
    again.close()
    names = [f"{i:06}.png" for i in range(7)]
    assert sorted(p.name for p in folder.iterdir()) == [*names, "labels.csv"]
    expected = quantise("round" if rule == "none" else rule, IMAGES)
    for name, image in zip(names, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(folder / name)), image)
    lines = (folder / "labels.csv").read_text().splitlines()
    assert lines == ["path,label", *(f"{n},{k}" for n, k in zip(names, LABELS, strict=True))]
