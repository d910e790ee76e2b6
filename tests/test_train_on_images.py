"""Training on photographs that worker processes decode."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from ml_collections import ConfigDict

from configs import digits
from shortcut_jax import config as config_lib
from shortcut_jax import metrics, train
from shortcut_jax.data import pipeline
from shortcut_jax.errors import UserError
from tests.data.photographs import encoded, make_tfds
from tests.data.test_workers import all_end, children


class NoExtractor:
    """Nothing here measures samples."""


@pytest.fixture(autouse=True)
def any_metric(monkeypatch):
    spec = dataclasses.replace(metrics.EXTRACTORS["fd_digits"], image_shape=(16, 16, 3))
    monkeypatch.setitem(metrics.EXTRACTORS, "fd_digits", spec)
    monkeypatch.setattr(metrics, "load_extractor", lambda *_: NoExtractor())


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(num_classes=2)}
    rows = [{"image": encoded(seed), "label": seed % 2} for seed in range(12)]
    broken = [{"image": encoded(0)[:300], "label": 0}]
    data_dir = tmp_path_factory.mktemp("data")
    make_tfds(data_dir, "toy", "1.0.0", features, {"train": rows, "broken": rows + broken})
    return data_dir


def config(data_dir: Path, **changes: Any) -> ConfigDict:
    def base(c: ConfigDict) -> None:
        digits.base(c)
        digits.small(c)
        c.total_steps = 2
        c.batch_size = 8
        c.model.update(patch_size=8, hidden_size=16)
        c.log.update(every=1, tensorboard=False)
        c.eval.update(every=0, metrics=("fd_digits",))
        c.data.update(
            name="images", builder="toy", split="train", data_dir=str(data_dir), image_size=16,
            crop="adm", num_classes=2, workers=0,
        )  # fmt: skip
        c.data.update(changes)

    return config_lib.build("objective=flow_matching", base, {})


def losses(workdir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").open()]


def test_workers_change_nothing_and_end(data_dir, tmp_path, monkeypatch):
    train.train(config(data_dir), tmp_path / "threads")
    started: set[int] = set()
    close = pipeline.Batches.close

    def watched(self: pipeline.Batches) -> None:
        started.update(children())
        close(self)

    monkeypatch.setattr(pipeline.Batches, "close", watched)
    train.train(config(data_dir, workers=1), tmp_path / "processes")
    assert len(started) == 1 and all_end(started)
    assert np.isfinite(losses(tmp_path / "threads")).all()
    assert losses(tmp_path / "processes") == losses(tmp_path / "threads")
    with pytest.raises(UserError, match="data.crop: adm -> authors"):
        train.train(config(data_dir, crop="authors"), tmp_path / "threads")


def test_a_record_that_cannot_be_decoded_ends_training_with_its_name(data_dir, tmp_path):
    broken = config(data_dir, split="broken", workers=1)
    with pytest.raises(UserError, match="toy 1.0.0, broken, record 12 cannot be decoded"):
        train.train(broken, tmp_path / "run")
    assert all_end(children())
