"""The FID's Inception-v3 is torch-fidelity's, layer by layer, and nothing but the image moves it.

tests/golden/inception.npz holds what torch-fidelity computes of two photographs; the weights, with
running statistics, are random and the same on both sides. The network is compiled twice in this
process: for four images with a summary of every layer, and as an extractor.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from shortcut_jax.evaluation.image_sets import open_images
from shortcut_jax.metrics import fid, gauges, inception, references
from shortcut_jax.metrics import inception_weights as weights_lib
from shortcut_jax.metrics.protocols import INCEPTION
from shortcut_jax.metrics.summaries import Moments
from tests.golden import make_end_to_end as end_to_end
from tests.golden import make_inception as golden

# What the golden file calls a resize and a scale -> ours.
OURS = {"tensorflow": INCEPTION["adm"], "pytorch_fid": INCEPTION["pytorch_fid"]}
# Of the largest activation of a layer. Found: 2e-6; with weights rounded to TF32, 1e-4 to 1e-3.
LAYER_TOLERANCE = 1e-4
BATCH_TOLERANCE = 1e-4
DEVICE_TOLERANCE = 1e-5
# Of 255 grey levels. Found: 7e-6, where PyTorch multiplies and adds in one rounding.
RESIZE_TOLERANCE = 1e-5


def error(found, expected):
    """Largest difference, in parts of the largest number expected."""
    return np.abs(np.float64(found) - expected).max() / np.abs(expected).max()


@pytest.fixture(scope="module")
def peer():
    """What torch-fidelity computed, of the photographs resized by each protocol in turn."""
    with np.load(golden.FILE) as file:
        arrays = {name: file[name] for name in file.files}
    # Another JPEG decoder would make every comparison below fail for no reason.
    assert str(arrays["photographs"]) == golden.photograph_digest()
    first = f"{golden.PROTOCOLS[0]}/"
    names = [n.removeprefix(first) for n in arrays if n.startswith(first)]
    return arrays | {
        name: np.concatenate([arrays[f"{protocol}/{name}"] for protocol in golden.PROTOCOLS])
        for name in names
        if "resized" not in name
    }


@pytest.fixture(scope="module")
def weights():
    return weights_lib.load(inception.weight_shapes(), weights_lib.RANDOM)


@pytest.fixture(scope="module")
def variables(weights):
    return inception.to_variables(weights.arrays)


@pytest.fixture(scope="module")
def images():
    """The photographs as each protocol shows them to the network."""
    pixels = jnp.asarray(golden.photographs())
    return jnp.concatenate([fid.preprocess(pixels, OURS[name]) for name in golden.PROTOCOLS])


def summary(a):
    """`golden.summary`, compiled."""
    flat = a.reshape(len(a), -1)
    kept = flat[:, golden.positions(flat.shape[1], golden.KEPT)]
    return jnp.column_stack([kept, jnp.abs(flat).max(1), jnp.sqrt((flat**2).sum(1))])


def all_layers(variables, images):
    def wanted(module, _):
        return isinstance(module, inception.ConvUnit | inception.Block)

    outputs, state = inception.InceptionV3().apply(
        variables, images, capture_intermediates=wanted, mutable=["intermediates"]
    )
    flat = flatten_dict(state["intermediates"])
    layers = {f"layer/{'.'.join(path[:-1])}": summary(calls[0]) for path, calls in flat.items()}
    outputs["layer/logits"] = summary(outputs.pop("logits"))
    return outputs | layers


@pytest.fixture(scope="module")
def lowered(variables, images):
    return jax.jit(all_layers).lower(variables, images)


@pytest.fixture(scope="module")
def program(lowered, images):
    compiled = lowered.compile()
    return lambda variables: jax.device_get(compiled(variables, images))


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


def test_every_layer_is_that_of_torch_fidelity(found, peer):
    errors = layer_errors(found, peer)
    assert errors.keys() == {name for name in peer if name.startswith("layer/")}
    assert len(errors) == 94 + len(inception.BLOCKS) + 1
    worst = max(errors, key=errors.get)
    assert errors[worst] <= LAYER_TOLERANCE, worst


@pytest.mark.parametrize(
    ("name", "width"), [("features", 2048), ("spatial", 17 * 17 * 7), ("logits_unbiased", 1008)]
)
def test_every_output_is_that_of_torch_fidelity(name, width, found, peer):
    assert found[name].shape == (4, width) and found[name].dtype == np.float32
    assert error(found[name], peer[name]) <= LAYER_TOLERANCE


def test_the_logits_add_the_bias(found, peer, weights):
    bias = weights.arrays["fc.bias"][golden.positions(1008, golden.KEPT)]
    unbiased = found["logits_unbiased"][:, golden.positions(1008, golden.KEPT)]
    np.testing.assert_allclose(
        found["layer/logits"][:, : golden.KEPT], unbiased + bias, rtol=0, atol=1e-5
    )
    assert np.abs(bias).max() > 0.1


@pytest.mark.parametrize("protocol", golden.PROTOCOLS)
@pytest.mark.parametrize("size", golden.SIZES)
def test_images_are_resized_as_torch_fidelity_and_pytorch_do(protocol, size, peer):
    x = fid.preprocess(jnp.asarray(golden.photographs(*size)), OURS[protocol])
    x = np.asarray(x, np.float64)
    x = x * 128 + 128 if protocol == "tensorflow" else (x + 1) * 127.5
    flat = x.reshape(2, -1)
    resized = flat[:, golden.positions(flat.shape[1], golden.PIXELS)]
    expected = peer[f"{protocol}/resized/{size[0]}x{size[1]}"]
    assert np.abs(resized - expected).max() <= 255 * RESIZE_TOLERANCE


def test_the_two_rules_differ(images):
    assert np.abs(np.asarray(images[:2] - images[2:])).max() > 0.01


# ------------------------------------------------------------------ precision


def products(text):
    operations = ("stablehlo.convolution", "stablehlo.dot_general")
    return [line for line in text.splitlines() if any(name in line for name in operations)]


def test_every_product_has_the_highest_precision(lowered):
    """TPUs (bfloat16) and recent GPUs (TF32) compute products in less than float32 by default."""
    lines = products(lowered.as_text())
    assert len(lines) == 94 + 1
    for line in lines:
        assert line.count("HIGHEST") == 2 and "bf16" not in line, line


@pytest.mark.parametrize("protocol", golden.PROTOCOLS)
def test_resizing_has_the_highest_precision(protocol):
    resize = jax.jit(functools.partial(fid.preprocess, protocol=OURS[protocol]))
    lines = products(resize.lower(jax.ShapeDtypeStruct((2, 32, 48, 3), np.uint8)).as_text())
    assert len(lines) == 2
    for line in lines:
        assert line.count("HIGHEST") == 2, line


def with_fewer_bits(a, bits):
    """float32 rounded to a mantissa of so many bits, as units for products do with their inputs."""
    unit = np.uint32(1 << (23 - bits))
    rounded = (np.ascontiguousarray(a).view(np.uint32) + unit // np.uint32(2)) & ~(unit - 1)
    return rounded.view(np.float32)


@pytest.mark.parametrize(("name", "bits"), [("bfloat16", 7), ("TF32", 10)])
def test_parity_fails_where_products_have_fewer_bits(name, bits, program, variables, found, peer):
    """The kernels alone, rounded as those units round them, are seen in nearly every layer."""
    rounded = jax.tree.map(lambda a: with_fewer_bits(a, bits) if a.ndim > 1 else a, variables)
    outputs = program(rounded)
    errors = layer_errors(outputs, peer)
    assert max(errors.values()) > 5 * LAYER_TOLERANCE
    assert np.mean([e > LAYER_TOLERANCE for e in errors.values()]) > 0.9
    assert error(outputs["features"], peer["features"]) > LAYER_TOLERANCE
    exact = jax.tree.map(lambda a: with_fewer_bits(a, 23) if a.ndim > 1 else a, variables)
    assert jax.tree.all(jax.tree.map(np.array_equal, exact, variables))


# ------------------------------------------------------------------ batches and devices


@pytest.fixture(scope="module")
def extractor(weights):
    """Computes one image at a time."""
    return fid.build_extractor(weights, INCEPTION["adm"], 1, jax.local_devices()[:1])


@pytest.fixture(scope="module")
def one_by_one(extractor):
    assert extractor.batch == 1
    return extractor.outputs(golden.photographs())


def test_features_do_not_depend_on_the_batch(one_by_one, found):
    for name in ("features", "spatial", "logits_unbiased"):
        assert error(one_by_one[name], found[name][:2]) <= BATCH_TOLERANCE, name


def test_features_do_not_depend_on_the_devices(one_by_one, run_python, tmp_path):
    args = ["-m", "tests.programs.inception_on_devices", str(tmp_path / "two.npz")]
    assert run_python(args, devices=2, timeout=280).returncode == 0
    with np.load(tmp_path / "two.npz") as two:
        assert two["devices"] == 2
        assert {*two.files} == {*one_by_one, "devices"}
        for name, expected in one_by_one.items():
            assert error(two[name], expected) <= DEVICE_TOLERANCE, name
        # Each device computes an image as one device does, and sums are made in their order.
        sums = [Moments(), Moments()]
        for moments, outputs in zip(sums, (one_by_one, two), strict=True):
            moments.update(outputs["features"])
        np.testing.assert_allclose(sums[0].cov, sums[1].cov, rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------ from files to numbers


def test_two_folders_give_what_torch_fidelity_finds(extractor, tmp_path):
    """From PNG files to every metric that it has; the network is random, the numbers are odd."""
    expected = json.loads(end_to_end.FILE.read_text())
    assert expected["photographs"] == golden.photograph_digest()
    found = expected["found"]
    gauge = gauges.Gauge(extractor, ("fid", "is", "kid", "precision", "recall"))
    sets = {name: open_images(folder) for name, folder in end_to_end.write(tmp_path).items()}
    (reference,) = references.measure([gauge], sets["reference"], workers=0)
    samples = gauge.of_samples(sets["samples"].size)
    gauges.measure([gauge], [samples], sets["samples"])
    values = gauge.values(samples, reference.summaries)
    exact = found["exact_frechet_inception_distance"]
    assert values["fid"].value == pytest.approx(exact, rel=1e-5)
    # Theirs has rounding errors that ours has not: see `exact_distance`.
    assert values["fid"].value == pytest.approx(found["frechet_inception_distance"], rel=1e-4)
    assert values["is"].value == pytest.approx(found["inception_score_mean"], rel=1e-4)
    assert values["is"].facts["std"] == pytest.approx(found["inception_score_std"], rel=1e-4)
    # Subsets of all 20: another order of the sums. The squares of features of a random network
    # are large, and their float32 sums there are not exact.
    assert values["kid"].facts["subset_size"] == end_to_end.SUBSET_SIZE
    assert values["kid"].value == pytest.approx(found["kernel_inception_distance_mean"], rel=1e-4)
    for name in ("precision", "recall"):
        assert values[name].value == pytest.approx(found[name], abs=1e-7)
