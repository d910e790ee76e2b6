"""Every kernel against attention in float64, forward and gradient; where each is refused."""

import dataclasses
import functools
import importlib.util
import json
import types

import jax
import jax.numpy as jnp
import pytest

from configs import digits, imagenet
from shortcut_jax import config as config_lib
from shortcut_jax import run, state
from shortcut_jax.benchmarks import correct
from shortcut_jax.errors import UserError
from shortcut_jax.models import attention
from shortcut_jax.planning import topology
from tests.sentences import assert_sentence

# The Pallas kernel as it is, run by XLA.
INTERPRETED = {
    "xla": attention.xla,
    "pallas": functools.partial(attention.pallas, interpret=True),
}


@pytest.mark.parametrize(
    ("name", "shape", "dtype"),
    [
        ("xla", (2, 64, 2, 72), "bfloat16"),
        ("pallas", (2, 64, 2, 72), "bfloat16"),
        ("pallas", (1, 16, 3, 8), "float32"),
        pytest.param("pallas", (2, 256, 16, 72), "bfloat16", marks=pytest.mark.slow),  # DiT-XL/2
        pytest.param("pallas", (2, 256, 12, 64), "bfloat16", marks=pytest.mark.slow),  # DiT-B/2
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
    qkv = jnp.zeros((1, 16, 24), jnp.bfloat16)

    def derivative(qkv):
        return jax.jvp(lambda a: INTERPRETED[name](a, 1, 1.0, None), (qkv,), (qkv,))

    if attention.KERNELS[name].forward_mode:
        assert jax.eval_shape(derivative, qkv)[1].shape == (1, 16, 8)
    else:
        with pytest.raises(TypeError, match="forward-mode"):
            jax.jit(derivative).lower(qkv)


def test_cudnn_is_asked_for_where_it_is_named():
    qkv = jnp.zeros((1, 128, 24), jnp.bfloat16)
    with pytest.raises(RuntimeError, match="cuDNN"):  # which is not on this machine
        jax.eval_shape(lambda: attention.cudnn(qkv, 1, 1.0, None))


def test_a_network_attends_with_the_kernel_it_names(monkeypatch):
    seen = []

    def spy(qkv, heads, scale, rows):
        seen.append((qkv.shape, heads, scale, rows))
        return attention.xla(qkv, heads, scale, rows)

    monkeypatch.setitem(attention.KERNELS, "spy", attention.Kernel(spy))
    setup = run.prepare(digits.get_config("small"), measures=False)
    network = setup.network.clone(attention="spy")
    jax.eval_shape(lambda: state.init_params(network, setup.image_shape, 0))
    assert seen == [((1, 16, 96), 2, 1 / 4, None)]
    seen.clear()
    params = jax.eval_shape(lambda: state.init_params(setup.network, setup.image_shape, 0))
    a = jnp.zeros(4)
    x = jnp.zeros((4, *setup.image_shape))
    jax.eval_shape(state.apply_fn(network), params, x, a, a, a.astype(jnp.int32))
    assert seen == [((4, 16, 96), 2, 1 / 4, setup.network.rows)]
    assert setup.network.rows.spec == jax.P(("data", "fsdp"))


EIGHT = """
import json
import jax, jax.numpy as jnp, numpy as np
from shortcut_jax.planning import collectives
from shortcut_jax.parallel import sharding
from shortcut_jax.models import attention
from shortcut_jax.benchmarks.correct import draw_heads, exact_attention

mesh = sharding.make_mesh(4, 2)
rows = sharding.batch_sharding(mesh)
arrays = draw_heads((8, 16, 1, 8), "float32")

def both(q, k, v, g):
    def result(*parts):
        qkv = jnp.stack(parts, axis=2).reshape(*q.shape[:2], -1)
        return attention.pallas(qkv, 1, 0.3, rows, interpret=True).reshape(q.shape)

    found, backward = jax.vjp(result, q, k, v)
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


GPU = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H100 80GB HBM3")
V3, V4 = (types.SimpleNamespace(platform="tpu", device_kind=f"TPU {v}") for v in ("v3", "v4"))
CPU = types.SimpleNamespace(platform="cpu", device_kind="cpu")
# DiT-XL/2.
XL = attention.Use(V4, "bfloat16", tokens=256, heads=16, head_dim=72, forward_mode=False)

REFUSED = {
    "tokens": ("pallas", {"tokens": 100}, ("a multiple of 8", "there are 100")),
    "rows": ("pallas", {"tokens": 1024}, ("holds a whole row", "1024 tokens", "1152")),
    "generation": ("pallas", {"device": V3}, ("TPU v3",)),
    "platform": ("cudnn", {"device": V4}, ("a kernel for a gpu", "on a tpu")),
    "dtype": (
        "cudnn", {"device": GPU, "dtype": "float32"}, ("bfloat16 or float16", "are in float32")
    ),
    "heads": ("cudnn", {"device": GPU, "head_dim": 4}, ("a multiple of 8", "is 4")),
    "wide heads": ("cudnn", {"device": GPU, "head_dim": 256}, ("at most 128", "is 256")),
    "forward mode": ("pallas", {"forward_mode": True}, ("no forward-mode derivative",)),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_kernel_is_refused_where_it_cannot_be_used(case):
    name, changes, fragments = REFUSED[case]
    use = dataclasses.replace(XL, **changes)
    with pytest.raises(UserError) as caught:
        attention.check(name, use)
    fragments = (f"model.attention={name}", *fragments, "set model.attention=auto")
    assert_sentence(str(caught.value), fragments)
    assert attention.choose(name, use) == "xla"


def test_xla_and_auto_are_never_refused():
    for changes in ({}, *(changes for _, changes, _ in REFUSED.values())):
        use = dataclasses.replace(XL, **changes)
        attention.check("xla", use)
        attention.check("auto", use)
        assert attention.choose("xla", use) == "xla"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({}, "pallas"), ({"head_dim": 64, "heads": 12, "tokens": 512}, "pallas"),
     ({"tokens": 512}, "xla"), ({"dtype": "float32"}, "xla"), ({"device": V3}, "xla"),
     ({"device": CPU}, "xla"), ({"device": GPU}, "xla"), ({"forward_mode": True}, "xla")],
)  # fmt: skip
def test_auto_is_the_kernel_where_it_can_be(changes, expected):
    assert attention.choose("auto", dataclasses.replace(XL, **changes)) == expected


@pytest.mark.parametrize(
    ("kernel", "fragments"),
    [("flash", ("'flash'", "auto, xla, cudnn, pallas")), ("cudnn", ("a gpu", "a cpu"))],
)
def test_what_cannot_be_is_refused_before_anything_is_built(kernel, fragments, monkeypatch):
    config = imagenet.get_config("small")
    config.model.attention = kernel
    monkeypatch.setattr(run, "build", lambda *_: pytest.fail("too late"))
    with pytest.raises(UserError) as caught:
        run.prepare(config, measures=False)
    assert_sentence(str(caught.value), ("model.attention", *fragments))


@pytest.mark.parametrize(
    ("device", "kernel", "objective", "expected"),
    [(GPU, "cudnn", "shortcut", "cudnn"), (V4, "auto", "shortcut", "pallas"),
     (V4, "auto", "mean_flow", "xla"), (CPU, "cudnn", "shortcut", "xla")],
)  # fmt: skip
def test_a_network_is_built_with_a_kernel_of_its_device(device, kernel, objective, expected):
    config = imagenet.get_config(f"objective={objective}")
    config.model.attention = kernel
    built = config_lib.build_objective(config, num_classes=1000)
    assert state.build_network(config, built, (32, 32, 4), device).attention == expected


def test_a_run_may_go_on_with_another_kernel():
    old = config_lib.flatten(imagenet.get_config("b"))
    assert config_lib.differences(old, {**old, "model.attention": "cudnn"}) == []
    # A run of before the key was there.
    del old["model.attention"]
    assert config_lib.with_defaults(old)["model.attention"] == "auto"


# ---- the compiler for TPUs -----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs pip install -e '.[tpu]'"
)
def test_a_step_with_the_kernel_compiles_for_tpus_and_needs_less(run_python, tmp_path):
    file = tmp_path / "rows.json"
    args = ["-m", "shortcut_jax.main", "--config=configs/imagenet.py:b", "--dry_run"]
    args += ["--topology=v5e:2x2", f"--report={file}", f"--workdir={tmp_path}"]
    args += ["--config.model.depth=1", "--config.batch_size=64"]
    for name in ("xla", "pallas"):
        assert run_python([*args, f"--config.model.attention={name}"], timeout=280).returncode == 0
    plain, fused = (topology.Report(**row) for row in json.loads(file.read_text())["rows"])
    assert fused.collectives.keys() == plain.collectives.keys() == {"all-reduce"}
    assert fused.peak < plain.peak and fused.bytes_accessed < plain.bytes_accessed
    assert dataclasses.asdict(fused)["settings"]["model.attention"] == "pallas"
