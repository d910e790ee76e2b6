"""The metric fid: which weights it takes, what its numbers are called, what it refuses."""

import dataclasses
import hashlib
import zlib
from pathlib import Path

import numpy as np
import pytest

from configs import digits
from shortcut_jax import data, metrics, run, state
from shortcut_jax.data.sources import Dataset
from shortcut_jax.errors import UserError
from shortcut_jax.evaluation import grid, measuring
from shortcut_jax.evaluation.reports import metric_name
from shortcut_jax.metrics import fid
from shortcut_jax.metrics import inception_weights as lib
from shortcut_jax.metrics.extractor import Extractor
from shortcut_jax.metrics.protocols import INCEPTION
from shortcut_jax.parallel import sharding
from shortcut_jax.weights.published import PUBLISHED
from tests.sentences import assert_sentence

GOLDEN = Path(__file__).parents[1] / "golden"
PTH = str(GOLDEN / "torch_zip.pth")
PTH_SHA256 = hashlib.sha256(Path(PTH).read_bytes()).hexdigest()
SHAPES = {"0.weight": (3, 2, 1, 5), "1.running_var": (3,)}  # some of what is in that file


def refusal(function, *args, **kwargs):
    with pytest.raises(UserError) as error:
        function(*args, **kwargs)
    return str(error.value)


# ------------------------------------------------------------------ weights


def test_only_the_published_file_makes_a_fid(monkeypatch):
    other = lib.load(SHAPES, PTH, PTH_SHA256)
    assert (other.name, other.sha256) == (PTH_SHA256[:8], PTH_SHA256)
    file = dataclasses.replace(PUBLISHED[lib.NAME], sha256=PTH_SHA256)
    monkeypatch.setitem(PUBLISHED, lib.NAME, file)
    published = lib.load(SHAPES, PTH)
    assert (published.name, published.sha256) == ("", PTH_SHA256)
    assert {k: v.shape for k, v in published.arrays.items()} == SHAPES
    with np.load(GOLDEN / "torch_files.npz") as expected:
        np.testing.assert_array_equal(published.arrays["0.weight"], expected["0.weight"])


def test_the_published_file_is_the_one_that_pytorch_fid_names():
    """torch.hub puts the first digits of a file's hash into its name."""
    assert len(lib.SHA256) == 64 and lib.SHA256.startswith("6726825d")
    assert PUBLISHED[lib.NAME].url.endswith(f"inception-2015-12-05-{lib.SHA256[:8]}.pth")


def test_other_weights_are_refused_unless_asked_for(tmp_path):
    text = refusal(lib.load, SHAPES, PTH)
    assert_sentence(text, (PTH, PTH_SHA256, lib.SHA256, "eval.inception_sha256", "get the file"))
    asked = "0" * 64
    assert_sentence(refusal(lib.check, PTH, asked), (PTH_SHA256, f"expected {asked}"))


@pytest.mark.parametrize("path", ["", "absent.pth", str(GOLDEN)])
def test_a_missing_file_says_where_it_is(path):
    text = refusal(lib.check, path)
    assert_sentence(
        text, (f"eval.inception_weights={path!r}", f"shortcut_jax.download {lib.NAME}", "set that")
    )


@pytest.mark.parametrize(
    ("shapes", "found"),
    [({"0.weight": (3, 2, 5, 1)}, "(3, 2, 1, 5)"), ({"Conv2d_1a_3x3.conv.weight": (1,)}, "None")],
)
def test_weights_of_another_network_are_refused(shapes, found):
    ((name, shape),) = shapes.items()
    text = refusal(lib.load, shapes, PTH, PTH_SHA256)
    assert_sentence(text, (PTH, name, f"shape {found}", f"expected {shape}", "2015-12-05"))


def test_random_weights_are_never_called_fid():
    a, b = lib.load(SHAPES, lib.RANDOM), lib.load({"1.running_var": (3,)}, lib.RANDOM)
    assert a.name == b.name == "random" and a.sha256 != b.sha256
    np.testing.assert_array_equal(a.arrays["1.running_var"], b.arrays["1.running_var"])
    assert (a.arrays["1.running_var"] >= 0.5).all()


def test_random_weights_come_from_the_bits_of_philox():
    """The first draws are known answers of Random123: kat_vectors, philox4x64 10, all zeros."""
    before_zero = np.random.Philox(key=0, counter=2**256 - 1)
    assert [f"{bits:x}" for bits in before_zero.random_raw(2)] == [
        "16554d9eca36314c", "db20fe9d672d0fdc",
    ]  # fmt: skip
    name = "Conv2d_1a_3x3.bn.running_mean"
    bits = np.random.Philox(key=[0, zlib.crc32(name.encode())]).random_raw(32)
    found = lib.random_array(name, (32,))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, [int(b) // 2**40 / 2**24 - 0.5 for b in bits])


# ------------------------------------------------------------------ the metric in a config


@pytest.mark.parametrize("shape", [(16, 16, 3), (256, 256, 3), (32, 48, 3)])
def test_rgb_images_of_any_size_are_measured(shape):
    metrics.check_metric("fid", shape)


def test_grey_images_are_refused():
    text = refusal(metrics.check_metric, "fid", (32, 32, 1))
    assert_sentence(text, ("fid", "(any, any, 3)", "(32, 32, 1)", "choose another"))


def test_the_number_of_samples_is_in_the_name():
    def called(name, weights):
        protocol = INCEPTION["adm"]
        return Extractor(name, weights, protocol, (None, None, 3), 1, "", {}, 1, lambda images: {})

    published, other = called("inception", ""), called("inception", "random")
    assert metrics.label("fid", published, 50_000) == "fid"
    assert metrics.label("fid", published, 5_000) == "fid_5000"
    assert metrics.label("kid", published, 5_000) == "kid_5000"
    assert metrics.label("fid", other, 50_000) == "fd_inception_random"
    assert metrics.label("sfid", other, 60) == "sfd_inception_random_60"
    assert metrics.label("recall", other, 50_000) == "recall_inception_random"
    assert metrics.label("fd_digits", called("fd_digits", ""), 50) == "fd_digits"


@pytest.fixture
def config(monkeypatch):
    """A small config for a data set of RGB images, measured by an untrained network."""
    spec = data.DatasetSpec("none", (16, 16, 3), 10)
    monkeypatch.setitem(data.DATASETS, "colours", spec)
    config = digits.get_config("small").unlock()
    config.data.update(name="colours", split="train")
    config.eval.update(
        metrics=("fid",), num_samples=11, batch_size=4, allow_small_n=True,
        inception_weights="random", protocols=("pytorch_fid", "authors"),
    )  # fmt: skip
    return config.lock()


@pytest.mark.parametrize(
    ("wrong", "found"),
    [({"protocols": ("tensorflow",)}, "'tensorflow'"), ({"metrics": ("fd",)}, "'fd'")],
)
def test_names_of_protocols_and_metrics_are_checked(config, wrong, found):
    config.eval.update(wrong)
    assert_sentence(refusal(run.prepare, config), (found, "expected"))


def test_a_network_takes_its_usual_protocol_if_none_is_named():
    def names(extractor, *protocols):
        section = {"protocols": protocols}
        return [p.name for p in metrics.protocols_of(extractor, section)]

    assert names("inception", "clean", "adm") == ["clean", "adm"]
    assert [p.name for p in metrics.protocols_of("inception", {})] == ["adm"]
    assert names("dinov2", "clean") == ["edm2"] and names("fd_digits", "clean") == ["plain"]


def test_few_samples_are_refused_unless_asked_for(config):
    config.eval.allow_small_n = False
    text = refusal(run.prepare, config)
    assert_sentence(text, ("eval.num_samples=11", "fid", "2,048", "allow_small_n=True"))
    config.eval.num_samples = 2048
    assert run.prepare(config).image_shape == (16, 16, 3)


def test_missing_weights_are_refused_before_anything_else(config):
    config.eval.inception_weights = "absent.pth"
    assert_sentence(refusal(run.prepare, config), ("eval.inception_weights='absent.pth'",))


@pytest.fixture
def colours():
    images = np.random.default_rng(0).integers(0, 256, (23, 16, 16, 3), np.uint8)
    return Dataset(
        name="colours", split="train", image_shape=(16, 16, 3), num_classes=10, size=len(images),
        fingerprint="f", read=lambda i: {"image": images[i], "label": np.zeros(len(i), np.int32)},
    )  # fmt: skip


def evaluator(config, dataset):
    setup = run.prepare(config)
    params = state.init_params(setup.network, setup.image_shape, 0)
    shardings = sharding.shard_tree(params, setup.mesh)
    return measuring.Evaluator(setup, dataset, shardings), params


def test_a_small_reference_is_refused_unless_asked_for(config, colours):
    config.eval.update(num_samples=2048, allow_small_n=False)
    text = refusal(evaluator, config, colours)
    assert_sentence(text, ("colours/train of 23 images", "2,048", "allow_small_n=True"))


def test_a_config_that_says_fid_is_measured_and_named(config, colours, monkeypatch):
    """All but the network, which takes seconds: its weights are loaded and named."""

    def two_features(weights, protocol, batch, devices):
        return Extractor(
            name="inception", weights=weights.name, protocol=protocol, image_shape=(None, None, 3),
            feature_dim=2, sha256=weights.sha256, info={}, batch=4,
            forward=lambda x: {"features": x.reshape(len(x), -1)[:, :2].astype(np.float32)},
        )  # fmt: skip

    monkeypatch.setattr(fid, "build_extractor", two_features)
    monkeypatch.setattr(fid.inception, "weight_shapes", lambda: {"fc.bias": (3,)})
    measuring, params = evaluator(config, colours)
    cells = grid.cells(run.prepare(config), grid.Grid(steps=(1,)))
    record, of_authors = measuring.run(params, 0, cells).records
    assert record["metric"] == "fd_inception_random_11" and np.isfinite(record["value"])
    assert record["protocol"] == "pytorch_fid"
    assert record["quantisation"] == "uint8, (x+1)*127.5 rounded"
    assert record["resize"] == "299x299, bilinear half-pixel; v/127.5-1"
    assert record["extractor_sha256"] == lib.load({"fc.bias": (3,)}, "random").sha256
    assert record["num_samples"] == 11
    assert (of_authors["protocol"], of_authors["quantisation"]) == ("authors", "none")
    assert of_authors["value"] != record["value"]  # not rounded
    assert [metric_name(r) for r in (record, of_authors)] == [
        "fd_inception_random_11 (pytorch_fid)", "fd_inception_random_11 (authors)",
    ]  # fmt: skip
