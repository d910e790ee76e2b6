"""Further averages of the parameters: against their closed forms, and through the training step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs import digits
from shortcut_jax import averages, run, spaces, state, train
from shortcut_jax import config as config_lib
from shortcut_jax.averages import Profile
from shortcut_jax.errors import UserError
from shortcut_jax.objectives import Batch
from tests.sentences import assert_sentence

NAMES = ("ema_0.5", "ema_0.9", "power_0.05", "power_0.1", "power_0.25")


def weights(name: str, steps: int) -> np.ndarray:
    """[1 + steps] float64: shares of the initial parameters and of those after each step."""
    kind, _, number = name.partition("_")
    if kind == "ema":
        rate = float(number)
        return np.append(rate**steps, (1 - rate) * rate ** np.arange(steps - 1, -1, -1))
    return np.append(0.0, np.diff((np.arange(steps + 1) / steps) ** (gamma(float(number)) + 1)))


def gamma(width: float) -> float:
    """The exponent of a width, by bisection of its definition."""
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        too_wide = (middle + 1) / (middle + 2) ** 2 / (middle + 3) > width**2
        low, high = (middle, high) if too_wide else (low, middle)
    return low


# ------------------------------------------------------------------ definitions


def test_exponents_that_the_paper_gives():
    assert averages.gamma(0.05) == pytest.approx(16.97, abs=0.005)
    assert averages.gamma(0.10) == pytest.approx(6.94, abs=0.005)
    assert averages.gamma(averages.MAX_WIDTH) == pytest.approx(0, abs=1e-12)


@given(st.floats(1e-3, averages.MAX_WIDTH))
def test_the_exponent_gives_the_width(width):
    assert averages.gamma(width) == pytest.approx(gamma(width), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 37])
def test_updates_give_the_closed_form(steps):
    rng = np.random.default_rng(0)
    history = rng.normal(size=(1 + steps, 3))
    with jax.enable_x64(True):
        found = {name: {"a": jnp.asarray(history[0])} for name in NAMES}
        for step in range(steps):
            found = averages.update(found, {"a": jnp.asarray(history[step + 1])}, jnp.int32(step))
        for name in NAMES:
            assert found[name]["a"].dtype == np.float64
            expected = weights(name, steps) @ history
            np.testing.assert_allclose(found[name]["a"], expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("step", [0, 1, 399_999, 10_000_000])
def test_shares_keep_their_digits_in_float32(step):
    expected = -np.expm1((gamma(0.05) + 1) * np.log1p(-1 / (step + 1))) if step else 1.0
    found = averages.share("power_0.05", jnp.int32(step))
    assert found.dtype == np.float32 and found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("name", "start"), [("ema_0.9999", 0.1), ("power_0.1", 0.0)])
def test_rounding_does_not_add_up(name, start):
    # Weights that did not sum to one in float32 would be 1e-4 off, over all these updates.
    steps = 50_000
    noise = np.random.default_rng(0).normal(size=(steps, 16))
    history = (0.1 + 0.01 * noise).astype(np.float32)
    body = jax.jit(lambda i, a: averages.update(a, jnp.asarray(history)[i], i))
    found = jax.lax.fori_loop(0, steps, body, {name: jnp.full(16, start, np.float32)})[name]
    shares = weights(name, steps)
    expected = shares[0] * start + shares[1:] @ history.astype(np.float64)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


# ------------------------------------------------------------------ in the training step


class Toy:
    """A network v(x) = a x + b."""

    rows = None

    def apply(self, variables, x, t, d, labels):
        return variables["params"]["a"] * x + variables["params"]["b"]


def toy_config(**overrides):
    config = digits.get_config("small,objective=flow_matching")
    tracked = {"averages.rates": (0.5, 0.9), "averages.power": (0.05, 0.1, 0.25)}
    step = {"optimizer.lr": 0.1, "optimizer.on_nonfinite": "skip"}
    config.update_from_flattened_dict({**step, **tracked, **overrides})
    return config


@functools.cache
def toy_step(tracks=True):
    """The compiled step and a fresh state."""
    config = toy_config(**({} if tracks else {"averages.rates": (), "averages.power": ()}))
    objective, optimizer = config_lib.build_objective(config, 10), state.build_optimizer(config)
    draw = spaces.Pixels().draw
    step = jax.jit(train.make_train_step(config, Toy(), objective, optimizer, 1, draw))
    params = {"a": jnp.float32(0.5), "b": jnp.float32(-0.2)}
    tracked = averages.start(config.averages, params)
    fresh = state.TrainState(jnp.int32(0), params, params, optimizer.init(params), {}, {}, tracked)
    return lambda old, batch: step(old.replace(metrics={}), batch), fresh


def make_batch(seed):
    images = np.random.default_rng(seed).normal(size=(8, 4, 4, 1))
    return Batch(jnp.asarray(images, jnp.float32), jnp.arange(8, dtype=jnp.int32))


def test_the_step_averages_the_parameters_that_it_leaves():
    step, new = toy_step()
    assert sorted(new.averages) == sorted(NAMES)
    history = [new.params]
    for index in range(9):
        new = step(new, make_batch(index))
        history.append(new.params)
        for name in NAMES:
            for key in ("a", "b"):
                theta = np.array([params[key] for params in history], np.float64)
                expected = weights(name, index + 1) @ theta
                np.testing.assert_allclose(new.averages[name][key], expected, rtol=1e-5)
    assert np.ptp([params["a"] for params in history]) > 0.1  # equal ones would prove nothing


def test_averages_change_nothing_else():
    with_averages, a = toy_step()
    without, b = toy_step(tracks=False)
    assert b.averages == {}
    for index in range(3):
        a, b = with_averages(a, make_batch(index)), without(b, make_batch(index))
    jax.tree.map(np.testing.assert_array_equal, a.replace(averages={}), b)


def test_a_step_that_is_skipped_keeps_them():
    step, old = toy_step()
    old = step(step(old, make_batch(0)), make_batch(1))
    new = step(old, make_batch(2).replace(image=jnp.nan * make_batch(2).image))
    assert new.step == 3
    jax.tree.map(np.testing.assert_array_equal, new.averages, old.averages)


# ------------------------------------------------------------------ reconstruction


STEPS, EVERY = 400, 25
SOURCES = [Profile(t, width) for t in range(EVERY, STEPS + 1, EVERY) for width in (0.05, 0.1)]


def profile(p: Profile) -> np.ndarray:
    """[STEPS] float64: the weight of the parameters after each step."""
    return np.pad(weights(f"power_{p.width!r}", p.step)[1:], (0, STEPS - p.step))


@pytest.mark.parametrize("target", [SOURCES[-1], SOURCES[-2], SOURCES[7]])
def test_what_is_stored_is_found_again(target):
    found, error = averages.combine(target, SOURCES)
    expected = np.array([source == target for source in SOURCES], float)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-11)
    assert error < 1e-7


# Relative errors of the profile that two widths and 16 snapshots leave.
@pytest.mark.parametrize(
    ("width", "expected"),
    [(0.03, 0.039), (0.07, 0.0038), (0.12, 0.0035), (0.15, 0.009), (0.2, 0.024)],
)
def test_other_widths_are_reconstructed(width, expected):
    target = Profile(STEPS, width)
    found, error = averages.combine(target, SOURCES)
    wanted = profile(target)
    missed = sum(w * profile(p) for w, p in zip(found, SOURCES, strict=True)) - wanted
    assert error == pytest.approx(expected, rel=0.1)
    # The fit is of continuous profiles; those of steps are their integrals.
    assert np.linalg.norm(missed) / np.linalg.norm(wanted) == pytest.approx(error, rel=0.02)
    assert found.sum() == pytest.approx(1, abs=1e-12)

    # Parameters that first move, then wander about: reconstructed against tracked.
    rng = np.random.default_rng(0)
    time = np.arange(1, STEPS + 1)[:, None]
    theta = 1 + 10 * np.exp(-time / 50) + np.cumsum(rng.normal(scale=0.1, size=(STEPS, 50)), axis=0)
    stored = np.array([profile(p) @ theta for p in SOURCES])
    difference = found @ stored - wanted @ theta
    assert np.sqrt(np.mean(difference**2)) < 0.02 * np.std(theta[-200:])


def test_few_snapshots_leave_an_error_that_says_so():
    few = [source for source in SOURCES if source.step in (200, 400)]
    errors = [averages.combine(Profile(STEPS, 0.15), s)[1] for s in (few, few[-2:], SOURCES)]
    assert errors[1] > errors[0] > 0.1 > errors[2]


def test_no_weights_of_that_sum_fit_better():
    target = Profile(STEPS, 0.15)
    found, error = averages.combine(target, SOURCES)
    rng = np.random.default_rng(0)
    for _ in range(20):
        other = found + 1e-3 * (lambda v: v - v.mean())(rng.normal(size=len(found)))
        missed = sum(w * profile(p) for w, p in zip(other, SOURCES, strict=True)) - profile(target)
        assert np.linalg.norm(missed) / np.linalg.norm(profile(target)) > error


# ------------------------------------------------------------------ names and the config


@pytest.mark.parametrize("name", ["ema", "online", "ema_0.9999", "ema_0.0", "power_0.1"])
def test_names(name):
    averages.check_name(name, "eval.params")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("best", "ema, online, ema_RATE"),
        ("power_0.10", "write power_0.1."),
        ("power_1e-1", "write power_0.1."),
        ("ema_.5", "write ema_0.5."),
        ("ema_1.0", "choose one of them"),
        ("power_0.0", "choose one of them"),
        ("power_0.3", "at most 0.289"),
        ("power_nan", "choose one of them"),
        ("power_", "choose one of them"),
    ],
)
def test_names_of_nothing(name, said):
    with pytest.raises(UserError) as error:
        averages.check_name(name, "eval.params")
    assert_sentence(str(error.value), (f"eval.params={name!r}", said))


BAD = [
    ({"averages.rates": (1.0,)}, ("averages.rates=(1.0,)", "0 <= rate < 1")),
    ({"averages.rates": (0.9, 0.9)}, ("averages.rates=(0.9, 0.9)", "twice")),
    ({"averages.rates": (0.99,)}, ("averages.rates=(0.99,)", "ema_rate=0.99", "leave it out")),
    ({"averages.rates": (1,)}, ("averages.rates=(1,)", "a tuple of numbers", "(0.9999,)")),
    ({"averages.power": (0.1, 0.3)}, ("averages.power", "0.3", "0 < width <= 0.289")),
    ({"averages.power": (0.0,)}, ("averages.power", "0.0")),
    ({"averages.snapshot_every": -1}, ("averages.snapshot_every=-1", "0 or more")),
    (
        {"averages.power": (0.1,), "averages.snapshot_every": 9},
        ("averages.snapshot_every=9", "total_steps=8", "lower it"),
    ),
    ({"eval.params": "power_0.10"}, ("eval.params='power_0.10'", "write power_0.1")),
]


@pytest.mark.parametrize(("overrides", "fragments"), BAD, ids=[str(b[0]) for b in BAD])
def test_wrong_configs(overrides, fragments):
    config = digits.get_config("small")
    config.update_from_flattened_dict(overrides)
    with pytest.raises(UserError) as error:
        run.check(config)
    assert_sentence(str(error.value), fragments)


def test_the_loop_evaluates_what_is_tracked_only(tmp_path):
    config = toy_config(**{"eval.params": "power_0.1"})
    averages.check_tracked(config)
    config.eval.params = "power_0.15"
    with pytest.raises(UserError) as error:
        train.train(config, tmp_path / "run")
    assert_sentence(str(error.value), ("eval.params=power_0.15", *NAMES, "eval.every=0"))
    assert not (tmp_path / "run").exists()
    config.eval.every = 0
    averages.check_tracked(config)


def test_a_run_without_the_section_had_none():
    new = config_lib.flatten(digits.get_config("small"))
    old = {key: value for key, value in new.items() if not key.startswith("averages.")}
    assert config_lib.differences(old, new) == []
    assert config_lib.differences(old, {**new, "averages.snapshot_every": 3}) == []
    for key, value in (("averages.rates", [0.5]), ("averages.power", [0.1])):
        assert config_lib.differences(old, {**new, key: value}) == [f"{key}: [] -> {value}"]
        assert config_lib.differences({**new, key: value}, new) == [f"{key}: {value} -> []"]
