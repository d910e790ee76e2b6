"""Sets of images from outside: what is read, and what is refused."""

import zipfile

import numpy as np
import pytest
from PIL import Image

from shortcut_jax.errors import UserError
from shortcut_jax.evaluation import image_sets
from tests.sentences import assert_sentence

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (5, 6, 7, 3), np.uint8)


@pytest.fixture
def folder(tmp_path):
    """b/0.png, a/1.png, 2.png, ...: sorted by path, 2 3 4 come first."""
    for i, image in enumerate(COLOURS):
        path = tmp_path / "set" / {0: "b", 1: "a"}.get(i, "") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    (tmp_path / "set" / "labels.csv").write_text("path,label\n")
    return tmp_path / "set"


def rows(dataset):
    return dataset.rows(np.arange(dataset.size))["image"]


def test_a_folder_is_read_in_the_order_of_its_paths(folder):
    found = image_sets.open_images(folder)
    assert (found.size, found.image_shape, found.name) == (5, (6, 7, 3), "set")
    np.testing.assert_array_equal(rows(found), COLOURS[[2, 3, 4, 1, 0]])


def test_a_zip_holds_the_same_images(folder, tmp_path):
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for path in folder.rglob("*.png"):
            archive.write(path, path.relative_to(folder))
    found = image_sets.open_images(tmp_path / "set.zip")
    np.testing.assert_array_equal(rows(found), rows(image_sets.open_images(folder)))


def test_grey_files_are_read_as_the_metric_wants_them(tmp_path):
    grey = COLOURS[..., 0]
    for i, image in enumerate(grey):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    np.testing.assert_array_equal(rows(image_sets.open_images(tmp_path, 1)), grey[..., None])
    as_colours = np.repeat(grey[..., None], 3, axis=-1)
    np.testing.assert_array_equal(rows(image_sets.open_images(tmp_path)), as_colours)


def test_arrays_are_read_as_they_are(tmp_path):
    for name, images in {
        "levels": COLOURS,
        "float32": (COLOURS / 127.5 - 1).astype(np.float32),
        "float64": COLOURS / 127.5 - 1,
    }.items():
        np.savez(tmp_path / f"{name}.npz", arr_0=images, arr_1=np.zeros(5))
        found = rows(image_sets.open_images(tmp_path / f"{name}.npz"))
        assert found.dtype == (np.uint8 if name == "levels" else np.float32)
        np.testing.assert_array_equal(found, images.astype(found.dtype))


def test_fingerprints_tell_sets_apart(folder, tmp_path):
    found = {image_sets.open_images(folder).fingerprint}
    Image.fromarray(COLOURS[0]).save(folder / "5.png")
    found.add(image_sets.open_images(folder).fingerprint)
    for i in (0, 1):
        np.savez(tmp_path / "a.npz", arr_0=COLOURS[i:])
        found.add(image_sets.open_images(tmp_path / "a.npz").fingerprint)
    assert len(found) == 4


FLOATS = (COLOURS / 127.5 - 1).astype(np.float32)


def changed(a, index, value):
    a = a.copy()
    a[index] = value
    return a


BAD_ARRAYS = {
    "grey": (COLOURS[..., :1], ("(5, 6, 7, 1)", "grey", "three channels")),
    "grey without an axis": (COLOURS[..., 0], ("(5, 6, 7)", "grey")),
    "channels first": (COLOURS.transpose(0, 3, 1, 2), ("(5, 3, 6, 7)", "channels go last")),
    "transparent": (np.zeros((2, 6, 7, 4), np.uint8), ("(2, 6, 7, 4)", "mend the array")),
    "one image": (COLOURS[0, :, :, 0], ("(6, 7)", "[n, H, W, 3]")),
    "none": (COLOURS[:0], ("(0, 6, 7, 3)",)),
    "whole numbers": (COLOURS.astype(np.int64), ("int64", "convert it")),
    "levels as floats": (COLOURS.astype(np.float32), ("float", "255", "0..255: round it")),
    "from 0 to 1": (COLOURS / 255, ("[0, 1]", "2 x - 1")),
    "beyond": (FLOATS * 1.5, ("-1.5", "clip it")),
    "NaN": (changed(FLOATS, (1, 2, 3, 0), np.nan), ("NaN", "expected")),
    "infinite": (changed(FLOATS, (1, 2, 3, 0), np.inf), ("infinite", "expected")),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_arrays_that_are_no_images_are_refused(case, tmp_path):
    images, fragments = BAD_ARRAYS[case]
    np.savez(tmp_path / "a.npz", arr_0=images)
    assert_sentence(refusal(tmp_path / "a.npz"), (str(tmp_path / "a.npz"), "arr_0", *fragments))


def refusal(path):
    with pytest.raises(UserError) as error:
        found = image_sets.open_images(path)
        rows(found)
    return str(error.value)


def test_files_of_several_sizes_are_refused(folder):
    Image.fromarray(COLOURS[0, :5]).save(folder / "b" / "small.png")
    text = refusal(folder)
    assert_sentence(text, ("several sizes", "2.png is 7x6", "b/small.png 7x5", "prepare"))


def test_what_cannot_be_read_is_refused(folder, tmp_path):
    assert_sentence(refusal(tmp_path / "absent"), ("absent does not exist", "folder or zip"))
    assert_sentence(refusal(tmp_path / "absent.npz"), ("absent.npz", "whole one"))
    (tmp_path / "empty").mkdir()
    assert_sentence(refusal(tmp_path / "empty"), ("empty", "no images", "mend the path"))
    np.savez(tmp_path / "other.npz", x=COLOURS)
    assert_sentence(refusal(tmp_path / "other.npz"), ("other.npz", "holds x", "arr_0"))
    np.savez(tmp_path / "whole.npz", arr_0=COLOURS)
    data = (tmp_path / "whole.npz").read_bytes()
    (tmp_path / "half.npz").write_bytes(data[: len(data) // 2])
    assert_sentence(refusal(tmp_path / "half.npz"), ("half.npz", "whole one", "again"))
    np.savez(tmp_path / "code.npz", arr_0=np.array([{}], dtype=object))
    assert_sentence(refusal(tmp_path / "code.npz"), ("code.npz", "cannot be read"))
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:60])
    assert_sentence(refusal(folder), ("3.png", "cannot be decoded", "take it out"))
