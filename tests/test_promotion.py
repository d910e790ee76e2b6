"""The training step makes the EMA of the student the teacher at the first step of every stage."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits
from shortcut_jax import config as config_lib
from shortcut_jax import rng, spaces, state, train
from shortcut_jax.objectives import Batch, Progress, Velocities
from shortcut_jax.objectives.progressive_distillation import ProgressiveDistillation

TOTAL = 7
STARTS = (3, 5)  # of the second and third of three stages: ceil(7/3), ceil(14/3)


class Toy:
    """A network v(x) = a x + b."""

    rows = None

    def apply(self, variables, x, t, d, labels):
        return variables["params"]["a"] * x + variables["params"]["inner"]["b"]


def params(a, b):
    return {"a": jnp.float32(a), "inner": {"b": jnp.float32(b)}}


def make_config(name):
    config = digits.get_config(f"small,objective={name}")
    config.objective.denoise_timesteps = 8  # three stages
    config.total_steps = TOTAL
    config.ema_rate = 0.5
    config.optimizer.lr = 0.1
    config.optimizer.on_nonfinite = "skip"
    return config


@functools.cache
def make_step(name="progressive_distillation"):
    """The objective, the compiled training step and a state from before the first one."""
    config = make_config(name)
    objective = config_lib.build_objective(config, num_classes=10)
    optimizer = state.build_optimizer(config)
    compiled = jax.jit(
        train.make_train_step(config, Toy(), objective, optimizer, 1, spaces.Pixels().draw)
    )

    def step(old, batch):
        # Without metrics of earlier steps those of the new state are of this step alone.
        return compiled(old.replace(metrics={}), batch)

    online, ema = params(0.5, 0.3), params(0.25, -0.1)
    teacher = params(-1.5, 1.0) if objective.teacher == "targets" else {}
    start = state.TrainState(jnp.int32(0), online, ema, optimizer.init(online), teacher, {})
    return objective, step, start


def make_batch(seed=0):
    images = np.random.default_rng(seed).normal(size=(8, 4, 4, 1))
    return Batch(jnp.asarray(images, jnp.float32), jnp.arange(8, dtype=jnp.int32))


def assert_equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def assert_differ(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a != b


def test_the_ema_becomes_the_teacher_at_the_first_step_of_every_stage_but_the_first():
    _, step, old = make_step()
    for index in range(TOTAL):
        new = step(old, make_batch(index))
        # The EMA that the step found, not the one it leaves and not the online parameters.
        assert_equal(new.teacher, old.ema if index in STARTS else old.teacher)
        for other in (old.params, new.params, new.ema):
            assert_differ(new.teacher, other)
        assert_differ(old.ema, old.teacher)  # a promotion would have been seen
        old = new
    assert new.step == TOTAL


def test_the_step_alone_decides():
    # A run resumed at the first step of a stage promotes as the uninterrupted one does.
    _, step, start = make_step()
    for index in range(TOTAL):
        new = step(start.replace(step=jnp.int32(index)), make_batch())
        assert_equal(new.teacher, start.ema if index in STARTS else start.teacher)


def test_the_step_that_promotes_learns_from_the_new_teacher():
    objective, step, old = make_step()
    seed = make_config("progressive_distillation").seed
    for index in range(TOTAL):
        batch = make_batch(index)
        new = step(old, batch)
        # The points x_t that the step has drawn depend on no network.
        draw, velocities = rng.draws(seed, "train", index), Velocities(*3 * [lambda x, *_: x])
        drawn, _ = objective.targets(draw, batch, velocities, Progress(index, TOTAL))
        x = np.asarray(drawn.x_t, np.float64)

        student = jax.tree.map(float, old.params)
        teacher = jax.tree.map(float, old.ema if index in STARTS else old.teacher)
        a, b = teacher["a"], teacher["inner"]["b"]
        size = 2.0 ** sum(index >= start for start in STARTS) / 8
        first = a * x + b
        second = a * (x + size * first) + b
        target = (first + second) / 2
        loss = np.mean((student["a"] * x + student["inner"]["b"] - target) ** 2)
        expected = {"loss": loss, "bootstrap_target_rms": np.sqrt(np.mean(target**2))}
        for name, value in expected.items():
            np.testing.assert_allclose(new.metrics[name].compute(), value, rtol=1e-5)
        old = new


def test_a_step_that_is_skipped_promotes_all_the_same():
    # Otherwise the next stage would be learned from the teacher of the last.
    _, step, start = make_step()
    broken = make_batch().replace(image=jnp.nan * make_batch().image)
    old = start.replace(step=jnp.int32(STARTS[0]))
    new = step(old, broken)
    assert_equal((new.params, new.ema), (old.params, old.ema))
    assert_equal(new.teacher, old.ema)


def assert_keeps_its_teacher(step, start):
    old = start
    for index in range(TOTAL):
        old = step(old, make_batch(index))
        assert jax.tree.structure(old.teacher) == jax.tree.structure(start.teacher)
        assert_equal(old.teacher, start.teacher)


@pytest.mark.parametrize("name", ["consistency_distillation", "consistency_training"])
def test_nothing_else_is_promoted(name):
    # Neither a teacher without stages nor stages without a teacher.
    _, step, start = make_step(name)
    assert bool(start.teacher) == (name == "consistency_distillation")
    assert_keeps_its_teacher(step, start)


def test_only_what_promotes_its_student_does(monkeypatch):
    # A teacher and stages are not enough.
    monkeypatch.setattr(ProgressiveDistillation, "promotes_student", False)
    _, step, start = make_step.__wrapped__()
    assert_keeps_its_teacher(step, start)
