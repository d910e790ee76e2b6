"""Samples per second, as the evaluation draws them: in latents, and decoded to images."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from shortcut_jax import data, run, sampling, state
from shortcut_jax.benchmarks import (
    Measurement,
    Options,
    ceiling,
    inputs,
    summarize,
    timing,
    workloads,
)
from shortcut_jax.benchmarks.timing import Took
from shortcut_jax.models import autoencoder
from shortcut_jax.parallel import sharding
from shortcut_jax.planning import flops, topology

GIGA = 1e9
STEPS = (1, 4, 128)


def measure(options: Options) -> Iterator[Measurement]:
    """The workloads of this back end."""
    on_cpu = jax.default_backend() == "cpu"
    networks = {"tiny": workloads.TINY} if options.small else (
        {"narrow": workloads.NARROW} if on_cpu else {"dit_b2": "B/2", "dit_xl2": "XL/2"}
    )  # fmt: skip
    for name, network in networks.items():
        devices = jax.device_count()
        size = {"eval.batch_size": (2 if on_cpu else 64) * devices}
        config = workloads.build(network, 32 * devices, overrides=size)
        yield from measure_sampling(
            f"sample/{name}",
            config,
            num_steps=STEPS[:2] if options.small else STEPS,
            repeats=options.repeats,
            small=options.small,
        )


def measure_sampling(
    name: str,
    config: ConfigDict,
    *,
    num_steps: Sequence[int] = STEPS,
    repeats: int = 5,
    small: bool = False,
) -> Iterator[Measurement]:
    """Measures batches of samples by several numbers of steps that take turns.

    Those that the method guides while it samples pass two rows through the network for each.

    Args:
      name: begins the names of what is found: NAME/STEPS and NAME/STEPS/decoded.
      config: of a run on latents, with eval.batch_size; see `workloads.build`.
      num_steps: numbers of sampling steps.
      repeats: rounds.
      small: a small ceiling, to see that it runs.
    """
    setup = run.prepare(config, measures=False)
    on_cpu = sharding.platform(setup.mesh) == "cpu"
    of_decoding = decode_flops(setup)  # which may be refused, so before the long part
    draw = _draw(setup)

    def decoded(steps: int) -> jax.Array:
        return setup.space.decode(draw(steps))

    turns: dict[str, Callable[[], Took]] = {}
    for steps in num_steps:
        # Several batches where one is soon done, given to the devices ahead as evaluation does.
        batches = 1 if on_cpu else max(1, 32 // steps)
        turns[f"{steps}"] = _turn(setup, draw, steps, batches)
        turns[f"{steps}/decoded"] = _turn(setup, decoded, steps, 1)
    products = 1 if on_cpu else 10
    ceilings = ceiling.contenders(setup.network.dtype, setup.mesh, products, small)
    found = timing.rounds(turns | ceilings, repeats)
    conditions: dict[str, Any] = {
        "network": topology.network_name(setup.config.model),
        "objective": dict(setup.config.objective.items()),
        "batch_size": setup.config.eval.batch_size,
        "dtype": jnp.dtype(setup.network.dtype).name,
        "autoencoder": f"{setup.config.autoencoder.kind}, float32",
        "mesh": dict(setup.mesh.shape),
    }
    for steps in num_steps:
        for suffix, extra in (("", 0.0), ("/decoded", of_decoding)):
            each = sample_flops(setup, steps) + extra
            took, title = found[f"{steps}{suffix}"], f"{name}/{steps}{suffix}"
            rates = [t.count / t.wall for t in took]
            yield summarize(title, rates, "samples / s", conditions)
            yield summarize(f"{title}: FLOPs", [each / GIGA], "GFLOP / sample", conditions)
            yield from ceiling.utilisation(title, each, took, found, conditions)


def sample_flops(setup: run.Setup, num_steps: int) -> float:
    """FLOPs of the network for one sample, by the formula."""
    objective = setup.objective
    guided = sampling.is_guided(objective, objective.cfg_scale, num_steps)
    return num_steps * (1 + guided) * flops.forward(setup.config.model, setup.image_shape)


def decode_flops(setup: run.Setup) -> float:
    """FLOPs of decoding one sample to an image, as XLA counts them before it optimises."""
    architecture = autoencoder.ARCHITECTURES[setup.config.autoencoder.kind]
    module = autoencoder.Autoencoder(architecture)
    image = jnp.zeros((1, *data.describe(setup.config.data)[0]))
    params = jax.eval_shape(module.init, jax.random.key(0), image)["params"]
    x = jax.ShapeDtypeStruct((1, *setup.image_shape), jnp.float32)
    return flops.counted(lambda p, x: autoencoder.decode(p, x, architecture), params, x)


def _draw(setup: run.Setup) -> Callable[[int], jax.Array]:
    """Starts a batch of samples in so many steps, with parameters that nobody trained."""

    shapes = jax.eval_shape(
        lambda: state.init_params(setup.network, setup.image_shape, setup.config.seed)
    )
    params_sharding = sharding.shard_tree(shapes, setup.mesh)
    params = jax.jit(lambda: inputs.params(shapes), out_shardings=params_sharding)()
    sampler = sampling.make_sampler(
        setup.objective,
        state.apply_fn(setup.network),
        params_sharding,
        setup.mesh,
        seed=setup.config.eval.seed,
        image_shape=setup.image_shape,
        num_classes=setup.num_classes,
    )
    indices = np.arange(setup.config.eval.batch_size)
    return lambda num_steps: sampler(params, indices, num_steps)[0]


def _turn(
    setup: run.Setup, draw: Callable[[int], jax.Array], num_steps: int, batches: int
) -> Callable[[], Took]:
    def work() -> int:
        jax.block_until_ready([draw(num_steps) for _ in range(batches)])
        return batches * setup.config.eval.batch_size

    return lambda: timing.timed(work)
