"""The start of a run in a process of its own: what `startup.py` measures.

python -P start.py '{"began": SECONDS, "small": false}' prints, as JSON, the seconds since `began`
(of `time.monotonic`) after which each stage was done.
"""

import json
import sys
import time
from typing import Any


def main(began: float, small: bool) -> dict[str, Any]:
    """Imports, finds the devices, compiles, makes a fresh train state, takes one step."""
    done = {}

    def mark(stage: str) -> None:
        done[stage] = time.monotonic() - began

    mark("python")
    import shortcut_jax  # noqa: F401

    mark("import shortcut_jax")
    import shortcut_jax.train  # noqa: F401

    mark("import shortcut_jax.train")
    import jax

    from shortcut_jax.benchmarks import inputs, runner, workloads

    device = jax.devices()[0].device_kind
    mark("devices")
    name, config = workloads.one(small)
    compiled = runner.compile_step(config)
    mark("compiled")
    program = compiled.program
    train_state = jax.jit(program.init, out_shardings=program.state_sharding)()
    jax.block_until_ready(train_state)
    mark("train state")
    jax.block_until_ready(compiled.compiled(train_state, inputs.batch(program, compiled.setup)))
    mark("first step")
    conditions = compiled.facts() | {"workload": name, "device": device}
    return {"done": done, "conditions": conditions}


if __name__ == "__main__":
    print(json.dumps(main(**json.loads(sys.argv[1]))))
