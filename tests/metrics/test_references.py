"""Stored statistics: what a file says of itself, and what it is refused for."""

import dataclasses
import json

import numpy as np
import pytest

from shortcut_jax.data.sources import Dataset
from shortcut_jax.errors import UserError
from shortcut_jax.metrics import gauges, references
from shortcut_jax.metrics.extractor import Extractor
from shortcut_jax.metrics.gauges import Gauge, Key
from shortcut_jax.metrics.protocols import INCEPTION
from tests.sentences import assert_sentence

IMAGES = np.random.default_rng(0).integers(0, 256, (40, 4, 4, 3), np.uint8)


def dataset(images=IMAGES):
    return Dataset(
        name="toy", split="train", image_shape=images.shape[1:], num_classes=1, size=len(images),
        fingerprint="f", read=lambda i: {"image": images[i]},
    )  # fmt: skip


def forward(levels):
    x = np.asarray(levels, np.float32).reshape(len(levels), -1)
    return {"features": x[:, :3], "spatial": x[:, 3:5], "logits_unbiased": x[:, :4] / 100}


def gauge(*names, protocol="adm", sha256="abcdef01"):
    extractor = Extractor(
        "inception", "random", INCEPTION[protocol], (None, None, 3), 3, sha256, {}, 8, forward
    )
    return Gauge(extractor, names)


ORIGIN = {"builder": "toy", "split": "train", "crop": "adm"}
ALL = ("fid", "sfid", "is", "kid", "precision", "recall")


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A file of two protocols, and what it was made of."""
    both = [gauge(*ALL), gauge("fid", protocol="authors")]
    made = references.measure(both, dataset(), workers=0, origin=ORIGIN)
    path = tmp_path_factory.mktemp("references") / "toy.npz"
    references.save(path, made)
    return path, made


def test_a_file_gives_back_what_was_measured(stored):
    path, made = stored
    found = references.load(path)
    assert [r.facts for r in found] == [r.facts for r in made]
    assert [r.sha256 for r in found] == [r.sha256 for r in made]
    assert found[0].facts == {
        "extractor": "inception", "extractor_sha256": "abcdef01", "protocol": "adm",
        "image_shape": [4, 4, 3], "num_images": 40, "source": "toy/train", "fingerprint": "f",
        **ORIGIN,
    }  # fmt: skip
    features = IMAGES.reshape(40, -1)[:, :3].astype(np.float64)
    assert found[0].summaries.keys() == {
        Key("moments", "features"), Key("moments", "spatial"), Key("rows", "features"),
    }  # fmt: skip
    moments = found[0].summaries[Key("moments", "features")]
    np.testing.assert_allclose(moments.mean, features.mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.cov, np.cov(features, rowvar=False), rtol=1e-12)
    np.testing.assert_array_equal(found[0].summaries[Key("rows", "features")].rows, features)


def test_a_large_reference_keeps_some_rows(monkeypatch):
    monkeypatch.setattr(gauges, "REFERENCE_ROWS", 10)
    (made,) = references.measure([gauge("fid", "kid")], dataset(), workers=0)
    rows = made.summaries[Key("rows", "features")].rows
    everything = {tuple(row) for row in IMAGES.reshape(40, -1)[:, :3]}
    assert len(rows) == 10 and {tuple(row) for row in rows.astype(int)} <= everything
    features = IMAGES.reshape(40, -1)[:, :3]
    np.testing.assert_allclose(made.summaries[Key("moments", "features")].mean, features.mean(0))


def test_each_gauge_gets_the_part_that_was_made_as_it_measures(stored):
    path, made = stored
    found = references.load(path)
    assert references.choose(path, found, gauge("fid")).sha256 == made[0].sha256
    authors = references.choose(path, found, gauge("fid", protocol="authors"))
    assert authors.sha256 == made[1].sha256 != made[0].sha256


@pytest.mark.parametrize(
    ("asked", "fragments"),
    [
        (gauge("fid", protocol="clean"), ("'adm'", "'authors'", "'clean' is measured")),
        (gauge("fid", sha256="ffff"), ("(abcdef01)", "(ffff)", "those weights")),
        (gauge("fid", "kid", protocol="authors"), ("no rows of features", "fid, kid", "eval ref")),
    ],
)
def test_statistics_made_otherwise_are_refused(stored, asked, fragments):
    path, _ = stored
    with pytest.raises(UserError) as error:
        references.choose(path, references.load(path), asked)
    assert_sentence(str(error.value), (str(path), *fragments))


def test_images_of_another_size_are_refused(stored):
    path, made = stored
    references.check_shape(path, made[0], (4, 4, 3))
    with pytest.raises(UserError) as error:
        references.check_shape(path, made[0], (8, 8, 3))
    assert_sentence(str(error.value), (str(path), "(4, 4, 3)", "(8, 8, 3)"))


@pytest.mark.parametrize(
    ("key", "wanted"), [("builder", "toys"), ("split", "train+test"), ("crop", "authors")]
)
def test_images_of_another_origin_are_refused_where_both_are_known(stored, key, wanted):
    path, made = stored
    other, facts = {**ORIGIN, key: wanted}, made[0].facts
    with pytest.raises(UserError) as error:
        references.check_origin(path, made[0], other)
    named = f"data.{key}={ORIGIN[key]!r} where this config has {wanted!r}"
    assert_sentence(str(error.value), (str(path), named, "eval ref"))
    older = dataclasses.replace(made[0], facts={k: v for k, v in facts.items() if k != key})
    unknown = dataclasses.replace(made[0], facts={**facts, key: None})
    for reference, origin in (
        (made[0], ORIGIN),
        (made[0], {**ORIGIN, key: None}),
        (unknown, other),
        (older, other),
    ):
        references.check_origin(path, reference, origin)


def test_files_that_do_not_say_what_they_are_are_refused(stored, tmp_path):
    def refusal(name, **arrays):
        np.savez(tmp_path / name, **arrays)
        with pytest.raises(UserError) as error:
            references.load(tmp_path / name)
        return str(error.value)

    assert_sentence(refusal("adm.npz", mu=1, sigma=2), ("mu, sigma", "eval ref --images"))
    assert_sentence(refusal("new.npz", about=json.dumps([{"format": 9}])), ("[9]", "expected 1"))
    assert_sentence(refusal("bad.npz", about="{"), ("facts that cannot be read", "again"))
    data = stored[0].read_bytes()
    (tmp_path / "half.npz").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError) as error:
        references.load(tmp_path / "half.npz")
    assert_sentence(str(error.value), ("half.npz", "whole one"))


# ------------------------------------------------------------------ other people's files


def statistics(d, seed):
    x = np.random.default_rng(seed).normal(size=(50, d))
    return x.mean(0), np.cov(x, rowvar=False)


def foreign(tmp_path, asked, of_images=None, **arrays):
    path = tmp_path / "foreign.npz"
    np.savez(path, **arrays)
    facts = {"image_shape": [4, 4, 3], "num_images": None}
    return references.foreign(path, references.read_npz(path), asked, facts, of_images or {})


def test_statistics_of_adm_are_those_of_both_outputs(tmp_path):
    (mu, sigma), (mu_s, sigma_s) = statistics(3, 0), statistics(2, 1)
    (rows,) = references.measure([gauge(*ALL)], dataset(), workers=0)
    found = foreign(
        tmp_path, gauge(*ALL), rows.summaries, mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s
    )
    np.testing.assert_array_equal(found.summaries[Key("moments", "features")].cov, sigma)
    np.testing.assert_array_equal(found.summaries[Key("moments", "spatial")].mean, mu_s)
    # Precision and recall are of the images in the file.
    kept = found.summaries[Key("rows", "features")].rows
    np.testing.assert_array_equal(kept, IMAGES.reshape(40, -1)[:, :3])
    assert found.facts["protocol"] == "adm" and found.facts["source"] == "foreign.npz"
    references.check_origin(tmp_path, found, ORIGIN)  # of which it says nothing
    references.save(tmp_path / "ours.npz", [found])
    (again,) = references.load(tmp_path / "ours.npz")
    assert again.sha256 == found.sha256
    assert references.choose(tmp_path / "ours.npz", [again], gauge(*ALL)) is again


def test_statistics_of_pytorch_fid_do_for_the_fid_alone(tmp_path):
    mu, sigma = statistics(3, 0)
    asked = gauge("fid", protocol="pytorch_fid")
    found = foreign(tmp_path, asked, mu=mu, sigma=sigma)
    assert references.choose(tmp_path, [found], asked) is found
    more = dataclasses.replace(asked, names=("fid", "sfid"))
    with pytest.raises(UserError) as error:
        references.choose(tmp_path, [found], more)
    assert_sentence(str(error.value), ("no mean and covariance of spatial",))


@pytest.mark.parametrize(
    ("mu", "sigma"),
    [
        (np.zeros((3, 1)), np.eye(3)),
        (np.zeros(3), np.eye(4)),
        (np.full(3, np.nan), np.eye(3)),
        (np.zeros(0), np.zeros((0, 0))),
    ],
)
def test_what_is_no_mean_and_covariance_is_refused(mu, sigma, tmp_path):
    with pytest.raises(UserError) as error:
        foreign(tmp_path, gauge("fid"), mu=mu, sigma=sigma)
    assert_sentence(str(error.value), ("foreign.npz", str(sigma.shape), "get the file again"))
