"""shortcut_jax.benchmarks.authors on a stand-in that is laid out as the authors' repository.

Their own code is not in this repository; docs/step.md says what was built from it.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shortcut_jax.benchmarks import authors
from shortcut_jax.errors import UserError
from tests.sentences import assert_sentence

# What is missing in today's JAX is in it, too: private imports, jax.tree_map.
FILES = {
    "train.py": """
import ml_collections
model_config = ml_collections.ConfigDict({
    'lr': 0.5, 'beta1': 0.9, 'beta2': 0.999, 'weight_decay': 0.1, 'dropout': 0.0,
    'hidden_size': 3, 'patch_size': 1, 'depth': 1, 'num_heads': 1, 'mlp_ratio': 1,
    'class_dropout_prob': 0.1, 'num_classes': 10, 'sharding': 'dp', 'train_type': 'shortcut',
})
def main(_):
    raise AssertionError('their main is not to run')
    def init(rng):
        params = model_def.init(rng, jnp.zeros(example_obs_shape))['params']
        return TrainStateEma.create(params, tx.init(params))
    @partial(jax.jit, out_shardings=(train_state_sharding, no_shard))
    def update(train_state, train_state_teacher, images, labels):
        if FLAGS.model['train_type'] == 'shortcut':
            from targets_shortcut import get_targets
            target = get_targets(FLAGS, images)
        elif FLAGS.model['train_type'] == 'naive':
            from baselines.targets_naive import get_targets
            target = get_targets(FLAGS, images)
        loss = lambda p: jnp.mean((model_def.apply({'params': p}, images) - target) ** 2)
        grads = jax.grad(loss)(train_state.params)
        updates, opt_state = tx.update(grads, train_state.opt_state, train_state.params)
        params = optax.apply_updates(train_state.params, updates)
        return train_state.replace(params=params, opt_state=opt_state).double(), {'loss': loss(params)}
""",  # noqa: E501
    "model.py": """
import flax.linen as nn
from jax._src import core
from jax._src import dtypes
from math_utils import SCALE
class DiT(nn.Module):
    patch_size: int
    hidden_size: int
    depth: int
    num_heads: int
    mlp_ratio: float
    class_dropout_prob: float
    num_classes: int
    out_channels: int
    dropout: float
    ignore_dt: bool
    dtype: object
    @nn.compact
    def __call__(self, x):
        print('DiT')
        core.as_named_shape(x.shape), dtypes.canonicalize_dtype(self.dtype)
        return SCALE * nn.Dense(self.out_channels, dtype=self.dtype)(x)
""",
    "math_utils.py": "SCALE = 1.0\n",
    "targets_shortcut.py": "def get_targets(flags, x):\n    return 0 * x + flags.batch_size\n",
    "baselines/targets_naive.py": "def get_targets(flags, x):\n    return 0 * x\n",
    "utils/train_state.py": """
import jax
import flax
class TrainStateEma(flax.struct.PyTreeNode):
    params: object
    opt_state: object
    twice: object
    @classmethod
    def create(cls, params, opt_state):
        return cls(params, opt_state, params)
    def double(self):
        return self.replace(twice=jax.tree_map(lambda a: 2 * a, self.params))
""",
    "utils/sharding.py": """
from jax.experimental import mesh_utils
from jax.sharding import Mesh, PartitionSpec, NamedSharding
import jax
def create_sharding(kind, shape):
    mesh = Mesh(mesh_utils.create_device_mesh((jax.device_count(),)), 'devices')
    whole = NamedSharding(mesh, PartitionSpec())
    state = whole if kind == 'dp' else jax.tree_map(lambda _: whole, shape)
    return NamedSharding(mesh, PartitionSpec('devices')), state, whole, None, None
""",
}


@pytest.fixture
def checkout(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def build(checkout, **model):
    return authors.build(checkout, authors.Setting(model, 4, (2, 2, 3), jnp.float32))


@pytest.mark.parametrize(
    "model, target", [({}, 4.0), ({"sharding": "fsdp"}, 4.0), ({"train_type": "naive"}, 0.0)]
)
def test_their_functions_run_with_what_their_main_gives_them(checkout, model, target):
    before, path = set(sys.modules), list(sys.path)
    step = build(checkout, **model)
    state = step.init(jax.random.key(0))
    images, labels = jnp.zeros((4, 2, 2, 3)), jnp.zeros(4, jnp.int32)
    for _ in range(40):  # the answer to zeros is the bias
        state, info = step.update(state, None, images, labels)
    np.testing.assert_allclose(state.params["Dense_0"]["bias"], target, atol=1)
    np.testing.assert_allclose(
        info["loss"], np.square(state.params["Dense_0"]["bias"] - target).mean(), rtol=1e-5
    )
    np.testing.assert_array_equal(
        state.twice["Dense_0"]["kernel"], 2 * state.params["Dense_0"]["kernel"]
    )
    assert step.compile().cost_analysis()["flops"] > 0
    assert sys.path == path
    assert not {name for name in set(sys.modules) - before if name.split(".")[0] in authors.NAMES}


def test_a_folder_that_is_not_their_repository(tmp_path):
    with pytest.raises(UserError) as caught:
        build(tmp_path)
    assert_sentence(str(caught.value), [f"--authors={tmp_path}", "train.py", "6010043", "clone it"])


# ------------------------------------------------------------------ beside ours, by a compiler

COMPILED = ("-m", "shortcut_jax.benchmarks.compiled", "--topology=cpu:2")


def test_their_step_is_compiled_for_a_machine_and_kept(checkout, run_python, tmp_path):
    kept = tmp_path / "kept.json"
    args = [*COMPILED, f"--authors={checkout}", "--rows=authors", f"--report={kept}"]
    done = run_python(args)
    assert done.returncode == 0, done.stderr
    name = "b cpu:2 dp: authors"
    assert done.stdout.startswith(f"| {name} | ")
    row = json.loads(kept.read_text())[name]
    # Its only product, 4 to 4 channels for 32 x 32 pixels of 128 rows on each of two devices.
    assert row["flops"] > 2 * 4 * 4 * 32**2 * 128
    assert row["peak"] > 0 and row["bytes_accessed"] > 0 and row["seconds"] > 0
    assert "all-reduce" in row["collectives"]


def test_a_row_that_there_is_not(checkout, run_python):
    done = run_python([*COMPILED, f"--authors={checkout}", "--rows=theirs"])
    assert done.returncode == 2
    assert_sentence(done.stderr.splitlines()[-1], ["'theirs'", "authors", "choose among them"])
