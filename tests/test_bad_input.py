"""What a config may not hold: one sentence that names it and the fix, before anything is done."""

import re
from typing import Any

import jax
import pytest

from shortcut_jax import config as config_lib
from shortcut_jax import objectives, run, train, validation
from shortcut_jax.errors import UserError
from tests.sentences import assert_sentence
from tests.small_digits import small

BAD_VALUES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "batch size": ("small", {"batch_size": 0}, ("batch_size=0", "expected a value above 0")),
    "total steps": ("small", {"total_steps": 2**31}, ("total_steps=2147483648", "below 2**31")),
    "seed": ("small", {"seed": 2**32}, ("seed=4294967296", "expected a seed below 2**32")),
    "EMA": ("small", {"ema_rate": 1.0}, ("ema_rate=1.0", "expected 0 <= value < 1")),
    "NaN": ("small", {"optimizer.lr": float("nan")}, ("optimizer.lr=nan", "finite", "0.0001")),
    "infinity": ("small", {"optimizer.lr": float("inf")}, ("optimizer.lr=inf", "a finite number")),
    "beyond float32": ("small", {"optimizer.lr": 1e39}, ("optimizer.lr=1e+39", "a finite number")),
    "data set": ("small", {"data.name": "cifar"}, ("data.name='cifar'", "digits, fashion_mnist")),
    "split": ("small", {"data.split": "val"}, ("split='val'", "expected", "train, test")),
    "objective": ("small", {"objective.name": "gan"}, ("objective='gan'", "flow_matching")),
    "objective by its key": (
        "small",
        {"objective.name": "flow_matching"},
        ("objective.name=flow_matching", "bootstrap_fraction", ":objective=flow_matching"),
    ),
    "sampling of sizes": (
        "small",
        {"objective.step_size_sampling": "all"},
        ("step_size_sampling='all'", "expected one of random, systematic, stratified", "choose"),
    ),
    "dropout": ("small", {"objective.class_dropout": 1.5}, ("class_dropout=1.5", "0 and 1")),
    "guidance without dropout": (
        "small",
        {"objective.cfg_scale": 2.0, "objective.class_dropout": 0.0},
        ("objective.cfg_scale=2.0", "objective.class_dropout=0.0", "expected", "set it to 0.1"),
    ),
    "dropout of bootstrap rows alone": (
        "small",
        {"objective.bootstrap_label_dropout": True},
        ("bootstrap_label_dropout=True", "objective.class_dropout=0.0", "set class_dropout to 0.1"),
    ),
    "labels never learned": (
        "small",
        {"objective.class_dropout": 1.0},
        ("objective.class_dropout=1.0", "objective.cfg_scale=1.0", "set cfg_scale to 0"),
    ),
    "tokens of step sizes": (
        "small,objective=mean_flow",
        {"model.step_embedding": "log2"},
        ("model.step_embedding=log2", "objective=mean_flow", "expected d", "step_embedding=d"),
    ),
    "time steps": (
        "small",
        {"objective.denoise_timesteps": 100},
        ("objective.denoise_timesteps=100", "power of two", "128"),
    ),
    "fraction 0": (
        "small",
        {"objective.bootstrap_fraction": 0.0},
        ("objective.bootstrap_fraction=0.0", "between 0 and 1", "objective=flow_matching"),
    ),
    "batch and fraction": (
        "small",
        {"batch_size": 33},
        ("batch_size=33", "bootstrap_fraction=1/4", "a multiple of 4", "works from here is 36"),
    ),
    "batch and stratified sizes": (
        "small,authors_code",
        {},
        ("batch_size=32", "1/8", "stratified", "at least 56", "works from here is 56"),
    ),
    "patch": ("small", {"model.patch_size": 3}, ("model.patch_size=3", "8x8", "use a divisor")),
    "heads": ("small", {"model.num_heads": 5}, ("hidden_size=32", "model.num_heads=5", "divide")),
    "width": ("small", {"model.hidden_size": 30}, ("model.hidden_size=30", "a multiple of 4")),
    "empty MLP": ("small", {"model.mlp_ratio": 0.01}, ("model.mlp_ratio=0.01", "one", "raise it")),
    "dtype": ("small", {"model.dtype": "float16"}, ("'float16'", "auto, float32, bfloat16")),
    "schedule": ("small", {"optimizer.schedule": "linear"}, ("'linear'", "constant, cosine")),
    "warm-up": (
        "small",
        {"optimizer.warmup_steps": 8},
        ("optimizer.warmup_steps=8", "total_steps=8", "lower it or raise total_steps"),
    ),
    "no step counts": ("small", {"eval.steps": ()}, ("eval.steps is empty", "give at least one")),
    "floats of steps": ("small", {"eval.steps": (1.0,)}, ("eval.steps=(1.0,)", "whole numbers")),
    "bools of steps": ("small", {"eval.steps": (True,)}, ("eval.steps=(True,)", "whole numbers")),
    "steps twice": ("small", {"eval.steps": (4, 4)}, ("eval.steps=(4, 4)", "twice", "drop")),
    "three steps": ("small", {"eval.steps": (3,)}, ("eval.steps holds 3", "power of two", "=128")),
    "steps in the loop": (
        "small",
        {"eval.steps_in_loop": (256,)},
        ("eval.steps_in_loop holds 256", "power of two", "objective.denoise_timesteps=128"),
    ),
    "no steps of flow matching": (
        "small,objective=flow_matching",
        {"eval.steps": (0,)},
        ("eval.steps holds 0", "at least 1"),
    ),
    "one sample": ("small", {"eval.num_samples": 1}, ("eval.num_samples=1", "2 or more")),
    "metric": ("small", {"eval.metrics": ("fid50k",)}, ("eval.metrics", "'fid50k'", "fd_digits")),
    "metric of other images": (
        "small",
        {"eval.metrics": ("fd_fashion_mnist",)},
        ("eval.metrics", "fd_fashion_mnist", "(32, 32, 1)", "(8, 8, 1)", "choose another"),
    ),
    "no steps": ("small", {"eval.steps": ()}, ("eval.steps is empty", "give at least one")),
    "no pairs": (
        "small,objective=reflow",
        {"objective.num_pairs": 0, "teacher": "runs/a"},
        ("objective.num_pairs=0", "expected a value above 0"),
    ),
    "pairs in no steps": (
        "small,objective=reflow",
        {"objective.pair_steps": 0, "teacher": "runs/a"},
        ("objective.pair_steps=0", "expected a value above 0"),
    ),
    "live reflow in no steps": (
        "small,objective=live_reflow",
        {"objective.reflow_steps": 0},
        ("objective.reflow_steps=0", "expected a value above 0"),
    ),
    "stages": (
        "small,objective=progressive_distillation",
        {"objective.denoise_timesteps": 100, "teacher": "runs/a"},
        ("objective.denoise_timesteps=100", "power of two", "128"),
    ),
    "sampler of consistency": (
        "small,objective=consistency_training",
        {"objective.sampler": "ddim"},
        ("objective.sampler='ddim'", "expected one of renoise, euler"),
    ),
}  # fmt: skip


LEARN_FROM_ONE = ("progressive_distillation", "consistency_distillation", "reflow")
NEED_NONE = [name for name in objectives.OBJECTIVES if name not in LEARN_FROM_ONE]

for name in LEARN_FROM_ONE:
    BAD_VALUES[f"no teacher of {name}"] = (
        f"small,objective={name}",
        {"init_from": "runs/a"},
        ("teacher is empty", f"objective={name}", "expected the workdir", "--config.teacher="),
    )
for name in NEED_NONE:
    BAD_VALUES[f"a teacher of {name}"] = (
        f"small,objective={name}",
        {"teacher": "runs/a"},
        ("teacher=runs/a", f"objective={name} has no teacher", "leave it out", "init_from"),
    )
for name in ("consistency_training", "consistency_distillation"):
    BAD_VALUES[f"guidance of {name}"] = (
        f"small,objective={name}",
        {"objective.cfg_scale": 2.0, "teacher": "runs/a" if name in LEARN_FROM_ONE else ""},
        ("objective.cfg_scale=2.0", name, "expected 1 (labels) or 0 (no labels)", "set one"),
    )


@pytest.mark.parametrize(("arg", "overrides", "fragments"), BAD_VALUES.values(), ids=BAD_VALUES)
def test_bad_values(monkeypatch, tmp_path, arg, overrides, fragments):
    """Refused before a back end is started and before anything is written."""
    monkeypatch.setattr(jax, "device_count", lambda: pytest.fail("a back end was started"))
    with pytest.raises(UserError) as error:
        train.train(small(arg, **overrides), tmp_path / "run")
    assert_sentence(str(error.value), fragments)
    assert not (tmp_path / "run").exists()


FREE_TEXT = ("data.data_dir", "teacher", "init_from")  # below, and tests/test_bad_teachers.py
ANY_NUMBER = ("objective.time_mean",)  # of a normal distribution
DEFAULTS = config_lib.flatten(small())
FLOATS = [k for k, v in DEFAULTS.items() if type(v) is float]
NAMES = [k for k, v in DEFAULTS.items() if type(v) is str and k not in FREE_TEXT]
NUMBERS = {
    (key, objective): value
    for objective in ("shortcut", *objectives.OBJECTIVES)
    for key, value in config_lib.flatten(small(f"small,objective={objective}")).items()
    if type(value) in (int, float) and key not in ANY_NUMBER
    if objective == "shortcut" or key.startswith("objective.")
}


@pytest.mark.parametrize(("key", "objective"), NUMBERS)
def test_every_number_has_a_range(key, objective):
    bad = type(NUMBERS[key, objective])(-7)
    teacher = "runs/a" if objective in LEARN_FROM_ONE else ""
    with pytest.raises(UserError, match="-7"):
        run.prepare(small(f"small,objective={objective}", teacher=teacher, **{key: bad}))


@pytest.mark.parametrize("key", FLOATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_every_float_is_finite(key, bad):
    with pytest.raises(UserError, match=rf"^{re.escape(key)}={bad} is not a finite number"):
        run.prepare(small(**{key: bad}))


@pytest.mark.parametrize("key", NAMES)
def test_every_name_has_choices(key):
    with pytest.raises(UserError, match="'nonsense'"):
        run.prepare(small(**{key: "nonsense"}))


@pytest.mark.parametrize("key", DEFAULTS)
@pytest.mark.parametrize("kind", ["none", "other type"])
def test_every_key_has_a_type(key, kind):
    other = 3 if isinstance(DEFAULTS[key], str) else "3"
    with pytest.raises(UserError) as error:
        run.prepare(small(**{key: None if kind == "none" else other}))
    assert_sentence(str(error.value), ("None" if kind == "none" else repr(other),))
    assert key in str(error.value) or key == "objective.name"


BAD_MESHES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "product": ({"mesh.data": 3}, ("'data': 3", "8 device(s)", "must be 8", "use -1")),
    "no divisor": ({"mesh.fsdp": 3}, ("'fsdp': 3", "8 device(s)", "use -1")),
    "two rests": ({"mesh.fsdp": -1}, ("'fsdp': -1", "at most one -1")),
    "zero": ({"mesh.data": 0}, ("'data': 0", "positive")),
    "batch": ({"batch_size": 36}, ("batch_size=36", "8 batch shard(s)", "from here is 64")),
    "evaluation": ({"eval.batch_size": 30}, ("eval.batch_size=30", "8 devices", "a multiple of 8")),
}


@pytest.mark.parametrize(("overrides", "fragments"), BAD_MESHES.values(), ids=BAD_MESHES)
def test_bad_meshes(overrides, fragments):
    config = small(**overrides)
    validation.check_values(config)
    validation.validate(config, (8, 8, 1))
    with pytest.raises(UserError) as error:
        validation.check_devices(config, num_devices=8)
    assert_sentence(str(error.value), fragments)
