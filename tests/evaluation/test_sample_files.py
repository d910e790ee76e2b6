"""Samples as files, written batch by batch, and gone on with after a kill."""

import shutil

import numpy as np
import pytest
from PIL import Image

from shortcut_jax.errors import UserError
from shortcut_jax.evaluation.sample_files import Npz, Pngs, check_folder
from shortcut_jax.metrics.protocols import quantise
from tests.sentences import assert_sentence, contents

IMAGES = np.random.default_rng(0).uniform(-1.1, 1.1, (7, 4, 5, 3)).astype(np.float32)
LABELS = np.arange(7, dtype=np.int32)[::-1]
BATCHES = ((0, 3), (3, 6), (6, 7))
PASS = {"step": 4, "num_samples": 7}


def write(sink, batches):
    for first, last in batches:
        sink.write(first, IMAGES[first:last], LABELS[first:last])


@pytest.mark.parametrize("rule", ["truncate", "round", "none"])
def test_an_npz_holds_all_in_order(tmp_path, rule):
    path = tmp_path / "s.npz"
    write(Npz(path, 7, rule, PASS), BATCHES[:2])
    assert not path.exists()
    again = Npz(path, 7, rule, PASS)  # after a kill
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
    assert not Npz(path, 7, rule, PASS).resumes


@pytest.mark.parametrize("rule", ["truncate", "none"])
def test_a_folder_of_pngs_holds_all_in_order(tmp_path, rule):
    folder = tmp_path / "s"
    write(Pngs(folder, 7, rule, PASS), BATCHES[:2])
    check_folder(folder, 7)
    again = Pngs(folder, 7, rule, PASS)
    assert again.resumes and not folder.exists()
    write(again, BATCHES[1:])
    again.close()
    names = [f"{i:06}.png" for i in range(7)]
    assert sorted(p.name for p in folder.iterdir()) == [*names, "labels.csv"]
    assert list(tmp_path.iterdir()) == [folder]
    expected = quantise("round" if rule == "none" else rule, IMAGES)
    for name, image in zip(names, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(folder / name)), image)
    lines = (folder / "labels.csv").read_text().splitlines()
    assert lines == ["path,label", *(f"{n},{k}" for n, k in zip(names, LABELS, strict=True))]


OTHERS = {  # than a pass of 7, "round", PASS
    "number": (5, "round", PASS),
    "rounding": (7, "truncate", PASS),
    "checkpoint": (7, "round", PASS | {"step": 8}),
}


@pytest.mark.parametrize(
    ("kind", "total", "rule", "identity"),
    [(kind, *other) for kind in (Npz, Pngs) for other in OTHERS.values()]
    + [(Npz, 7, "none", PASS)],  # another dtype, which PNG files do not have
)
def test_another_pass_starts_anew(tmp_path, kind, total, rule, identity):
    write(kind(tmp_path / "s", 7, "round", PASS), BATCHES[:1])  # and is killed
    other, alone = (
        kind(folder / "s", total, rule, identity) for folder in (tmp_path, tmp_path / "x")
    )
    alone.path.parent.mkdir()
    for sink in (other, alone):
        assert not sink.resumes
        write(sink, ((0, 3), (3, total)))
        sink.close()
    if kind is Npz:
        assert other.path.read_bytes() == alone.path.read_bytes()
    else:
        assert contents(other.path) == contents(alone.path)


def test_images_of_another_pass_stay_until_all_have_come(tmp_path):
    folder = tmp_path / "s"
    for sink in (Pngs(folder, 7, "round", PASS), Pngs(tmp_path / "x", 7, "truncate", PASS)):
        write(sink, BATCHES)
        sink.close()
    (folder / "notes.txt").write_text("mine")
    before = contents(folder)
    write(Pngs(folder, 7, "truncate", PASS), BATCHES[:2])  # and is killed
    assert contents(folder) == before
    again = Pngs(folder, 7, "truncate", PASS)
    write(again, BATCHES[1:])
    assert contents(folder) == before
    again.close()
    assert contents(folder) == {**contents(tmp_path / "x"), "notes.txt": b"mine"}


def test_killed_while_images_are_moved(tmp_path, monkeypatch):
    folder = tmp_path / "s"
    write(sink := Pngs(folder, 7, "round", PASS), BATCHES)
    sink.close()
    write(other := Pngs(folder, 7, "truncate", PASS), BATCHES)
    move, moved = shutil.move, []

    def killed(source, target):
        if len(moved) == 3:
            raise KeyboardInterrupt
        moved.append(move(source, target))

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "move", killed)
        other.close()
    assert not (folder / "labels.csv").exists()  # which says that it is not whole
    again = Pngs(folder, 7, "truncate", PASS)
    assert again.resumes
    again.close()
    write(alone := Pngs(tmp_path / "x", 7, "truncate", PASS), BATCHES)
    alone.close()
    assert contents(folder) == contents(alone.path)


def test_parts_that_were_being_removed_are_not_gone_on_with(tmp_path, monkeypatch):
    path = tmp_path / "s.npz"
    sink = Npz(path, 7, "round", PASS)
    write(sink, BATCHES)

    def killed(folder):
        (folder / "arr_0.npy").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        sink.close()
    again = Npz(path, 7, "round", PASS)
    assert not again.resumes
    write(again, BATCHES)
    again.close()
    assert [p.name for p in tmp_path.iterdir()] == ["s.npz"]


def test_a_folder_with_other_images_is_refused(tmp_path):
    folder = tmp_path / "s"
    sink = Pngs(folder, 7, "round", PASS)
    check_folder(folder, 7)  # which is not there
    write(sink, BATCHES)
    sink.close()
    check_folder(folder, 7)
    (folder / "holiday").mkdir()
    (folder / "000006.png").rename(folder / "holiday" / "1.JPG")
    before = contents(folder)
    for total, others, first in ((7, 1, "holiday/1.JPG"), (4, 3, "000004.png")):
        with pytest.raises(UserError) as error:
            check_folder(folder, total)
        fragments = (str(folder), f"other than the {total}", f"({others}, the first {first})")
        assert_sentence(str(error.value), fragments)
    assert contents(folder) == before
