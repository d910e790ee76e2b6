"""Folders and zips of images become sets: nothing dropped, nothing made twice, TFDS reads them."""

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from shortcut_jax.data import crops, image_files, open_dataset, preparing, shards
from shortcut_jax.errors import UserError
from tests.data.photographs import cut, encoded
from tests.sentences import assert_sentence, contents

REPOSITORY = Path(__file__).resolve().parents[2]
WNIDS = ("n01440764", "n01443537", "n15075141")
SEED_OF = {f"{wnid}/{wnid}_{k}.JPEG": 3 * i + k for i, wnid in enumerate(WNIDS) for k in range(3)}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(shards, "SHARD_FILES", 4)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Nine images in ImageNet's layout (PNG bytes: the suffix says nothing), and what is none."""
    root = tmp_path / "train"
    for path, seed in SEED_OF.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(encoded(seed))
    (root / WNIDS[0] / "Thumbs.db").write_text("")
    (root / "README.txt").write_text("")
    (root / "notes.TXT").write_text("")
    (root / "__MACOSX").mkdir()
    (root / "__MACOSX" / "a.png").write_text("")
    return root


def request(source: Path, data_dir: Path, inside: str = "", **changes) -> preparing.Request:
    asked = preparing.Request(image_files.Source(source, inside), "mine", "train", data_dir)
    return dataclasses.replace(asked, **changes)


def pack(root: Path, path: Path, prefix: str = "") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(root.rglob("*"), reverse=True):
            archive.write(file, prefix + str(file.relative_to(root)))
    return path


def rows(data_dir: Path, num_classes: int, split: str = "train") -> dict[str, np.ndarray]:
    section = {
        "name": "images", "split": split, "data_dir": str(data_dir), "builder": "mine",
        "image_size": 16, "crop": "adm", "num_classes": num_classes, "workers": 0,
    }  # fmt: skip
    dataset = open_dataset(section)
    return dataset.rows(np.arange(dataset.size))


def expected(seeds) -> np.ndarray:
    return np.stack([crops.adm(Image.fromarray(cut(seed)), 16) for seed in seeds])


def manifest(data_dir: Path) -> dict:
    return json.loads((data_dir / "mine" / "1.0.0" / "manifest.json").read_text())


def refused(asked: preparing.Request, *fragments: str) -> None:
    with pytest.raises(UserError) as error:
        preparing.prepare(asked)
    assert_sentence(str(error.value), (*fragments, "expected", ": "))


def test_folder_in_imagenet_layout(folder, tmp_path, capsys):
    preparing.prepare(request(folder, tmp_path))
    found = rows(tmp_path, 3)
    np.testing.assert_array_equal(found["image"], expected(range(9)))
    assert found["label"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    said = capsys.readouterr().out
    assert "9 images; other files, ignored: 1 .db, 2 .txt, 1 hidden." in said
    assert "data.builder=mine" in said and "data.num_classes=3" in said
    split = manifest(tmp_path)["splits"]["train"]
    assert split["images"] == 9 and split["corrupt"] == []
    assert split["not_images"] == {".db": 1, ".txt": 2, "hidden": 1}
    assert split["shard_lengths"] == [4, 4, 1]


def test_tfds_reads_it_and_bytes_are_unchanged(folder, tmp_path):
    preparing.prepare(request(folder, tmp_path))
    builder = tfds.builder("mine", data_dir=tmp_path)
    assert builder.info.features["label"].names == list(WNIDS)
    skip = {"image": tfds.decode.SkipDecoding()}
    found = list(builder.as_data_source(split="train", decoders=skip))
    assert [record["file_name"].decode() for record in found] == sorted(SEED_OF)
    for record in found:
        data = (folder / record["file_name"].decode()).read_bytes()
        assert hashlib.sha256(record["image"]).digest() == hashlib.sha256(data).digest()
    decoded = builder.as_data_source(split="train")[5]
    np.testing.assert_array_equal(decoded["image"], cut(5))
    names = {path.name for path in (tmp_path / "mine" / "1.0.0").iterdir()}
    assert names == {
        ".lock", "manifest.json", "dataset_info.json", "features.json", "label.labels.txt",
        *(f"mine-train.array_record-{i:05d}-of-00003" for i in range(3)),
    }  # fmt: skip


def test_zip_gives_the_same_set(folder, tmp_path):
    preparing.prepare(request(folder, tmp_path / "a"))
    archive = pack(folder, tmp_path / "train.zip", "imagenet/train/")
    preparing.prepare(request(archive, tmp_path / "b", inside="imagenet/train"))
    preparing.prepare(request(archive, tmp_path / "c"))  # one folder in another is no class
    a, b, c = (rows(tmp_path / name, 3) for name in "abc")
    for key in a:
        np.testing.assert_array_equal(a[key], b[key])
        np.testing.assert_array_equal(a[key], c[key])
    digests = [manifest(tmp_path / name)["splits"]["train"]["digest"] for name in "ab"]
    assert digests[0] == digests[1]


def test_a_zip_is_opened_once_for_all_shards(folder, tmp_path, monkeypatch):
    opened, open_zip = [], image_files._open_zip
    monkeypatch.setattr(
        image_files, "_open_zip", lambda path: opened.append(path) or open_zip(path)
    )
    archive = pack(folder, tmp_path / "a.zip")
    preparing.prepare(request(archive, tmp_path / "a"))
    assert len(manifest(tmp_path / "a")["splits"]["train"]["shard_lengths"]) == 3
    assert opened == [archive] * 2  # to list its files, and to read them

    for path, seed in SEED_OF.items():  # another zip in its place
        (folder / path).write_bytes(encoded(seed + 9))
    archive.unlink()
    preparing.prepare(request(pack(folder, archive), tmp_path / "b"))
    np.testing.assert_array_equal(rows(tmp_path / "b", 3)["image"], expected(range(9, 18)))


def test_workers_by_default(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    found = [preparing.default_workers("zip", n) for n in (10, 30_000, 1_281_167, 14_200_000)]
    assert found == [16, 16, 6, 1] and preparing.default_workers("folder", 14_200_000) == 16
    started = []

    def workers(function, count, key):
        started.append(count)
        raise UserError("enough.")

    monkeypatch.setattr(preparing, "Workers", workers)
    monkeypatch.setattr(preparing, "ZIP_FILES", 26)  # the zip has 9 images and 4 other files
    with pytest.raises(UserError, match="enough"):
        preparing.prepare(request(pack(folder, tmp_path / "a.zip"), tmp_path, workers=None))
    assert started == [2]


def test_workers_give_the_same_files(folder, tmp_path):
    preparing.prepare(request(folder, tmp_path / "a"))
    preparing.prepare(request(folder, tmp_path / "b", workers=2))
    a, b = (manifest(tmp_path / name) for name in "ab")
    assert a == b
    # Not the bytes: protobuf orders the features of a record as it likes.
    a, b = (tfds.builder("mine", data_dir=tmp_path / name) for name in "ab")
    names = [
        [row["file_name"] for row in builder.as_data_source(split="train")] for builder in (a, b)
    ]
    assert names[0] == names[1]
    np.testing.assert_array_equal(
        rows(tmp_path / "a", 3)["image"], rows(tmp_path / "b", 3)["image"]
    )


def test_splits_share_their_classes(folder, tmp_path):
    preparing.prepare(request(folder, tmp_path))
    shutil.rmtree(folder / WNIDS[0])
    for name in (WNIDS[1], WNIDS[2]):
        (folder / name / f"{name}_0.JPEG").unlink()
    preparing.prepare(request(folder, tmp_path, split="validation"))
    assert rows(tmp_path, 3, "validation")["label"].tolist() == [1, 1, 2, 2]
    assert rows(tmp_path, 3, "train+validation")["label"].tolist() == [0] * 3 + [1, 1, 1, 2, 2] + [
        2, 1, 1, 2, 2,
    ]  # fmt: skip
    (folder / WNIDS[1]).rename(folder / "n99999999")
    refused(request(folder, tmp_path, split="other"), "--split=other", "n99999999")


LABELS = {path: seed % 4 for path, seed in SEED_OF.items()}


@pytest.mark.parametrize("kind", ["stylegan", "csv", "csv with a header", "named", "null"])
def test_labels_file(folder, tmp_path, kind):
    names = ["cat", "ant", "dog", "bee"]
    lines = [f"{path},{names[k] if kind == 'named' else k}" for path, k in LABELS.items()]
    text = {
        "stylegan": json.dumps({"labels": [[path, k] for path, k in LABELS.items()]}),
        "null": json.dumps({"labels": None}),
        "csv with a header": "\n".join(["path,label", *lines]),
    }.get(kind, "\n".join(lines))
    (folder / "labels").write_text(text)
    source = pack(folder, tmp_path / "a.zip") if kind == "stylegan" else folder
    preparing.prepare(request(source, tmp_path, labels="labels"))
    found = rows(tmp_path, 1 if kind == "null" else 4)["label"].tolist()
    order = {"named": [2, 0, 3, 1], "null": [0, 0, 0, 0]}.get(kind, [0, 1, 2, 3])
    assert found == [order[LABELS[path]] for path in sorted(SEED_OF)]


PATHS = sorted(SEED_OF)


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("\n".join(f"{path},1" for path in PATHS[1:]), "leaves 1 images without one"),
        ("\n".join(f"{path},1" for path in [*PATHS, "x.png"]), "1 of files that are not there"),
        ("\n".join(f"{path},1" for path in [*PATHS, PATHS[2]]), "1 of them repeated"),
        ("a.png,1,2", "a line has 3 values"),
        ("", "empty"),
        ('{"labels": [["a", -1]]}', "label -1"),
        ('{"labels": [["a", 1.5]]}', "label 1.5"),
        ('{"classes": []}', "cannot be read as labels"),
        ("{", "cannot be read as labels"),
    ],
)
def test_labels_file_that_does_not_fit(folder, tmp_path, text, fragment):
    (folder / "labels").write_text(text)
    refused(request(folder, tmp_path, labels="labels"), "--labels=labels", fragment)


def test_labels_file_that_is_not_there(folder, tmp_path):
    refused(request(folder, tmp_path, labels="lables.json"), "--labels=lables.json")


def test_flat_folder_is_one_class_and_a_mixed_one_is_asked_about(folder, tmp_path):
    flat = tmp_path / "flat" / "celeba_hq_256"
    flat.mkdir(parents=True)
    for path, seed in SEED_OF.items():
        (flat / f"{seed}.jpg").write_bytes((folder / path).read_bytes())
    preparing.prepare(request(flat.parent, tmp_path, counts=(30_000, 9)))
    assert set(rows(tmp_path, 1)["label"]) == {0}
    (folder / "beside.png").write_bytes(encoded(0))
    refused(request(folder, tmp_path, name="mixed"), "beside.png", "--labels=none")
    preparing.prepare(request(folder, tmp_path, name="mixed", labels="none"))


def corrupt(folder: Path) -> list[str]:
    """Damages three of the nine, in as many ways."""
    paths = [sorted(SEED_OF)[i] for i in (1, 4, 8)]
    (folder / paths[0]).write_bytes(encoded(1)[:500])
    (folder / paths[1]).write_text("<html>not found</html>")
    (folder / paths[2]).unlink()
    (folder / paths[2]).symlink_to("nowhere")
    return paths


def test_corrupt_files_stop_at_the_end_and_can_be_mended(folder, tmp_path):
    paths = corrupt(folder)
    refused(request(folder, tmp_path), "3 of 9 images", paths[0], "--on_corrupt=skip")
    directory = tmp_path / "mine" / "1.0.0"
    listed = (directory / "corrupt-train.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in listed] == paths
    assert not (directory / "dataset_info.json").exists()
    for path in paths:
        (folder / path).unlink()
        (folder / path).write_bytes(encoded(SEED_OF[path]))
    preparing.prepare(request(folder, tmp_path))
    np.testing.assert_array_equal(rows(tmp_path, 3)["image"], expected(range(9)))
    assert not (directory / "corrupt-train.txt").exists()


def test_corrupt_files_are_left_out_when_asked(folder, tmp_path, capsys):
    paths = corrupt(folder)
    preparing.prepare(request(folder, tmp_path, skip_corrupt=True))
    found = rows(tmp_path, 3)  # the last shard is empty
    np.testing.assert_array_equal(found["image"], expected([0, 2, 3, 5, 6, 7]))
    assert found["label"].tolist() == [0, 0, 1, 1, 2, 2]
    assert "3 of 9 images cannot be decoded" in capsys.readouterr().out
    split = manifest(tmp_path)["splits"]["train"]
    assert split["corrupt"] == paths and split["images"] == 6


def test_a_set_of_corrupt_files_only(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").write_text("")
    refused(request(tmp_path / "a", tmp_path, skip_corrupt=True), "1 of 1 images")


def test_digest_tells_contents_and_labels_apart(folder, tmp_path):
    def digest(name, **changes):
        preparing.prepare(request(folder, tmp_path / name, **changes))
        return manifest(tmp_path / name)["splits"]["train"]["digest"]

    first, unlabelled = digest("a"), digest("b", labels="none")
    path = folder / PATHS[3]
    path.write_bytes(path.read_bytes() + b"\0")  # decodes to the same pixels
    assert len({first, unlabelled, digest("c")}) == 3


def test_finished_split_is_left_alone(folder, tmp_path):
    preparing.prepare(request(folder, tmp_path))
    before = contents(tmp_path / "mine")
    preparing.prepare(request(folder, tmp_path))
    assert contents(tmp_path / "mine") == before
    (folder / PATHS[0]).write_bytes(encoded(77))
    refused(request(folder, tmp_path), "of other files or labels")
    assert contents(tmp_path / "mine") == before


@pytest.mark.parametrize("when", ["second shard", "before metadata"])
def test_killed_and_started_again(folder, tmp_path, when):
    script = f"""
import os, signal
from pathlib import Path
from shortcut_jax.data import image_files, preparing, shards
shards.SHARD_FILES = 4
kill = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
write = shards.Target.write
if {when!r} == "second shard":
    shards.Target.write = lambda t, src, s: (kill if s.index == 2 else write)(t, src, s)
else:
    shards.write_metadata = kill
source = image_files.Source(Path({str(folder)!r}))
preparing.prepare(preparing.Request(source, "mine", "train", Path({str(tmp_path)!r})))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, timeout=120)
    assert done.returncode == -signal.SIGKILL
    directory = tmp_path / "mine" / "1.0.0"
    times = {path.name: path.stat().st_mtime_ns for path in directory.glob("*array_record*")}
    assert len(times) == (2 if when == "second shard" else 3)
    (directory / "mine-train.array_record-00002-of-00003.1.tmp").write_text("half")
    preparing.prepare(request(folder, tmp_path))
    after = {path.name: path.stat().st_mtime_ns for path in directory.glob("*array_record*")}
    assert len(after) == 3 and after.items() >= times.items()  # what was there was not made again
    np.testing.assert_array_equal(rows(tmp_path, 3)["image"], expected(range(9)))
    assert not list(directory.glob("incomplete*"))


def test_a_shard_is_made_again_if_a_file_or_its_label_changed(folder):
    entries, _ = image_files.Source(folder).images()
    shard = shards.plan(entries, [0] * 9)[0]
    other = dataclasses.replace(shard.entries[0], stamp=1)
    keys = [
        shard.key(["a"]),
        shard.key(["b"]),
        dataclasses.replace(shard, labels=(0, 0, 0, 1)).key(["a"]),
        dataclasses.replace(shard, entries=(other, *shard.entries[1:])).key(["a"]),
    ]
    assert len(set(keys)) == 4


@pytest.mark.parametrize("member", ["/etc/a.png", "../a.png", "a/../../b.png", "..\\a.png"])
def test_zip_members_that_leave_the_zip(tmp_path, member):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(member, encoded(0))
    refused(request(tmp_path / "a.zip", tmp_path / "data"), "a.zip", "points out of it")
    assert not (tmp_path / "data").exists()


def test_damaged_member_of_a_zip_is_counted(folder, tmp_path):
    path = pack(folder, tmp_path / "a.zip")
    data = bytearray(path.read_bytes())
    at = data.index(encoded(4)) + 300
    data[at : at + 50] = bytes(50)
    path.write_bytes(bytes(data))
    refused(request(path, tmp_path), "1 of 9 images", PATHS[4], "CRC")


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"counts": (30_000, 28_000)}, ("9 images", "30,000 or 28,000", "--inside")),
        ({"name": "My-Set"}, ("--name=My-Set",)),
        ({"split": "Train"}, ("--split=Train",)),
        ({"workers": -1}, ("--workers=-1",)),
        ({"inside": "absent"}, ("no images in absent/",)),
    ],
)
def test_requests_that_are_refused_before_anything_is_written(folder, tmp_path, changes, fragments):
    refused(request(folder, tmp_path / "data", **changes), *fragments)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("source", ["absent", "train/README.txt"])
def test_source_that_is_neither(folder, tmp_path, source):
    refused(request(tmp_path / source, tmp_path / "data"), "neither a folder nor a zip")


def test_a_set_of_tfds_is_not_overwritten(folder, tmp_path):
    (tmp_path / "mine" / "1.0.0").mkdir(parents=True)
    (tmp_path / "mine" / "1.0.0" / "dataset_info.json").write_text("{}")
    refused(request(folder, tmp_path), "did not make")


def test_two_processes_do_not_write_one_set(folder, tmp_path):
    directory = tmp_path / "mine" / "1.0.0"
    directory.mkdir(parents=True)
    with preparing._only_process(directory):
        refused(request(folder, tmp_path), "Another process")
    preparing.prepare(request(folder, tmp_path))


def test_links_are_followed_and_loops_end(folder, tmp_path):
    (folder / WNIDS[2]).rename(tmp_path / "elsewhere")
    (folder / WNIDS[2]).symlink_to(tmp_path / "elsewhere")
    (folder / WNIDS[0] / "loop").symlink_to(folder)
    entries, _ = image_files.Source(folder).images()
    assert [entry.path for entry in entries] == PATHS


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything: run as another user")
def test_folder_without_permission(folder, tmp_path):
    (folder / WNIDS[0]).chmod(stat.S_IWUSR)
    refused(request(folder, tmp_path), WNIDS[0], "cannot be listed")


def test_command(folder, tmp_path, run_python):
    corrupt(folder)
    command = ["-m", "shortcut_jax.prepare", f"--source={folder}", "--name=mine", "--split=test"]
    command += [f"--data_dir={tmp_path}", "--labels=none", "--count=9", "--workers=1"]
    done = run_python(command)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert_sentence(done.stderr.splitlines()[-1], ("error: 3 of 9 images", "--on_corrupt=skip"))
    done = run_python([*command, "--on_corrupt=skip"])
    assert done.returncode == 0
    assert "9/9" in done.stderr  # the bar; nothing is decoded again
    assert rows(tmp_path, 1, "test")["label"].tolist() == [0] * 6
