"""One training step against its definition."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits
from shortcut_jax import config as config_lib
from shortcut_jax import data, layers, objectives, program, rng, run, spaces, state, train
from shortcut_jax.data import pipeline
from shortcut_jax.objectives import Batch, Progress, Velocities
from shortcut_jax.objectives.flow_matching import FlowMatching
from tests import toys

DRAW = spaces.Pixels().draw


def test_step_is_adamw_on_the_mean_squared_error_then_ema():
    config = digits.get_config("small,objective=flow_matching")
    config.ema_rate = 0.9
    config.batch_size = 8
    objective = config_lib.build_objective(config, num_classes=10)
    network = state.build_network(config, objective, (8, 8, 1))
    optimizer = state.build_optimizer(config)
    params = state.init_params(network, (8, 8, 1), seed=0)
    ema = jax.tree.map(lambda a: a + 1.0, params)  # unlike the parameters
    old = state.TrainState(jnp.int32(0), params, ema, optimizer.init(params), {}, {})
    batch = Batch(jnp.full((8, 8, 8, 1), 0.5), jnp.arange(8))

    new = jax.jit(train.make_train_step(config, network, objective, optimizer, 1, DRAW))(old, batch)

    # At its initialisation the network answers zero: the loss is the mean square of the target.
    loss, target_rms = (new.metrics[name].compute() for name in ("loss", "target_rms"))
    np.testing.assert_allclose(loss, target_rms**2, rtol=1e-5)
    # The first step of Adam has size lr wherever there is a gradient, whatever its size: the
    # output bias. Elsewhere decoupled weight decay alone moves parameters.
    lr, decay = config.optimizer.lr, config.optimizer.weight_decay
    moved = np.abs(np.asarray(new.params["output"]["bias"]))
    np.testing.assert_allclose(moved, lr, rtol=1e-2)
    kernel = params["block_0"]["qkv"]["kernel"]  # no gradient: the output layer is zero
    found = new.params["block_0"]["qkv"]["kernel"]
    np.testing.assert_allclose(found, kernel * (1 - lr * decay), rtol=1e-5, atol=1e-8)
    # EMA of the new parameters.
    expected = jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, ema, new.params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), new.ema, expected
    )
    assert new.step == 1


# ---- what the step asks whom ---------------------------------------------------------------------


class Toy:
    """A network v(x, d) = a x + b d + c label."""

    rows = None

    def apply(self, variables, x, t, d, labels):
        p = variables["params"]
        return p["a"] * x + (p["b"] * d + p["c"] * labels)[:, None, None, None]


class Weighted(FlowMatching):
    """Flow matching whose rows weigh 1, 2 ..."""

    def targets(self, *args):
        found, scalars = super().targets(*args)
        return found.replace(weight=1.0 + jnp.arange(found.weight.size)), scalars


ONLINE, EMA = {"a": 0.5, "b": 0.3, "c": 0.1}, {"a": -0.7, "b": 0.2, "c": -0.2}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("shortcut", {}),
        ("shortcut", {"bootstrap_params": "online"}),
        ("live_reflow", {}),
        ("consistency_training", {}),
        ("mean_flow", {"weight_power": 0.7}),
        ("flow_matching", {}),
    ],
)
def test_the_step_learns_the_targets_of_its_networks_and_its_number(name, changes, monkeypatch):
    """The loss and the gradient in float64, of targets made outside of the step."""
    monkeypatch.setitem(objectives.OBJECTIVES, "flow_matching", Weighted)
    config = digits.get_config(f"small,objective={name}")
    config.seed, config.total_steps = 5, 7
    config.objective.update(changes)
    objective = config_lib.build_objective(config, num_classes=10)
    optimizer = state.build_optimizer(config)
    params, ema = ({k: jnp.float32(v) for k, v in p.items()} for p in (ONLINE, EMA))
    # A step whose stage is not the first, where there are stages.
    old = state.TrainState(jnp.int32(4), params, ema, optimizer.init(params), {}, {})
    images = np.random.default_rng(0).normal(size=(32, 4, 4, 1))
    batch = Batch(jnp.asarray(images, jnp.float32), jnp.arange(32) % 10)
    step = train.make_train_step(config, Toy(), objective, optimizer, 1, DRAW)
    new = jax.jit(step)(old, batch)
    metrics = {k: a.compute() for k, a in new.metrics.items()}

    def asks(p):
        return functools.partial(Toy().apply, {"params": p})

    draw, progress = rng.draws(5, "train", 4), Progress(jnp.int32(4), 7)
    found, _ = objective.targets(draw, batch, Velocities(asks(params), asks(ema)), progress)
    x, target, d, labels = (
        np.asarray(a, np.float64) for a in (found.x_t, found.target, found.d, found.labels)
    )
    of_row = {"a": x, "b": toys.per_row(d) + 0 * x, "c": toys.per_row(labels) + 0 * x}
    error = sum(ONLINE[k] * of_row[k] for k in of_row) - target
    row_loss = np.mean(error**2, axis=(1, 2, 3))
    weight = 16 * (16 * row_loss + 0.01) ** -0.7 if name == "mean_flow" else found.weight
    np.testing.assert_allclose(metrics["loss"], np.mean(weight * row_loss), rtol=1e-4)
    for index, branch in enumerate(objective.branches):
        rows = found.branch == index
        if rows.any():
            np.testing.assert_allclose(metrics[f"loss/{branch}"], row_loss[rows].mean(), rtol=1e-4)
    gradient = [np.mean(weight * np.mean(2 * error * of_row[k], axis=(1, 2, 3))) for k in of_row]
    np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(gradient), rtol=1e-4)
    after = np.array([new.params[k] for k in ONLINE], np.float64)
    moved = after - [*ONLINE.values()]
    np.testing.assert_allclose(metrics["param_norm"], np.linalg.norm(after), rtol=1e-5)
    np.testing.assert_allclose(metrics["update_norm"], np.linalg.norm(moved), rtol=1e-3)


# Keys that change how a step is computed and not what.
ALL = {"accumulation_steps": 2, "model.remat": "full", "model.scan_layers": True}
WAYS = [
    pytest.param(ALL, id="all"),
    pytest.param({"accumulation_steps": 4}, id="accumulated", marks=pytest.mark.slow),
    pytest.param({"model.remat": "dots"}, id="remat", marks=pytest.mark.slow),
    pytest.param({"model.scan_layers": True}, id="scanned", marks=pytest.mark.slow),
]


def trained(**overrides):
    """Metrics of three steps of a guided shortcut model of two layers, its final parameters."""
    config = digits.get_config("small")
    config.objective.update(cfg_scale=1.5, class_dropout=0.1, step_size_sampling="systematic")
    config.model.depth, config.log.every = 2, 1
    # The gradient of the bias of keys is zero but for rounding, which Adam would make a step of.
    config.optimizer.eps = 1e-4
    config.update_from_flattened_dict(overrides)
    objective = config_lib.build_objective(config, num_classes=10)
    network = state.build_network(config, objective, (8, 8, 1))
    optimizer = state.build_optimizer(config)
    params = state.init_params(network, (8, 8, 1), seed=0)
    # The layers that start at zero would hide the gradient of those before them.
    params = jax.tree.map(lambda a: a + 0.02, params)
    old = state.TrainState(jnp.int32(0), params, params, optimizer.init(params), {}, {})
    numbers = np.random.default_rng(0)
    images = jnp.asarray(numbers.normal(size=(32, 8, 8, 1)), jnp.float32)
    batch = Batch(images, jnp.arange(32) % 10)
    step = train.make_train_step(config, network, objective, optimizer, 1, DRAW)
    compiled = jax.jit(step, compiler_options={"xla_backend_optimization_level": "0"})
    metrics = []
    for _ in range(3):
        old = compiled(dataclasses.replace(old, metrics={}), batch)
        metrics.append({name: float(a.compute()) for name, a in old.metrics.items()})
    return metrics, layers.unstack({"params": old.params, "ema": old.ema})


@pytest.fixture(scope="module")
def plainly():
    return trained()


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_compute_a_step_agree(way, plainly):
    """In losses, norms and parameters, to rounding (tolerances: tests/parallel/test_meshes.py)."""
    (metrics, params), (expected_metrics, expected) = trained(**way), plainly
    for found, wanted in zip(metrics, expected_metrics, strict=True):
        assert found == pytest.approx(wanted, rel=1e-5, nan_ok=True)
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=3e-6), params, expected)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_the_compiler_knows_the_options(platform):
    """On every platform: it refuses names that it does not know."""
    lowered = jax.jit(lambda x: x + 1).lower(1.0)
    assert lowered.compile(compiler_options=state.compiler_options(platform))(1.0) == 2
    assert bool(state.compiler_options(platform)) == (platform != "tpu")


# ---- what the trainer gives the step -------------------------------------------------------------


def test_every_step_gets_the_rows_of_its_number(monkeypatch, tmp_path):
    """Of the seed of the run, mirrored as it says, in the order of the steps, also after a stop."""
    config = digits.get_config("small,objective=flow_matching")
    config.update(seed=3, batch_size=8, total_steps=5, steps_per_dispatch=2)
    config.data.flip = True
    config.model.update(hidden_size=4, num_heads=1, patch_size=8)
    config.eval.every, config.log.tensorboard = 0, False
    config.optimizer.on_nonfinite = "skip"  # there are no metrics here
    given = []

    def compile_several(self, most):
        def steps(state, batches, count):
            given.append((batches, count))
            return state

        return steps

    monkeypatch.setattr(program.Program, "compile_several", compile_several)
    monkeypatch.setattr(run, "report_compiled", lambda *args: None)
    untouched = train.train(config, tmp_path)
    # What it starts from: parameters of its seed, and an EMA that is equal to them.
    network = run.prepare(config).network
    fresh = jax.jit(lambda: state.init_params(network, (8, 8, 1), seed=3))()
    for part in (untouched.params, untouched.ema):
        jax.tree.map(np.testing.assert_array_equal, part, fresh)
    config.total_steps = 8
    train.train(config, tmp_path)
    found = [batch for batches, count in given for batch in batches[: int(count)]]
    dataset = data.open_dataset(config.data)
    rows = {"batch_size": 8, "seed": 3, "start_step": 0, "num_steps": 8, "flip": True}
    for batch, expected in zip(found, pipeline.batches(dataset, **rows), strict=True):
        np.testing.assert_array_equal(batch.image, expected["image"])
        np.testing.assert_array_equal(batch.label, expected["label"])
