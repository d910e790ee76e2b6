"""Blocks one by one and blocks stacked: the same numbers, either way."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from shortcut_jax import checkpoint, layers, pretrained, run, sampling, state
from shortcut_jax.parallel import sharding
from shortcut_jax.weights import conversion
from tests.untrained_runs import param_shapes, random_params, save_run, small

DEPTH = 3


def setup_of(**overrides):
    return run.prepare(small("shortcut", **{"model.depth": DEPTH, **overrides}))


def assert_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_stacking_moves_blocks_wherever_they_are():
    params = random_params(setup_of(), seed=0)
    opt_state = optax.adamw(1e-3).init(params)
    tree = {"params": params, "opt_state": opt_state, "teacher": {}, "step": jnp.int32(3)}
    stacked = layers.stack(tree)
    assert not layers.holds_stacked(tree) and layers.holds_stacked(stacked)
    for blocks in (stacked["params"]["blocks"], stacked["opt_state"][0].mu["blocks"]):
        assert blocks["qkv"]["kernel"].shape == (DEPTH, 32, 96)
    assert "block_0" not in stacked["params"] and "patch_embed" in stacked["params"]
    for i in range(DEPTH):
        np.testing.assert_array_equal(
            stacked["params"]["blocks"]["mlp_in"]["kernel"][i],
            params[f"block_{i}"]["mlp_in"]["kernel"],
        )
    assert_equal(layers.unstack(stacked), tree)
    assert_equal(layers.stack(stacked), stacked)
    assert_equal(layers.unstack(tree), tree)


def test_more_than_ten_blocks_keep_their_order():
    tree = {f"block_{i}": {"a": np.full(2, i)} for i in reversed(range(12))}
    stacked = layers.stack(tree)
    np.testing.assert_array_equal(stacked["blocks"]["a"][:, 0], np.arange(12))


def test_a_scanned_network_has_the_layout_and_the_initial_numbers():
    plain, scanned = setup_of(), setup_of(**{"model.scan_layers": True})
    one = jnp.zeros(1)
    shapes = jax.eval_shape(
        scanned.network.init,
        jax.random.key(0),
        jnp.zeros((1, 8, 8, 1)),
        one,
        one,
        jnp.zeros(1, int),
    )["params"]
    params, found = (state.init_params(s.network, s.image_shape, 0) for s in (plain, scanned))
    assert jax.tree.map(lambda a: a.shape, found) == jax.tree.map(lambda a: a.shape, shapes)
    assert_equal(layers.unstack(found), params)


# ------------------------------------------------------------------ checkpoints


def saved(workdir, setup, params):
    run.claim_workdir(setup.config, workdir)
    checkpoints = checkpoint.Checkpoints(workdir, keep=1)
    opt_state = optax.adamw(1e-3).init(params)
    kept = {"params": params, "ema": params, "opt_state": opt_state}
    checkpoints.save(1, kept, {"config": {}, "data": {}, "clock": {}})
    checkpoints.wait()
    return checkpoints, kept


@pytest.mark.parametrize("scanned", [False, True])
def test_a_checkpoint_is_read_in_the_layout_of_the_network(tmp_path, scanned):
    there, here = (setup_of(**{"model.scan_layers": s}) for s in (scanned, not scanned))
    checkpoints, kept = saved(tmp_path, there, random_params(there, seed=1))
    convert_tree = layers.unstack if scanned else layers.stack

    params, _ = run.restore_params(here, checkpoints, 1, "ema")
    assert_equal(params, convert_tree(kept["ema"]))
    shapes = jax.eval_shape(convert_tree, kept)
    wanted = checkpoint.with_shardings(shapes, sharding.shard_tree(shapes, here.mesh))
    found = checkpoints.restore(1, wanted)
    assert_equal(found, convert_tree(kept))
    assert jax.tree.map(lambda a: a.sharding, found) == jax.tree.map(lambda a: a.sharding, wanted)


def test_shapes_of_the_other_layout_have_the_same_parts():
    mesh = jax.sharding.AbstractMesh((1, 8), sharding.AXES)
    params = random_params(setup_of(), seed=0)
    trees = {}
    for name, tree in (("unrolled", params), ("scanned", layers.stack(params))):
        shapes = jax.eval_shape(lambda tree=tree: tree)
        trees[name] = checkpoint.with_shardings(shapes, sharding.shard_tree(shapes, mesh))
    kernel = trees["scanned"]["blocks"]["qkv"]["kernel"]
    assert kernel.sharding == NamedSharding(mesh, PartitionSpec(None, None, "fsdp"))
    assert layers.shapes_as(trees["unrolled"], stacked=True) == trees["scanned"]
    assert layers.shapes_as(trees["scanned"], stacked=False) == trees["unrolled"]


def test_weights_leave_a_scanned_run_unrolled_and_come_back(tmp_path):
    params = random_params(setup_of(), seed=1)
    files = []
    for scanned in (False, True):
        setup = setup_of(**{"model.scan_layers": scanned})
        workdir, out = tmp_path / f"run_{scanned}", tmp_path / f"out_{scanned}"
        saved(workdir, setup, layers.stack(params) if scanned else params)[0].close()
        conversion.export(workdir, out)
        files.append((out / "model.safetensors").read_bytes())
        described = json.loads((out / "architecture.json").read_text())
        assert described["config"]["model.scan_layers"] == scanned
    assert files[0] == files[1]

    conversion.import_exported(tmp_path / "out_True", tmp_path / "again")
    model = sampling.load(tmp_path / "again")
    assert_equal(model.params, layers.stack(params))


def test_a_teacher_has_one_digest_in_both_layouts():
    params = jax.tree.map(jnp.asarray, random_params(setup_of(), seed=1))
    assert pretrained.digest(layers.stack(params)) == pretrained.digest(params)


def test_a_run_may_start_from_one_in_the_other_layout(tmp_path):
    there, here = (small("shortcut", **{"model.scan_layers": s}) for s in (False, True))
    emas = save_run(tmp_path / "there", there)
    here.init_from, here.model.remat = str(tmp_path / "there"), "dots"
    setup, found = run.prepare(here), pretrained.find(here).init_from
    shapes = param_shapes(setup)
    params = found.params(shapes, sharding.shard_tree(shapes, setup.mesh))
    assert_equal(params, layers.stack(emas[4]))
