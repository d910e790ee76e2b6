"""DINOv2 is Meta's, layer by layer, and nothing but the image moves its features.

tests/golden/dinov2.npz holds what Meta's code computes of two photographs with random weights, the
same on both sides: for a network of two narrow blocks, which every test here takes, and for
ViT-L/14, which takes a minute and is marked slow.
"""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from shortcut_jax.errors import UserError
from shortcut_jax.files import sha256_of
from shortcut_jax.metrics import dinov2
from shortcut_jax.metrics import dinov2_weights as weights_lib
from shortcut_jax.metrics.protocols import DINOV2
from shortcut_jax.weights.published import PUBLISHED
from tests.golden import make_dinov2 as golden
from tests.golden.make_inception import photograph_digest, photographs, positions, summary
from tests.sentences import assert_sentence

# Of the largest activation of a layer. Found: 5e-6; with weights rounded to TF32, 1e-4 to 4e-4;
# with the approximation of the GELU by tanh, 1.7e-4.
LAYER_TOLERANCE = 5e-5
BATCH_TOLERANCE = 1e-4
DEVICE_TOLERANCE = 1e-5
# Of the range of what the network sees, about 4.5.
PIXEL_TOLERANCE = 1e-5

SMALL = dinov2.VisionTransformer(*golden.NETWORKS["small"])


@functools.cache
def small_weights():
    return weights_lib.load(dinov2.weight_shapes(SMALL), weights_lib.RANDOM)


def small_extractor(protocol, batch, devices):
    return dinov2.build_extractor(SMALL, small_weights(), DINOV2[protocol], batch, devices)


def error(found, expected):
    """Largest difference, in parts of the largest number expected."""
    return np.abs(np.float64(found) - expected).max() / np.abs(expected).max()


@pytest.fixture(scope="module")
def peer():
    """What Meta's code computed of the photographs, as each protocol shows them."""
    with np.load(golden.FILE) as file:
        arrays = {name: file[name] for name in file.files}
    # Another JPEG decoder would make every comparison below fail for no reason.
    assert str(arrays["photographs"]) == photograph_digest()
    return arrays


def see(images, protocol):
    shown = images if protocol == "edm2" else dinov2.pillow_resize(images)
    return dinov2.preprocess(jnp.asarray(shown), DINOV2[protocol])


@pytest.fixture(scope="module")
def images():
    return jnp.concatenate([see(photographs(), protocol) for protocol in golden.PROTOCOLS])


def all_layers(network, variables, images):
    outputs, state = network.apply(
        variables, images, capture_intermediates=True, mutable=["intermediates"]
    )
    flat = flatten_dict(state["intermediates"])
    layers = {".".join(path[:-1]).replace("blocks_", "blocks."): a[0] for path, a in flat.items()}
    return outputs | {
        f"layer/{name}": a for name, a in layers.items() if golden.LAYER.fullmatch(name)
    }


def summaries(outputs):
    """What the golden file holds of each."""
    return {k: summary(v) if "layer/" in k else v for k, v in jax.device_get(outputs).items()}


@pytest.fixture(scope="module")
def variables():
    return dinov2.to_variables(SMALL, small_weights().arrays)


@pytest.fixture(scope="module")
def lowered(variables, images):
    return jax.jit(functools.partial(all_layers, SMALL)).lower(variables, images)


@pytest.fixture(scope="module")
def program(lowered, images):
    compiled = lowered.compile()
    return lambda variables: summaries(compiled(variables, images))


@pytest.fixture(scope="module")
def found(program, variables):
    return program(variables)


# ------------------------------------------------------------------ parity


def layer_errors(found, peer):
    errors = {}
    for name in found:
        if name.startswith("layer/"):
            (a, b), largest = (found[name], peer[name]), peer[name][:, -2:-1]
            activations = np.abs(a - b)[:, :-1] / largest
            norm = np.abs(a - b)[:, -1] / b[:, -1]
            errors[name] = max(activations.max(), norm.max())
    return errors


def assert_parity(found, peer, name):
    peer = {k.removeprefix(f"{name}/"): v for k, v in peer.items() if k.startswith(f"{name}/")}
    depth, width, _ = golden.NETWORKS[name]
    errors = layer_errors(found, peer)
    assert errors.keys() == {name for name in peer if name.startswith("layer/")}
    assert len(errors) == 2 + depth * (1 + len(golden.IN_BLOCKS))
    worst = max(errors, key=errors.get)
    assert errors[worst] <= LAYER_TOLERANCE, worst
    assert found["features"].shape == (4, width) and found["features"].dtype == np.float32
    assert error(found["features"], peer["features"]) <= LAYER_TOLERANCE


def test_every_layer_is_that_of_the_published_code(found, peer):
    assert_parity(found, peer, "small")


def test_the_epsilon_of_the_normalisation_is_theirs(variables, images, peer):
    """Tokens of usual size do not show it: here they have a variance of 1e-6."""
    params = variables["params"]
    embeddings = {key: params[key] for key in params if golden.EMBEDDING.match(key)}
    assert len(embeddings) == 3
    faint = {"params": params | jax.tree.map(lambda a: np.float32(golden.FAINT) * a, embeddings)}
    features = jax.jit(SMALL.apply)(faint, images)["features"]
    assert error(features, peer["small/faint_features"]) <= LAYER_TOLERANCE


@pytest.mark.slow
def test_every_layer_of_vit_large_is_that_of_the_published_code(images, peer):
    network = dinov2.VisionTransformer()
    assert (network.depth, network.width, network.heads) == golden.NETWORKS["large"]
    weights = weights_lib.load(dinov2.weight_shapes(network), weights_lib.RANDOM)
    variables = dinov2.to_variables(network, weights.arrays)
    outputs = jax.jit(functools.partial(all_layers, network))(variables, images)
    assert_parity(summaries(outputs), peer, "large")


def test_position_embeddings_are_resized_as_the_published_code_does(variables, peer):
    resized = np.asarray(dinov2.resize_places(variables["params"]["pos_embed"]))
    assert resized.shape == (1, 257, 64)
    kept = resized.reshape(-1)[positions(resized.size, golden.PIXELS)]
    assert error(kept, peer["small/places"]) <= 1e-5


@pytest.mark.parametrize("protocol", golden.PROTOCOLS)
@pytest.mark.parametrize("size", golden.SIZES)
def test_images_are_resized_and_scaled_as_theirs_are(protocol, size, peer):
    seen = np.asarray(see(photographs(*size), protocol))
    assert seen.shape == (2, 224, 224, 3) and seen.dtype == np.float32
    flat = seen.reshape(2, -1)
    kept = flat[:, positions(flat.shape[1], golden.PIXELS)]
    expected = peer[f"{protocol}/seen/{size[0]}x{size[1]}"]
    assert np.abs(kept - expected).max() <= 4.5 * PIXEL_TOLERANCE


def test_the_published_network_has_its_size():
    """304,368,640 numbers with the mask token, which only training needs."""
    shapes = dinov2.weight_shapes(dinov2.VisionTransformer())
    numbers = sum(int(np.prod(shape)) for shape in shapes.values()) + 1024
    assert (len(shapes) + 1, numbers) == (343, 304_368_640)
    # The rest of the file is names, shapes and padding to 64 bytes.
    overhead = PUBLISHED[weights_lib.NETWORK.published].size - 4 * numbers
    assert 0 < overhead < 400 * len(shapes)


# ------------------------------------------------------------------ precision


def test_every_product_has_the_highest_precision(lowered):
    """TPUs (bfloat16) and recent GPUs (TF32) compute products in less than float32 by default."""
    operations = ("stablehlo.convolution", "stablehlo.dot_general")
    text = lowered.as_text()
    lines = [line for line in text.splitlines() if any(name in line for name in operations)]
    # A convolution, two for positions; in a block four layers and two of attention.
    assert len(lines) == 3 + 6 * SMALL.depth
    for line in lines:
        assert line.count("HIGHEST") == 2, line
    assert not re.search("bf16|f16|f64", text)


def with_fewer_bits(a, bits):
    """float32 rounded to a mantissa of so many bits, as units for products do with their inputs."""
    unit = np.uint32(1 << (23 - bits))
    rounded = (np.ascontiguousarray(a).view(np.uint32) + unit // np.uint32(2)) & ~(unit - 1)
    return rounded.view(np.float32)


@pytest.mark.parametrize(("name", "bits"), [("bfloat16", 7), ("TF32", 10)])
def test_parity_fails_where_products_have_fewer_bits(name, bits, program, variables, peer):
    """The kernels alone, rounded as those units round them, are seen in nearly every layer."""
    rounded = jax.tree.map(lambda a: with_fewer_bits(a, bits) if a.ndim > 1 else a, variables)
    outputs = program(rounded)
    peer = {k.removeprefix("small/"): v for k, v in peer.items()}
    errors = layer_errors(outputs, peer)
    assert max(errors.values()) > 5 * LAYER_TOLERANCE
    assert np.mean([e > LAYER_TOLERANCE for e in errors.values()]) > 0.9
    assert error(outputs["features"], peer["features"]) > LAYER_TOLERANCE


# ------------------------------------------------------------------ batches and devices


@pytest.fixture(scope="module")
def one_by_one():
    """Outputs of an extractor that computes one image at a time."""
    extractor = small_extractor("edm2", 1, jax.local_devices()[:1])
    assert extractor.batch == 1
    return extractor.outputs(photographs())


def test_features_do_not_depend_on_the_batch(one_by_one, found):
    assert error(one_by_one["features"], found["features"][:2]) <= BATCH_TOLERANCE


def test_features_do_not_depend_on_the_devices(one_by_one, run_python, tmp_path):
    np.save(tmp_path / "images.npy", photographs())
    files = [str(tmp_path / name) for name in ("images.npy", "two.npz")]
    args = ["-m", "tests.programs.dinov2_on_devices", *files]
    assert run_python(args, devices=2).returncode == 0
    with np.load(tmp_path / "two.npz") as two:
        assert two["devices"] == 2
        assert {*two.files} == {*one_by_one, "devices"}
        for name, expected in one_by_one.items():
            assert error(two[name], expected) <= DEVICE_TOLERANCE, name


# ------------------------------------------------------------------ the extractor and its weights


@pytest.fixture
def small(monkeypatch):
    """`load_extractor` takes the small network."""
    monkeypatch.setattr(dinov2, "VisionTransformer", lambda: SMALL)


def test_the_extractor_of_dgm_eval_rounds(small, found):
    extractor = dinov2.load_extractor("dinov2", DINOV2["dgm_eval"], dinov2_weights="random")
    assert (extractor.name, extractor.weights) == ("dinov2", "random")
    assert (extractor.feature_dim, extractor.image_shape) == (64, (None, None, 3))
    assert extractor.sha256 == small_weights().sha256
    assert extractor.protocol is DINOV2["dgm_eval"]
    features = extractor.outputs(photographs())["features"]
    assert error(features, found["features"][2:]) <= BATCH_TOLERANCE
    assert error(features, found["features"][:2]) > BATCH_TOLERANCE


def test_a_published_file_is_read(small, tmp_path, monkeypatch, found):
    from safetensors.numpy import save_file

    path = tmp_path / "dinov2.safetensors"
    arrays = small_weights().arrays
    save_file({**arrays, "mask_token": np.zeros((1, 64), np.float32)}, path)
    sha256 = sha256_of(path)
    options = dict(dinov2_weights=str(path), dinov2_sha256=sha256)
    weights_lib.check(**options)
    extractor = dinov2.load_extractor("dinov2", **options)
    assert (extractor.weights, extractor.sha256) == (sha256[:8], sha256)
    assert (
        error(extractor.outputs(photographs())["features"], found["features"][:2])
        <= BATCH_TOLERANCE
    )


def refusal(function, *args, **kwargs):
    with pytest.raises(UserError) as said:
        function(*args, **kwargs)
    return str(said.value)


GOLDEN = Path(golden.FILE).parent


@pytest.mark.parametrize("path", ["", "absent.pth", str(GOLDEN)])
def test_a_missing_file_says_where_it_is(path):
    text = refusal(weights_lib.check, path)
    assert_sentence(
        text, (f"eval.dinov2_weights={path!r}", "shortcut_jax.download dinov2-vitl14", "set that")
    )


def test_another_file_is_refused_unless_asked_for():
    path = str(GOLDEN / "torch_zip.pth")
    text = refusal(weights_lib.check, path)
    published = PUBLISHED["dinov2-vitl14"].sha256
    assert_sentence(text, (path, published, "eval.dinov2_sha256", "not called fd_dinov2"))


@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        ({"register_tokens": np.zeros((1, 4, 64), np.float32)}, ("register_tokens", "(1, 4, 64)")),
        ({"norm.bias": np.zeros(65, np.float32)}, ("norm.bias", "(65,)", "(64,)")),
        ({"pos_embed": None}, ("pos_embed", "None", "(1, 1370, 64)")),
    ],
)
def test_another_network_is_refused(change, fragments, tmp_path):
    """One with registers has all the arrays that are needed, and more."""
    from safetensors.numpy import save_file

    path = tmp_path / "other.safetensors"
    arrays = {**small_weights().arrays, **change}
    save_file({name: a for name, a in arrays.items() if a is not None}, path)
    text = refusal(weights_lib.load, dinov2.weight_shapes(SMALL), str(path), sha256_of(path))
    assert_sentence(text, (*fragments, str(path), "dinov2-vitl14"))


def test_files_are_checked_without_jax(run_python):
    code = (
        "import sys; from shortcut_jax.metrics import dinov2_weights as w; w.check('random'); "
        "print(sorted({'jax', 'flax', 'torch'} & set(sys.modules)))"
    )
    done = run_python(["-c", code])
    assert (done.returncode, done.stdout.strip()) == (0, "[]")
