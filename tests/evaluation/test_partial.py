"""A killed evaluation goes on at the batch it reached, with the same bits."""

import numpy as np
import pytest

from configs import digits
from shortcut_jax import metrics, run, state
from shortcut_jax.data.sources import Dataset
from shortcut_jax.evaluation import grid, measuring, partial
from shortcut_jax.evaluation.sample_files import Npz, Pngs
from shortcut_jax.parallel import sharding
from tests.evaluation.test_measuring import MeanPixels
from tests.kept_samples import Kept
from tests.sentences import contents

CELLS = [grid.Cell("ema", 1.0, n) for n in (1, 2)]


class Killed(BaseException):
    """As sudden as a signal."""


@pytest.fixture(scope="module")
def setup():
    config = digits.get_config("small")
    config.eval.update(num_samples=23, batch_size=4, metrics=("fd_digits",), grid_rows=6)
    return run.prepare(config)


@pytest.fixture
def evaluate(setup, monkeypatch):
    """evaluate(folder, ...): records and pictures of 23 samples in batches of 4, and what the
    extractor saw of them."""
    images = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 1), np.uint8)
    dataset = Dataset(
        name="toy", split="train", image_shape=(8, 8, 1), num_classes=10, size=len(images),
        fingerprint="f", read=lambda i: {"image": images[i]},
    )  # fmt: skip
    params = state.init_params(setup.network, setup.image_shape, 0)
    shardings = sharding.shard_tree(params, setup.mesh)
    monkeypatch.setattr(partial, "SHARE", 1e9)  # store after every batch

    def evaluate(folder, killed_after=None, sink=None, **identity):
        extractor = MeanPixels()
        monkeypatch.setattr(metrics, "load_extractor", lambda *_: extractor)
        evaluator = measuring.Evaluator(setup, dataset, shardings)
        evaluator.compared_with()
        extractor.seen.clear()
        if killed_after is not None:
            extractor.outputs = dying(extractor.outputs, killed_after)
        sinks = sink if sink is None or callable(sink) else lambda cell, identity: sink
        found = evaluator.run(params, 3, CELLS, partial=folder, identity=identity, sink=sinks)
        return found, sum(extractor.seen)

    return evaluate


def dying(outputs, calls):
    left = iter(range(calls))

    def once_more(images):
        if next(left, None) is None:
            raise Killed
        return outputs(images)

    return once_more


def assert_same(found, expected):
    assert found.records == expected.records
    assert found.samples.keys() == expected.samples.keys()
    for cell, images in found.samples.items():
        assert len(images) == 6
        np.testing.assert_array_equal(images, expected.samples[cell])


@pytest.mark.parametrize(("batches", "again"), [(0, 12), (1, 12), (5, 8), (6, 6), (8, 5), (11, 2)])
def test_it_goes_on_where_it_was(evaluate, tmp_path, batches, again):
    expected, seen = evaluate(None)
    assert seen == 2 * 24  # 6 batches of 4 for each cell
    with pytest.raises(Killed):
        evaluate(tmp_path, killed_after=batches)
    found, seen = evaluate(tmp_path)
    assert seen == 4 * again
    assert_same(found, expected)


def test_what_is_done_is_not_done_again(evaluate, tmp_path):
    expected, _ = evaluate(tmp_path)
    found, seen = evaluate(tmp_path)
    assert seen == 0
    assert_same(found, expected)


def test_another_checkpoint_or_config_starts_anew(evaluate, setup, tmp_path):
    evaluate(tmp_path, checkpoint=1)
    assert evaluate(tmp_path, checkpoint=2)[1] == 48
    with setup.config.unlocked():
        setup.config.eval.seed = 1
    try:
        assert evaluate(tmp_path, checkpoint=1)[1] == 48
    finally:
        setup.config.eval.seed = 0


def test_a_sink_that_lost_its_samples_gets_all_of_them(evaluate, tmp_path):
    with pytest.raises(Killed):
        evaluate(tmp_path, killed_after=3, sink=Kept())
    fresh = Kept()
    with pytest.raises(Killed):
        evaluate(tmp_path, killed_after=6, sink=fresh)
    assert len(fresh.images) == 23


def test_a_sink_is_told_what_decides_its_samples(evaluate):
    told = []

    def sink(cell, identity):
        told.append(identity)
        raise Killed

    for checkpoint in (1, 2):
        with pytest.raises(Killed):
            evaluate(None, sink=sink, checkpoint=checkpoint)
    one, other = told
    assert {
        "step": 3,
        "num_samples": 23,
        "sampling_steps": 1,
        "checkpoint": 1,
    }.items() <= one.items()
    assert other == {**one, "checkpoint": 2}


def test_a_sink_begun_anew_and_killed_gets_all_samples_the_next_time(evaluate, tmp_path):
    class Firsts(Kept):
        def write(self, first, images, labels):
            self.batches.append(first)

    class Full(Kept):
        def write(self, first, images, labels):
            raise Killed

    evaluate(tmp_path, sink=Firsts())  # of both cells
    with pytest.raises(Killed):
        evaluate(tmp_path, sink=Full())
    again = Firsts(resumes=True)
    evaluate(tmp_path, sink=again)
    assert again.batches == [0, 4, 8, 12, 16, 20]  # of the first cell; the second was not touched


@pytest.mark.parametrize("kind", [Npz, Pngs])
def test_samples_of_a_cell_that_is_done_are_not_drawn_again(evaluate, tmp_path, kind):
    def into(folder):
        folder.mkdir()
        return lambda cell, identity: kind(folder / f"s{cell.num_steps}", 23, "round", identity)

    expected, _ = evaluate(None, sink=into(tmp_path / "at once"))
    sinks = into(tmp_path / "killed")
    with pytest.raises(Killed):
        evaluate(tmp_path / "partial", killed_after=8, sink=sinks)  # 6 batches for each cell
    found, seen = evaluate(tmp_path / "partial", sink=sinks)
    assert seen == 4 * 5  # one had been seen, and was not written
    assert_same(found, expected)
    assert contents(tmp_path / "killed") == contents(tmp_path / "at once")
    assert evaluate(tmp_path / "partial", sink=sinks)[1] == 0
    first = next((tmp_path / "killed").rglob("s1" if kind is Npz else "s1/000003.png"))
    first.unlink()
    assert evaluate(tmp_path / "partial", sink=sinks)[1] == 24
    assert contents(tmp_path / "killed") == contents(tmp_path / "at once")
    first.with_name("labels.csv" if kind is Pngs else "s1").write_bytes(b"of another pass")
    assert evaluate(tmp_path / "partial", sink=sinks)[1] == 24


def test_storing_takes_a_small_share_of_the_time(tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr(partial.time, "monotonic", lambda: now)
    store = partial.Partial(tmp_path, {"a": 1})
    writes = []

    def savez(file, **arrays):
        nonlocal now
        writes.append(now)
        now += 2.0  # seconds that it takes

    monkeypatch.setattr(partial.np, "savez", savez)
    for _ in range(1000):
        now += 1.0
        store.store({"next": np.zeros(1)})
    assert len(writes) == 5 and np.diff(writes).min() >= 2 / partial.SHARE
    store.store({}, now=True)
    assert len(writes) == 6
