"""The parts of the benchmark that train, sample and save: what their numbers say is so."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shortcut_jax import flops, run, sharding, topology, train
from shortcut_jax.benchmarks import ceiling, inputs, sample, startup, step, timing, workloads
from shortcut_jax.errors import UserError
from shortcut_jax.objectives import shortcut
from tests.sentences import assert_sentence

# ------------------------------------------------------------------ the formula


def lowered_flops(config):
    """XLA's count of the step as the compiler gets it, over all devices, and the formula's."""
    setup = run.prepare(config, measures=False)
    program = train.build_program(setup, *topology.batch_shape(setup))
    return program.lower().cost_analysis()["flops"], flops.train_step(config, setup.image_shape)


@pytest.mark.parametrize("name", workloads.CONTENDERS)
def test_every_step_does_the_products_of_the_formula(name):
    """XLA counts what is no product, too: less than one percent in a network of DiT-S's width."""
    network = workloads.NARROW | {"depth": 1}
    counted, by_formula = lowered_flops(workloads.contenders(network, 8, [name])[name])
    assert by_formula < counted < 1.015 * by_formula
