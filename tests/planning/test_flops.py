"""planning/flops.py, beside numbers worked out by hand; XLA's own count is in test_meshes.py."""

import jax
import jax.numpy as jnp
import pytest

from configs import imagenet
from shortcut_jax.errors import UserError
from shortcut_jax.planning import flops
from tests.sentences import assert_sentence

LATENTS = (32, 32, 4)


def test_a_row_of_dit_b_is_what_its_products_add_up_to():
    t, h = 256, 768
    block = 24 * t * h**2 + 4 * t**2 * h + 12 * h**2
    ends = 2 * (2 * t * 16 * h)
    embeddings = 2 * (2 * 256 * h + 2 * h**2)
    by_hand = 12 * block + ends + embeddings + 4 * h**2
    found = flops.forward(imagenet.get_config("b").model, LATENTS)
    assert found == by_hand == pytest.approx(46.0e9, rel=2e-3)


@pytest.mark.parametrize(
    ("argument", "gflop"),
    # Table 4 of DiT (Peebles & Xie 2023) counts a multiply-add once: 23.0 and 118.6.
    [("b", 2 * 23.0), ("xl", 2 * 118.6)],
)
def test_a_row_is_what_the_paper_of_dit_says(argument, gflop):
    found = flops.forward(imagenet.get_config(argument).model, LATENTS)
    assert found == pytest.approx(gflop * 1e9, rel=0.01)


def test_attention_is_its_share_of_a_block():
    model = imagenet.get_config("b").model
    block = 256 / (6 * 768 + 256)  # 4 T^2 h of 24 T h^2 + 4 T^2 h
    assert flops.attention_share(model, LATENTS) == pytest.approx(block, rel=0.01)


def test_a_step_without_guidance_is_three_and_a_half_passes():
    config = imagenet.get_config("b")
    config.objective.cfg_scale = 1.0
    row = flops.forward(config.model, LATENTS)
    assert flops.train_step(config, LATENTS) == 3.5 * 256 * row  # 1/4 of the rows bootstrap


def test_guidance_adds_the_rows_without_a_label():
    config = imagenet.get_config("b")
    plain, guided = config.copy_and_resolve_references(), config.copy_and_resolve_references()
    plain.objective.cfg_scale = 1.0
    ratio = flops.train_step(guided, LATENTS) / flops.train_step(plain, LATENTS)
    assert 1 < ratio <= 4 / 3.5


def test_a_program_is_counted_where_the_devices_are_no_cpus(monkeypatch):
    """jax counts what is not compiled for a CPU alone: for others it gives None."""
    count = jax.stages.Lowered.cost_analysis

    def of_a_cpu_alone(lowered):
        device = jax.config.jax_default_device
        return count(lowered) if device is not None and device.platform == "cpu" else None

    monkeypatch.setattr(jax.stages.Lowered, "cost_analysis", of_a_cpu_alone)
    a = jax.ShapeDtypeStruct((8, 16), jnp.float32)
    b = jax.ShapeDtypeStruct((16, 4), jnp.float32)
    assert jax.jit(jnp.matmul).lower(a, b).cost_analysis() is None
    assert flops.counted(jnp.matmul, a, b) == 2 * 8 * 16 * 4


def test_where_there_is_no_cpu_nothing_is_counted(monkeypatch):
    def fail(platform):
        raise RuntimeError(f"Unknown backend {platform}")

    monkeypatch.setattr(jax, "devices", fail)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(UserError) as caught:
        flops.counted(jnp.sin, jnp.zeros(3))
    assert_sentence(str(caught.value), ["JAX_PLATFORMS=cuda", "set JAX_PLATFORMS=cuda,cpu"])
