"""Steps of training, compiled and run as `train.train` does, without its data."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from shortcut_jax import device_memory, run, train
from shortcut_jax.benchmarks import inputs, timing
from shortcut_jax.benchmarks.timing import Took
from shortcut_jax.parallel import sharding
from shortcut_jax.planning import flops, topology
from shortcut_jax.program import Program
from shortcut_jax.state import TrainState


@dataclasses.dataclass(frozen=True)
class Step:
    """A compiled step.

    Attributes:
      setup: of the run.
      program: what was compiled.
      compiled: the step.
      flops: by the formula, over all devices.
      xla_flops: by XLA, per device; the body of a loop counts once.
      bytes_accessed: the same.
      peak: bytes of memory that it needs on a device.
      state_bytes: bytes of the train state on a device.
      seconds: of compilation.
    """

    setup: run.Setup
    program: Program
    compiled: jax.stages.Compiled
    flops: float
    xla_flops: float
    bytes_accessed: float
    peak: float
    state_bytes: int
    seconds: float

    def facts(self) -> dict[str, Any]:
        """What the numbers depend on."""
        config = self.setup.config
        return {
            "network": topology.network_name(config.model),
            "objective": dict(config.objective.items()),
            "image_shape": list(self.setup.image_shape),
            "batch_size": config.batch_size,
            "dtype": jnp.dtype(self.setup.network.dtype).name,
            "mesh": dict(self.setup.mesh.shape),
            "remat": config.model.remat,
            "loops": config.model.scan_layers or config.accumulation_steps > 1,
            "state_bytes": self.state_bytes,
        }


def compile_step(config: ConfigDict) -> Step:
    """Compiles the step that `train.train` would run, on the devices of this process."""
    setup = run.prepare(config, measures=False)
    program = train.build_program(setup, *topology.batch_shape(setup))
    start = time.perf_counter()
    compiled = program.compile()
    seconds = time.perf_counter() - start
    cost = compiled.cost_analysis() or {}
    return Step(
        setup=setup,
        program=program,
        compiled=compiled,
        flops=flops.train_step(config, setup.image_shape),
        xla_flops=cost.get("flops", 0.0),
        bytes_accessed=cost.get("bytes accessed", 0.0),
        peak=device_memory.peak(compiled, sharding.platform(setup.mesh)),
        state_bytes=topology.state_bytes(program),
        seconds=seconds,
    )


class Steps:
    """Steps that take turns on one train state, of which large networks leave room for one only.

    Args:
      steps: of networks with the same parameters.
    """

    def __init__(self, steps: Mapping[str, Step]):
        self._steps = dict(steps)
        self.state = inputs.train_state(next(iter(self._steps.values())).program)
        self._own = {name: self._start(step.program) for name, step in self._steps.items()}
        self._batches = {
            name: inputs.batch(step.program, step.setup) for name, step in self._steps.items()
        }

    def run(
        self, name: str, count: int, halfway: Callable[[TrainState], None] | None = None
    ) -> Took:
        """Makes `count` steps and waits for the last.

        Args:
          name: of the step.
          count: how many.
          halfway: called after half of them, when the devices have made these.
        """
        step = self._steps[name].compiled
        state = dataclasses.replace(self.state, **self._own[name])
        batch = self._batches[name]

        def work() -> int:
            nonlocal state
            for done in range(count):
                if halfway is not None and done == count // 2:
                    halfway(jax.block_until_ready(state))
                state = step(state, batch)
            jax.block_until_ready(state)
            return count

        took = timing.timed(work)
        self.state = state
        self._own[name] = {"metrics": state.metrics, "teacher": state.teacher}
        return took

    def _start(self, program: Program) -> dict[str, Any]:
        """The parts of a train state that not every step has."""

        def zeros() -> Any:
            return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), program.state_shape.metrics)

        metrics = jax.jit(zeros, out_shardings=program.state_sharding.metrics)()
        teacher = jax.tree.map(jnp.copy, self.state.ema) if program.state_shape.teacher else {}
        return {"metrics": metrics, "teacher": teacher}
