"""Flags and config files that a person gets wrong: one sentence that names it and the fix."""

import sys
from collections.abc import Callable

import pytest
from absl import flags
from absl.testing import flagsaver
from ml_collections import ConfigDict

from shortcut_jax import config_flag, main, run
from shortcut_jax.errors import UserError
from tests.sentences import assert_sentence
from tests.small_digits import SMALL


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
