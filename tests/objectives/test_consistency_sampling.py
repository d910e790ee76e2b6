"""The sampler that consistency training and distillation share."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from shortcut_jax.errors import UserError
from shortcut_jax.objectives.base import sampling_velocity
from shortcut_jax.objectives.consistency_training import ConsistencyTraining
from tests import toys
from tests.objectives.consistency_targets import (
    EMA,
    NULL,
    SHAPE,
    N,
    both_methods,
    unused,
)

ONES = jnp.ones(N)
CONSTANT = functools.partial(jnp.full, (N, *SHAPE))


@both_methods
def test_step_counts_are_powers_of_two(method):
    objective = method(null_label=NULL, denoise_timesteps=16)
    for steps in (1, 2, 4, 8, 16):
        objective.check_steps(steps)
        assert not objective.guided(steps)
    for steps in (-1, 0, 3, 12, 32):
        with pytest.raises(UserError, match=rf"holds {steps}; a consistency model .*=16"):
            objective.check_steps(steps)


@both_methods
@pytest.mark.parametrize(
    ("sampler", "expected"),
    [
        # v = 2x + t + label: from x = 3 at t = 1/4 by 1/2, v = 6 + 1/4 + 5 = 11.25.
        # f = 3 + 3/4 * 11.25 = 11.4375 and 3/4 f + 1/4 * 8 = 10.578125.
        ("renoise", 10.578125),
        ("euler", 3 + 11.25 / 2),
    ],
)
def test_a_step_by_hand(method, sampler, expected):
    objective = method(null_label=NULL, sampler=sampler)
    spy = toys.Spy(toys.linear_velocity(2, 1, 0, 1))
    velocity = sampling_velocity(objective, spy, objective.guided(2))
    labels = jnp.full(N, 5)
    x = objective.step(velocity, CONSTANT(3.0), ONES / 4, ONES / 2, labels, lambda: CONSTANT(8.0))
    np.testing.assert_allclose(x, CONSTANT(expected), rtol=1e-6)
    ((x, t, d, asked),) = spy.calls
    for found, value in ((x, 3), (t, 0.25), (d, 0), (asked, 5)):
        np.testing.assert_array_equal(found, value)


def test_times_and_sizes_are_each_rows_own():
    # v = 2x. f = x + (1-t) 2x = 9, 4.5 of x = 3 at t = 0, 3/4, from there 1/2 and 1/4 on.
    objective = ConsistencyTraining(null_label=NULL)
    t, d = jnp.tile(jnp.asarray([0, 0.75]), N // 2), jnp.tile(jnp.asarray([0.5, 0.25]), N // 2)
    velocity, labels = toys.linear_velocity(2, 0, 0, 0), jnp.zeros(N, jnp.int32)
    x = objective.step(velocity, CONSTANT(3.0), t, d, labels, lambda: CONSTANT(8.0))
    np.testing.assert_allclose(x[0], 9 / 2 + 8 / 2)
    np.testing.assert_allclose(x[1], 4.5)


@pytest.mark.parametrize("steps", [1, 2, 128])
def test_the_last_step_adds_no_noise(steps):
    objective = ConsistencyTraining(null_label=NULL)
    d = ONES / steps
    x = objective.step(EMA, CONSTANT(3.0), (steps - 1) * d, d, jnp.arange(N), lambda: CONSTANT(1e6))
    end = 3 + EMA(CONSTANT(3.0), (steps - 1) * d, d, jnp.arange(N)) / steps
    np.testing.assert_allclose(x, end, rtol=1e-5)


def test_euler_draws_no_noise():
    objective = ConsistencyTraining(null_label=NULL, sampler="euler")
    objective.step(EMA, CONSTANT(3.0), ONES / 4, ONES / 2, jnp.arange(N), unused)


@pytest.mark.parametrize("sampler", ["renoise", "euler"])
@pytest.mark.parametrize("steps", [1, 2, 8])
def test_a_network_that_knows_the_end_gets_there_in_any_number_of_steps(sampler, steps):
    # ... and is on the path of the noise it was last given and the end at every time.
    def to_five(x, t, d, labels):
        return (5 - x) / toys.per_row(1 - t)

    objective = ConsistencyTraining(null_label=NULL, sampler=sampler)
    x, d, labels = CONSTANT(-2.0), ONES / steps, jnp.arange(N)
    for i in range(steps):
        noise = 10.0 + i
        x = objective.step(to_five, x, i * d, d, labels, lambda noise=noise: CONSTANT(noise))
        t, start = (i + 1) / steps, -2.0 if sampler == "euler" else noise
        np.testing.assert_allclose(x, CONSTANT((1 - t) * start + t * 5), rtol=1e-5, atol=1e-5)
