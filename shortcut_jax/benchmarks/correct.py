"""Whether this device computes what a CPU does: attention, the network, a step, Inception.

Every measurement is an error, relative to the norm of what is expected, and says in its conditions
how large it may be (`bound`) and whether it was no larger (`passed`).
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from shortcut_jax import run, state, train
from shortcut_jax.benchmarks import Measurement, inputs, summarize, workloads
from shortcut_jax.metrics import fid, inception, inception_weights
from shortcut_jax.metrics.protocols import INCEPTION
from shortcut_jax.models import attention
from shortcut_jax.parallel import sharding
from shortcut_jax.planning import topology

# Of attention, forward and gradient: 2^-7 is twice what rounding one bfloat16 costs at most.
ATTENTION = {"bfloat16": 2.0**-7, "float32": 1e-5}
NETWORK = {"bfloat16": 0.03, "float32": 1e-4}
STEP = 1e-3  # of what an update changes, in float32
FEATURES = 1e-4
# Heads of DiT-B/2 and DiT-XL/2, and of the released networks' logits.
HEADS = {"b": (2, 256, 12, 64), "xl": (2, 256, 16, 72)}
SMALL_HEADS = {"small": (1, 128, 1, 8)}
# A network of 256 tokens and heads as wide as those of DiT-XL/2.
NETWORK_SIZE = {"hidden_size": 288, "depth": 4, "num_heads": 4}


def checks(small: bool) -> dict[str, Callable[[], Iterator[Measurement]]]:
    """Name -> what makes its measurements; each works without the others."""
    found: dict[str, Callable[[], Iterator[Measurement]]] = {
        "attention": functools.partial(check_attention, SMALL_HEADS if small else HEADS)
    }
    for kernel in kernels("bfloat16"):
        found[f"network/{kernel}"] = functools.partial(check_network, kernel, small)
        found[f"step/{kernel}"] = functools.partial(check_repeats, kernel, small)
    found["step"] = functools.partial(check_step, small)
    if not small:  # it takes long to compile on a CPU
        found["inception"] = check_inception
    return found


def kernels(dtype: str) -> list[str]:
    """Names of the kernels of attention that DiT-XL/2 can use on this back end."""
    use = attention.Use(jax.devices()[0], dtype, 256, 16, 72, forward_mode=False)
    return [name for name, kernel in attention.KERNELS.items() if not kernel.refusal(use)]


def error(found: Any, expected: Any) -> float:
    """||found - expected|| / ||expected|| over all arrays of two trees, in float64."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    arrays = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in pairs]
    difference = sum(float(np.sum((a - b) ** 2)) for a, b in arrays)
    return (difference / sum(float(np.sum(b**2)) for _, b in arrays)) ** 0.5


def checked(name: str, value: float, bound: float, **conditions: Any) -> Measurement:
    """An error that has to stay within a bound; NaN does not."""
    passed = {"bound": bound, "passed": bool(value <= bound)}
    return summarize(f"check/{name}", [value], "relative error", conditions | passed)


# ---------------------------------------------------------------------- attention


def draw_heads(shape: tuple[int, ...], dtype: str, seed: int = 0) -> list[jax.Array]:
    """q, k, v and the gradient of the result; logits have a standard deviation of 3."""
    random = np.random.default_rng(seed)
    q, *others = (random.normal(size=shape) for _ in range(4))
    return [jnp.asarray(a, dtype) for a in (3 * q, *others)]


def exact_attention(q: Any, k: Any, v: Any, g: Any, scale: float) -> list[np.ndarray]:
    """The result, and the gradients of q, k and v where its own is g: [B, T, N, D] float64."""
    q, k, v, g = (np.asarray(a, np.float64).swapaxes(1, 2) for a in (q, k, v, g))
    logits = scale * q @ k.swapaxes(2, 3)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    dp = g @ v.swapaxes(2, 3)
    dlogits = scale * p * (dp - (p * dp).sum(-1, keepdims=True))
    found = (p @ v, dlogits @ k, dlogits.swapaxes(2, 3) @ q, p.swapaxes(2, 3) @ g)
    return [a.swapaxes(1, 2) for a in found]


def attention_errors(attend: Callable[..., jax.Array], arrays: list[Any], scale: float):
    """Errors of a kernel's result and of the gradients of q, k and v."""

    q, k, v, g = arrays
    rows, tokens, heads, _ = q.shape

    def result(*parts):
        qkv = jnp.stack(parts, axis=2).reshape(rows, tokens, -1)
        return attend(qkv, heads, scale, None).reshape(q.shape)

    @jax.jit
    def both(q, k, v, g):
        found, backward = jax.vjp(result, q, k, v)
        return found, *backward(g)

    pairs = zip(both(q, k, v, g), exact_attention(q, k, v, g, scale), strict=True)
    return [error(a, b) for a, b in pairs]


def check_attention(heads: Mapping[str, tuple[int, ...]]) -> Iterator[Measurement]:
    """Every kernel of this back end in bfloat16, at the scale of the paper."""
    for kernel in kernels("bfloat16"):
        for name, shape in heads.items():
            arrays, scale = draw_heads(shape, "bfloat16"), shape[-1] ** -0.5
            found = attention_errors(attention.KERNELS[kernel].attend, arrays, scale)
            for what, value in zip(("result", "dq", "dk", "dv"), found, strict=True):
                full = f"attention/{kernel}/{name}/{what}"
                yield checked(full, value, ATTENTION["bfloat16"], shape=list(shape))


# ---------------------------------------------------------------------- the network and the step


def check_network(kernel: str, small: bool) -> Iterator[Measurement]:
    """A DiT here, in float32 and bfloat16, beside the same in float32 on a CPU."""
    config = _config(small)
    cpu = jax.devices("cpu")[0]
    setup = _setup(config, cpu)
    shapes = jax.eval_shape(lambda: state.init_params(setup.network, setup.image_shape, 0))
    rows = jnp.arange(4)

    def answer(device: jax.Device, dtype: str, kernel: str) -> np.ndarray:
        network = setup.network.clone(dtype=jnp.dtype(dtype), attention=kernel, rows=None)
        with jax.default_device(device), jax.default_matmul_precision("highest"):
            params = jax.jit(lambda: inputs.params(shapes))()
            x = inputs.uniform((4, *setup.image_shape), 1.0)
            t, d = (jnp.asarray(a, jnp.float32) for a in ([0, 0.3, 0.6, 0.9], [0, 0.25, 0.5, 1]))
            return np.asarray(jax.jit(state.apply_fn(network))(params, x, t, d, rows))

    expected = answer(cpu, "float32", "xla")
    for dtype, bound in NETWORK.items():
        if kernel in kernels(dtype):
            found = answer(jax.devices()[0], dtype, kernel)
            yield checked(f"network/{kernel}/{dtype}", error(found, expected), bound)


def check_step(small: bool) -> Iterator[Measurement]:
    """One step here and on a CPU from the same state, in float32."""
    config = _config(small)
    # Adam's own first update is the sign of the gradient: where that is almost 0, rounding decides.
    config.optimizer.eps = 1.0
    # Every array is compared with its start, so that what the step adds is what counts.
    (start, expected), (_, found) = (
        _one_step(config, device) for device in (jax.devices("cpu")[0], jax.devices()[0])
    )
    for name in ("params", "ema"):
        moved = [jax.tree.map(np.subtract, after[name], start[name]) for after in (found, expected)]
        yield checked(f"step/{name}", error(*moved), STEP)
    yield checked("step/gradient", error(found["mu"], expected["mu"]), STEP)


def check_repeats(kernel: str, small: bool) -> Iterator[Measurement]:
    """Two runs of one step from the same state, in the type of the training: bit for bit."""
    config = _config(small)
    config.model.update(attention=kernel, dtype="auto" if small else "bfloat16")
    (_, one), (_, two) = (_one_step(config, jax.devices()[0]) for _ in range(2))
    yield checked(f"repeats/{kernel}", error(one["params"], two["params"]), 0.0)


def _config(small: bool) -> ConfigDict:
    network = workloads.TINY if small else NETWORK_SIZE | {"patch_size": 2}
    config = workloads.build(network, 16, overrides={"objective.cfg_scale": 1.0})
    config.model.dtype = "float32"
    return config


def _setup(config: ConfigDict, device: jax.Device) -> run.Setup:
    mesh: Mesh = sharding.make_mesh(1, 1, [device])
    run.check_device(config, device)
    return run.build(config, mesh)


def _one_step(config: ConfigDict, device: jax.Device) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters, EMA and first moments before and after a step, on the host."""

    def parts(tree: state.TrainState) -> dict[str, Any]:
        mu = tree.opt_state[0].mu
        return jax.device_get({"params": tree.params, "ema": tree.ema, "mu": mu})

    with jax.default_matmul_precision("highest"):
        setup = _setup(config, device)
        program = train.build_program(setup, *topology.batch_shape(setup))
        before, batch = inputs.train_state(program), inputs.batch(program, setup)
        first = parts(before)
        return first, parts(program.compile()(before, batch))


# ---------------------------------------------------------------------- Inception


def check_inception() -> Iterator[Measurement]:
    """Features here and on a CPU, with random weights."""
    weights = inception_weights.load(inception.weight_shapes(), inception_weights.RANDOM)
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    found = [
        fid.build_extractor(weights, INCEPTION["adm"], 2, [device]).outputs(images)["features"]
        for device in (jax.devices()[0], jax.devices("cpu")[0])
    ]
    yield dataclasses.replace(
        checked("inception/features", error(*found), FEATURES), unit="relative error (float32)"
    )
