"""Named streams: every (seed, name, index) is a key of its own, the same in every process."""

import itertools

import jax
import numpy as np
import pytest

from shortcut_jax import rng

NAMES = (
    "init", "train/noise", "train/time", "train/dropout", "train/bootstrap/noise",
    "train/bootstrap/time", "train/bootstrap/step_size", "train/bootstrap/dropout", "eval/noise",
    "eval/label",
)  # fmt: skip


def bits(key):
    return tuple(jax.random.key_data(key).tolist())


def test_streams_differ_by_seed_name_and_index():
    keys = itertools.product((0, 1, 2**32 - 1), NAMES, (0, 1, 2, 400_000, 2**32 - 1))
    seen = {key: bits(rng.stream(*key)) for key in keys}
    assert len(set(seen.values())) == len(seen) == 3 * 10 * 5


def test_a_stream_is_a_function_of_its_arguments():
    assert bits(rng.stream(3, "eval/noise", 7)) == bits(rng.stream(3, "eval/noise", 7))


def test_streams_are_the_same_in_every_process(run_python):
    # hash() of a string is another in each process; checkpoints and pods rely on this not being so.
    code = (
        "import jax; from shortcut_jax import rng;"
        "print(jax.random.key_data(rng.stream(3, 'train/noise', 7)).tolist())"
    )
    out = run_python(["-c", code], env={"PYTHONHASHSEED": "123"}).stdout
    assert out.strip() == str(list(bits(rng.stream(3, "train/noise", 7))))


@pytest.mark.parametrize("dtype", [np.int32, np.uint32])
def test_the_index_may_be_traced(dtype):
    traced = jax.jit(lambda index: jax.random.key_data(rng.stream(3, "train/noise", index)))
    assert tuple(traced(dtype(7)).tolist()) == bits(rng.stream(3, "train/noise", 7))


def test_draws_are_the_streams_of_one_scope_and_step():
    draw = rng.draws(3, "train", 7)
    for name in ("noise", "bootstrap/time"):
        assert bits(draw(name)) == bits(rng.stream(3, f"train/{name}", 7))
