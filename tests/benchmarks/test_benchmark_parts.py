"""The parts of the benchmark that train, sample and save: what their numbers say is so."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shortcut_jax import benchmarks, run, train
from shortcut_jax.benchmarks import (
    ceiling,
    inputs,
    runner,
    sample,
    startup,
    step,
    timing,
    workloads,
)
from shortcut_jax.errors import UserError
from shortcut_jax.parallel import sharding
from shortcut_jax.planning import flops, topology
from tests.sentences import assert_sentence

# ------------------------------------------------------------------ the formula


def lowered_flops(config):
    """XLA's count of the step as the compiler gets it, over all devices, and the formula's."""
    setup = run.prepare(config, measures=False)
    program = train.build_program(setup, *topology.batch_shape(setup))
    return program.lower().cost_analysis()["flops"], flops.train_step(config, setup.image_shape)


@pytest.mark.parametrize("name", ["flow_matching", "shortcut_1_4", "shortcut_1_8_guided"])
def test_every_step_does_the_products_of_the_formula(name):
    """XLA counts what is no product, too: less than one percent in a network of DiT-S's width."""
    network = workloads.NARROW | {"depth": 1}
    counted, by_formula = lowered_flops(workloads.contenders(network, 8, [name])[name])
    assert by_formula < counted < 1.015 * by_formula


def test_a_sample_in_128_steps_is_guided_and_one_in_a_few_is_not():
    setup = run.prepare(workloads.build(workloads.TINY, 16), measures=False)
    row = flops.forward(setup.config.model, setup.image_shape)
    assert [sample.sample_flops(setup, n) for n in (1, 4, 128)] == [row, 4 * row, 256 * row]
    never = run.prepare(
        workloads.build(workloads.TINY, 16, overrides={"objective.cfg_scale": 1.0}), measures=False
    )
    assert sample.sample_flops(never, 128) == 128 * row


def test_decoding_is_its_convolutions():
    setup = run.prepare(workloads.build(workloads.TINY, 16), measures=False)
    # autoencoder.TINY at full size: 2 blocks of 2 convolutions of 8 to 8 channels, then 8 to 3, on
    # 32x32; before that the same on 16x16, ...; the middle is small.
    last = 2 * 32**2 * 9 * (4 * 8 * 8 + 8 * 3)
    assert 1.2 * last < sample.decode_flops(setup) < 3 * last


# ------------------------------------------------------------------ what is compared


def test_all_contenders_are_compared_on_one_network():
    (workload,) = workloads.standard(small=False)
    configs = workload.configs()
    assert list(configs)[0] == "flow_matching" and len(configs) == 5
    fractions = {
        (c.objective.bootstrap_fraction, c.objective.cfg_scale)
        for name, c in configs.items()
        if name != "flow_matching"
    }
    assert fractions == {(k, w) for k in (1 / 8, 1 / 4) for w in (1.0, workloads.GUIDANCE)}
    shapes = {str(c.model) for c in configs.values()}
    assert len(shapes) == 1
    # Every step must be possible: validation says so.
    for config in configs.values():
        run.check(config)


def test_any_key_of_a_workload_may_be_another():
    found = workloads.contenders("B/2", 64, ["shortcut_1_8"], {"model.remat": "dots"})
    config = found["shortcut_1_8"]
    assert (config.model.remat, config.model.hidden_size, config.batch_size) == ("dots", 768, 64)
    assert config.objective.bootstrap_fraction == 1 / 8
    with pytest.raises(UserError, match="SIZE/PATCH"):
        workloads.build("B/3", 64)


def took(**seconds):
    return [timing.Took(2, wall, wall / 2) for wall in seconds["wall"]]


def test_the_ceiling_of_a_round_is_its_best_side():
    found = {
        "ceiling/1": took(wall=[1.0, 4.0]),
        "ceiling/2": took(wall=[2.0, 2.0]),
        "step": took(wall=[4.0, 4.0]),
    }
    assert ceiling.best(found) == [2.0, 1.0]
    assert ceiling.best(found, "cpu") == [4.0, 2.0]
    wall, cpu = ceiling.utilisation("x", 0.5, found["step"], found, {})
    # 2 pieces of work of 0.5 FLOPs in 4 seconds, beside 2 and 1 FLOPs per second.
    assert wall.spread == cpu.spread == (0.125, 0.25)
    assert (wall.name, wall.unit, cpu.unit) == (
        "x: MFU", "of the ceiling (time)", "of the ceiling (CPU s)"
    )  # fmt: skip


def test_a_cost_is_a_step_beside_one_of_the_first_contender():
    shortcut, base = (SimpleNamespace(flops=f, facts=dict) for f in (3.0, 2.0))
    rounds = took(wall=[3.0, 6.0]), took(wall=[2.0, 2.0])
    cost, relative, *by_cpu = step._costs("x", "base", shortcut, base, *rounds)
    assert (cost.spread, relative.spread) == ((1.5, 3.0), (1.0, 2.0))
    assert (cost.unit, relative.unit) == ("x base's time", "x FLOPs' (time)")
    assert [m.value for m in by_cpu] == [cost.value, relative.value]


def test_a_turn_of_the_ceiling_says_what_it_did():
    turns = ceiling.contenders(jnp.float32, sharding.make_mesh(1, 1), 2, small=True)
    (side,) = ceiling.SMALL_SIDES
    assert turns[f"ceiling/{side}"]().count == 2 * 2 * side**3


@dataclasses.dataclass
class Device:
    """Says what it has of memory."""

    bytes_limit: int

    def memory_stats(self):
        return {"bytes_limit": self.bytes_limit}


def test_a_batch_that_fills_the_memory(monkeypatch):
    tried = []

    def compile_step(config):
        tried.append(config.batch_size)
        mesh = SimpleNamespace(size=1)
        return SimpleNamespace(program=SimpleNamespace(mesh=mesh), state_bytes=200, peak=360)

    monkeypatch.setattr(step, "compile_step", compile_step)
    monkeypatch.setattr(jax, "local_devices", lambda: [Device(1000)])
    configs = workloads.Workload("x", workloads.TINY, None).configs
    # 16 rows take 160 beside the state, and 900 of the 1000 are to be filled.
    assert step.filling_batch(configs) == 68  # 70, in groups of 4
    assert tried == [16]
    monkeypatch.setattr(jax, "local_devices", lambda: [Device(100)])
    with pytest.raises(ValueError, match="no batch fills 100 bytes"):
        step.filling_batch(configs)


# ------------------------------------------------------------------ what is timed


def test_numbers_are_like_random_ones():
    a = np.asarray(inputs.uniform((64, 128), 0.02))
    assert len(np.unique(a)) > 0.99 * a.size and a.std() == pytest.approx(0.02, rel=0.02)
    assert abs(a.mean()) < 1e-3 and abs(a).max() <= 0.02 * 3**0.5 + 1e-6
    # Not of low rank, as a regular pattern would be.
    assert np.linalg.svd(a, compute_uv=False)[0] < 0.02 * 1.3 * (64**0.5 + 128**0.5)


def test_steps_take_turns_on_one_state():
    steps = {}

    def compiled(name):
        def run_step(state, batch):
            assert batch.image.std() == pytest.approx(1, rel=0.05)
            metrics = {
                k: dataclasses.replace(a, total=a.total + 1) for k, a in state.metrics.items()
            }
            return dataclasses.replace(state, step=state.step + 1, metrics=metrics)

        return run_step

    for name, config in workloads.contenders(
        workloads.TINY, 16, ["flow_matching", "shortcut_1_4"]
    ).items():
        setup = run.prepare(config, measures=False)
        program = train.build_program(setup, *topology.batch_shape(setup))
        steps[name] = SimpleNamespace(setup=setup, program=program, compiled=compiled(name))
    running = runner.Steps(steps)

    def totals():
        return {float(a.total) for a in running.state.metrics.values()}

    assert running.run("flow_matching", 2).count == 2 and totals() == {2.0}
    names = running.state.metrics.keys()
    running.run("shortcut_1_4", 3)
    assert totals() == {3.0} and names != running.state.metrics.keys()  # its own
    running.run("flow_matching", 1)
    assert totals() == {3.0} and names == running.state.metrics.keys()
    assert int(running.state.step) == 6  # of all


def test_a_start_that_fails_is_a_sentence(tmp_path, monkeypatch):
    program = tmp_path / "start.py"
    program.write_text("raise RuntimeError('the device is busy.')")
    monkeypatch.setattr(startup, "PROGRAM", program)
    with pytest.raises(UserError) as error:
        startup._start(small=True, cache=tmp_path)
    assert_sentence(str(error.value), ("--parts=startup", "the device is busy)", "leave the part"))


def test_processes_of_startup_come_before_this_one_takes_the_device():
    assert list(benchmarks.PARTS)[0] == "startup"
