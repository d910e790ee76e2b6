"""Every key of the config is read by something."""

import inspect
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

import configs
from shortcut_jax import config as config_lib
from shortcut_jax import objectives, train, validation
from shortcut_jax.data import fashion_mnist
from shortcut_jax.metrics import classifier, dinov2, fid
from shortcut_jax.metrics.protocols import PLAIN
from shortcut_jax.models import dit

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(module.name for module in pkgutil.iter_modules(configs.__path__))


def load(name: str, arg: str | None = None) -> ConfigDict:
    return pkgutil.resolve_name(f"configs.{name}").get_config(arg)


class Recorder(Mapping):
    """Looks like a section of the config and notes which keys are read."""

    def __init__(self, section: ConfigDict, read: set[str], prefix: str = ""):
        self._section, self._read, self._prefix = section, read, prefix

    def __getitem__(self, key: str) -> Any:
        value = self._section[key]
        if isinstance(value, ConfigDict):
            return Recorder(value, self._read, f"{self._prefix}{key}.")
        self._read.add(self._prefix + key)
        return value

    def __getattr__(self, key: str) -> Any:
        return self[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._section)

    def __len__(self) -> int:
        return len(self._section)

    def to_dict(self) -> dict[str, Any]:
        return {key: self[key] for key in self._section}


class NoExtractor:
    name, weights, sha256 = "fd", "", ""
    protocol = PLAIN

    def begin(self, images: np.ndarray) -> Callable[[], dict[str, np.ndarray]]:
        return lambda: self.outputs(images)

    def outputs(self, images: np.ndarray) -> dict[str, np.ndarray]:
        return {"features": images.reshape(len(images), -1)[:, :3].astype(np.float64)}


@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize("name", FILES)
def test_every_key_is_read(name, monkeypatch, photographs_dir, tmp_path):
    """A key that only validation looks at would be a promise that nothing keeps."""
    config = load(name, "small,objective=flow_matching")  # quick to compile
    latents = "autoencoder" in config
    config.update_from_flattened_dict(
        {
            "total_steps": 2, "batch_size": 4, "model.hidden_size": 4, "model.num_heads": 1,
            "model.patch_size": 4 if latents else 8, "optimizer.warmup_steps": 0, "eval.every": 2,
            "eval.num_samples": 8, "eval.batch_size": 8, "log.tensorboard": False,
            "data.data_dir": str(photographs_dir if latents else tmp_path / "data"),
        }
    )  # fmt: skip
    if latents:
        files = {"inception_weights": "random", "dinov2_weights": "random", "allow_small_n": True}
        config.eval.update(metrics=("fid", "fd_dinov2"), **files)

    def toy_images(builder):
        assert str(builder._idx_dir) == config.data.idx_dir
        image = np.zeros((8, 28, 28, 1), np.uint8)
        return {split: (image, np.arange(8)) for split in ("train", "test")}

    if name == "fashion_mnist":
        config.data.idx_dir = str(tmp_path / "idx")
        monkeypatch.setattr(fashion_mnist.FashionMnistIdx, "read_arrays", toy_images)
    flat = config_lib.flatten(config)
    monkeypatch.setattr(validation, "check_values", lambda config: None)
    monkeypatch.setattr(validation, "validate", lambda config, image_shape: None)
    monkeypatch.setattr(validation, "check_devices", lambda config, n, slices: (n, 1))
    monkeypatch.setattr(config_lib, "flatten", lambda config: flat)
    for module in (classifier, dinov2, fid):
        monkeypatch.setattr(module, "load_extractor", lambda *_, **options: NoExtractor())
    read: set[str] = set()
    train.train(Recorder(config, read), tmp_path / "run")  # type: ignore[arg-type]

    if "section.steps" in source("evaluation/grid.py"):  # of checkpoints, not in the loop
        read.add("eval.steps")
    read |= {f"mesh.{axis}" for axis in ("data", "fsdp")}  # by mesh_shape, tested above
    assert flat.keys() - read == set()


def source(name: str) -> str:
    return (ROOT / "shortcut_jax" / name).read_text()


@pytest.mark.parametrize("name", objectives.OBJECTIVES)
def test_every_option_of_an_objective_is_used(name):
    """Sections become fields of objects as a whole, so reading the section proves nothing."""
    cls = objectives.OBJECTIVES[name]
    parents = [c for c in cls.__mro__ if issubclass(c, objectives.Objective)]
    text = "".join(inspect.getsource(c) for c in parents) + inspect.getsource(objectives.base)
    text += (ROOT / "shortcut_jax" / "pairs.py").read_text() if cls.teacher == "pairs" else ""
    for key in objectives.options(name):
        assert f"self.{key}" in text or f"objective.{key}" in text, key


def test_every_key_of_the_model_is_used():
    text = inspect.getsource(dit.DiT)
    for key in config_lib.default().model:
        assert f"self.{key}" in text, key
