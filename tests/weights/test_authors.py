"""The released code's checkpoints: its own outputs, samples and files are in tests/golden."""

import gzip
import io
import json
import pickle
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shortcut_jax import config as config_lib
from shortcut_jax import pretrained, run, sampling, state, train
from shortcut_jax.config_flag import load as load_config
from shortcut_jax.errors import UserError
from shortcut_jax.models.dit import DiT
from shortcut_jax.weights import authors, conversion, restricted_pickle
from shortcut_jax.weights.tables import Source, flatten, unflatten
from tests.golden import philox
from tests.sentences import assert_sentence, contents
from tests.untrained_runs import small

GOLDEN = Path(__file__).parents[1] / "golden"
SWITCHES = {
    key.removeprefix("model."): value
    for key, value in config_lib.AUTHORS_CODE.items()
    if key.startswith("model.")
}


def digits_config(arg="authors_code", **overrides):
    """The config of the network in authors_checkpoint.pkl.gz."""
    config = load_config(f"configs/digits.py:{arg}")
    sizes = {"model.hidden_size": 16, "model.num_heads": 2, "model.depth": 1}
    config.update_from_flattened_dict({**sizes, **overrides})
    return config


@pytest.fixture(scope="module")
def content():
    """The bytes of the checkpoint that their code wrote."""
    return gzip.decompress((GOLDEN / "authors_checkpoint.pkl.gz").read_bytes())


@pytest.fixture(scope="module")
def file(content, tmp_path_factory):
    path = tmp_path_factory.mktemp("theirs") / "celeba400001"
    path.write_bytes(content)
    return path


@pytest.fixture(scope="module")
def converted(file, tmp_path_factory):
    """A workdir made of the checkpoint."""
    out = tmp_path_factory.mktemp("runs") / "theirs"
    conversion.import_authors(file, out, digits_config())
    return out


def write(folder, tree):
    path = folder / "changed"
    path.write_bytes(pickle.dumps(tree))
    return path


def relative_error(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


# ------------------------------------------------------------------ the network


@pytest.fixture(scope="module", params=["B", "XL"])
def case(request):
    """Our network with their parameters, its inputs, and the output of their code."""
    with np.load(GOLDEN / "authors_outputs.npz") as golden:
        found = {
            key: golden[f"{request.param}/{key}"] for key in ("output", "t", "token", "labels")
        }
        sizes = json.loads(str(golden[f"{request.param}/sizes"]))
    shapes = sizes.pop("shapes")
    flat = {k: philox.parameter(f"{request.param}/{k}", tuple(s)) for k, s in shapes.items()}
    source = Source(flat, "golden", "/")
    inferred = authors.infer_sizes(source)
    assert (inferred.channels, inferred.num_classes) == (4, sizes["num_classes"])
    assert (inferred.hidden_size, inferred.depth) == (sizes["hidden_size"], sizes["depth"])
    network = DiT(
        **inferred.model(), **SWITCHES, num_heads=sizes["num_heads"],
        num_classes=inferred.num_classes,
    )  # fmt: skip
    found["x"] = philox.values(f"{request.param}/x", (40, 8, 8, 4), 2.0)
    return network, authors.to_params(source, inferred), found


def test_outputs_are_those_of_their_code_for_every_step_token(case):
    network, params, golden = case
    assert set(golden["token"]) == set(range(8))
    assert network.num_classes in golden["labels"]  # the null label, too
    args = (golden["x"], golden["t"], 2.0 ** -golden["token"], golden["labels"])
    output = np.asarray(jax.jit(state.apply_fn(network))(params, *args))
    assert np.abs(golden["output"]).max() > 1
    for token in range(8):
        rows = golden["token"] == token
        assert relative_error(output[rows], golden["output"][rows]) < 1e-5, token
    # The question of d = 0 is theirs of 1/128.
    args = (*args[:2], np.where(golden["token"] == 7, 0, args[2]), args[3])
    np.testing.assert_array_equal(jax.jit(state.apply_fn(network))(params, *args), output)


# ------------------------------------------------------------------ a whole checkpoint


def test_samples_are_those_of_their_sampler(converted):
    models = {which: sampling.load(converted, params=which) for which in ("online", "ema")}
    setup = models["ema"].setup

    @jax.jit
    def sample(params, x, labels, num_steps):
        def velocity(*args):
            return state.apply_fn(setup.network)(params, *args)

        return sampling.integrate(setup.objective, velocity, x, labels, num_steps, None)

    with np.load(GOLDEN / "authors_samples.npz") as golden:
        for which, model in models.items():
            assert model.step == 400_000
            for num_steps in (1, 4, 128):
                found = sample(model.params, golden["noise"], golden["labels"], num_steps)
                expected = golden[f"{which}/{num_steps}"]
                assert relative_error(found, expected) < 1e-5, (which, num_steps)
    drawn = models["ema"].sample(num_steps=4, labels=[1, 2])
    assert drawn.shape == (2, 8, 8, 1) and drawn.dtype == np.uint8


def test_a_workdir_says_what_it_is_and_where_from(converted, file):
    flat = json.loads((converted / "config.json").read_text())
    assert flat == config_lib.flatten(digits_config())
    config = run.restore_config(converted)
    assert config.model.step_embedding == "log2" and config.objective.name == "shortcut"
    meta = json.loads((converted / "checkpoints/400000/meta/metadata").read_text())
    assert meta["data"][run.CONVERTED]["file"] == file.name
    assert len(meta["data"][run.CONVERTED]["sha256"]) == 64


def test_a_run_starts_from_it(converted):
    config = digits_config("authors_code,objective=flow_matching", init_from=str(converted))
    start = pretrained.find(config).init_from
    setup = run.prepare(config)
    shapes = jax.eval_shape(lambda: state.init_params(setup.network, setup.image_shape, 0))
    shardings = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), shapes)
    found = start.params(shapes, shardings)
    expected = philox.parameter("ema/FinalLayer_0/Dense_1/kernel", (16, 4), bits=8)
    np.testing.assert_array_equal(found["output"]["kernel"], expected)


def test_a_network_of_latents_becomes_a_run_of_its_data_set(tmp_path):
    with np.load(GOLDEN / "authors_outputs.npz") as golden:
        shapes = json.loads(str(golden["XL/sizes"]))["shapes"]
    params = unflatten({k: philox.parameter(f"XL/{k}", tuple(s)) for k, s in shapes.items()})
    state_dict = {"params": params, "params_ema": params, "step": np.int32(3)}
    path = write(tmp_path, {"train_state": state_dict, "_timestamp": 0.0})
    config = load_config("configs/celebahq.py:authors_code")
    config.model.update(hidden_size=144, depth=3, num_heads=2)
    conversion.import_authors(path, tmp_path / "out", config)  # without the other weights
    found = run.restore_config(tmp_path / "out")
    assert config_lib.flatten(found) == config_lib.flatten(config)
    assert found.objective.cfg_scale == 0 and found.model.attention_scale == "linear"


def test_the_paths_their_code_writes(content, file, tmp_path):
    folder = tmp_path / "celeba400001"  # where a local file should be, their code makes a folder
    folder.mkdir()
    (folder / "celeba400001.tmp").write_bytes(content)
    found, expected = authors.read(folder), authors.read(file)
    jax.tree.map(np.testing.assert_array_equal, found.ema, expected.ema)
    conversion.import_authors(folder, tmp_path / "out", digits_config())


def test_arrays_that_one_process_gathered_have_an_axis_too_many(content, file, tmp_path):
    tree = read_plainly(content)
    tree["train_state"] = jax.tree.map(lambda a: np.asarray(a)[None], tree["train_state"])
    found, expected = authors.read(write(tmp_path, tree)), authors.read(file)
    assert found.step == expected.step and found.sizes == expected.sizes
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)


@pytest.mark.parametrize("kind", [jnp.asarray, lambda a: jnp.asarray(a, jnp.bfloat16)])
def test_arrays_that_were_on_a_device_and_bfloat16(content, file, tmp_path, kind):
    tree = read_plainly(content)
    tree["train_state"] = jax.tree.map(kind, tree["train_state"])
    tree["train_state"]["step"] = 7
    found, expected = authors.read(write(tmp_path, tree)), authors.read(file)
    assert {a.dtype for a in jax.tree.leaves(found.params)} == {np.dtype("float32")}
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a, np.asarray(kind(b), np.float32)),
        found.params, expected.params,
    )  # fmt: skip


def read_plainly(content):
    """The checkpoint without its optimizer state."""
    tree = restricted_pickle.load(io.BytesIO(content), "golden", "a checkpoint")
    del tree["train_state"]["opt_state"]
    return tree


# ------------------------------------------------------------------ what is refused


def changed(change):
    """What `change` does to the flat parameters."""

    def apply(tree):
        flat = flatten(tree["train_state"]["params"])
        change(flat)
        tree["train_state"]["params"] = unflatten(flat)

    return apply


K = "DiTBlock_0/Dense_2/kernel"
BAD = {
    "missing": (changed(lambda f: f.pop(K)), ["(params)", f"no array {K}"]),
    "extra": (changed(lambda f: f.update(odd=f[K])), ["1 entries", "odd"]),
    "shape": (changed(lambda f: f.update({K: f[K][:, :3]})), [K, "(16, 3)", "(16, 16)"]),
    "axes": (changed(lambda f: f.update({"PatchEmbed_0/Conv_0/kernel": f[K]})), ["4 axes"]),
    "type": (changed(lambda f: f.update({K: f[K].astype(int)})), [K, "int64", "floats"]),
    "values": (changed(lambda f: f.update({K: f[K] * np.nan})), [K, "not finite"]),
    "no array": (changed(lambda f: f.update({K: 3.0})), [f"no array {K}"]),
    "no EMA": (lambda t: t["train_state"].pop("params_ema"), ["params_ema", "train_state"]),
    "no step": (lambda t: t["train_state"].pop("step"), ["step=None", "number of updates"]),
}


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_holds_something_else(content, tmp_path, case):
    change, fragments = BAD[case]
    tree = read_plainly(content)
    change(tree)
    path, out = write(tmp_path, tree), tmp_path / "out"
    with pytest.raises(UserError) as caught:
        conversion.import_authors(path, out, digits_config())
    assert_sentence(str(caught.value), [str(path), "expected", *fragments])
    assert not contents(out)


@pytest.mark.parametrize(
    ("config", "fragments"),
    [
        (lambda: small("shortcut"), ["model.attention_scale=sqrt for linear", "add authors_code"]),
        (lambda: digits_config(**{"model.depth": 2}), ["model.depth: 1 there, 2 here"]),
        (lambda: digits_config(**{"model.patch_size": 4}), ["model.patch_size: 2 there, 4 here"]),
    ],
)
def test_a_config_of_another_network(file, tmp_path, config, fragments):
    with pytest.raises(UserError) as caught:
        conversion.import_authors(file, tmp_path / "out", config())
    assert_sentence(str(caught.value), [str(file), "expected", *fragments])
    assert not contents(tmp_path / "out")


def test_without_a_config_the_sizes_must_be_known(file, tmp_path):
    with pytest.raises(UserError) as caught:
        conversion.import_authors(file, tmp_path / "out")
    fragments = ["width 16, depth 1", "--config=configs/digits.py:authors_code", "num_heads"]
    assert_sentence(str(caught.value), [str(file), *fragments])


def test_a_run_is_not_overwritten(converted, file):
    before = contents(converted)
    with pytest.raises(UserError) as caught:
        conversion.import_authors(file, converted, digits_config())
    assert_sentence(str(caught.value), [f"--out={converted}", "nothing was changed"])
    assert contents(converted) == before


def test_training_does_not_continue_from_weights_alone(converted):
    with pytest.raises(UserError) as caught:
        train.train(digits_config(), converted)
    assert_sentence(str(caught.value), ["converted weights", f"--config.init_from={converted}"])
