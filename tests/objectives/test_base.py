"""What several objectives stand on: stages of the training, groups of rows, two-step targets."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shortcut_jax.errors import UserError
from shortcut_jax.objectives import Progress, common
from shortcut_jax.objectives.groups import Groups

MAX_INT32 = 2**31 - 1

# ---- stages --------------------------------------------------------------------------------------


def stages(total, num_stages, steps):
    """stage and starts_stage of many steps, in one compiled program."""

    @jax.jit
    @jax.vmap
    def both(step):
        progress = Progress(step, total)
        return progress.stage(num_stages), progress.starts_stage(num_stages)

    return both(jnp.asarray(steps, jnp.int32))


@pytest.mark.parametrize(
    ("total", "num_stages", "expected"),
    [
        (6, 3, [0, 0, 1, 1, 2, 2]),
        (10, 3, [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]),
        (7, 7, [0, 1, 2, 3, 4, 5, 6]),
        (5, 1, [0, 0, 0, 0, 0]),
        (2, 4, [0, 2]),
    ],
)
def test_stages_by_hand(total, num_stages, expected):
    found, starts = stages(total, num_stages, range(total))
    assert found.dtype == jnp.int32 and starts.dtype == bool
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(starts, np.diff(expected, prepend=0) != 0)


def test_the_last_stage_goes_on_after_the_end():
    found, starts = stages(10, 3, [9, 10, 11, MAX_INT32])
    np.testing.assert_array_equal(found, 2)
    assert not starts.any()


@settings(deadline=None)
@example(total=MAX_INT32, num_stages=7, near=6, offset=-1)  # step * 7 is no int32, nor a float32
@example(total=MAX_INT32, num_stages=10, near=10, offset=0)
@example(total=400_000, num_stages=7, near=3, offset=1)
@given(
    total=st.integers(1, MAX_INT32) | st.integers(1, 50),
    num_stages=st.sampled_from((1, 2, 7, 10)),
    near=st.integers(0, 10),
    offset=st.integers(-1, 1),
)
def test_stage_is_the_floor_of_step_times_stages_over_total(total, num_stages, near, offset):
    def exact(step):
        return step * num_stages // total  # of Python integers, which have no limit

    # Around the start of a stage: ceil(near * total / num_stages).
    step = min(max(-(-near * total // num_stages) + offset, 0), total - 1)
    progress = Progress(jnp.int32(step), total)
    assert progress.stage(num_stages) == exact(step)
    assert progress.starts_stage(num_stages) == (step > 0 and exact(step) != exact(step - 1))


# ---- groups of rows ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "p", "q"),
    [
        (1 / 4, 1, 4), (1 / 8, 1, 8), (3 / 8, 3, 8), (1 / 3, 1, 3), (0.3, 3, 10),
        (1 / 64, 1, 64), (63 / 64, 63, 64), (float(np.float32(2 / 7)), 2, 7),
    ],
)  # fmt: skip
def test_groups_of_a_share(share, p, q):
    assert Groups.of(share, "key", "advice") == Groups(p, q)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.25, 1.25, 0.123, 1 / 65, 64 / 65, 1e-9])
def test_groups_refuse_what_is_no_share(share):
    message = f"objective.some_share={share} is not a fraction .* q <= 64; say a quarter."
    with pytest.raises(UserError, match=message):
        Groups.of(share, "objective.some_share", "say a quarter")


def is_split(groups, n, num_shards, at_least):
    """Whether every shard has whole groups, and all together enough rows of the first kind."""
    per_shard, rest = divmod(n, num_shards)
    return n > 0 and rest == 0 == per_shard % groups.q and n // groups.q * groups.p >= at_least


@settings(deadline=None)
@example(n=16, groups=Groups(3, 8), num_shards=1, at_least=7)  # has 6
@given(
    n=st.integers(0, 100) | st.integers(0, 2000),
    groups=st.sampled_from((Groups(1, 4), Groups(3, 8), Groups(2, 3), Groups(5, 64))),
    num_shards=st.sampled_from((1, 2, 3, 8)),
    at_least=st.sampled_from((1, 2, 7, 10)),
)
def test_check_names_the_smallest_batch_that_works(n, groups, num_shards, at_least):
    if is_split(groups, n, num_shards, at_least):
        groups.check(n, num_shards, "some_share=x", at_least)
        return
    with pytest.raises(UserError, match=f"batch_size={n} .* some_share=x and {num_shards} ") as e:
        groups.check(n, num_shards, "some_share=x", at_least)
    smallest, named = map(int, re.findall(r"\d+", str(e.value))[-2:])
    working = (k for k in itertools.count() if is_split(groups, k, num_shards, at_least))
    assert smallest == next(working)
    assert named == next(k for k in itertools.chain([smallest], working) if k >= n)


def test_check_asks_for_one_row_of_the_first_kind():
    Groups(1, 4).check(4, 1, "x")
    with pytest.raises(UserError):
        Groups(1, 4).check(0, 1, "x")


def test_view_and_merge_keep_the_order_of_the_rows():
    groups = Groups(2, 5)
    batch = {"label": jnp.arange(15), "image": jnp.arange(60).reshape(15, 2, 1, 2)}
    view = jax.tree.map(groups.view, batch)
    np.testing.assert_array_equal(
        view["label"], [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11, 12, 13, 14]]
    )
    assert view["image"].shape == (3, 5, 2, 1, 2)
    first, others = (jax.tree.map(lambda a, s=s: a[:, s], view) for s in (slice(2), slice(2, 5)))
    jax.tree.map(np.testing.assert_array_equal, groups.merge(first, others), batch)


# ---- two steps -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("clips", "expected"),
    [
        # s = 2x + t.
        # x = 1, t = 0, d = 1/2: s1 = 2, x' = 2, s2 = 4.5.
        # x = -3, t = 1/2, d = 1/4: s1 = -5.5, x' = -4.375, s2 = -8.75 + 0.75 = -8.
        ((0.0, 0.0), [3.25, -6.75]),
        # x' = 2, -4: s2 = 4.5, -7.25.
        ((4.0, 0.0), [3.25, -6.375]),
        # x' = 1.5, -1.5: s2 = 3.5, -2.25.
        ((1.5, 0.0), [2.75, -3.875]),
        ((0.0, 4.0), [3.25, -4.0]),
        ((1.5, 2.5), [2.5, -2.5]),
    ],
)
def test_two_step_target_by_hand(clips, expected):
    # The rows have two axes, as groups do.
    x = jnp.asarray([1.0, -3.0]).reshape(1, 2, 1, 1, 1)
    t, d = jnp.asarray([[0.0, 0.5]]), jnp.asarray([[0.5, 0.25]])
    velocities = []

    def step(x, t):
        velocities.append(2 * x + t[..., None, None, None])
        return velocities[-1]

    clip_middle, clip_target = clips
    target, scalars = common.two_step_target(
        step, x, t, d, clip_middle=clip_middle, clip_target=clip_target
    )
    np.testing.assert_allclose(target.ravel(), expected, rtol=1e-6)
    assert target.shape == x.shape
    names = ("bootstrap_target_rms", "half_step_1_rms", "half_step_2_rms")
    logged = dict(zip(names, (target, *velocities), strict=True))
    assert scalars.keys() == logged.keys()
    for name, value in logged.items():
        rms = np.sqrt(np.mean(np.asarray(value, np.float64) ** 2))
        np.testing.assert_allclose(scalars[name], rms, rtol=1e-6)


def test_no_gradient_flows_into_a_two_step_target():
    def total(parameter, x):
        def step(x, t):
            return parameter * x

        half = jnp.full(1, 0.5)
        target, _ = common.two_step_target(step, x, half, half, clip_middle=0.0, clip_target=0.0)
        return target.sum()

    image = jnp.ones((1, 1, 1, 1))
    assert total(2.0, image) == 3  # s1 = 2, x' = 2, s2 = 4
    assert jax.grad(total)(2.0, image) == 0
    assert jax.grad(total, argnums=1)(2.0, image).item() == 0


def test_clip():
    x = jnp.asarray([-5.0, -4.0, 0.5, 7.0])
    np.testing.assert_array_equal(common.clip(x, 4.0), [-4, -4, 0.5, 4])
    np.testing.assert_array_equal(common.clip(x, 0.0), x)


# ---- powers of two -------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [2, 16, 128])
def test_step_counts_are_powers_of_two_up_to_m(m):
    powers = [2**i for i in range(12)]
    accepted = [p for p in powers if p <= m]
    for steps in accepted:
        assert common.not_a_power_of_two(steps, m, "a method") == ""
    listed = ", ".join(map(str, accepted))
    for steps in {*range(-2, 300), *powers} - set(accepted):
        why = common.not_a_power_of_two(steps, m, "a method")
        assert re.fullmatch(f"a method takes a power of two .*={m}: one of {listed}", why)


def test_the_number_of_smallest_steps_is_a_power_of_two():
    for m in (2, 4, 128, 1024):
        common.check_denoise_timesteps(m)
    for m in (-4, -1, 0, 1, 3, 100, 127):
        with pytest.raises(UserError, match=f"objective.denoise_timesteps={m} is not a power"):
            common.check_denoise_timesteps(m)
