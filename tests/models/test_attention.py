"""Every kernel against attention in float64, forward and gradient; where each is refused."""

import dataclasses
import functools
import importlib.util
import json

import jax
import jax.numpy as jnp
import pytest

from configs import digits, imagenet
from shortcut_jax import config as config_lib
from shortcut_jax import run, state, topology
from shortcut_jax.benchmarks import correct
from shortcut_jax.errors import UserError
from shortcut_jax.models import attention
from tests.sentences import assert_sentence

# The Pallas kernel as it is, run by XLA.
INTERPRETED = {
    "xla": attention.xla,
    "splash": functools.partial(attention.splash, interpret=True),
}


@pytest.mark.parametrize(
    ("name", "shape", "dtype"),
    [
        ("xla", (2, 128, 1, 72), "bfloat16"),
        ("splash", (2, 128, 1, 72), "bfloat16"),
        pytest.param("splash", (2, 256, 2, 72), "bfloat16", marks=pytest.mark.slow),  # DiT-XL/2
        pytest.param("splash", (2, 256, 2, 64), "bfloat16", marks=pytest.mark.slow),  # DiT-B/2
        pytest.param("splash", (1, 384, 2, 24), "float32", marks=pytest.mark.slow),  # 3 blocks
        pytest.param("splash", (1, 1024, 1, 72), "bfloat16", marks=pytest.mark.slow),
        pytest.param("xla", (1, 384, 2, 24), "float32", marks=pytest.mark.slow),
    ],
)
def test_result_and_gradients_are_those_of_float64(name, shape, dtype):
    arrays = correct.draw_heads(shape, dtype)
    found = correct.attention_errors(INTERPRETED[name], arrays, shape[-1] ** -0.5)
    assert max(found) < correct.ATTENTION[dtype], found
    if dtype == "bfloat16":
        assert min(found) > 1e-4  # and not exact by comparing a thing with itself


@pytest.mark.parametrize("name", INTERPRETED)
def test_only_those_that_say_so_have_a_forward_mode_derivative(name):
    q = jnp.zeros((1, 128, 1, 8), jnp.bfloat16)

    def derivative(q):
        return jax.jvp(lambda q: INTERPRETED[name](q, q, q, 1.0, None), (q,), (q,))

    if attention.KERNELS[name].forward_mode:
        assert jax.eval_shape(derivative, q)[1].shape == q.shape
    else:
        with pytest.raises(TypeError, match="forward-mode"):
            jax.jit(derivative).lower(q)


def test_cudnn_is_asked_for_where_it_is_named():
    q = jnp.zeros((1, 128, 1, 8), jnp.bfloat16)
    with pytest.raises(RuntimeError, match="cuDNN"):  # which is not on this machine
        jax.eval_shape(lambda: attention.cudnn(q, q, q, 1.0, None))


def test_a_network_attends_with_the_kernel_it_names(monkeypatch):
    seen = []

    def spy(q, k, v, scale, rows):
        seen.append((q.shape, scale, rows))
        return attention.xla(q, k, v, scale, rows)

    monkeypatch.setitem(attention.KERNELS, "spy", attention.Kernel(spy))
    setup = run.prepare(digits.get_config("small"), measures=False)
    network = setup.network.clone(attention="spy")
    jax.eval_shape(lambda: state.init_params(network, setup.image_shape, 0))
    assert seen == [((1, 16, 2, 16), 1 / 4, None)]
    seen.clear()
    params = jax.eval_shape(lambda: state.init_params(setup.network, setup.image_shape, 0))
    a = jnp.zeros(4)
    x = jnp.zeros((4, *setup.image_shape))
    jax.eval_shape(state.apply_fn(network), params, x, a, a, a.astype(jnp.int32))
    assert seen == [((4, 16, 2, 16), 1 / 4, setup.network.rows)]
    assert setup.network.rows.spec == jax.P(("data", "fsdp"))


EIGHT = """
import functools, json
import jax, jax.numpy as jnp, numpy as np
from shortcut_jax import collectives, sharding
from shortcut_jax.models import attention
from shortcut_jax.benchmarks.correct import draw_heads, exact_attention

mesh = sharding.make_mesh(4, 2)
rows = sharding.batch_sharding(mesh)
arrays = draw_heads((8, 128, 1, 8), "float32")

def both(q, k, v, g):
    attend = functools.partial(attention.splash, scale=0.3, rows=rows, interpret=True)
    found, backward = jax.vjp(attend, q, k, v)
    return found, *backward(g)

compiled = jax.jit(both, in_shardings=rows, out_shardings=rows).lower(*arrays).compile()
found = compiled(*(jax.device_put(a, rows) for a in arrays))
error = max(
    float(np.abs(np.asarray(a, np.float64) - b).max())
    for a, b in zip(found, exact_attention(*arrays, 0.3))
)
sent = [c.kind for c in collectives.collectives(compiled.as_text())]
print(json.dumps({"error": error, "sent": sent, "shards": len(found[0].addressable_shards)}))
"""


def test_rows_stay_on_their_devices(run_python):
    done = run_python(["-c", EIGHT], devices=8)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["sent"] == [] and found["shards"] == 8
    assert found["error"] < 1e-5


# ---- where each is refused -----------------------------------------------------------------------


REFUSED = {
    "unknown": (digits, "small", {"model.attention": "flash"}, ("'flash'", "xla, cudnn, splash")),
    "tokens": (
        digits, "small", {"model.attention": "splash"},
        ("model.attention=splash", "a multiple of 128", "there are 16", "set model.attention=xla"),
    ),
    "heads": (
        digits, "small", {"model.attention": "cudnn", "model.num_heads": 8},
        ("model.attention=cudnn", "a multiple of 8", "is 4", "set model.attention=xla"),
    ),
    "wide heads": (
        digits, "small",
        {"model.attention": "cudnn", "model.num_heads": 1, "model.hidden_size": 256},
        ("at most 128", "is 256"),
    ),
    "forward mode": (
        imagenet, "objective=mean_flow", {"model.attention": "splash"},
        ("model.attention=splash", "objective=mean_flow", "set model.attention=xla"),
    ),
    "another platform": (
        imagenet, "small", {"model.attention": "cudnn"},
        ("model.attention=cudnn", "a gpu", "a cpu", "set model.attention=xla"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_before_anything_is_built(case, monkeypatch):
    file, argument, changes, fragments = REFUSED[case]
    config = file.get_config(argument)
    config.update_from_flattened_dict(changes)
    monkeypatch.setattr(run, "build", lambda *_: pytest.fail("too late"))
    with pytest.raises(UserError) as caught:
        run.prepare(config, measures=False)
    assert_sentence(str(caught.value), fragments)


def test_cudnn_does_not_work_in_float32():
    with pytest.raises(UserError) as caught:
        attention.check_platform("cudnn", "gpu", jnp.float32)
    expected = ("bfloat16 or float16", "are in float32", "model.dtype=bfloat16")
    assert_sentence(str(caught.value), expected)
    attention.check_platform("cudnn", "gpu", jnp.bfloat16)
    attention.check_platform("splash", "tpu", jnp.float32)


@pytest.mark.parametrize(
    ("platform", "dtype", "expected"),
    [("gpu", "auto", "cudnn"), ("gpu", "float32", "xla"), ("cpu", "bfloat16", "xla"),
     ("tpu", "auto", "xla")],
)  # fmt: skip
def test_a_trained_network_is_used_where_its_kernel_is_not(platform, dtype, expected):
    config = imagenet.get_config("small")
    config.model.update(attention="cudnn", dtype=dtype)
    objective = config_lib.build_objective(config, num_classes=3)
    assert state.build_network(config, objective, platform).attention == expected


def test_a_run_may_go_on_with_another_kernel():
    old = config_lib.flatten(imagenet.get_config("b"))
    assert config_lib.differences(old, {**old, "model.attention": "cudnn"}) == []
    # A run of before the key was there.
    del old["model.attention"]
    assert config_lib.with_defaults(old)["model.attention"] == "xla"


# ---- the compiler for TPUs -----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the extra tpu is missing")
def test_a_step_with_the_kernel_compiles_for_tpus_and_needs_less(run_python, tmp_path):
    file = tmp_path / "rows.json"
    args = ["-m", "shortcut_jax.main", "--config=configs/imagenet.py:b", "--dry_run"]
    args += ["--topology=v5e:2x2", f"--report={file}", f"--workdir={tmp_path}"]
    args += ["--config.model.depth=1", "--config.batch_size=64"]
    for name in ("xla", "splash"):
        assert run_python([*args, f"--config.model.attention={name}"], timeout=280).returncode == 0
    plain, fused = (topology.Report(**row) for row in json.loads(file.read_text())["rows"])
    assert fused.collectives.keys() == plain.collectives.keys() == {"all-reduce"}
    assert fused.peak < plain.peak and fused.bytes_accessed < plain.bytes_accessed
    assert dataclasses.asdict(fused)["settings"]["model.attention"] == "splash"
