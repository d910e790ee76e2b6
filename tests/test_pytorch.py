"""The export as PyTorch sees it: the code of docs/pytorch.md, and the numbers that it gave."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shortcut_jax import sampling, state
from shortcut_jax.objectives.base import sampling_velocity
from shortcut_jax.weights import exported
from tests.golden import export_cases

GOLDEN = export_cases.ROOT / "pytorch.npz"


@pytest.fixture(scope="module", params=export_cases.CASES)
def case(request):
    """The name, the network and what PyTorch gave for it."""
    with np.load(GOLDEN) as golden:
        found = {
            key.removeprefix(f"{request.param}/"): golden[key]
            for key in golden.files
            if key.startswith(f"{request.param}/")
        }
    return request.param, export_cases.setup_of(request.param), found


def assert_close(found, expected):
    assert np.abs(expected).max() > 0.5
    assert np.abs(found - expected).max() / np.abs(expected).max() < 2e-5


def test_our_network_and_sampler_give_what_theirs_gave(case):
    name, setup, golden = case
    params, given = export_cases.params_of(setup, name), export_cases.inputs(name)
    apply = jax.jit(state.apply_fn(setup.network))
    labels = given["labels"].astype(np.int32)
    assert_close(apply(params, given["x"], given["t"], given["d"], labels), golden["output"])

    @jax.jit
    def sample(num_steps, x, guided):
        def integrate(explicit):
            velocity = sampling_velocity(
                setup.objective, lambda *args: apply(params, *args), explicit
            )
            return sampling.integrate(setup.objective, velocity, x, labels, num_steps, None)

        return jax.lax.cond(guided, lambda: integrate(True), lambda: integrate(False))

    assert set(golden) == {"output", *(f"samples_{n}" for n in export_cases.STEPS)}
    for n in export_cases.STEPS:
        found = sample(n, jnp.asarray(given["x"]), setup.objective.guided(n))
        assert_close(found, golden[f"samples_{n}"])


@pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="needs PyTorch: pip install -e .[parity]"
)
def test_the_page_in_pytorch(case, tmp_path):
    from tests.golden import make_pytorch

    name, setup, golden = case
    description = exported.describe(setup, 7, "ema")
    for file, content in exported.files(export_cases.params_of(setup, name), description).items():
        (tmp_path / file).write_bytes(content)
    found = make_pytorch.outputs(tmp_path, export_cases.inputs(name), export_cases.STEPS)
    for key, expected in golden.items():
        assert_close(found[key], expected)
