"""The optimizer against its definition: learning rates by hand, AdamW in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits
from shortcut_jax import state


def make_config(**optimizer):
    config = digits.get_config("small")
    config.total_steps = 100
    config.optimizer.update(lr=0.5, schedule="constant", warmup_steps=0)
    config.optimizer.update(optimizer)
    return config


@pytest.mark.parametrize(
    ("changes", "by_hand"),
    [
        ({}, {0: 0.5, 1: 0.5, 99: 0.5}),
        # The first update of a warm-up moves nothing; the one after `warmup_steps` has all of lr.
        ({"warmup_steps": 20}, {0: 0, 1: 0.025, 10: 0.25, 20: 0.5, 99: 0.5, 500: 0.5}),
        ({"schedule": "cosine"}, {0: 0.5, 25: 0.25 + 0.125 * 2**0.5, 50: 0.25, 100: 0}),
        ({"schedule": "cosine", "warmup_steps": 20}, {0: 0, 5: 0.125, 20: 0.5, 60: 0.25, 100: 0}),
    ],
    ids=["constant", "warm-up", "cosine", "cosine after a warm-up"],
)
def test_learning_rates_by_hand(changes, by_hand):
    schedule = state.learning_rate(make_config(**changes))
    found = [float(schedule(step)) for step in by_hand]
    np.testing.assert_allclose(found, list(by_hand.values()), rtol=1e-5, atol=1e-7)


def test_the_optimizer_is_adamw_with_what_the_config_says():
    settings = {"b1": 0.7, "b2": 0.8, "eps": 0.2, "weight_decay": 0.3, "warmup_steps": 3}
    optimizer = state.build_optimizer(make_config(**settings))
    numbers = np.random.default_rng(0)
    p, gradients = numbers.normal(size=5), numbers.normal(size=(4, 5))
    params = {"bias": jnp.asarray(p, jnp.float32)}  # decayed like all others
    opt_state = optimizer.init(params)
    m, v = np.zeros(5), np.zeros(5)
    for i, g in enumerate(gradients):
        updates, opt_state = optimizer.update({"bias": jnp.float32(g)}, opt_state, params)
        params = jax.tree.map(jnp.add, params, updates)
        m, v = 0.7 * m + 0.3 * g, 0.8 * v + 0.2 * g**2
        step = m / (1 - 0.7 ** (i + 1)) / (np.sqrt(v / (1 - 0.8 ** (i + 1))) + 0.2)
        p = p - 0.5 * i / 3 * (step + 0.3 * p)
        np.testing.assert_allclose(params["bias"], p, rtol=1e-5)
