"""Which row goes where, and that threads neither change it nor hang."""

import dataclasses
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shortcut_jax.data import open_dataset, pipeline

REPOSITORY = Path(__file__).resolve().parents[2]


def collect(dataset, **kwargs):
    """All batches of a run, one after the other along the rows."""
    made = list(pipeline.batches(dataset, **kwargs))
    return {key: np.concatenate([batch[key] for batch in made]) for key in ("image", "label")}


def assert_same(a, b):
    np.testing.assert_array_equal(a["image"], b["image"])
    np.testing.assert_array_equal(a["label"], b["label"])


@given(size=st.integers(1, 40), seed=st.integers(0, 2**40), epoch=st.integers(0, 10**6))
def test_permutation_has_each_row_once(size, seed, epoch):
    np.testing.assert_array_equal(np.sort(pipeline.permutation(seed, epoch, size)), np.arange(size))


def test_streams_keep_their_values():
    # A run resumed with newer code or numpy must see the same rows: these values may never change.
    assert pipeline.permutation(0, 0, 10).tolist() == [0, 7, 2, 8, 5, 3, 6, 1, 4, 9]
    assert pipeline.permutation(3, 7, 10).tolist() == [7, 9, 5, 3, 8, 2, 6, 0, 4, 1]
    assert np.flatnonzero(pipeline.flips(0, 5, 16)).tolist() == [0, 1, 2, 3, 4, 5, 6, 8, 9, 13]


def test_seeds_epochs_and_streams_differ():
    orders = [pipeline.permutation(seed, epoch, 50) for seed, epoch in [(0, 0), (0, 1), (1, 0)]]
    orders.append(np.argsort(pipeline.random_bits(0, "flip", 0, 50)))
    assert len({tuple(order) for order in orders}) == 4


def test_permutation_is_uniform():
    firsts = [pipeline.permutation(0, epoch, 4)[0] for epoch in range(4000)]
    assert np.abs(np.bincount(firsts) - 1000).max() < 150  # 5 standard deviations


@pytest.mark.parametrize("batch_size", [3, 10, 25])
def test_epochs_follow_each_other_across_batches(make_toy, batch_size):
    size, epochs = 10, 6
    num_steps = size * epochs // batch_size
    labels = collect(
        make_toy(size), batch_size=batch_size, seed=4, start_step=0, num_steps=num_steps
    )["label"]
    expected = [pipeline.permutation(4, epoch, size) for epoch in range(epochs)]
    np.testing.assert_array_equal(labels, np.concatenate(expected)[: num_steps * batch_size])


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # make_toy keeps no state.
)
@given(
    size=st.integers(1, 30),
    share=st.integers(1, 9),
    start_step=st.integers(0, 50),
    seed=st.integers(0, 9),
    flip=st.booleans(),
)
def test_rows_do_not_depend_on_who_asks_or_the_start(make_toy, size, share, start_step, seed, flip):
    dataset, batch_size = make_toy(size), 4 * share
    run = {"batch_size": batch_size, "seed": seed, "flip": flip}
    whole = collect(dataset, **run, start_step=0, num_steps=start_step + 3)
    tail = {key: rows[start_step * batch_size :] for key, rows in whole.items()}
    assert_same(collect(dataset, **run, start_step=start_step, num_steps=3), tail)
    for rows in (np.arange(share, 3 * share), np.arange(0, batch_size, 3)):
        part = collect(dataset, **run, start_step=start_step, num_steps=3, rows=rows)
        wanted = np.concatenate([step * batch_size + rows for step in range(3)])
        assert_same(part, {key: whole[wanted] for key, whole in tail.items()})


@pytest.mark.parametrize(("num_threads", "prefetch"), [(0, 0), (1, 1), (4, 16)])
def test_threads_do_not_change_the_batches(make_toy, num_threads, prefetch):
    run = {"batch_size": 7, "seed": 1, "start_step": 2, "num_steps": 40, "flip": True}
    threaded = collect(make_toy(50), **run, num_threads=num_threads, prefetch=prefetch)
    assert_same(threaded, collect(make_toy(50), **run))


def test_flip_mirrors_half_of_the_rows(make_toy):
    run = {"batch_size": 100, "seed": 2, "start_step": 3, "num_steps": 40}
    plain = collect(make_toy(64), **run)
    flipped = collect(make_toy(64), **run, flip=True)
    np.testing.assert_array_equal(plain["label"], flipped["label"])
    drawn = np.concatenate([pipeline.flips(2, step, 100) for step in range(3, 43)])
    expected = np.where(drawn[:, None, None, None], plain["image"][:, :, ::-1], plain["image"])
    np.testing.assert_array_equal(flipped["image"], expected)
    assert abs(drawn.mean() - 0.5) < 0.04  # 5 standard deviations of 4000 draws
    by_step = drawn.reshape(40, 100)
    assert len({tuple(row) for row in by_step}) == 40
    assert by_step.mean(axis=0).min() > 0 and by_step.mean(axis=0).max() < 1


def test_samples_of_pairs_are_never_mirrored(make_toy):
    run = {"batch_size": 100, "seed": 2, "start_step": 3, "num_steps": 2}
    samples = dataclasses.replace(make_toy(64), holds="samples")
    assert_same(collect(samples, **run, flip=True), collect(samples, **run))


def test_seeds_give_different_rows(make_toy):
    run = {"batch_size": 20, "start_step": 0, "num_steps": 2}
    a, b = (collect(make_toy(100), **run, seed=seed)["label"] for seed in (0, 1))
    assert (a != b).any()


def test_values_are_scaled_to_minus_one_and_one(make_toy):
    every_grey = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    dataset = dataclasses.replace(
        make_toy(1), read=lambda indices: {"image": every_grey, "label": np.zeros(1, np.int32)}
    )
    batch = next(pipeline.batches(dataset, batch_size=1, seed=0, start_step=0, num_steps=1))
    assert batch["image"].dtype == np.float32 and batch["label"].dtype == np.int32
    assert batch["image"].min() == -1 and batch["image"].max() == 1
    expected = np.arange(256) / 127.5 - 1
    np.testing.assert_allclose(batch["image"].ravel(), expected, rtol=0, atol=1e-7)


def test_reading_leaves_the_data_set_as_it_was(digits_dir):
    dataset = open_dataset(dict(name="digits", split="train+test", data_dir=str(digits_dir)))
    before = dataset.rows(np.arange(dataset.size))
    batch = collect(dataset, batch_size=64, seed=0, start_step=0, num_steps=5, flip=True)
    assert batch["image"].shape == (320, 8, 8, 1)
    batch["image"][:] = 0
    assert_same(dataset.rows(np.arange(dataset.size)), before)


def test_no_steps_is_no_batch(make_toy):
    run = {"batch_size": 2, "seed": 0, "start_step": 5}
    assert list(pipeline.batches(make_toy(4), **run, num_steps=0)) == []
    assert len(list(pipeline.batches(make_toy(4), **run, num_steps=3))) == 3


def test_each_epoch_is_sorted_once_whatever_the_threads(make_toy, monkeypatch):
    epochs = []

    def counted(seed, epoch, size):
        epochs.append(epoch)
        time.sleep(0.05)  # Long enough for the other threads to want the same epoch.
        return permutation(seed, epoch, size)

    permutation = pipeline.permutation
    monkeypatch.setattr(pipeline, "permutation", counted)
    collect(
        make_toy(40), batch_size=4, seed=0, start_step=0, num_steps=30, num_threads=8, prefetch=8
    )
    assert epochs == [0, 1, 2]


def test_batches_are_made_ahead(make_toy):
    reads = []
    toy = make_toy(8)
    dataset = dataclasses.replace(toy, read=lambda i: (reads.append(i), toy.read(i))[1])
    iterator = pipeline.batches(
        dataset, batch_size=2, seed=0, start_step=0, num_steps=100, num_threads=1, prefetch=5
    )
    next(iterator)
    until = time.monotonic() + 10
    while len(reads) < 6 and time.monotonic() < until:
        time.sleep(0.01)
    assert len(reads) == 6  # The one taken and five ahead.
    iterator.close()


def test_close_ends_the_threads(make_toy):
    before = set(threading.enumerate())
    iterator = pipeline.batches(
        make_toy(8), batch_size=2, seed=0, start_step=0, num_steps=10**9, num_threads=3
    )
    next(iterator)
    started = set(threading.enumerate()) - before
    assert started
    iterator.close()
    for thread in started:
        thread.join(timeout=10)
        assert not thread.is_alive()


def test_read_errors_reach_the_caller(make_toy):
    def fail(indices):
        raise OSError("disk gone")

    dataset = dataclasses.replace(make_toy(8), read=fail)
    with pytest.raises(OSError, match="disk gone"):
        next(pipeline.batches(dataset, batch_size=2, seed=0, start_step=0, num_steps=9))


def test_process_exits_with_an_unfinished_iterator(digits_dir):
    script = f"""
from shortcut_jax.data import open_dataset
from shortcut_jax.data.pipeline import batches
dataset = open_dataset(dict(name="digits", split="train", data_dir={str(digits_dir)!r}))
kept = batches(dataset, batch_size=64, seed=0, start_step=0, num_steps=10**9)
dropped = batches(dataset, batch_size=64, seed=0, start_step=0, num_steps=10**9)
next(kept), next(dropped)
del dropped
"""
    subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, check=True, timeout=60)
