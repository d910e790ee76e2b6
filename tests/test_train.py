"""One training step against its definition."""

import jax
import jax.numpy as jnp
import numpy as np

from configs import digits
from shortcut_jax import config as config_lib
from shortcut_jax import spaces, state, train
from shortcut_jax.objectives import Batch

DRAW = spaces.Pixels().draw


def test_step_is_adamw_on_the_mean_squared_error_then_ema():
    config = digits.get_config("small,objective=flow_matching")
    config.ema_rate = 0.9
    config.batch_size = 8
    objective = config_lib.build_objective(config, num_classes=10)
    network = state.build_network(config, objective)
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
