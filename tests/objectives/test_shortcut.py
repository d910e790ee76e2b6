"""Shortcut targets against numpy in float64, with velocities of a closed form.

The velocity of most tests is s(x, t, d, label) = a x + b t + c d + e label: asking the network at a
wrong point, time, size or label, or asking the wrong network, changes the answer. Labels number the
images, so that they tell which image a row is made of.

Most tests run operation by operation and share the shapes of 256 rows, a quarter of which
bootstrap: compiling is what takes time here, and every operation is compiled once.
"""

import collections
import fractions
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from shortcut_jax import rng
from shortcut_jax.errors import UserError
from shortcut_jax.objectives import Progress, Velocities
from shortcut_jax.objectives.shortcut import Shortcut, stratified_levels
from tests import toys

N = 256
NULL = 10_000
PROGRESS = Progress(0, 1)
SHAPE = (1, 1, 2)
AUTHORS = dict(Shortcut.authors_code)
SAMPLINGS = ("random", "systematic", "stratified")


def make_objective(**changes):
    return Shortcut(null_label=NULL, **{"class_dropout": 0.0, **changes})


def linear_velocity(a, b, c, e):
    return lambda x, t, d, labels: a * x + (b * t + c * d + e * labels)[:, None, None, None]


ONLINE = linear_velocity(-0.5, 0.3, 1.1, -0.001)
EMA = linear_velocity(0.7, -1.3, 0.9, 0.001)


def make_batch(n=N, scale=1.0):
    return toys.make_batch(n, SHAPE, scale)


def make_targets(objective, batch=None, *, online=ONLINE, ema=EMA, num_shards=1, seed=0, index=0):
    draw = rng.draws(seed, "train", index)
    velocities = Velocities(online, ema)
    targets, _ = objective.targets(draw, batch or make_batch(), velocities, PROGRESS, num_shards)
    return jax.tree.map(np.asarray, targets)


def compiled_targets(objective, batch):
    """Like make_targets, for shapes no other test has: compiled as a whole, in less time."""
    cheaply = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

    @functools.partial(jax.jit, compiler_options=cheaply)
    def run(batch):
        return objective.targets(
            rng.draws(0, "train", 0), batch, Velocities(ONLINE, EMA), PROGRESS
        )[0]

    return jax.tree.map(np.asarray, run(batch))


@functools.cache
def sixteen_steps(objective, *, scale=1.0):
    """The rows of 16 steps: 1,024 that bootstrap and 3,072 that do not."""
    batch = make_batch(scale=scale)
    steps = [make_targets(objective, batch, index=index) for index in range(16)]
    return jax.tree.map(lambda *a: np.concatenate(a), *steps)


def bootstrap_rows(objective, n=N):
    """Mask of the rows that bootstrap: the first p of every q."""
    share = fractions.Fraction(objective.bootstrap_fraction).limit_denominator(64)
    return np.arange(n) % share.denominator < share.numerator


class Spy:
    """A velocity that notes what it was asked."""

    def __init__(self, velocity=EMA):
        self.velocity = velocity
        self.calls = []

    def __call__(self, x, t, d, labels):
        self.calls.append([np.asarray(a) for a in (x, t, d, labels)])
        return self.velocity(x, t, d, labels)


def spied_half_steps(**changes):
    """Targets, the mask of the rows that bootstrap, and the two calls they made."""
    objective, spy = make_objective(**changes), Spy()
    targets = make_targets(objective, ema=spy)
    first, second = spy.calls
    return targets, bootstrap_rows(objective), first, second


def chi_square(counts):
    """Of counts that should be equal."""
    expected = np.sum(counts) / len(counts)
    return np.sum((counts - expected) ** 2) / expected


# ---- bootstrap targets ---------------------------------------------------------------------------


def reference_target(objective, targets, coefficients):
    """The target of every row in float64, as if it were a bootstrap row of its size."""
    a, b, c, e = coefficients
    clip, w = objective.bootstrap_clip or np.inf, objective.cfg_scale
    x, t = targets.x_t.astype(np.float64), targets.t.astype(np.float64)
    half = targets.d.astype(np.float64) / 2
    smallest = half == 1 / objective.denoise_timesteps

    def ask(x, t):
        def network(label):
            return a * x + toys.per_row(b * t + c * np.where(smallest, 0, half) + e * label)

        conditional, unconditional = network(targets.labels), network(np.array([NULL]))
        guided = unconditional + w * (conditional - unconditional)
        guides = smallest & (objective.bootstrap_cfg and w not in (0, 1))
        return np.where(toys.per_row(guides), guided, conditional)

    s1 = ask(x, t)
    s2 = ask(np.clip(x + toys.per_row(half) * s1, -clip, clip), t + half)
    return np.clip((s1 + s2) / 2, -clip, clip)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"denoise_timesteps": 8},
        {"bootstrap_clip": 0.8},
        {"cfg_scale": 3.0},
        {"cfg_scale": 3.0, "step_size_sampling": "stratified", "denoise_timesteps": 16},
        {"cfg_scale": 3.0, "step_size_sampling": "systematic"},
        {"cfg_scale": 3.0, "bootstrap_cfg": False},
        {"cfg_scale": 0.0},
        {**AUTHORS, "cfg_scale": 1.5},
    ],
    ids=["default", "8_steps", "clip", "guided", "stratified", "systematic", "no_guides", "null"]
    + ["authors"],
)
def test_bootstrap_targets_match_numpy(changes):
    objective = make_objective(**changes)
    targets = make_targets(objective, ema=linear_velocity(2, -3, 5, 0.001))
    expected = reference_target(objective, targets, (2, -3, 5, 0.001))
    boot = bootstrap_rows(objective)
    np.testing.assert_allclose(targets.target[boot], expected[boot], rtol=1e-5, atol=2e-5)


def test_bootstrap_targets_by_hand():
    # M = 4, s = 2x + t + 4d.
    objective = make_objective(denoise_timesteps=4)
    targets = make_targets(objective, ema=linear_velocity(2, 1, 4, 0))
    boot = bootstrap_rows(objective)
    whole, half = boot & (targets.d == 1), boot & (targets.d == 0.5)
    assert whole.sum() > 9 and half.sum() > 9 and (whole | half).sum() == boot.sum()
    # d = 1 from t = 0, half-steps of 1/2: s1 = 2x + 2, x' = x + s1/2 = 2x + 1,
    # s2 = 2x' + 1/2 + 2 = 4x + 4.5, mean 3x + 3.25.
    x = targets.x_t
    np.testing.assert_allclose(targets.target[whole], 3 * x[whole] + 3.25, rtol=1e-5, atol=1e-5)
    # d = 1/2 from t, half-steps of 1/4 = 1/M, asked as d = 0: s1 = 2x + t,
    # x' = 1.5x + t/4, s2 = 2x' + t + 1/4 = 3x + 1.5t + 0.25, mean 2.5x + 1.25t + 0.125.
    expected = 2.5 * x + 1.25 * toys.per_row(targets.t) + 0.125
    np.testing.assert_allclose(targets.target[half], expected[half], rtol=1e-5, atol=1e-5)


def test_the_second_half_step_is_asked_at_t_plus_d():
    targets, boot, first, second = spied_half_steps()
    np.testing.assert_array_equal(first[1], targets.t[boot])
    np.testing.assert_array_equal(second[1], targets.t[boot] + targets.d[boot] / 2)


def test_the_network_learns_2d_from_half_steps_of_d_and_the_smallest_is_asked_as_0():
    targets, boot, first, second = spied_half_steps()
    asked = {2.0**-level: 2.0 ** -(level + 1) for level in range(6)} | {1 / 64: 0.0}
    assert set(targets.d[boot]) == set(asked)
    expected = [asked[size] for size in targets.d[boot]]
    np.testing.assert_array_equal(first[2], expected)
    np.testing.assert_array_equal(second[2], expected)


def test_the_second_half_step_starts_where_the_first_one_led():
    targets, boot, first, second = spied_half_steps()
    half = toys.per_row(targets.d[boot]) / 2
    np.testing.assert_array_equal(first[0], targets.x_t[boot])
    generated = first[0] + half * EMA(*first)
    np.testing.assert_allclose(second[0], generated, rtol=1e-6, atol=1e-6)
    # ... and not on the line through noise and data, at t + d.
    t, x1 = toys.per_row(targets.t[boot]), make_batch().image[boot]
    x0 = (first[0] - t * x1) / (1 - t)
    interpolated = (1 - t - half) * x0 + (t + half) * x1
    assert np.abs(second[0] - interpolated).max() > 0.1


def test_only_bootstrap_rows_cost_extra_passes_two_each():
    _, boot, first, second = spied_half_steps()
    assert len(first[1]) == len(second[1]) == boot.sum() == 64


@pytest.mark.parametrize("chosen", ["ema", "online"])
def test_bootstrap_params_choose_who_answers(chosen):
    def unused(*args):
        raise AssertionError("the other network was asked")

    objective = make_objective(bootstrap_params=chosen)
    other = {"ema": "online", "online": "ema"}[chosen]
    targets = make_targets(objective, **{chosen: ONLINE, other: unused})
    expected = reference_target(objective, targets, (-0.5, 0.3, 1.1, -0.001))
    boot = bootstrap_rows(objective)
    np.testing.assert_allclose(targets.target[boot], expected[boot], rtol=1e-5, atol=1e-5)


def test_ema_parameters_answer_by_default():
    assert make_objective().bootstrap_params == "ema"


def test_mid_point_and_target_are_clipped_and_nothing_else():
    objective, spy = make_objective(bootstrap_clip=0.5), Spy()
    targets = make_targets(objective, ema=spy)
    boot = bootstrap_rows(objective)
    assert np.abs(spy.calls[0][0]).max() > 1  # x_t
    assert np.abs(spy.calls[1][0]).max() == 0.5
    assert np.abs(targets.target[boot]).max() == 0.5
    assert np.abs(targets.target[~boot]).max() > 1


def test_no_gradient_flows_through_the_targets():
    objective, batch = make_objective(cfg_scale=2.0), make_batch()

    def loss(params):
        velocity = linear_velocity(*params)
        draw = rng.draws(0, "train", 0)
        targets, _ = objective.targets(draw, batch, Velocities(velocity, velocity), PROGRESS)
        return jnp.sum(targets.target**2) + jnp.sum(targets.x_t**2)

    gradient = jax.jit(jax.grad(loss))((0.7, -1.3, 0.9, 0.001))
    np.testing.assert_array_equal(np.asarray(gradient), 0)


def test_scalars_are_root_mean_squares():
    objective, spy = make_objective(), Spy()
    velocities, draw = Velocities(ONLINE, spy), rng.draws(0, "train", 0)
    targets, scalars = objective.targets(draw, make_batch(), velocities, PROGRESS)
    s1, s2 = (EMA(*call) for call in spy.calls)
    target = targets.target[bootstrap_rows(objective)]
    expected = {"bootstrap_target_rms": target, "half_step_1_rms": s1, "half_step_2_rms": s2}
    assert scalars.keys() == expected.keys()
    for name, v in expected.items():
        np.testing.assert_allclose(scalars[name], np.sqrt(np.mean(np.square(v))), rtol=1e-5)


# ---- guidance ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_guidance_applies_to_the_smallest_size_only(sampling):
    # s = 1 for a label and 5 for the null label: guided by w = 3, 5 + 3 (1 - 5) = -7.
    def velocity(x, t, d, labels):
        return jnp.zeros_like(x) + toys.per_row(jnp.where(labels == NULL, 5.0, 1.0))

    objective = make_objective(cfg_scale=3.0, step_size_sampling=sampling)
    targets = make_targets(objective, ema=velocity)
    boot, smallest = bootstrap_rows(objective), targets.d == 2 / 128
    assert 0 < smallest.sum() < boot.sum() / 2
    np.testing.assert_array_equal(targets.target[boot & smallest], -7)
    np.testing.assert_array_equal(targets.target[boot & ~smallest], 1)


def test_unconditional_twins_differ_from_their_rows_in_the_label_alone():
    objective, spy = make_objective(**AUTHORS, cfg_scale=3.0), Spy()
    make_targets(objective, ema=spy)
    for call in spy.calls:
        # One row of x, t, d, label each.
        rows = np.concatenate([a.reshape(len(a), -1) for a in call], axis=1)
        real = {tuple(row[:-1]) for row in rows if row[-1] != NULL}
        twins = {tuple(row[:-1]) for row in rows if row[-1] == NULL}
        guided = {row for row in real if row[-1] == 0}  # d = 0
        assert (len(real), len(guided)) == (32, 4)
        assert guided <= twins <= real
        # 4 more rows than 32 make the overhead of 9.4 % that the released code has.
        assert len(rows) == 36


@pytest.mark.parametrize("changes", [{"cfg_scale": 1.0}, {"cfg_scale": 0.0}, {"cfg": False}])
def test_no_twins_without_guidance(changes):
    changes = {"cfg_scale": 2.0, "bootstrap_cfg": changes.pop("cfg", True), **changes}
    _, boot, first, second = spied_half_steps(**changes)
    assert len(first[1]) == len(second[1]) == boot.sum()


@pytest.mark.parametrize(
    "changes", [{}, {"step_size_sampling": "systematic"}, AUTHORS], ids=SAMPLINGS
)
def test_shards_decide_where_rows_are_computed_never_what_they_are(changes):
    objective = make_objective(cfg_scale=3.0, **changes)
    boot = bootstrap_rows(objective)
    whole = make_targets(objective)
    for num_shards in (2, 4, 8):
        objective.validate(N, num_shards)
        spy = Spy()
        targets = make_targets(objective, ema=spy, num_shards=num_shards)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), targets, whole)
        # Cut in equal parts, what the network is asked for is about each shard's own rows.
        for x, own in zip(
            np.split(spy.calls[0][0], num_shards),
            np.split(targets.x_t[boot], num_shards),
            strict=True,
        ):
            assert {tuple(row.ravel()) for row in x} == {tuple(row.ravel()) for row in own}


# ---- empirical rows ------------------------------------------------------------------------------


@pytest.mark.parametrize("noise_floor", [0.0, 0.25])
def test_every_row_lies_on_the_path_and_empirical_rows_regress_its_velocity(noise_floor):
    # Images of zeros show the noise: x_t = (1 - (1-f) t) x0 and v = -(1-f) x0. The same draw with
    # images adds t x1 and x1.
    objective = make_objective(noise_floor=noise_floor)
    targets = make_targets(objective)
    noise = make_targets(objective, make_batch(scale=0.0))
    flow, keep = ~bootstrap_rows(objective), 1 - noise_floor
    t, x0, x1 = toys.per_row(targets.t), -noise.target / keep, np.asarray(make_batch().image)
    np.testing.assert_allclose(noise.x_t[flow], ((1 - keep * t) * x0)[flow], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(targets.x_t - noise.x_t, t * x1, atol=1e-6)
    np.testing.assert_allclose(targets.target[flow], (x1 - keep * x0)[flow], rtol=1e-5, atol=1e-6)
    assert (targets.d[flow] == 0).all() and (targets.branch[flow] == 0).all()


@pytest.mark.parametrize("noise_floor", [0.0, 0.5])
def test_noise_is_standard_normal_in_both_kinds_of_rows(noise_floor):
    objective = make_objective(noise_floor=noise_floor)
    noise = sixteen_steps(objective, scale=0.0)
    x0 = noise.x_t / toys.per_row(1 - (1 - noise_floor) * noise.t)
    boot = bootstrap_rows(objective, len(x0))
    for rows in (boot, ~boot):
        assert abs(x0[rows].mean()) < 0.07
        assert abs(x0[rows].std() - 1) < 0.06
        assert abs(np.corrcoef(x0[rows].reshape(-1, 2).T)[0, 1]) < 0.1
    assert len(np.unique(x0)) > 0.99 * x0.size  # no two rows, nor two steps, share any


def test_the_two_kinds_of_rows_share_neither_noise_nor_times():
    # The released code draws both from one key; half and half, the shapes are the same, too.
    objective = make_objective(bootstrap_fraction=0.5, reuse_images=True)
    noise = compiled_targets(objective, make_batch(scale=0.0))
    x0 = (noise.x_t / toys.per_row(1 - noise.t)).reshape(-1, 2, 2)
    assert abs(np.corrcoef(x0[:, 0].ravel(), x0[:, 1].ravel())[0, 1]) < 0.25
    assert abs(np.corrcoef(noise.t.reshape(-1, 2).T)[0, 1]) < 0.35


def test_noise_times_and_dropped_labels_are_drawn_independently():
    # Draws of one key agree in order of the rows of a step, whatever their shapes.
    objective = make_objective(class_dropout=0.3, bootstrap_label_dropout=True)
    noise, boot = sixteen_steps(objective, scale=0.0), bootstrap_rows(objective, 16 * N)
    for kind in (boot, ~boot):
        t, dropped = noise.t[kind].reshape(16, -1), noise.labels[kind].reshape(16, -1) == NULL
        x0 = noise.x_t[kind] / toys.per_row(1 - noise.t[kind])
        x0 = x0.reshape(16, -1)[:, : t.shape[1]]
        correlations = np.corrcoef([t.ravel(), dropped.ravel(), x0.ravel()])
        assert np.abs(correlations - np.eye(3)).max() < 4.5 * t.size**-0.5


def test_flow_times_are_continuous_and_uniform_on_0_1():
    objective = make_objective()
    targets = sixteen_steps(objective)
    t = np.sort(targets.t[~bootstrap_rows(objective, 16 * N)])
    assert t[0] >= 0 and t[-1] < 1 and len(np.unique(t)) > 3000
    np.testing.assert_allclose(t, np.linspace(0, 1, len(t)), atol=0.04)


def test_flow_times_on_a_grid():
    objective = make_objective(flow_time_grid=128)
    places = sixteen_steps(objective).t[~bootstrap_rows(objective, 16 * N)] * 128
    assert set(places) == set(range(128))
    assert chi_square(np.bincount(places.astype(int))) < 181  # 127 degrees, p = 0.001


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
    spy = Spy()
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


# ---- rows, images and labels ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fraction", "p", "q", "n"),
    [(3 / 8, 3, 8, 64), (1 / 3, 1, 3, 21)],
)
def test_the_first_p_of_every_q_rows_bootstrap(fraction, p, q, n):
    objective = make_objective(bootstrap_fraction=fraction)
    objective.validate(n, 1)
    targets = compiled_targets(objective, make_batch(n))
    boot = np.arange(n) % q < p
    np.testing.assert_array_equal(targets.d > 0, boot)
    np.testing.assert_array_equal(targets.branch > 0, boot)
    expected = reference_target(objective, targets, (0.7, -1.3, 0.9, 0.001))
    np.testing.assert_allclose(targets.target[boot], expected[boot], rtol=1e-5, atol=2e-5)
    # Each image is used exactly once, by the row it came in.
    np.testing.assert_array_equal(targets.labels, np.arange(n))
    assert (targets.weight == 1).all()


@pytest.mark.parametrize(
    ("fraction", "image_of_row"), [(1 / 4, [0, 0, 1, 2]), (1 / 8, [0, 0, 1, 2, 3, 4, 5, 6])]
)
def test_reuse_images_gives_both_kinds_of_rows_the_first_images(fraction, image_of_row):
    objective = make_objective(bootstrap_fraction=fraction, reuse_images=True)
    targets, noise = (make_targets(objective, make_batch(scale=scale)) for scale in (1, 0))
    images = np.add.outer(np.arange(0, N, len(image_of_row)), image_of_row).ravel()
    np.testing.assert_array_equal(targets.labels, images)
    expected = toys.per_row(targets.t) * make_batch().image[images]
    np.testing.assert_allclose(targets.x_t - noise.x_t, expected, atol=1e-6)


def test_reuse_images_with_several_bootstrap_rows_in_a_group():
    objective = make_objective(bootstrap_fraction=3 / 8, reuse_images=True)
    labels = compiled_targets(objective, make_batch(16)).labels
    np.testing.assert_array_equal(labels, [0, 1, 2, 0, 1, 2, 3, 4, 8, 9, 10, 8, 9, 10, 11, 12])


@pytest.mark.parametrize("bootstrap_too", [False, True])
def test_label_dropout(bootstrap_too):
    objective = make_objective(class_dropout=0.3, bootstrap_label_dropout=bootstrap_too)
    labels, boot = sixteen_steps(objective).labels, bootstrap_rows(objective, 16 * N)
    dropped = labels == NULL
    assert abs(dropped[~boot].mean() - 0.3) < 0.035
    if bootstrap_too:
        assert abs(dropped[boot].mean() - 0.3) < 0.06
    else:
        assert not dropped[boot].any()
    np.testing.assert_array_equal(labels[~dropped], np.tile(np.arange(N), 16)[~dropped])


def test_a_dropped_bootstrap_label_is_dropped_in_the_half_steps_too():
    targets, _, first, second = spied_half_steps(class_dropout=1.0, bootstrap_label_dropout=True)
    assert all((labels == NULL).all() for labels in (targets.labels, first[3], second[3]))


def test_cfg_scale_0_trains_the_null_label_alone():
    targets, _, first, second = spied_half_steps(cfg_scale=0.0)
    assert all((labels == NULL).all() for labels in (targets.labels, first[3], second[3]))


def test_targets_are_a_function_of_seed_and_step():
    objective = make_objective(class_dropout=0.5)
    one, again = make_targets(objective), make_targets(objective)
    jax.tree.map(np.testing.assert_array_equal, again, one)
    for other in ({"index": 1}, {"seed": 1}):
        targets = make_targets(objective, **other)
        for name in ("x_t", "t", "labels", "d"):
            assert (getattr(targets, name) != getattr(one, name)).any(), (other, name)


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


# ---- sampling rules ------------------------------------------------------------------------------


def test_step_counts_are_the_trained_ones():
    objective = make_objective(denoise_timesteps=16)
    for steps in (1, 2, 4, 8, 16):
        objective.check_steps(steps)
    for steps in (-1, 0, 3, 12, 32):
        with pytest.raises(UserError, match=rf"eval\.steps holds {steps};.*timesteps=16"):
            objective.check_steps(steps)


def test_only_sampling_at_the_smallest_step_is_guided():
    # Guidance is distilled into every larger size; the d = 0 network is not guided.
    assert [n for n in (1, 2, 4, 8, 16) if make_objective(denoise_timesteps=16).guided(n)] == [16]


def test_sampling_asks_for_d_and_for_0_at_the_smallest():
    d = jnp.asarray([1, 1 / 2, 1 / 64, 1 / 128])
    np.testing.assert_array_equal(make_objective().query_size(d), [1, 1 / 2, 1 / 64, 0])
