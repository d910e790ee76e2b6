"""Encode and decode of the autoencoder, beside diffusers' where a Python that has it is given."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from shortcut_jax.benchmarks import Measurement, Options, timing
from shortcut_jax.benchmarks.peer import Peer, check_backend
from shortcut_jax.benchmarks.timing import Took
from shortcut_jax.models import autoencoder
from shortcut_jax.weights import autoencoder_weights


def measure(options: Options) -> Iterator[Measurement]:
    """Images per second, float32, weights drawn at random."""
    kind, size = ("tiny", 32) if options.small else ("sd", 256)
    on_cpu = jax.default_backend() == "cpu"
    check_backend(options.torch_python)
    batch_size = 1 if on_cpu else 16
    architecture = autoencoder.ARCHITECTURES[kind]
    conditions = {"autoencoder": kind, "image_size": size, "batch_size": batch_size}
    conditions["dtype"] = "float32"
    with contextlib.ExitStack() as stack:
        contenders = _ours(architecture, size, batch_size)
        if options.torch_python:
            arguments = {
                "channels": architecture.channels,
                "layers": architecture.layers,
                "groups": architecture.groups,
                "image_size": size,
                "batch_size": batch_size,
                "threads": len(os.sched_getaffinity(0)),
            }
            peer = Peer("torch_python", options.torch_python, "diffusers_vae.py", arguments)
            stack.enter_context(peer)
            conditions |= peer.versions
            for name in list(contenders):
                contenders[f"{name}/diffusers"] = functools.partial(peer.run, name)
        found = timing.rounds(contenders, options.repeats)
    for name, took in found.items():
        yield from timing.rates(f"vae/{name}", took, "images", conditions)
    for name in ("encode", "decode"):
        if options.torch_python:
            theirs = found[f"{name}/diffusers"]
            yield timing.ratio(f"vae/{name}: ours / diffusers", found[name], theirs, conditions)


def _ours(
    architecture: autoencoder.Architecture, size: int, batch_size: int
) -> dict[str, Callable[[], Took]]:
    tensors = autoencoder_weights.random_weights(architecture, seed=0)
    params = jax.device_put(autoencoder_weights.to_params(tensors, architecture))
    random = np.random.default_rng(0)
    images = random.uniform(-1, 1, (batch_size, size, size, 3)).astype(np.float32)
    encode = jax.jit(lambda params, x: autoencoder.encode(params, x, architecture)[0])
    decode = jax.jit(lambda params, x: autoencoder.decode(params, x, architecture))
    latents = jax.random.normal(jax.random.key(0), encode(params, images).shape)

    def work(function: Callable[..., jax.Array], x: Any) -> Callable[[], Took]:
        x = jax.device_put(x)

        def run() -> int:
            function(params, x).block_until_ready()
            return batch_size

        return lambda: timing.timed(run)

    return {"encode": work(encode, images), "decode": work(decode, latents)}
