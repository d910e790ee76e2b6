"""The training step of the paper's authors, taken from a checkout of their repository.

github.com/kvfrans/shortcut-models at commit 6010043. Their files are read and run as they are but
for what the JAX of today has no longer: `jax.tree_map`, two private imports of model.py and the
`as_named_shape` that one of them was for, whose result nothing uses. `init` and `update`, which are
functions within their `main`, are taken out of it and get the variables that `main` gives them.
"""

import ast
import contextlib
import dataclasses
import functools
import io
import re
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax

from shortcut_jax.errors import UserError

FILES = ("train.py", "model.py", "math_utils.py", "targets_shortcut.py", "utils/sharding.py")
# What their modules are called among all modules of this process, while they are loaded.
NAMES = ("model", "math_utils", "targets_shortcut", "baselines", "utils")
TARGETS = {"shortcut": "targets_shortcut", "naive": "baselines.targets_naive"}  # by train_type


@dataclasses.dataclass(frozen=True)
class Setting:
    """What their flags say; the values of their ImageNet command by default.

    Attributes:
      model: overrides of their `model_config`: sizes, bootstrap_every, train_type of TARGETS ...
      batch_size: global.
      image_shape: (H, W, C) of what the network sees.
      dtype: of the network; their `main` leaves it at bfloat16.
    """

    model: Mapping[str, Any]
    batch_size: int
    image_shape: tuple[int, int, int]
    dtype: Any = jnp.bfloat16


@dataclasses.dataclass(frozen=True)
class Step:
    """Their step, nothing of it compiled yet.

    Attributes:
      init: key -> train state.
      update: (train state, None, images [B, H, W, C], labels [B]) -> (train state, dict of infos).
      state_shape: of the train state, with shardings.
      batch_shape: images and labels, with shardings.
    """

    init: Callable[..., Any]
    update: Callable[..., Any]
    state_shape: Any
    batch_shape: tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]

    def compile(self, options: Mapping[str, Any] | None = None) -> jax.stages.Compiled:
        """Their update, compiled for the devices of its shardings."""
        with contextlib.redirect_stdout(io.StringIO()):  # their network prints while it is traced
            lowered = self.update.lower(self.state_shape, None, *self.batch_shape)  # type: ignore[attr-defined]
        return lowered.compile(compiler_options=dict(options or {}))


def build(checkout: Path, setting: Setting, devices: Sequence[jax.Device] | None = None) -> Step:
    """Their step for a setting.

    Args:
      checkout: of their repository.
      setting: see there.
      devices: those to shard over, which need not exist; all devices by default.

    Raises:
      UserError: the folder is not their repository.
    """
    devices = list(devices or jax.devices())
    with _their_modules(checkout) as load:
        train = ast.parse(_source(checkout, "train.py"))
        flags = types.SimpleNamespace(
            model=_defaults(train) | dict(setting.model),
            batch_size=setting.batch_size,
            dataset_name="imagenet256",
        )
        model = flags.model
        train_state = load("utils.train_state", {"jax": _Today()})
        network = load("model", _instead_of_private()).DiT(
            **{key: model[key] for key in ("patch_size", "hidden_size", "depth", "num_heads")},
            **{key: model[key] for key in ("mlp_ratio", "class_dropout_prob", "num_classes")},
            out_channels=setting.image_shape[-1],
            dropout=model["dropout"],
            ignore_dt=model["train_type"] not in ("shortcut", "livereflow"),
            dtype=setting.dtype,
        )
        given = {
            "FLAGS": flags, "TrainStateEma": train_state.TrainStateEma, "flax": flax, "jax": jax,
            "jnp": jnp, "model_def": network, "np": np, "optax": optax,
            "partial": functools.partial, "example_obs_shape": (1, *setting.image_shape),
            "lr_schedule": lambda _: model["lr"],
        }  # fmt: skip
        given["tx"] = optax.chain(
            optax.adamw(given["lr_schedule"], model["beta1"], model["beta2"],
                        weight_decay=model["weight_decay"])
        )  # fmt: skip
        exec(_functions(train, "init"), given)
        with contextlib.redirect_stdout(io.StringIO()):
            shape = jax.eval_shape(given["init"], jax.random.key(0))
        shardings = load("utils.sharding", {"jax": _Today(devices), "mesh_utils": _Flat(devices)})
        data, state, replicated, *_ = shardings.create_sharding(model["sharding"], shape)
        given |= {"data_sharding": data, "train_state_sharding": state, "no_shard": replicated}
        # `update` imports it while it is traced, when these modules are gone again.
        given["get_targets"] = load(TARGETS[model["train_type"]]).get_targets
        exec(_functions(train, "update"), given)
    if model["sharding"] == "dp":
        state = jax.tree.map(lambda _: replicated, shape)
    placed = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shape, state
    )
    images = (setting.batch_size, *setting.image_shape)
    batch = (
        jax.ShapeDtypeStruct(images, jnp.float32, sharding=data),
        jax.ShapeDtypeStruct(images[:1], jnp.int32, sharding=data),
    )
    init = jax.jit(given["init"], out_shardings=state)
    return Step(init, given["update"], placed, batch)


class _Today:
    """`jax` with what their code finds missing, and with other devices if there are some."""

    def __init__(self, devices: Sequence[jax.Device] | None = None) -> None:
        self.tree_map = jax.tree.map
        if devices is not None:
            self.device_count = self.local_device_count = lambda: len(devices)
            self.local_devices = lambda: list(devices)

    def __getattr__(self, name: str) -> Any:
        return getattr(jax, name)


class _Flat:
    """`jax.experimental.mesh_utils` for devices that are given."""

    def __init__(self, devices: Sequence[jax.Device]) -> None:
        self.create_device_mesh = lambda shape: np.asarray(devices).reshape(shape)


def _instead_of_private() -> dict[str, Any]:
    return {
        "core": types.SimpleNamespace(as_named_shape=lambda shape: shape),
        "dtypes": jax.dtypes,
    }


@contextlib.contextmanager
def _their_modules(checkout: Path) -> Iterator[Callable[..., types.ModuleType]]:
    """A function that loads a module of theirs, with names replaced; all are gone at the end."""
    for name in FILES:
        _source(checkout, name)

    def load(name: str, replaced: Mapping[str, Any] | None = None) -> types.ModuleType:
        text = _source(checkout, f"{name.replace('.', '/')}.py")
        text = re.sub(r"^from jax\._src.*$", "", text, flags=re.MULTILINE)
        for what in replaced or {}:
            text = re.sub(
                rf"^(import {what}|from \S+ import {what})$", "", text, flags=re.MULTILINE
            )
        module = types.ModuleType(f"authors.{name}")
        sys.modules[module.__name__] = module  # where dataclasses look for it
        module.__dict__.update(replaced or {})
        exec(compile(text, name, "exec"), module.__dict__)
        return module

    found = {name: module for name, module in sys.modules.items() if _top(name) in NAMES}
    for name in found:
        del sys.modules[name]
    sys.path.insert(0, str(checkout))
    try:
        yield load
    finally:
        sys.path.remove(str(checkout))
        for name in [name for name in sys.modules if _top(name) in NAMES]:
            del sys.modules[name]
        sys.modules.update(found)


def _top(name: str) -> str:
    return name.partition(".")[0]


def _source(checkout: Path, name: str) -> str:
    try:
        return (checkout / name).read_text()
    except OSError as error:
        raise UserError(
            f"--authors={checkout} has no {name} that can be read ({error.strerror}); expected a "
            "checkout of github.com/kvfrans/shortcut-models at commit 6010043: clone it there."
        ) from error


def _defaults(train: ast.Module) -> dict[str, Any]:
    """Their `model_config`."""
    for node in train.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "model_config":
            assert isinstance(node.value, ast.Call)
            return ast.literal_eval(node.value.args[0])
    raise AssertionError("their train.py has no model_config")


def _functions(train: ast.Module, name: str) -> types.CodeType:
    """A function within their `main`, without its imports of what it is given."""
    main = next(n for n in train.body if isinstance(n, ast.FunctionDef) and n.name == "main")
    found = next(n for n in main.body if isinstance(n, ast.FunctionDef) and n.name == name)
    for node in ast.walk(found):
        if isinstance(node, ast.If):
            node.body = [n for n in node.body if not isinstance(n, ast.ImportFrom)]
    return compile(ast.fix_missing_locations(ast.Module([found], [])), "train.py", "exec")
