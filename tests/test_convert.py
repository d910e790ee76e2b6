"""The command that converts weights: export and import, and what it refuses."""

import gzip
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from configs import celebahq
from shortcut_jax import checkpoint, run, sampling
from shortcut_jax import config as config_lib
from shortcut_jax.errors import UserError
from shortcut_jax.objectives import OBJECTIVES
from shortcut_jax.parallel import sharding
from shortcut_jax.weights import conversion, exported
from tests.golden import export_cases
from tests.sentences import assert_sentence, contents
from tests.untrained_runs import save_run, small


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run with steps 4 and 8, with guidance."""
    path = tmp_path_factory.mktemp("runs") / "run"
    overrides = {"objective.cfg_scale": 1.5, "objective.class_dropout": 0.1}
    save_run(path, small("shortcut", **overrides), steps=(4, 8))
    return path


@pytest.fixture(scope="module")
def folder(workdir, tmp_path_factory):
    """What it exports."""
    path = tmp_path_factory.mktemp("exports") / "new" / "folder"
    conversion.export(workdir, path)
    return path


def params_of(workdir, step=None, which="ema"):
    model = sampling.load(workdir, step, which)
    return model.step, jax.tree.map(np.asarray, model.params)


def assert_equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


# ------------------------------------------------------------------ export


def test_a_round_trip_is_exact(workdir, folder, tmp_path):
    conversion.import_exported(folder, tmp_path / "again")
    for which in ("ema", "online"):
        step, found = params_of(tmp_path / "again", which=which)
        assert (step, jax.tree.structure(found)) == (8, jax.tree.structure(params_of(workdir)[1]))
        assert_equal(found, params_of(workdir)[1])
    assert (tmp_path / "again/config.json").read_bytes() == (workdir / "config.json").read_bytes()
    conversion.export(tmp_path / "again", tmp_path / "export")
    assert contents(tmp_path / "export") == contents(folder)


@pytest.mark.parametrize(("step", "which"), [(4, "ema"), (8, "online")])
def test_step_and_parameters_can_be_chosen(workdir, tmp_path, step, which):
    files = conversion.export(workdir, tmp_path, step, which)
    assert files == [tmp_path / "model.safetensors", tmp_path / "architecture.json"]
    found, description = exported.read(tmp_path)
    assert (description["step"], description["params"]) == (step, which)
    assert_equal(found, params_of(workdir, step, which)[1])


def test_weights_are_in_pytorchs_layout(workdir, folder):
    arrays, (_, params) = load_file(folder / "model.safetensors"), params_of(workdir)
    assert {a.dtype for a in arrays.values()} == {np.dtype("float32")}
    kernel = params["block_0"]["qkv"]["kernel"]
    assert kernel.shape == (32, 96)
    np.testing.assert_array_equal(arrays["block_0.qkv.weight"], kernel.T)
    np.testing.assert_array_equal(arrays["label_embed.weight"], params["label_embed"]["embedding"])
    assert len(arrays) == len(jax.tree.leaves(params))


def test_the_description_says_all_that_sampling_needs(folder):
    found = json.loads((folder / "architecture.json").read_text())
    assert found["architecture"] == {
        "patch_size": 2, "hidden_size": 32, "depth": 1, "num_heads": 2, "num_classes": 10,
        "mlp_ratio": 4.0, "attention_scale": "sqrt", "time_scale": 1000.0, "step_embedding": "d",
        "modulation_init": "zero", "max_level": 7, "ignore_step": False, "image_shape": [8, 8, 1],
    }  # fmt: skip
    steps = found["sampling"]["steps"]
    assert found["sampling"]["rule"] == "euler" and found["sampling"]["null_label"] == 10
    assert steps["1"] == {"d": 1.0, "guidance": 1.0} and steps["4"]["d"] == 0.25
    assert steps["128"] == {"d": 0.0, "guidance": 1.5}
    assert found["objective"]["name"] == "shortcut" and found["step"] == 8


def test_the_description_does_not_depend_on_where_files_are():
    def described(**overrides):
        config = celebahq.get_config("small,objective=reflow")
        config.update_from_flattened_dict(overrides)
        setup = run.build(config, sharding.make_mesh(1, 1))
        return json.dumps(exported.describe(setup, 1, "ema"))

    names = ("data.builder", "eval.inception_sha256", "eval.dinov2_sha256")  # no paths
    flat = config_lib.flatten(celebahq.get_config("small,objective=reflow"))
    paths = [key for key, value in flat.items() if value == "" and key not in names]
    assert len(paths) >= 7
    plain = described()
    assert described(**{key: f"/home/me/{key}" for key in paths}) == plain
    assert json.loads(plain)["config"]["autoencoder.weights"] == "random"  # decides the latents
    assert described(**{"autoencoder.weights": "/home/me/vae.safetensors"}) == plain.replace(
        '"autoencoder.weights": "random"', '"autoencoder.weights": ""'
    )


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_method_can_be_described(name):
    setup = run.prepare(small(name, **{"objective.cfg_scale": 0.0}))
    sampled = json.loads(json.dumps(exported.describe(setup, 1, "ema")))["sampling"]
    assert (sampled["rule"] == "euler") == (
        name not in ("diffusion", "consistency_training", "consistency_distillation")
    )
    assert {step["guidance"] for step in sampled["steps"].values()} == {0.0}


def test_nothing_is_overwritten(workdir, folder):
    before = contents(folder)
    with pytest.raises(UserError) as caught:
        conversion.export(workdir, folder)
    assert_sentence(str(caught.value), [f"--out={folder}", "model.safetensors", "choose another"])
    with pytest.raises(UserError) as caught:
        conversion.import_exported(folder, workdir)
    assert_sentence(str(caught.value), [f"--out={workdir}", "nothing was changed"])
    assert contents(folder) == before


def cut(path: Path) -> None:
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])


def of_another_shape(path: Path) -> None:
    arrays = load_file(path / "model.safetensors")
    arrays["output.bias"] = arrays["output.bias"][:3]
    save_file(arrays, path / "model.safetensors")


def of_another_version(path: Path) -> None:
    found = json.loads((path / "architecture.json").read_text())
    (path / "architecture.json").write_text(json.dumps(found | {"version": 2}))


@pytest.mark.parametrize(
    ("spoil", "fragments"),
    [
        (cut, ["model.safetensors", "cannot be read"]),
        (of_another_shape, ["output/bias: (3,) there, (4,) here"]),
        (of_another_version, ["version 1", "export the weights again"]),
        (lambda path: (path / "architecture.json").unlink(), ["architecture.json"]),
        (lambda path: (path / "model.safetensors").unlink(), ["model.safetensors"]),
    ],
)
def test_an_export_that_was_spoilt(folder, tmp_path, spoil, fragments):
    shutil.copytree(folder, tmp_path / "spoilt")
    spoil(tmp_path / "spoilt")
    with pytest.raises(UserError) as caught:
        conversion.import_exported(tmp_path / "spoilt", tmp_path / "out")
    assert_sentence(str(caught.value), [str(tmp_path / "spoilt"), "expected", *fragments])
    assert not contents(tmp_path / "out")


# ------------------------------------------------------------------ the command


@pytest.fixture
def theirs(tmp_path):
    """The file of the authors' code, and the flags that say what it is."""
    golden = Path(export_cases.__file__).with_name("authors_checkpoint.pkl.gz")
    path = tmp_path / "theirs"
    path.write_bytes(gzip.decompress(golden.read_bytes()))
    sizes = [f"--config.model.{k}={v}" for k, v in (("hidden_size", 16), ("num_heads", 2))]
    return path, ["--config=configs/digits.py:authors_code", *sizes, "--config.model.depth=1"]


def test_the_commands_of_the_documentation(theirs, in_turn, run_python, tmp_path):
    path, flags = theirs
    out = tmp_path / "out"
    done = in_turn(
        "convert",
        ["authors", path, f"--out={out}", *flags],
        ["export", out, "--out", tmp_path / "exported", "--params=online", "--step=400000"],
        ["import", tmp_path / "exported", f"--out={tmp_path}/again"],
    )
    assert [call["status"] for call in done] == [0, 0, 0], done
    assert f"--config.init_from={out}" in done[0]["out"] and "model.safetensors" in done[1]["out"]
    assert checkpoint.Checkpoints(tmp_path / "again", keep=1, read_only=True).steps() == [400_000]
    assert run.restore_config(tmp_path / "again").model.step_embedding == "log2"
    assert_equal(params_of(tmp_path / "again")[1], params_of(out, which="online")[1])

    limits = ["--config.eval.num_samples=50", "--config.eval.steps=(1,)"]
    evaluated = run_python(["-m", "shortcut_jax.eval", f"--workdir={out}", *flags, *limits])
    assert evaluated.returncode == 0 and "fd_digits_mlp64" in evaluated.stdout


WRONG = {
    "no command": ([], ["the command is missing", "authors FILE", "export WORKDIR"]),
    "another command": (["load", "FILE"], ["'load FILE' is not a command", "import FOLDER"]),
    "no file": (["authors", "--out=a"], ["'authors' is not a command", "authors FILE"]),
    "a word too many": (["export", "a", "b"], ["'export a b'"]),
    "a word after a flag": (["export", "--out=a", "b"], ["'export' is not a command"]),
    "no out": (["export", "a"], ["--out is missing"]),
    "no such file": (["authors", "nowhere", "--out=OUT"], ["nowhere cannot be read"]),
    "no such run": (["export", "nowhere", "--out=OUT"], ["nowhere"]),
    "a flag of another command": (["authors", "a", "--out=b", "--step=3"], ["--step", "export"]),
    "a config where there is one": (
        ["import", "a", "--out=b", "--config=configs/digits.py"], ["--config", "import"],
    ),
    "an unknown flag": (["export", "a", "--ou=b"], ["Unknown command line flag 'ou'"]),
}  # fmt: skip


def test_a_wrong_command_is_one_sentence(in_turn, tmp_path):
    commands = [
        [w.replace("OUT", str(tmp_path / "out")) for w in words] for words, _ in WRONG.values()
    ]
    found = in_turn("convert", *commands)
    for call, (case, (_, fragments)) in zip(found, WRONG.items(), strict=True):
        assert (call["status"], call["out"]) == (2, ""), case
        assert_sentence(call["error"], fragments)
    assert not contents(tmp_path)


def test_without_config_the_data_set_is_found_by_the_shapes(monkeypatch):
    found = []
    monkeypatch.setattr(conversion.config_flag, "load", lambda argument: found.append(argument))
    monkeypatch.setattr(conversion.os.path, "isfile", lambda path: True)
    for channels, classes, hidden, depth in ((4, 1, 768, 12), (4, 1000, 1152, 28)):
        sizes = conversion.Sizes(2, hidden, depth, 4.0, channels, classes)
        conversion._config_for(sizes, Path("FILE"), "authors_code")
    assert found == [
        "configs/celebahq.py:authors_code,model=B/2",
        "configs/imagenet.py:authors_code,model=XL/2",
    ]
    with pytest.raises(UserError) as caught:
        conversion._config_for(
            conversion.Sizes(2, 768, 12, 4.0, 3, 7), Path("FILE"), "authors_code"
        )
    assert_sentence(
        str(caught.value), ["3 channels and 7 classes", "--config=FILE.py:authors_code"]
    )


def test_the_config_files_named_here_are_of_such_data():
    for (channels, classes), file in conversion.CONFIG_FILES.items():
        if not Path(file).is_file():
            continue
        setup = conversion._setup(conversion.config_flag.load(file))
        assert (setup.image_shape[-1], setup.num_classes) == (channels, classes)
        assert config_lib.flatten(setup.config)["data.name"]
