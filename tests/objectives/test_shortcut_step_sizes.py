"""Shortcut targets: step sizes, their times, and the batches that have room for all sizes."""

import collections
import fractions
import itertools
import re

import jax
import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from shortcut_jax import rng
from shortcut_jax.errors import UserError
from shortcut_jax.objectives import Velocities
from shortcut_jax.objectives.shortcut import stratified_levels
from tests import toys
from tests.objectives.shortcut_targets import (
    AUTHORS,
    EMA,
    PROGRESS,
    SAMPLINGS,
    SHAPE,
    N,
    bootstrap_rows,
    chi_square,
    make_batch,
    make_objective,
    make_targets,
    sixteen_steps,
)

# ---- step sizes and their times ------------------------------------------------------------------


def test_times_are_multiples_of_the_learned_step_and_uniform():
    objective = make_objective()
    targets, boot = sixteen_steps(objective), bootstrap_rows(objective, 16 * N)
    for level in range(7):
        places = targets.t[boot & (targets.d == 0.5**level)] * 2**level
        np.testing.assert_array_equal(places, np.round(places))
        assert places.min() >= 0 and places.max() <= 2**level - 1
        if level > 0:
            degrees = 2**level - 1
            counts = np.bincount(places.astype(int), minlength=2**level)
            assert chi_square(counts) < degrees + 4 * (2 * degrees) ** 0.5


def test_random_sizes_are_uniform_over_the_levels():
    objective = make_objective()
    targets, boot = sixteen_steps(objective), bootstrap_rows(objective, 16 * N)
    sizes, counts = np.unique(targets.d[boot], return_counts=True)
    np.testing.assert_array_equal(sizes, [1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1])
    assert chi_square(counts) < 22.5  # 6 degrees, p = 0.001
    # Every row has them all in turn, from step to step.
    steps = targets.d[boot].reshape(16, -1)
    assert 0.8 < np.mean(steps[1:] != steps[:-1]) < 0.92  # 6/7


def test_systematic_sizes_come_in_turn_from_one_drawn_at_random():
    objective = make_objective(step_size_sampling="systematic")
    boot = bootstrap_rows(objective)
    first = []
    for index in range(70):
        levels = -np.log2(make_targets(objective, index=index).d[boot]).astype(int)
        np.testing.assert_array_equal((levels[1:] - levels[:-1]) % 7, 1)
        first.append(levels[0])
    # So each row has every size equally often: as random sizes, but for what goes together.
    assert chi_square(np.bincount(first, minlength=7)) < 22.5  # 6 degrees, p = 0.001


@pytest.mark.parametrize("sampling, twins", [("random", 64), ("systematic", 10), ("stratified", 9)])
def test_target_evaluations_are_the_rows_the_network_is_asked_for(sampling, twins):
    objective = make_objective(cfg_scale=3.0, step_size_sampling=sampling)
    spy = toys.Spy(EMA)
    make_targets(objective, ema=spy)
    assert objective.target_evaluations(N) == sum(len(x) for x, *_ in spy.calls) == 2 * (64 + twins)


@settings(max_examples=30, deadline=None)
@given(
    sampling=st.sampled_from(SAMPLINGS),
    in_shard=st.integers(1, 40),
    num_shards=st.integers(1, 16),
    index=st.integers(0, 100),
)
def test_no_shard_has_more_rows_to_guide_than_twins(sampling, in_shard, num_shards, index):
    objective = make_objective(cfg_scale=3.0, step_size_sampling=sampling)
    n = in_shard * num_shards
    assume(n >= 7)
    levels = np.asarray(objective._levels(jax.random.key(index), n))
    most = (levels == 6).reshape(num_shards, -1).sum(1).max()
    spare = {"random": in_shard, "systematic": 1, "stratified": 0}[sampling]
    assert most <= objective._most_smallest(n, num_shards) <= most + spare


@pytest.mark.parametrize(
    ("batch_size", "fraction", "each", "whole"),
    [(64, 1 / 8, 1, 2), (256, 1 / 8, 4, 8), (64, 1 / 4, 2, 4), (256, 1 / 4, 9, 10)],
)
def test_stratified_counts_are_the_released_codes(batch_size, fraction, each, whole):
    expected = {1.0: whole} | {2.0**-level: each for level in range(1, 7)}
    levels = stratified_levels(round(batch_size * fraction), 7)
    assert collections.Counter((0.5**levels).tolist()) == expected
    if batch_size == N:
        objective = make_objective(bootstrap_fraction=fraction, step_size_sampling="stratified")
        targets = make_targets(objective)
        expected[0.0] = batch_size * (1 - fraction)
        assert collections.Counter(targets.d.tolist()) == expected
        np.testing.assert_array_equal(targets.d == 0, ~bootstrap_rows(objective))


@settings(deadline=None)
@given(num_levels=st.integers(1, 10), extra=st.integers(0, 500))
def test_stratified_levels(num_levels, extra):
    n = num_levels + extra
    each = n // num_levels
    levels = stratified_levels(n, num_levels)
    assert len(levels) == n
    counts = np.bincount(levels, minlength=num_levels)
    np.testing.assert_array_equal(counts[1:], [each] * (num_levels - 1))
    # Rows to guide are spread: of two equally long stretches one has at most one more.
    smallest = np.flatnonzero(levels == num_levels - 1)
    gaps = np.diff([*smallest, smallest[0] + n])
    assert gaps.max() - gaps.min() <= 1 or num_levels == 1


def test_branches_name_the_size_of_each_row():
    objective = make_objective()
    assert objective.num_levels == 7
    sizes = dict(zip(objective.branches, [0.0, *(2.0**-level for level in range(7))], strict=True))
    assert list(sizes) == ["empirical", *(f"bootstrap_1_{n}" for n in (1, 2, 4, 8, 16, 32, 64))]
    targets = make_targets(objective)
    named = [sizes[objective.branches[branch]] for branch in targets.branch]
    np.testing.assert_array_equal(targets.d, named)


# ---- which batches work --------------------------------------------------------------------------

FRACTIONS = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 3 / 8, 1 / 3, 2 / 7, 5 / 64, 0.3)


def splits(objective, n, num_shards):
    """Whether n rows give every shard whole groups, and every size a row if stratified."""
    share = fractions.Fraction(objective.bootstrap_fraction).limit_denominator(64)
    levels = round(np.log2(objective.denoise_timesteps))
    enough = objective.step_size_sampling != "stratified" or n * share >= levels
    return n > 0 and n % (num_shards * share.denominator) == 0 and enough


@settings(deadline=None)  # machines are shared
@example(batch_size=16, fraction=3 / 8, num_shards=1, m=128, sampling="stratified")  # 6 rows
@given(
    batch_size=st.integers(0, 100) | st.integers(0, 2000),
    fraction=st.sampled_from(FRACTIONS),
    num_shards=st.sampled_from((1, 2, 3, 4, 8, 16)),
    m=st.sampled_from((2, 8, 128, 1024)),
    sampling=st.sampled_from(SAMPLINGS),
)
def test_validate_names_the_smallest_batch_that_works(
    batch_size, fraction, num_shards, m, sampling
):
    objective = make_objective(
        bootstrap_fraction=fraction, denoise_timesteps=m, step_size_sampling=sampling
    )
    if splits(objective, batch_size, num_shards):
        objective.validate(batch_size, num_shards)
        return
    with pytest.raises(UserError, match=f"batch_size={batch_size} ") as error:
        objective.validate(batch_size, num_shards)
    named = int(re.findall(r"\d+", str(error.value))[-1])
    assert named == next(n for n in itertools.count(batch_size) if splits(objective, n, num_shards))
    objective.validate(named, num_shards)


@settings(max_examples=10, deadline=None)
@given(
    groups=st.integers(1, 3),
    fraction=st.sampled_from(FRACTIONS),
    num_shards=st.sampled_from((1, 2, 4)),
    m=st.sampled_from((2, 16, 128)),
    changes=st.sampled_from(({}, {"cfg_scale": 2.0}, {**AUTHORS, "cfg_scale": 1.5})),
)
def test_what_validate_accepts_gives_targets_of_the_right_shapes(
    groups, fraction, num_shards, m, changes
):
    changes = {**changes, "bootstrap_fraction": fraction, "denoise_timesteps": m}
    objective = make_objective(**changes)
    n = groups * next(n for n in itertools.count(1) if splits(objective, n, num_shards))
    objective.validate(n, num_shards)

    def run(batch):
        return objective.targets(
            rng.draws(0, "t", 0), batch, Velocities(EMA, EMA), PROGRESS, num_shards
        )[0]

    targets = jax.eval_shape(run, make_batch(n))
    image, row, integer = (("float32", (n, *SHAPE)), ("float32", (n,)), ("int32", (n,)))
    expected = {"x_t": image, "target": image, "t": row, "d": row, "weight": row}
    expected |= {"labels": integer, "branch": integer}
    assert {name: (a.dtype.name, a.shape) for name, a in vars(targets).items()} == expected


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"denoise_timesteps": 100}, "denoise_timesteps=100"),
        ({"denoise_timesteps": 1}, "denoise_timesteps=1 "),
        ({"denoise_timesteps": 0}, "denoise_timesteps=0"),
        ({"denoise_timesteps": -4}, "denoise_timesteps=-4"),
        ({"bootstrap_fraction": 0.0}, "bootstrap_fraction=0.0"),
        ({"bootstrap_fraction": 1.0}, "bootstrap_fraction=1.0"),
        ({"bootstrap_fraction": -0.25}, "bootstrap_fraction=-0.25"),
        ({"bootstrap_fraction": 0.123}, "bootstrap_fraction=0.123"),
    ],
)
def test_validate_refuses_settings_that_are_no_shortcut_model(changes, named):
    with pytest.raises(UserError, match=re.escape(named)):
        make_objective(**changes).validate(N, 1)


def test_stratified_refuses_a_batch_that_would_leave_sizes_out():
    # Released code, batch 32 with every 8th row: 4 rows for 7 sizes, all of them d = 1.
    with pytest.raises(UserError, match="smallest that works from here is 56"):
        make_objective(**AUTHORS).validate(32, 1)
