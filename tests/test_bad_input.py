"""What a person gets wrong: one sentence that names it and the fix, before anything is done."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from ml_collections import ConfigDict

from configs import digits, fashion_mnist
from shortcut_jax import (
    checkpoint,
    checksums,
    config_flag,
    main,
    metrics,
    objectives,
    run,
    train,
    validation,
)
from shortcut_jax import config as config_lib
from shortcut_jax.errors import UserError
from tests.sentences import assert_sentence, contents

SMALL = "--config=configs/digits.py:small"


def small(arg: str = "small", **overrides: Any) -> ConfigDict:
    """The small digits config with flat overrides, whatever their type."""
    config = digits.get_config(arg)
    with config.ignore_type():
        config.update_from_flattened_dict(overrides)
    return config


# ------------------------------------------------------------------- flags and config files


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ConfigDict]:
    """parse("--config=...", ...): the config, by the code that the binaries run on their flags."""

    def parse(*args: str) -> ConfigDict:
        argv = ["main", *args]
        monkeypatch.setattr(sys, "argv", argv)  # where ml_collections looks for overrides
        was_parsed = flags.FLAGS.is_parsed()
        with flagsaver.flagsaver():
            try:
                main.config_flag.parse(argv)  # with the flags of that binary
                return config_flag.CONFIG.value
            finally:
                if not was_parsed:
                    flags.FLAGS.unparse_flags()

    return parse


def test_good_flags_are_accepted(parse):
    config = parse(
        "--workdir", "runs/a", "--config", "configs/digits.py:small", "--config.batch_size=64",
        "--config.eval.steps=(1,2)", "--config.data.flip", "--config.optimizer.lr=1",
    )  # fmt: skip
    assert config.batch_size == 64 and config.eval.steps == (1, 2)
    assert config.data.flip is True and config.optimizer.lr == 1.0


BAD_FLAGS = {
    "no config": ((), ("--config is missing", "give", "configs/digits.py")),
    "no config, override": (("--config.seed=1",), ("--config is missing",)),
    "empty config": (("--config=",), ("--config=:", "no file ''", "give")),
    "absent file": (("--config=nope.py",), ("--config=nope.py", "no file 'nope.py'", "give")),
    "a folder": (("--config=configs",), ("no file 'configs'", "give a Python file")),
    "two configs": ((SMALL, SMALL), ("--config", "2 times", "give it once")),
    "late config": (("--config.seed=1", SMALL), ("--config.seed=1", "before", "--config=FILE")),
    "unknown argument": (
        ("--config=configs/digits.py:smal",),
        ("'smal'", "expected one of", "objective=NAME", "authors_code", "small"),
    ),
    "unknown objective": (
        ("--config=configs/digits.py:objective=gan",),
        (
            "objective='gan' is not one of progressive_distillation, consistency_distillation, "
            "reflow, diffusion, flow_matching, consistency_training, live_reflow, shortcut, "
            "mean_flow",
        ),
    ),
    "model without patch": (
        ("--config=configs/digits.py:model=B",),
        ("model=B", "SIZE/PATCH", "S, B, L, XL", "2, 4, 8"),
    ),
    "unknown key": (
        (SMALL, "--config.batchsize=3"),
        ("--config.batchsize", "not a key", "did you mean batch_size?"),
    ),
    "unknown section": (
        (SMALL, "--config.objctive.cfg_scale=1"),
        ("--config.objctive.cfg_scale", "not a key", "did you mean objective.cfg_scale?"),
    ),
    "unknown nested key": (
        (SMALL, "--config.objective.bootstrap_frac=0.1"),
        ("--config.objective.bootstrap_frac", "did you mean objective.bootstrap_fraction?"),
    ),
    "key without its section": (
        (SMALL, "--config.lr=0.1"),
        ("--config.lr", "not a key", "did you mean optimizer.lr?"),
    ),
    "key like no other": ((SMALL, "--config.zzz=1"), ("--config.zzz", "--dry_run lists all keys")),
    "below a key": ((SMALL, "--config.seed.x=1"), ("--config.seed.x", "did you mean seed?")),
    "key of the other objective": (
        (f"{SMALL},objective=flow_matching", "--config.objective.bootstrap_cfg=False"),
        ("--config.objective.bootstrap_cfg", "one of shortcut", ":objective=shortcut"),
    ),
    "key of other objectives": (
        (f"{SMALL},objective=reflow", "--config.objective.bootstrap_fraction=0.5"),
        ("bootstrap_fraction", "one of live_reflow and shortcut", ":objective=live_reflow"),
    ),
    "float for a number of pairs": (
        (f"{SMALL},objective=reflow", "--config.objective.num_pairs=1.5"),
        ("objective.num_pairs='1.5'", "a whole number"),
    ),
    "whole section": (
        (SMALL, "--config.model={'depth': 2}"),
        ("--config.model", "is a section", "one by one", "model."),
    ),
    "text for an int": (
        (SMALL, "--config.batch_size=abc"),
        ("--config.batch_size='abc'", "not a whole number", "give one, such as 32"),
    ),
    "float for an int": ((SMALL, "--config.batch_size=1.5"), ("'1.5'", "a whole number", "32")),
    "bool for an int": ((SMALL, "--config.batch_size=True"), ("'True'", "a whole number", "32")),
    "tuple for an int": ((SMALL, "--config.batch_size=(1,2)"), ("'(1,2)'", "a whole number")),
    "text for a float": ((SMALL, "--config.ema_rate=x"), ("ema_rate='x'", "finite", "such as 0.9")),
    "text for a bool": ((SMALL, "--config.data.flip=3"), ("flip='3'", "true or false", "False")),
    "not a tuple": ((SMALL, "--config.eval.steps=1 2"), ("'1 2'", "whole numbers", "(1, 4)")),
    "no value": ((SMALL, "--config.seed"), ("Missing value", "--config.seed", "--name=value")),
    "unknown flag": ((SMALL, "--wrkdir=x"), ("'wrkdir'", "workdir", "--help lists them")),
    "stray argument": ((SMALL, "batch_size=3"), ("'batch_size=3'", "not a flag", "--name=value")),
    "wrong type of another flag": (
        (SMALL, "--logger_levels=x"),
        ("--logger_levels='x'", "is refused", "--help"),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("args", "fragments"), BAD_FLAGS.values(), ids=BAD_FLAGS)
def test_bad_flags(parse, capsys, args, fragments):
    with pytest.raises(SystemExit) as ended:
        parse(*args)
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert_sentence(printed.err, fragments)


USES_BUILD = """
from shortcut_jax import config
def get_config(arg=None):
    return config.build(arg, base, {})
def base(c):
    """
BAD_FILES = {
    "syntax": ("def get_config(:\n", ("line 1", "SyntaxError", "correct")),
    "no get_config": ("x = 1\n", ("no function get_config", "expected", "add one")),
    "returns nothing": ("def get_config(arg=None):\n    pass\n", ("returns None", "ConfigDict")),
    "takes no argument": ("def get_config():\n    pass\n", ("TypeError", "argument", "correct")),
    "name error": ("def get_config(arg):\n    return foo\n", ("line 2", "NameError", "'foo'")),
    "wrong section": (USES_BUILD + "c.modle.depth = 3\n", ("line 6", "modle", 'mean "model"')),
    "wrong type": (USES_BUILD + "c.batch_size = 'x'\n", ("line 6", "'batch_size'", "'int'")),
    "absent import": ("import no_such_module\n", ("line 1", "no_such_module", "correct")),
}


@pytest.mark.parametrize(("text", "fragments"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_config_files(parse, capsys, tmp_path, text, fragments):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(SystemExit) as ended:
        parse(f"--config={path}:arg" if "takes no" in str(fragments) else f"--config={path}:")
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert_sentence(printed.err, (str(path), *fragments))


BAD_BUILDS = {
    "new key": ("c.batchsize = 3", ("batchsize", "not a key", "did you mean batch_size?")),
    "key dropped": ("del c.eval.metrics", ("no key eval.metrics", "shortcut_jax.config.build")),
    "section dropped": ("del c.data", ("no key data.", "shortcut_jax.config.default")),
    "none": ("c.batch_size = None", ("batch_size=None", "a whole number", "such as 256")),
    "bool": ("c.total_steps = True", ("total_steps=True", "a whole number", "such as 400000")),
    "none in a tuple": ("c.eval.steps = (1, None)", ("eval.steps=(1, None)", "whole numbers")),
}


@pytest.mark.parametrize(("line", "fragments"), BAD_BUILDS.values(), ids=BAD_BUILDS)
def test_config_files_that_ml_collections_lets_pass(parse, tmp_path, line, fragments):
    path = tmp_path / "mine.py"
    path.write_text(USES_BUILD + line)
    with pytest.raises(UserError) as error:
        run.prepare(parse(f"--config={path}"))
    assert_sentence(str(error.value), fragments)


def test_config_of_another_project():
    with pytest.raises(UserError, match="has no key .*expected every key"):
        run.prepare(ConfigDict({"lr": 0.1, "model": {"depth": 3}}))


# ------------------------------------------------------------------- values and combinations

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


# ------------------------------------------------------------------- data, workdirs, checkpoints

TINY_ARG = "small,objective=flow_matching"  # one pass per step: quick to compile
TINY = {
    "total_steps": 2, "batch_size": 4, "checkpoint.every": 2, "log.every": 2,
    "log.tensorboard": False, "eval.every": 0, "model.hidden_size": 4, "model.num_heads": 1,
    "model.patch_size": 8, "optimizer.lr": 1e-3, "optimizer.schedule": "constant",
    "optimizer.warmup_steps": 0,
}  # fmt: skip


class NoExtractor:
    sha256 = ""


@pytest.fixture(autouse=True)
def no_extractor(monkeypatch):
    """Nothing here measures samples."""
    monkeypatch.setattr(metrics, "load_extractor", lambda name: NoExtractor())


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("data"))


def tiny(data_dir: str, **overrides: Any) -> ConfigDict:
    return small(TINY_ARG, **{**TINY, "data.data_dir": data_dir, **overrides})


@pytest.mark.parametrize(
    ("data", "fragments"),
    [
        ({"idx_dir": "absent"}, ("idx_dir=absent", "train-images-idx3-ubyte.gz", "put", "set")),
        ({"data_dir": "gs://a/b"}, ("data_dir=gs://a/b", "expected a local folder", "set")),
        ({"data_dir": "a_file/x"}, ("data_dir=a_file/x", "expected a local folder", "set")),
    ],
)
def test_missing_data(monkeypatch, tmp_path, data, fragments):
    monkeypatch.chdir(tmp_path)
    Path("a_file").write_text("")
    config = fashion_mnist.get_config("small")
    config.data.update({"data_dir": "prepared", "idx_dir": "absent", **data})
    if data.get("data_dir") == "a_file/x":  # fashion_mnist would ask for its source first
        config = small(**{"data.data_dir": "a_file/x"})
    with pytest.raises(UserError) as error:
        train.train(config, "run")
    assert_sentence(str(error.value), fragments)
    assert not Path("run", "checkpoints").exists()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data_dir) -> Path:
    """The workdir of a run of two steps. Tests work on copies of it."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "load_extractor", lambda name: NoExtractor())
        train.train(tiny(data_dir), workdir)
    return workdir


def test_workdir_of_another_config(trained, data_dir):
    before = contents(trained)
    with pytest.raises(UserError) as error:
        train.train(tiny(data_dir, **{"batch_size": 8, "optimizer.lr": 0.5}), trained)
    assert_sentence(
        str(error.value),
        (
            str(trained / "config.json"),
            "batch_size: 4 -> 8",
            "optimizer.lr: 0.001 -> 0.5",
            "another --workdir",
        ),
    )
    assert "total_steps" not in str(error.value)
    assert contents(trained) == before


@pytest.mark.parametrize("workdir", ["a_file", "a_file/run"])
def test_workdir_that_cannot_be_made(tmp_path, data_dir, workdir):
    (tmp_path / "a_file").write_text("mine")
    with pytest.raises(UserError) as error:
        train.train(tiny(data_dir), tmp_path / workdir)
    assert_sentence(
        str(error.value), (f"--workdir={tmp_path / workdir}", "expected a folder", "choose another")
    )
    assert (tmp_path / "a_file").read_text() == "mine"


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe\x00"], ids=["cut", "list", "binary"])
@pytest.mark.parametrize("binary", ["main", "eval"])
def test_damaged_config_json(tmp_path, data_dir, content, binary):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError) as error:
        if binary == "main":
            train.train(tiny(data_dir), tmp_path)
        else:
            run.check_workdir_for_evaluation(tiny(data_dir), tmp_path)
    assert_sentence(
        str(error.value),
        (str(tmp_path / "config.json"), "cannot be read as JSON", "expected", "restore"),
    )
    assert contents(tmp_path) == {"config.json": content}


def test_evaluation_with_another_ema_rate_is_refused(data_dir, tmp_path):
    config = tiny(data_dir)
    run.claim_workdir(config, tmp_path)
    run.check_workdir_for_evaluation(config, tmp_path)
    config.ema_rate = 0.75  # a record would name it
    with pytest.raises(UserError) as error:
        run.check_workdir_for_evaluation(config, tmp_path)
    assert_sentence(str(error.value), (str(tmp_path / "config.json"), "-> 0.75", "Use that config"))


def remove_meta(step: Path) -> None:
    shutil.rmtree(step / "meta")


def remove_state(step: Path) -> None:
    shutil.rmtree(step / "state")


def cut_state(step: Path) -> None:
    for path in (step / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:50])


def replace_all(step: Path) -> None:
    shutil.rmtree(step)
    step.mkdir()
    (step / "model.pt").write_text("of another program")


def change_data(step: Path) -> None:
    path = step / "meta" / "metadata"
    meta = json.loads(path.read_text())
    meta["data"]["dataset"] = "0123456789abcdef"
    path.write_text(json.dumps(with_checksum(meta)))


def change_config(step: Path) -> None:
    path = step / "meta" / "metadata"
    meta = json.loads(path.read_text())
    meta["config"]["model.depth"] = 7
    path.write_text(json.dumps(with_checksum(meta)))


def flip_meta(step: Path) -> None:
    path = step / "meta" / "metadata"
    path.write_text(path.read_text().replace('"model.depth": 1', '"model.depth": 9'))


def with_checksum(meta: dict[str, Any]) -> dict[str, Any]:
    rest = {k: v for k, v in meta.items() if k != checkpoint.CHECKSUMS}
    sums = {**meta[checkpoint.CHECKSUMS], "rest": checksums.of_json(rest)}
    return {**rest, checkpoint.CHECKSUMS: sums}


UNREADABLE = ("checkpoint", "cannot be read", "expected a whole checkpoint", "move that directory")


@pytest.mark.parametrize(
    ("damage", "fragments"),
    [
        (remove_meta, UNREADABLE),
        (remove_state, UNREADABLE),
        (cut_state, UNREADABLE),
        (replace_all, UNREADABLE),
        (flip_meta, (*UNREADABLE, "checksum")),
        (change_data, ("other data", "0123456789abcdef", "restore that data", "--workdir")),
        (change_config, ("another config", "model.depth: 7 -> 1", "Use that config")),
    ],
)
def test_damaged_and_foreign_checkpoints(trained, data_dir, tmp_path, damage, fragments):
    workdir = shutil.copytree(trained, tmp_path / "run")
    damage(workdir / "checkpoints" / "2")
    before = contents(workdir / "checkpoints")
    with pytest.raises(UserError) as error:
        train.train(tiny(data_dir, total_steps=4), workdir)
    assert_sentence(str(error.value), (str(workdir / "checkpoints" / "2"), *fragments))
    assert contents(workdir / "checkpoints") == before  # nothing is thrown away


def test_fewer_steps_than_done(trained, data_dir, tmp_path):
    workdir = shutil.copytree(trained, tmp_path / "run")
    with pytest.raises(UserError) as error:
        train.train(tiny(data_dir, total_steps=1), workdir)
    assert_sentence(str(error.value), ("checkpoints/2", "total_steps=1", "at least 2"))


@pytest.mark.parametrize("objective", ["progressive_distillation", "consistency_training"])
def test_another_length_of_a_staged_run(trained, data_dir, tmp_path, objective):
    """Where its stages begin depends on the last step, whatever the learning rate does."""
    teacher = str(trained) if objective in LEARN_FROM_ONE else ""

    def config(total_steps: int) -> ConfigDict:
        overrides = {**TINY, "data.data_dir": data_dir, "total_steps": total_steps}
        return small(f"small,objective={objective}", teacher=teacher, **overrides)

    assert config(8).optimizer.schedule == "constant"
    run.claim_workdir(config(8), tmp_path)
    before = contents(tmp_path)
    with pytest.raises(UserError) as error:
        train.train(config(16), tmp_path)
    assert_sentence(
        str(error.value), ("another config", "total_steps: 8 -> 16", "another --workdir")
    )
    assert contents(tmp_path) == before


# ------------------------------------------------------------------- a loss that is not finite


def logged(workdir: Path, name: str) -> list[float]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)[name] for line in lines]


def test_nonfinite_loss_stops_the_run(data_dir, tmp_path):
    # The first step is taken with a fresh network; its update makes the second loss overflow.
    config = tiny(
        data_dir, **{"total_steps": 8, "optimizer.lr": 1e30, "checkpoint.every": 1, "log.every": 4}
    )
    with pytest.raises(UserError) as error:
        train.train(config, tmp_path)
    fragments = (
        "between steps 1 and 2",
        "checkpoint is 1",
        "lower optimizer.lr",
        "on_nonfinite=skip",
    )
    assert_sentence(str(error.value), fragments)
    assert checkpoint.Checkpoints(tmp_path, keep=3, read_only=True).steps() == [1]
    assert not (tmp_path / run.FINISHED).exists()


def test_nonfinite_steps_are_skipped(data_dir, tmp_path):
    config = tiny(data_dir, **{"total_steps": 6, "optimizer.lr": 1e30})
    config.optimizer.on_nonfinite = "skip"
    state = train.train(config, tmp_path)
    assert int(state.step) == 6
    assert logged(tmp_path, train.NONFINITE) == [0.5, 1.0, 1.0]
    for leaf in jax.tree.leaves((state.params, state.ema, state.opt_state)):
        assert np.isfinite(leaf).all()
    assert (tmp_path / run.FINISHED).exists()


# ------------------------------------------------------------------- the binaries themselves


@pytest.mark.parametrize(
    ("args", "fragments"),
    [
        ((SMALL, "--config.objective.bootstrap_frac=0.1"), ("objective.bootstrap_fraction?",)),
        ((SMALL, "--config.model.patch_size=3"), ("model.patch_size=3", "8x8")),
        ((SMALL, "--config.mesh.data=2"), ("mesh=", "1 device(s)")),
    ],
    ids=["flag", "value", "mesh"],
)
def test_status_and_output_of_training(run_python, tmp_path, args, fragments):
    workdir = tmp_path / "run"
    done = run_python(["-m", "shortcut_jax.main", *args, f"--workdir={workdir}"])
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and done.stdout == ""
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert_sentence(last, fragments)
    assert not workdir.exists()


# One process for all cases: starting one takes longer than any of them.
EVALUATE = """
import json, sys
from absl.testing import flagsaver
from shortcut_jax import eval
from shortcut_jax.errors import UserError
for args in json.loads(sys.argv.pop()):
    sys.argv = ["eval", *args]
    with flagsaver.flagsaver():
        try:
            eval.main(eval.parse(sys.argv)[1])
            print("accepted")
        except UserError as error:
            print(error)
"""
BAD_EVALUATIONS: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    ((SMALL,), ("--workdir is missing", "give the folder")),
    ((SMALL, "--workdir=WORK/absent"), ("WORK/absent", "no run", "expected", "train first")),
    ((SMALL, "--workdir=WORK/empty"), ("no finished checkpoint", "expected at least one", "train")),
    (("OWN", "--config.model.depth=2"), ("config.json", "depth: 1 -> 2", "another --workdir")),
    (("OWN", "--step=7"), ("--step=7", "expected one of 2", "newest")),
    (("OWN", "--save_samples=WORK/s.png"), ("--save_samples=", "s.png", "expected", ".npz")),
    (("OWN", "--save_samples=WORK/a_file/s.npz"), ("--save_samples", "WORK/a_file", "choose")),
]  # fmt: skip


def test_evaluation_refuses(run_python, trained, tmp_path, data_dir):
    flat = {**TINY, "data.data_dir": data_dir}
    own = [f"--config=configs/digits.py:{TINY_ARG}", f"--workdir={trained}"]
    own += [f"--config.{key}={value}" for key, value in flat.items()]
    (tmp_path / "a_file").write_text("")
    (tmp_path / "empty").mkdir()
    run.claim_workdir(small(), tmp_path / "empty")
    before = contents(tmp_path)

    def fill(text: str) -> str:
        return text.replace("WORK", str(tmp_path))

    cases = [
        [fill(word) for arg in args for word in (own if arg == "OWN" else [arg])]
        for args, _ in BAD_EVALUATIONS
    ]
    done = run_python(["-c", EVALUATE, json.dumps(cases)])
    assert done.returncode == 0
    answers = done.stdout.splitlines()
    assert len(answers) == len(cases)
    for answer, (_, fragments) in zip(answers, BAD_EVALUATIONS, strict=True):
        assert_sentence(answer, tuple(map(fill, fragments)))
    assert contents(tmp_path) == before
