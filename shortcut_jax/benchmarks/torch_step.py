"""The training step of the same DiT in PyTorch (`peers/torch_dit.py`), in a process of its own.

Before it is timed it has to be the same network: it is given parameters, and what it says of random
inputs must be what ours does.
"""

import functools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from shortcut_jax import layers, run, state
from shortcut_jax.benchmarks import Measurement, ceiling, inputs, summarize, timing
from shortcut_jax.benchmarks.peer import Peer
from shortcut_jax.benchmarks.timing import Took
from shortcut_jax.planning import flops
from shortcut_jax.weights import exported

GIGA = 1e9
OBJECTIVES = ("flow_matching", "shortcut_1_4")
BOUND = 1e-4  # of the difference of the outputs in float32, relative to their norm
ROWS = 4  # that are compared


def measure_step(
    name: str,
    configs: dict[str, ConfigDict],
    *,
    python: str,
    repeats: int = 5,
    steps: int = 10,
    side: int = 8192,
    dtype: str = "bfloat16",
    compile_step: bool = True,
) -> Iterator[Measurement]:
    """Measures steps and the ceiling of PyTorch's products, which take turns.

    Args:
      name: begins the names of what is found.
      configs: flow_matching and shortcut_1_4 of one network and batch size.
      python: of an environment with PyTorch and safetensors; its GPU is used if it sees one.
      repeats: rounds.
      steps: in a turn.
      side: of the square matrices.
      dtype: of matrix products.
      compile_step: with torch.compile, which takes minutes on a CPU.

    Raises:
      UserError: the other program cannot be started, or has ended.
    """
    config = configs[OBJECTIVES[0]]
    setup = run.prepare(config, measures=False)
    with tempfile.TemporaryDirectory(prefix="benchmark.") as scratch:
        paths = {key: str(Path(scratch, key)) for key in ("weights", "inputs.npz", "outputs.npz")}
        expected = _write_network(setup, paths)
        products = steps if side > 1024 else 1
        arguments = _arguments(setup, steps, dtype) | {"side": side, "products": products}
        arguments["compile"] = compile_step
        arguments |= {key.partition(".")[0]: path for key, path in paths.items()}
        with Peer("torch_python", python, "torch_dit.py", arguments) as peer:
            facts = dict(peer.versions)
            per_row = float(facts.pop("forward_flops"))
            conditions: dict[str, Any] = facts | {
                "batch_size": config.batch_size, "dtype": dtype, "steps_in_a_turn": steps,
            }  # fmt: skip
            with np.load(paths["outputs.npz"], allow_pickle=False) as file:
                error = relative(file["output"], expected)
            bound = {"bound": BOUND, "passed": error <= BOUND}
            yield summarize(f"{name}: outputs", [error], "relative to ours", conditions | bound)
            ours = flops.forward(config.model, setup.image_shape)
            yield summarize(f"{name}: FLOPs / ours", [per_row / ours], "x", conditions)
            works = {key: functools.partial(peer.run, key) for key in OBJECTIVES}
            works |= {f"{ceiling.PREFIX}{side}": functools.partial(peer.run, "ceiling")}
            found = timing.rounds(works, repeats)
    most = [rate / GIGA for rate in ceiling.best(found)]
    yield summarize(f"{name}/ceiling", most, "GFLOP / s", conditions)
    for key in OBJECTIVES:
        took, step_flops = found[key], flops.train_step(configs[key], setup.image_shape)
        yield from speed(f"{name}/{key}", config.batch_size, took, conditions)
        yield from ceiling.utilisation(f"{name}/{key}", step_flops, took, found, conditions)


def speed(
    name: str, batch_size: int, took: list[Took], conditions: dict[str, Any]
) -> Iterator[Measurement]:
    """Seconds for a step, and rows per second."""
    yield summarize(name, [t.wall / t.count for t in took], "s / step", conditions)
    rows = [batch_size * t.count / t.wall for t in took]
    yield summarize(f"{name}: rows", rows, "rows / s", conditions)


def relative(found: Any, expected: Any) -> float:
    """||found - expected|| / ||expected||, in float64."""
    a, b = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def _arguments(setup: run.Setup, steps: int, dtype: str) -> dict[str, Any]:
    config, model = setup.config, setup.config.model
    keys = ("patch_size", "hidden_size", "depth", "num_heads", "mlp_ratio", "time_scale")
    optimizer = config.optimizer
    return {
        "model": {key: model[key] for key in keys} | {"num_classes": setup.objective.null_label},
        "image_shape": list(setup.image_shape),
        "batch_size": config.batch_size,
        "dtype": dtype,
        "ema_rate": config.ema_rate,
        "optimizer": {
            "lr": optimizer.lr,
            "betas": [optimizer.b1, optimizer.b2],
            "eps": optimizer.eps,
            "weight_decay": optimizer.weight_decay,
        },
        "steps": steps,
        "max_steps": 128,
        "threads": len(os.sched_getaffinity(0)),
    }


def _write_network(setup: run.Setup, paths: dict[str, str]) -> np.ndarray:
    """Writes weights and inputs for the other side; returns what our network says, in float32."""
    network = setup.network.clone(dtype=np.dtype("float32"), ignore_step=False, scan_layers=True)
    network = network.clone(attention="xla", rows=None)  # scanned: it compiles in no time
    shapes = jax.eval_shape(lambda: state.init_params(network, setup.image_shape, 0))
    params = jax.jit(lambda: inputs.params(shapes))()
    host = layers.unstack(jax.tree.map(np.asarray, params))
    Path(paths["weights"]).write_bytes(exported.files(host, {})[exported.WEIGHTS])
    random = np.random.default_rng(0)
    given = {
        "x": random.normal(size=(ROWS, *setup.image_shape)).astype(np.float32),
        "t": np.linspace(0, 0.9, ROWS, dtype=np.float32),
        "d": np.array([0, 1 / 128, 0.25, 1], np.float32),
        "labels": np.arange(ROWS),
    }
    np.savez(paths["inputs.npz"], **given)  # type: ignore[arg-type]  # no array is an option
    with jax.default_matmul_precision("highest"):
        return np.asarray(jax.jit(state.apply_fn(network))(params, *given.values()))
