"""Sample i is sample i everywhere; exactly N are measured; a number carries its protocol."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import digits
from shortcut_jax import data, metrics, run, state
from shortcut_jax.data.sources import Dataset
from shortcut_jax.errors import UserError
from shortcut_jax.evaluation import grid, measuring, reports
from shortcut_jax.evaluation.partial import Partial
from shortcut_jax.metrics import gauges, references
from shortcut_jax.metrics.protocols import PLAIN, quantise
from shortcut_jax.parallel import sharding
from tests.kept_samples import by_steps
from tests.sentences import assert_sentence

# ------------------------------------------------------------------ sample i is sample i

REFERENCE = "1,1,32"  # mesh axes and batch size
OTHERS = ("1,1,20", "8,1,32", "1,8,16")


@pytest.fixture(scope="module")
def sampled(run_quickly, tmp_path_factory):
    """A folder with what tests/programs/sample_on_meshes.py writes."""
    out = tmp_path_factory.mktemp("samples")
    args = ["-m", "tests.programs.sample_on_meshes", str(out), REFERENCE, *OTHERS]
    assert run_quickly(args, devices=8, timeout=280).returncode == 0
    return out


@pytest.mark.parametrize("spec", OTHERS)
def test_noise_and_labels_are_bit_identical(sampled, spec):
    with np.load(sampled / f"{REFERENCE}.npz") as a, np.load(sampled / f"{spec}.npz") as b:
        np.testing.assert_array_equal(a["noise"], b["noise"])
        np.testing.assert_array_equal(a["labels"], b["labels"])
        assert len(np.unique(a["noise"])) > 0.99 * a["noise"].size
        assert len(np.unique(a["labels"])) > 5


@pytest.mark.parametrize("spec", OTHERS)
def test_images_are_the_same(sampled, spec):
    """Equal but for one grey level in a thousandth of the pixels.

    A matrix product of another number of rows may add its terms in another order; the last bit of
    a float32 that differs decides, very rarely, to which of two grey levels a value is rounded.
    """
    with np.load(sampled / f"{REFERENCE}.npz") as a, np.load(sampled / f"{spec}.npz") as b:
        difference = np.abs(a["images"].astype(int) - b["images"])
        moved = np.abs(a["images"] - np.clip((a["noise"] + 1) * 127.5, 0, 255))
    assert difference.max() <= 1
    assert np.mean(difference > 0) < 1e-3
    assert np.mean(moved > 1) > 0.2  # the network did something


@pytest.mark.parametrize("spec", OTHERS)
def test_latents_are_decoded_alike(sampled, spec):
    """But for the order of sums in convolutions of another number of images."""
    with np.load(sampled / f"{REFERENCE}.npz") as a, np.load(sampled / f"{spec}.npz") as b:
        np.testing.assert_allclose(b["decoded"], a["decoded"], rtol=1e-5, atol=1e-5)
        assert np.abs(np.diff(a["decoded"], axis=0)).max((1, 2, 3)).min() > 0.1  # rows differ


@pytest.mark.parametrize("spec", OTHERS)
def test_the_distance_is_the_same(sampled, spec):
    a, b = (json.loads((sampled / f"{s}.json").read_text()) for s in (REFERENCE, spec))
    assert [r["value"] for r in b] == pytest.approx([r["value"] for r in a], rel=1e-3)
    assert b[0]["devices"] * b[0]["batch_size"] != a[0]["devices"] * a[0]["batch_size"]


@pytest.mark.parametrize("spec", (REFERENCE, *OTHERS))
def test_exactly_as_many_as_asked_for(sampled, spec):
    with np.load(sampled / f"{spec}.npz") as a:
        assert a["images"].shape == (50, 8, 8, 1) and a["images"].dtype == np.uint8
        assert a["labels"].shape == (50,)


# ------------------------------------------------------------------ what is measured


class MeanPixels:
    """An extractor of two features whose distance is easily computed; counts what it sees."""

    name, weights, sha256 = "fd_digits", "", "of no file"
    protocol = PLAIN

    def __init__(self):
        self.seen = []

    def outputs(self, images):
        self.seen.append(len(images))
        levels = quantise("round", images)
        flat = levels.reshape(len(images), -1).astype(np.float32)
        return {"features": np.stack([flat.mean(1), flat[:, 0]], axis=1)}

    def begin(self, images):
        return lambda: self.outputs(images)


@pytest.fixture(scope="module")
def measured():
    """Extractor, data set, params and evaluation of 11 samples in batches of 4."""
    extractor = MeanPixels()
    images = np.random.default_rng(0).integers(0, 256, (1003, 8, 8, 1), np.uint8)
    dataset = Dataset(
        name="toy", split="train", image_shape=(8, 8, 1), num_classes=10, size=len(images),
        fingerprint="f", read=lambda i: {"image": images[i], "label": np.zeros(len(i), np.int32)},
    )  # fmt: skip
    config = digits.get_config("small")
    config.eval.update(num_samples=11, batch_size=4, metrics=("fd_digits",), grid_rows=3)
    setup = run.prepare(config)
    params = state.init_params(setup.network, setup.image_shape, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "load_extractor", lambda *_: extractor)
        shardings = sharding.shard_tree(params, setup.mesh)
        evaluator = measuring.Evaluator(setup, dataset, shardings)
        kept, sink = by_steps()
        cells = grid.cells(setup, grid.Grid(steps=(1, 2)))
        found = evaluator.run(params, 7, cells, sink=sink)
    return extractor, images, config, found, kept


def test_devices_have_the_next_batches_before_anything_is_waited_for(measured, monkeypatch):
    """Sampling of batch i + 2 and the network on i + 1 are begun before the features of i are read,
    and these are sent to other processes before those of i - 1 are taken; nothing is done twice."""
    _, _, config, _, _ = measured
    events = []

    class Recorded(MeanPixels):
        def begin(self, images):
            batch = sum(name == "features begun" for name, _ in events)
            events.append(("features begun", batch))

            def finish():
                events.append(("features read", batch))
                return self.outputs(images)

            return finish

    class Recording(measuring.Evaluator):
        def _dispatch(self, params, cell, first):
            events.append(("sampling begun", first // 4))
            return super()._dispatch(params, cell, first)

    def begin_gather(rows, mesh):
        if rows.ndim > 2:  # pictures
            return lambda: rows
        batch = sum(name == "sent" for name, _ in events)
        events.append(("sent", batch))

        def finish():
            events.append(("taken", batch))
            return rows

        return finish

    monkeypatch.setattr(metrics, "load_extractor", lambda *_: Recorded())
    monkeypatch.setattr(sharding, "begin_gather", begin_gather)
    setup = run.prepare(config)
    params = state.init_params(setup.network, setup.image_shape, 0)
    evaluator = Recording(setup, None, sharding.shard_tree(params, setup.mesh))
    evaluator._references = []  # nothing is compared here
    evaluator._sample(params, grid.Cell("ema", 1.0, 1), Partial(None, {}), None)
    assert events == [
        ("sampling begun", 0),
        ("sampling begun", 1),
        ("features begun", 0),
        ("sampling begun", 2),
        ("features begun", 1),
        ("features read", 0),
        ("sent", 0),
        ("features begun", 2),
        ("features read", 1),
        ("sent", 1),
        ("taken", 0),
        ("features read", 2),
        ("sent", 2),
        ("taken", 1),
        ("taken", 2),
    ]


def test_every_sample_and_every_reference_image_counts_once(measured):
    extractor, _, _, _, kept = measured
    # A last batch of 3 is drawn whole; the reference is measured once.
    assert extractor.seen == [4, 4, 4, 1000, 3, 4, 4, 4]
    assert {steps: len(samples.images) for steps, samples in kept.items()} == {1: 11, 2: 11}
    np.testing.assert_array_equal(kept[1].images, kept[2].images)  # a velocity of zero


def test_value_is_the_distance_of_the_saved_samples_to_the_data(measured):
    extractor, images, _, found, kept = measured
    samples, reference = metrics.Moments(), metrics.Moments()
    samples.update(extractor.outputs(kept[1].images)["features"])
    reference.update(extractor.outputs(images)["features"])
    expected = metrics.frechet_distance(samples, reference)
    assert found.records[0]["value"] == pytest.approx(expected, rel=1e-9)


def test_records_carry_the_protocol(measured):
    _, _, config, found, _ = measured
    assert [r["sampling_steps"] for r in found.records] == [1, 2]
    expected = {
        "metric": "fd_digits",
        "step": 7,
        "num_samples": 11,
        "sampler": "euler",
        "objective": "shortcut",
        "params": "ema",
        "ema_rate": config.ema_rate,
        "cfg_scale": 1.0,
        "guided": False,
        "labels": "uniform",
        "seed": 0,
        "protocol": "plain",
        "quantisation": "uint8, (x+1)*127.5 rounded",
        "resize": "none",
        "extractor_sha256": MeanPixels.sha256,
        "reference": "toy/train",
        "reference_size": 1003,
        "reference_fingerprint": "f",
        "dtype": "float32",
        "backend": "cpu",
        "batch_size": 4,
        "config_hash": run.config_hash(config),
        "jax": jax.__version__,
    }
    for record in found.records:
        assert expected.items() <= record.items()
        assert len(record["reference_sha256"]) == 64 and record["commit"]


@pytest.mark.parametrize(
    ("objective", "cfg_scale", "num_steps", "guided"),
    [
        ("flow_matching", 1.5, 1, True),
        ("flow_matching", 1.0, 1, False),
        ("flow_matching", 0.0, 1, False),  # without labels
        ("shortcut", 1.5, 128, True),
        ("shortcut", 1.5, 4, False),  # the guidance is in the weights
        ("shortcut", 0.0, 128, False),
    ],
)
def test_records_say_guided_where_the_sampler_guides(objective, cfg_scale, num_steps, guided):
    config = digits.get_config(f"small,objective={objective}")
    config.objective.update(cfg_scale=cfg_scale, class_dropout=0.1 if cfg_scale else 1.0)
    config.eval.metrics = ()
    evaluator = measuring.Evaluator(run.prepare(config), None, None)
    facts = evaluator._facts(grid.Cell("ema", cfg_scale, num_steps))
    assert facts["guided"] is guided


def test_stored_statistics_of_other_images_are_refused(measured, monkeypatch, tmp_path):
    extractor, _, config, *_ = measured
    monkeypatch.setattr(metrics, "load_extractor", lambda *_: extractor)
    images = np.zeros((5, 8, 8, 1), np.uint8)
    dataset = Dataset(
        name="digits", split="test", image_shape=(8, 8, 1), num_classes=10, size=len(images),
        fingerprint="f", read=lambda i: {"image": images[i]},
    )  # fmt: skip
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.eval.reference = str(tmp_path / "ref.npz")
    origin = data.origin({**config.data, "split": "test"})
    made = references.measure(gauges.build(config.eval), dataset, 0, origin)
    references.save(Path(config.eval.reference), made)
    with pytest.raises(UserError) as error:
        measuring.Evaluator(run.prepare(config), None, None)
    fragments = ("ref.npz", "data.split='test' where this config has 'train+test'")
    assert_sentence(str(error.value), fragments)
    config.data.split = "test"
    measuring.Evaluator(run.prepare(config), None, None)


def test_pictures_are_the_first_samples(measured):
    *_, found, kept = measured
    assert [cell.num_steps for cell in found.samples] == [1, 2]
    for cell, images in found.samples.items():
        np.testing.assert_array_equal(images, kept[cell.num_steps].images[:3])


# ------------------------------------------------------------------ what is written


def read_results(workdir):
    lines = (Path(workdir) / "eval" / "results.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_record_replaces_the_earlier_one_of_its_protocol(measured, tmp_path):
    found = measured[-2]
    reports.report(tmp_path, found)
    better = [{**record, "value": 0.5} for record in found.records]
    reports.report(tmp_path, dataclasses.replace(found, records=better[:1]))
    assert sorted(r["value"] for r in read_results(tmp_path)) == sorted(
        [0.5, found.records[1]["value"]]
    )
    other = [{**record, "params": "online"} for record in found.records]
    folder = reports.report(tmp_path, dataclasses.replace(found, records=other))
    assert len(read_results(tmp_path)) == 4
    assert folder == tmp_path / "eval" / "7"
    assert {path.name for path in folder.iterdir()} == {"samples.png", "curve.png"}


def test_table_has_a_row_per_metric_and_a_column_per_number_of_steps():
    records = [
        {"metric": "a", "sampling_steps": 4, "value": 2.0},
        {"metric": "a", "sampling_steps": 1, "value": 1.0},
        {"metric": "longer", "sampling_steps": 4, "value": 3.5},
    ]
    same = {"protocol": "plain", "params": "ema", "cfg_scale": 1.0}
    records = [{**record, **same} for record in records]
    header, a, longer = reports.table(records).splitlines()
    assert header.split() == ["1", "4", "sampling", "steps"]
    assert a.split() == ["a", "1.000", "2.000"]
    assert longer.split() == ["longer", "3.500"]
    assert longer.index("3.500") == a.index("2.000")
    records.append({**same, "metric": "a", "sampling_steps": 2, "value": 123456.0})
    assert reports.table(records).splitlines()[1].split() == ["a", "1.000", "123456.000", "2.000"]
