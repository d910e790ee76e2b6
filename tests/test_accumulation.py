"""Gradients in parts are those of the whole, and each part has rows of every device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shortcut_jax import accumulation


@pytest.mark.parametrize(("parts", "num_shards"), [(1, 1), (4, 1), (2, 3), (3, 2)])
def test_a_part_has_as_many_rows_of_every_device(parts, num_shards):
    rows = np.arange(12)
    found = accumulation.split({"row": rows, "image": np.stack([rows, rows], 1)}, parts, num_shards)
    assert found["row"].shape == (parts, 12 // parts)
    assert found["image"].shape == (parts, 12 // parts, 2)
    np.testing.assert_array_equal(found["image"][..., 1], found["row"])
    device = rows.reshape(num_shards, -1)
    for i, part in enumerate(found["row"]):
        # Device s keeps its place in the part, and gives it the i-th stretch of its rows.
        np.testing.assert_array_equal(
            part.reshape(num_shards, -1), np.split(device, parts, axis=1)[i]
        )
    np.testing.assert_array_equal(accumulation.join(found["row"], num_shards), rows)


def loss(params, rows, own):
    by_row = jnp.tanh(rows["x"] @ params["w"]) ** 2 + params["b"]
    return by_row.mean(), by_row


@pytest.mark.parametrize("parts", [1, 2, 6])
def test_the_gradient_is_that_of_all_rows(parts):
    numbers = np.random.default_rng(0)
    params = {"w": jnp.asarray(numbers.normal(size=3), jnp.float32), "b": jnp.float32(0.5)}
    rows = {"x": jnp.asarray(numbers.normal(size=(12, 3)), jnp.float32)}
    expected = jax.value_and_grad(loss, has_aux=True)(params, rows, own=False)
    found = jax.jit(accumulation.value_and_grad, static_argnums=(0, 3))(loss, params, rows, parts)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected
    )
