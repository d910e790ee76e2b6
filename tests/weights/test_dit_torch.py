"""Weights of facebookresearch/DiT: what their code saves and gives is in tests/golden."""

import gzip

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from configs import digits
from shortcut_jax import pretrained, run, sampling, state
from shortcut_jax.errors import UserError
from shortcut_jax.weights import conversion, dit_torch, torch_file
from tests.golden import export_cases
from tests.sentences import assert_sentence, contents

GOLDEN = export_cases.ROOT


def config_of(arg="objective=diffusion", **overrides):
    """The config of the network in dit_weights.pt.gz."""
    config = digits.get_config(arg)
    sizes = {"model.hidden_size": 32, "model.num_heads": 2, "model.depth": 2}
    config.update_from_flattened_dict({**sizes, **overrides})
    return config


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("theirs") / "DiT-XL-2-256x256.pt"
    path.write_bytes(gzip.decompress((GOLDEN / "dit_weights.pt.gz").read_bytes()))
    return path


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "dit_outputs.npz") as found:
        return dict(found)


def theirs(file):
    """Its arrays, by their names."""
    return torch_file.read(file)


def test_the_network_predicts_what_theirs_does_at_every_noise_level(file, golden):
    params, sizes = dit_torch.read(file)
    assert (sizes.patch_size, sizes.channels, sizes.num_classes) == (2, 1, 10)
    setup = run.prepare(config_of())
    # As `objectives.diffusion` asks for a noise level.
    time = 1 - (golden["levels"].astype(np.float32) + 1) / 1000
    for d in (0.0, 0.5):
        found = jax.jit(state.apply_fn(setup.network))(
            params, golden["x"], time, np.full(10, d, np.float32), golden["labels"]
        )
        scale = np.abs(golden["noise"]).max()
        assert scale > 0.5
        assert np.abs(found - golden["noise"]).max() < 2e-5 * scale


def test_a_workdir_samples_by_diffusion_and_starts_a_shortcut_model(file, golden, tmp_path):
    out = tmp_path / "dit"
    conversion.import_dit(file, out, config_of())
    model = sampling.load(out)
    assert model.step == 0 and model.setup.config.objective.name == "diffusion"
    assert model.sample(num_steps=4, num=2).shape == (2, 8, 8, 1)

    start = pretrained.find(config_of("objective=shortcut", init_from=str(out))).init_from
    setup = run.prepare(config_of("objective=shortcut"))
    shapes = jax.eval_shape(lambda: state.init_params(setup.network, setup.image_shape, 0))
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = start.params(shapes, jax.tree.map(lambda _: place, shapes))
    apply = jax.jit(state.apply_fn(setup.network))
    time = 1 - (golden["levels"].astype(np.float32) + 1) / 1000
    found = apply(params, golden["x"], time, np.full(10, 0.25, np.float32), golden["labels"])
    np.testing.assert_allclose(found, golden["noise"], rtol=0, atol=1e-4)
    # What embeds d answers nothing yet, but learns.
    grads = jax.grad(lambda p: apply(p, golden["x"], time, 0 * time + 0.25, golden["labels"]).sum())
    assert np.abs(grads(params)["d_embed"]["out"]["kernel"]).max() > 0


def test_safetensors_and_bare_weights(file, tmp_path):
    arrays = {key: np.ascontiguousarray(a) for key, a in theirs(file).items()}
    save_file(arrays, tmp_path / "dit.safetensors")
    expected, _ = dit_torch.read(file)
    found, _ = dit_torch.read(tmp_path / "dit.safetensors")
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_weights_without_a_learned_variance(file, tmp_path):
    arrays = {key: np.ascontiguousarray(a) for key, a in theirs(file).items()}
    for key in ("final_layer.linear.weight", "final_layer.linear.bias"):
        arrays[key] = np.ascontiguousarray(arrays[key].reshape(4, 2, -1)[:, 0])
    arrays["final_layer.linear.bias"] = arrays["final_layer.linear.bias"].ravel()
    save_file(arrays, tmp_path / "dit.safetensors")
    expected, found = dit_torch.read(file)[0], dit_torch.read(tmp_path / "dit.safetensors")[0]
    jax.tree.map(np.testing.assert_array_equal, found, expected)


# ------------------------------------------------------------------ what is refused


def changed(**changes):
    def change(arrays):
        for key, value in changes.items():
            key = key.replace("__", ".")
            if value is None:
                del arrays[key]
            else:
                arrays[key] = value(arrays.get(key))

    return change


BAD = {
    "missing": (changed(blocks__1__mlp__fc2__bias=None), ["no array blocks.1.mlp.fc2.bias"]),
    "extra": (changed(odd=lambda _: np.zeros(3, np.float32)), ["1 entries", "odd"]),
    "shape": (changed(x_embedder__proj__bias=lambda a: a[:3].copy()), ["(3,)", "(32,)"]),
    "positions": (changed(pos_embed=lambda a: a[:, ::-1].copy()), ["position embedding"]),
}


@pytest.mark.parametrize("case", BAD)
def test_weights_of_something_else(file, tmp_path, case):
    arrays = {key: np.ascontiguousarray(a) for key, a in theirs(file).items()}
    change, fragments = BAD[case]
    change(arrays)
    path = tmp_path / "dit.safetensors"
    save_file(arrays, path)
    with pytest.raises(UserError) as caught:
        conversion.import_dit(path, tmp_path / "out", config_of())
    assert_sentence(str(caught.value), [str(path), "expected", *fragments])
    assert not contents(tmp_path / "out")


def test_a_file_that_is_no_weights(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"cos\nsystem\n(S'touch RAN'\ntR.")
    with pytest.raises(UserError) as caught:
        dit_torch.read(tmp_path / "a.pt")
    assert_sentence(str(caught.value), ["a.pt", "expected"])


def test_the_config_must_be_that_of_a_diffusion_with_dits_network(file, tmp_path):
    for arg, fragments in (
        ("objective=shortcut", ["objective.name=shortcut for diffusion"]),
        ("objective=diffusion,authors_code", ["model.time_scale=1.0 for 1000.0"]),
    ):
        with pytest.raises(UserError) as caught:
            conversion.import_dit(file, tmp_path / "out", config_of(arg))
        assert_sentence(str(caught.value), [str(file), "add objective=diffusion", *fragments])
    assert not contents(tmp_path / "out")
