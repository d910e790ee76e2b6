"""One of several processes that find each other and agree: for tests/parallel/test_distributed.py.

python -m tests.programs.several OUT --config=FILE ... does in turn what a run does together, and
leaves as a preempted one does:

  gathers and agrees; one process fails alone, and all hear of it
  places, gathers and samples rows on a mesh whose order is not that of the processes
  saves a checkpoint in OUT/checkpoints from a mesh over all devices, while these go on to change
  its arrays in place and to exchange what they hold, and reads it back
  process 1 is sent SIGTERM, twice, and all leave at the same step, which OUT/left_P says
"""

import os
import signal
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from shortcut_jax import checkpoint, config_flag, objectives, sampling
from shortcut_jax.errors import UserError
from shortcut_jax.parallel import distributed, preemption, sharding
from tests.programs.restore_on_meshes import make_state, place

META = {"config": {}, "data": {"next_step": 3}, "clock": {}}


def agree() -> None:
    index, count = jax.process_index(), jax.process_count()
    assert distributed.gather({"i": index, "long": "x" * 5000 * index}) == [
        {"i": i, "long": "x" * 5000 * i} for i in range(count)
    ]
    distributed.agree({"same": [1, 2]})
    try:
        distributed.agree({"same": 1, "seed": 7 * index})
        raise AssertionError("they differ and nobody said so")
    except UserError as error:
        assert "process 1 was started with something else" in str(error)
        assert "(seed: 7 there and 0 on process 0)" in str(error)
    try:
        with distributed.together():
            if index == count - 1:
                raise UserError("this host has no disk.")
        raise AssertionError("one failed and nobody heard")
    except UserError as error:
        assert "this host has no disk." in str(error)


def rows_stay_in_order() -> None:
    """On a mesh that goes from one process to the other and back, as on a TPU's torus."""
    here, *rest, last = sorted(jax.devices(), key=lambda device: device.id)
    order = np.array([here, *rest[1:], last, rest[0]]).reshape(-1, 1)
    mesh = jax.sharding.Mesh(order, sharding.AXES)
    count = 2 * len(order)
    own = sharding.own_rows(count, mesh)
    assert jax.process_index() or np.any(np.diff(own) > 1)  # the others' rows are between
    batches = [np.random.default_rng(i).random((count, 3), np.float32) for i in range(4)]
    for batch in batches:
        placed = sharding.to_global(batch[own], sharding.batch_sharding(mesh))
        np.testing.assert_array_equal(sharding.to_host(placed), batch)
        np.testing.assert_array_equal(sharding.local_rows(placed), batch[own])
    begun = [sharding.begin_gather(batch[own], mesh) for batch in batches]
    for batch, finish in zip(batches, begun, strict=True):
        np.testing.assert_array_equal(finish(), batch)
    images, labels = sampling.make_sampler(
        objectives.build("flow_matching", num_classes=10), lambda params, x, *_: jnp.zeros_like(x),
        sharding.replicated(mesh), mesh, seed=0, image_shape=(2, 2, 1), num_classes=10,
    )(np.zeros(()), np.arange(count), 1)  # fmt: skip
    wanted = sampling.initial(0, jnp.arange(count, dtype=jnp.uint32), (2, 2, 1), 10)
    np.testing.assert_array_equal(sharding.to_host(images), wanted[0])
    np.testing.assert_array_equal(sharding.to_host(labels), wanted[1])


def change(tree):
    mean = tree["params"]["kernel"].mean()  # of what all devices have
    return jax.tree.map(lambda a: a - mean, tree)


def save(out: Path) -> None:
    shardings = place(sharding.make_mesh(1, jax.device_count()))
    shapes = checkpoint.with_shardings(jax.eval_shape(make_state), shardings)
    make = jax.jit(make_state, out_shardings=shardings)
    step = jax.jit(change, out_shardings=shardings, donate_argnums=0)
    checkpoints = checkpoint.Checkpoints(out, keep=1, copy="device")
    for number in (2, 3):
        changed = state = make()
        checkpoints.save(number, state, META)
        for _ in range(20):
            changed = jax.block_until_ready(step(changed))
    checkpoints.wait()
    state = make()
    found = checkpoints.restore(3, shapes)
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(sharding.to_host(a), sharding.to_host(b)),
        found, state,
    )  # fmt: skip
    checkpoints.close()


def leave(out: Path) -> None:
    with preemption.Notice() as notice:
        for step in range(1000):
            if notice.reached():
                (out / f"left_{jax.process_index()}").write_text(str(step))
                raise preemption.Preempted(f"asked to leave at step {step}")
            if jax.process_index() == 1 and step in (3, 4):
                os.kill(os.getpid(), signal.SIGTERM)
            distributed.gather(step)
            time.sleep(0.01)


def main() -> None:
    agree()
    rows_stay_in_order()
    save(OUT)
    leave(OUT)


if __name__ == "__main__":
    OUT = Path(sys.argv.pop(1))
    config_flag.main(main)
