"""The config: variants by argument, and what a run may change."""

import pkgutil
from pathlib import Path
from typing import Any

import jax
import pytest
from ml_collections import ConfigDict

import configs
from configs import digits
from shortcut_jax import config as config_lib
from shortcut_jax import data, objectives, run, validation
from shortcut_jax.errors import UserError
from shortcut_jax.models import dit
from tests.sentences import assert_sentence

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(module.name for module in pkgutil.iter_modules(configs.__path__))


def load(name: str, arg: str | None = None) -> ConfigDict:
    return pkgutil.resolve_name(f"configs.{name}").get_config(arg)


def get(config: ConfigDict, path: str) -> Any:
    section, _, key = path.rpartition(".")
    return (config[section] if section else config)[key]


# ------------------------------------------------------------------- variants by argument


def test_default_is_what_the_paper_says():
    c = config_lib.default()
    assert (c.total_steps, c.batch_size, c.ema_rate) == (400_000, 256, 0.999)
    assert (c.model.hidden_size, c.model.depth, c.model.num_heads) == (768, 12, 12)
    assert (c.model.patch_size, c.model.mlp_ratio) == (2, 4.0)
    assert (c.optimizer.lr, c.optimizer.weight_decay, c.optimizer.schedule) == (
        1e-4,
        0.1,
        "constant",
    )
    assert (c.optimizer.b1, c.optimizer.b2) == (0.9, 0.999)
    assert (c.objective.bootstrap_fraction, c.objective.denoise_timesteps) == (0.25, 128)
    assert c.objective.class_dropout == 0.1
    assert c.eval.num_samples == 50_000


def test_calls_of_default_share_nothing():
    config_lib.default().model.depth = 99
    assert config_lib.default().model.depth == 12


@pytest.mark.parametrize("arg", [None, "", "small", "small,authors_code"])
def test_build_locks(arg):
    config = digits.get_config(arg)
    for section in (config, config.model):
        with pytest.raises(AttributeError):
            section.no_such_key = 1
    with pytest.raises(TypeError):
        config.batch_size = "many"
    config.batch_size = 128  # values may be changed


def test_build_starts_from_the_file_then_applies_the_argument():
    def base(c):
        c.batch_size = 8
        c.total_steps = 10

    def half(c):
        c.batch_size = c.batch_size // 2

    config = config_lib.build("half", base, {"half": half})
    assert (config.batch_size, config.total_steps) == (4, 10)
    assert config_lib.build(None, base, {"half": half}).batch_size == 8


def test_objective_argument_gives_the_keys_of_that_objective():
    config = digits.get_config("objective=flow_matching")
    assert set(config.objective.keys()) == {"name", *objectives.options("flow_matching")}
    assert config.objective.name == "flow_matching"
    # What the file says about keys that both have, stays.
    assert config.objective.class_dropout == digits.get_config().objective.class_dropout
    assert isinstance(config_lib.build_objective(config, 10), objectives.FlowMatching)


@pytest.mark.parametrize(("size", "width"), [("S", 384), ("B", 768), ("L", 1024), ("XL", 1152)])
@pytest.mark.parametrize("patch", [2, 4, 8])
def test_model_argument(size, width, patch):
    model = digits.get_config(f"model={size}/{patch}").model
    assert (model.hidden_size, model.patch_size) == (width, patch)
    assert (model.depth, model.num_heads) == (
        dit.SIZES[size]["depth"],
        dit.SIZES[size]["num_heads"],
    )


@pytest.mark.parametrize(
    "bad", ["model=B", "model=B/3", "model=M/2", "model=/2", "model=", "objective="]
)
def test_bad_arguments(bad):
    with pytest.raises(UserError, match=bad):
        digits.get_config(bad)


def authors_code(objective):
    """Path -> value of all that the preset sets for an objective."""
    own = objectives.OBJECTIVES[objective].authors_code
    return {**config_lib.AUTHORS_CODE, **{f"objective.{key}": own[key] for key in own}}


@pytest.mark.parametrize("name", objectives.OBJECTIVES)
def test_authors_code_sets_every_key_it_lists(name):
    config = digits.get_config(f"objective={name},authors_code")
    plain = config_lib.build(f"objective={name}", lambda c: None, {})
    needed = objectives.OBJECTIVES[name].model_settings  # goes before the preset
    set_here = authors_code(name)
    del set_here["data.crop"]  # tests/test_paper_configs.py: digits are not cropped
    for path, value in set_here.items():
        key = path.removeprefix("model.")
        assert get(config, path) == needed.get(key, value)
        if key not in needed:
            assert get(plain, path) != value, f"{path} is no difference"


def test_ledger_lists_what_authors_code_sets():
    ledger = (ROOT / "docs" / "differences.md").read_text()
    for name in objectives.OBJECTIVES:
        for path in authors_code(name):
            assert f"`{path}`" in ledger


@pytest.mark.parametrize(
    "words",
    [
        ["authors_code", "objective=flow_matching"],
        ["small", "authors_code"],
        ["model=B/4", "authors_code", "objective=flow_matching"],
    ],
)
def test_order_of_arguments_does_not_matter(words):
    forwards = config_lib.flatten(digits.get_config(",".join(words)))
    assert forwards == config_lib.flatten(digits.get_config(",".join(reversed(words))))
    assert forwards == config_lib.flatten(digits.get_config(" , ".join(words) + ","))


def test_presets_see_the_keys_of_the_objective_that_is_asked_for():
    def base(c):
        c.objective = {"name": "flow_matching", **objectives.options("flow_matching")}

    config = config_lib.build("authors_code,objective=shortcut", base, {})
    assert config.objective.bootstrap_fraction == 0.125


@pytest.mark.parametrize("variant", ["", "small"])
@pytest.mark.parametrize("arg", ["", "authors_code", "objective=flow_matching"])
@pytest.mark.parametrize("name", FILES)
def test_every_config_file_is_valid(name, variant, arg):
    config = load(name, f"{variant},{arg}")
    if (variant, arg) == ("small", "authors_code"):
        config.batch_size = 64  # its stratified step sizes need at least 56
    if "autoencoder" in config:
        config.autoencoder.weights = "random"  # the user names the files
        config.eval.inception_weights = "random"
    run.prepare(config)


# ------------------------------------------------------------------- resolved configs


def test_flatten():
    nested = ConfigDict({"a": 1, "b": {"c": (1, 2), "d": {"e": "x"}}})
    assert config_lib.flatten(nested) == {"a": 1, "b.c": [1, 2], "b.d.e": "x"}
    assert config_lib.flatten(nested.to_dict()) == config_lib.flatten(nested)


OLD = {"lr": 1, "total_steps": 10, "optimizer.schedule": "constant", "mesh.data": 1, "eval.seed": 0}


def test_no_differences():
    assert config_lib.differences(OLD, dict(OLD)) == []


@pytest.mark.parametrize(
    "change",
    [
        {"mesh.data": 8},
        {"eval.seed": 1},
        {"eval.new": 1},
        {"checkpoint.every": 5},
        {"log.every": 5},
        {"data.data_dir": "/x"},
        {"data.idx_dir": "/x"},
        {"optimizer.on_nonfinite": "skip"},
        {"total_steps": 20},
    ],
)
def test_what_a_resumed_run_may_change(change):
    assert config_lib.differences(OLD, {**OLD, **change}) == []


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"lr": 2}, "lr: 1 -> 2"),
        ({"data.name": "x"}, "data.name: (absent) -> x"),
        ({"meshes": 2}, "meshes: (absent) -> 2"),  # not a key of the section mesh
        ({"optimizer.on_nonfinite_": 2}, "optimizer.on_nonfinite_: (absent) -> 2"),
    ],
)
def test_what_a_resumed_run_may_not_change(change, line):
    assert config_lib.differences(OLD, {**OLD, **change}) == [line]


def test_a_dropped_key_is_a_difference():
    assert config_lib.differences(OLD, {k: v for k, v in OLD.items() if k != "lr"}) == [
        "lr: 1 -> (absent)"
    ]


def test_total_steps_is_fixed_under_a_schedule_that_ends_there():
    old = {**OLD, "optimizer.schedule": "cosine"}
    assert config_lib.differences(old, {**old, "total_steps": 20}) == ["total_steps: 10 -> 20"]


@pytest.mark.parametrize(
    ("data", "fsdp", "expected"),
    [(-1, 1, (8, 1)), (1, -1, (1, 8)), (-1, 4, (2, 4)), (2, 4, (2, 4)), (8, -1, (8, 1))],
)
def test_mesh_shape(data, fsdp, expected):
    assert validation.mesh_shape(ConfigDict({"data": data, "fsdp": fsdp}), 8) == expected


# ------------------------------------------------------------------- keys of image sets

IMAGES = {
    "name": "images", "builder": "imagenet2012", "image_size": 256, "crop": "adm",
    "num_classes": 1000, "workers": 0,
}  # fmt: skip


def images_config(**changes: Any) -> ConfigDict:
    def base(c: ConfigDict) -> None:
        c.data.update(IMAGES | changes)

    return config_lib.build(None, base, {})


def test_keys_of_image_sets_are_accepted():
    config = images_config()
    validation.check_values(config)
    assert data.describe(config.data) == ((256, 256, 3), 1000)
    assert config_lib.OPTIONAL.keys() >= {f"data.{key}" for key in IMAGES if key != "name"}


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("image_size", 0, "out of range"),
        ("image_size", 32.0, "whole number"),
        ("num_classes", 0, "out of range"),
        ("workers", -1, "out of range"),
        ("crop", "center", "adm, authors"),
        ("builder", 3, "not text"),
    ],
)
def test_wrong_values_of_image_sets(key, value, said):
    with pytest.raises(UserError) as error:
        validation.check_values(images_config(**{key: value}))
    assert_sentence(str(error.value), (f"data.{key}={value!r}", said))


def test_resume_may_change_the_number_of_workers_only():
    flat = config_lib.flatten(images_config())
    assert config_lib.differences(flat, flat | {"data.workers": 8}) == []
    for key in IMAGES.keys() - {"workers"}:
        assert config_lib.differences(flat, flat | {f"data.{key}": "x"})


# ------------------------------------------------------------------- what --dry_run prints


def test_summary():
    config = digits.get_config("small")
    text = run.summary(run.prepare(config))
    lines = text.splitlines()
    for key, value in config_lib.flatten(config).items():
        assert f"{key} = {value!r}" in lines
    assert "(8, 8, 1), 10 classes" in text
    assert f"{parameters(32, depth=1, patch=2, channels=1, classes=10):,}" in text
    assert "{'data': 1, 'fsdp': 1} on 1 cpu device(s)" in text
    assert "32, 32 per device" in text
    assert "bootstrap_1_64" in text
    assert "float32" in text


def parameters(h: int, *, depth: int, patch: int, channels: int, classes: int) -> int:
    """Weights and biases of the network, counted by hand."""

    def dense(a, b):
        return a * b + b

    pixels = patch * patch * channels
    embeddings = 2 * (dense(256, h) + dense(h, h)) + (classes + 1) * h
    block = dense(h, 6 * h) + dense(h, 3 * h) + dense(h, h) + dense(h, 4 * h) + dense(4 * h, h)
    return dense(pixels, h) + embeddings + depth * block + dense(h, 2 * h) + dense(h, pixels)


def test_prepare_builds_what_the_config_says():
    config = digits.get_config("small,model=S/4")
    config.model.dtype = "bfloat16"
    setup = run.prepare(config)
    assert setup.network.hidden_size == 384 and setup.network.patch_size == 4
    assert setup.network.dtype == jax.numpy.bfloat16
    assert setup.network.num_classes == setup.num_classes == 10
    assert setup.objective.null_label == 10
    assert setup.image_shape == (8, 8, 1)
    assert dict(setup.mesh.shape) == {"data": jax.device_count(), "fsdp": 1}
