"""The DiT against a numpy model of the authors' architecture, and its parameter counts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shortcut_jax import config, layers, objectives, state
from shortcut_jax.models import attention as attention_lib
from shortcut_jax.models import dit
from shortcut_jax.models.dit import DiT

AUTHORS = {
    key.removeprefix("model."): value
    for key, value in config.AUTHORS_CODE.items()
    if key.startswith("model.")
}
TINY = {"patch_size": 2, "hidden_size": 32, "depth": 2, "num_heads": 4, "num_classes": 5}
TINY_IMAGE = (8, 8, 3)
LATENTS = (32, 32, 4)


# ---- sizes ---------------------------------------------------------------------------------------


def authors_count(h, depth, num_classes, patch=2, channels=4, mlp=4):
    """Parameters of the released model, layer by layer: kernel and bias of each."""
    patch_conv = patch * patch * channels * h + h
    time_or_step = (256 * h + h) + (h * h + h)
    label_table = (num_classes + 1) * h
    adaln = h * 6 * h + 6 * h
    q_k_v_and_out = 4 * (h * h + h)  # three separate biased layers for q, k and v
    feed_forward = (h * mlp * h + mlp * h) + (mlp * h * h + h)
    final = (h * 2 * h + 2 * h) + (h * patch * patch * channels + patch * patch * channels)
    unused_log_variances = 256
    blocks = depth * (adaln + q_k_v_and_out + feed_forward)
    return patch_conv + 2 * time_or_step + label_table + blocks + final + unused_log_variances


@pytest.mark.parametrize(
    ("size", "num_classes", "millions"), [("B", 1, 130.3), ("B", 1000, 131.1), ("XL", 1000, 676.4)]
)
def test_parameter_counts_are_the_authors(size, num_classes, millions):
    conf = config.build(f"authors_code,model={size}/2", lambda conf: None, {})
    network = state.build_network(conf, config.build_objective(conf, num_classes), LATENTS)
    params = jax.eval_shape(lambda: state.init_params(network, LATENTS, seed=0))
    width, depth = dit.SIZES[size]["hidden_size"], dit.SIZES[size]["depth"]
    expected = authors_count(width, depth, num_classes)
    assert round(expected / 1e6, 1) == millions
    # Theirs has a table of 256 log-variances that nothing reads; this model leaves it out.
    assert state.count(params) == expected - 256


def test_sizes_are_those_of_the_dit_paper():
    table = {name: tuple(size.values()) for name, size in dit.SIZES.items()}
    assert table == {
        "S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16),
    }  # fmt: skip


@pytest.mark.parametrize("patch", dit.PATCHES)
@pytest.mark.parametrize("size", dit.SIZES)
def test_every_size_answers_with_an_image(size, patch):
    network = DiT(**dit.SIZES[size], patch_size=patch, num_classes=1000, dtype=jnp.bfloat16)

    def run(x, t, labels):
        return network.init_with_output(jax.random.key(0), x, t, t, labels)

    x, t, labels = jnp.zeros((3, *LATENTS)), jnp.zeros(3), jnp.zeros(3, jnp.int32)
    output, variables = jax.eval_shape(run, x, t, labels)
    assert output.shape == x.shape and output.dtype == jnp.float32
    assert {a.dtype for a in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert variables["params"]["patch_embed"]["kernel"].shape[0] == patch * patch * 4


# ---- the authors' architecture in numpy, float64 -------------------------------------------------


def mae_position_embedding(width, grid):
    """get_2d_sincos_pos_embed of MAE, number by number: [grid * grid, width]."""
    out = np.zeros((grid * grid, width))
    for row in range(grid):
        for column in range(grid):
            for axis, position in enumerate((column, row)):  # "here w goes first"
                for i in range(width // 4):
                    angle = position / 10000 ** (i / (width / 4))
                    at = axis * width // 2 + i
                    out[row * grid + column, at] = np.sin(angle)
                    out[row * grid + column, at + width // 4] = np.cos(angle)
    return out


def silu(x):
    return x / (1 + np.exp(-x))


def gelu_tanh(x):
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def normalise(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


def linear(layer, x):
    return x @ layer["kernel"] + layer["bias"]


def embed_scalar(layers, a):
    angles = a[:, None] * np.exp(-np.log(10000) * np.arange(128) / 128)
    sinusoids = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    return linear(layers["out"], silu(linear(layers["in"], sinusoids)))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def numpy_dit(params, x, t, step, labels, *, patch, heads, logit_scale):
    """The released model; `t` and `step` are what its two scalar embedders are given."""
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    n, size, _, channels = x.shape
    width, grid = params["label_embed"]["embedding"].shape[1], size // patch

    # A convolution whose stride is its size: [patch, patch, channels, width].
    kernel = params["patch_embed"]["kernel"].reshape(patch, patch, channels, width)
    tokens = np.zeros((n, grid * grid, width))
    for i, j in np.ndindex(grid, grid):
        window = x[:, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch]
        tokens[:, i * grid + j] = np.einsum("nijc,ijcw->nw", window, kernel)
    tokens += params["patch_embed"]["bias"] + mae_position_embedding(width, grid)

    c = embed_scalar(params["t_embed"], t) + embed_scalar(params["d_embed"], step)
    c = silu(c + params["label_embed"]["embedding"][labels])[:, None]

    depth = sum(name.startswith("block_") for name in params)
    for block in (params[f"block_{i}"] for i in range(depth)):
        modulation = linear(block["modulation"], c)
        shift1, scale1, gate1, shift2, scale2, gate2 = np.split(modulation, 6, axis=-1)
        y = normalise(tokens) * (1 + scale1) + shift1
        q, k, v = np.split(linear(block["qkv"], y), 3, axis=-1)
        attended = np.zeros_like(tokens)
        for head in range(heads):
            of_head = slice(head * width // heads, (head + 1) * width // heads)
            logits = q[..., of_head] @ k[..., of_head].swapaxes(1, 2) * logit_scale
            attended[..., of_head] = softmax(logits) @ v[..., of_head]
        tokens = tokens + gate1 * linear(block["attention_out"], attended)
        y = normalise(tokens) * (1 + scale2) + shift2
        tokens = tokens + gate2 * linear(block["mlp_out"], gelu_tanh(linear(block["mlp_in"], y)))

    shift, scale = np.split(linear(params["modulation"], c), 2, axis=-1)
    tokens = linear(params["output"], normalise(tokens) * (1 + scale) + shift)
    image = np.zeros(x.shape)
    for i, j in np.ndindex(grid, grid):
        window = tokens[:, i * grid + j].reshape(n, patch, patch, channels)
        image[:, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch] = window
    return image


def randomised(network, seed=0):
    """Parameters of a network none of which is zero."""
    rng = np.random.default_rng(seed)

    def leaf(a):
        scale = a.shape[0] ** -0.5 if a.ndim == 2 else 0.5
        return jnp.asarray(rng.normal(scale=scale, size=a.shape), jnp.float32)

    return jax.tree.map(leaf, jax.eval_shape(lambda: state.init_params(network, TINY_IMAGE, 0)))


def inputs():
    """x, t, d, labels; the sizes are 0, the smallest and some others."""
    x = np.random.default_rng(1).normal(size=(5, *TINY_IMAGE)).astype(np.float32)
    t = np.array([0, 1 / 128, 0.25, 0.5, 127 / 128], np.float32)
    d = np.array([0, 1 / 128, 1 / 64, 0.25, 1], np.float32)
    return x, t, d, np.array([0, 1, 2, 4, 5])  # 5 is the null label


@functools.partial(jax.jit, static_argnums=0)  # equal networks are compiled once
def forward(network, params, x, t, d, labels):
    return network.apply({"params": params}, x, t, d, labels)


@pytest.mark.parametrize("preset", ["authors", "default"])
def test_forward_pass_is_that_of_the_numpy_model(preset):
    network = DiT(**TINY, **(AUTHORS if preset == "authors" else {}))
    params = randomised(network)
    x, t, d, labels = inputs()
    output = forward(network, params, x, t, d, labels)
    if preset == "authors":
        # t as it is; log2(1/d), with 7 for d = 0 as well; logits over head_dim = 8.
        given = {"t": t, "step": np.array([7, 7, 6, 2, 0]), "logit_scale": 1 / 8}
    else:
        given = {"t": 1000 * t, "step": 1000 * d, "logit_scale": 1 / np.sqrt(8)}
    expected = numpy_dit(params, x, labels=labels, patch=2, heads=4, **given)
    assert expected.std() > 0.5
    np.testing.assert_allclose(output, expected, rtol=0, atol=2e-4)


def test_mlp_ratio_and_another_patch_size():
    network = DiT(**{**TINY, "patch_size": 4, "depth": 1}, mlp_ratio=2.0)
    params = randomised(network)
    assert params["block_0"]["mlp_in"]["kernel"].shape == (32, 64)
    x, t, d, labels = inputs()
    output = forward(network, params, x, t, d, labels)
    expected = numpy_dit(
        params, x, 1000 * t, 1000 * d, labels, patch=4, heads=4, logit_scale=8**-0.5
    )
    np.testing.assert_allclose(output, expected, rtol=0, atol=2e-4)


def test_the_residual_barrier_changes_no_value():
    plain, barred = DiT(**TINY), DiT(**TINY, residual_barrier=True)
    params = randomised(plain)
    outputs = [forward(network, params, *inputs()) for network in (plain, barred)]
    np.testing.assert_allclose(*outputs, rtol=0, atol=1e-5)


# ---- parts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "grid"), [(16, 3), (32, 4)])
def test_position_embedding_is_maes(width, grid):
    embedding = dit.sincos_position_embedding(width, grid)
    assert embedding.shape == (1, grid * grid, width) and embedding.dtype == np.float32
    np.testing.assert_allclose(embedding[0], mae_position_embedding(width, grid), atol=1e-6)


@pytest.mark.parametrize(("patch", "grid", "channels"), [(2, 3, 4), (4, 2, 1), (1, 4, 3)])
def test_unpatchify_inverts_patchify(patch, grid, channels):
    size = patch * grid
    x = jnp.arange(2.0 * size * size * channels).reshape(2, size, size, channels)
    tokens = dit.patchify(x, patch)
    assert tokens.shape == (2, grid * grid, patch * patch * channels)
    np.testing.assert_array_equal(dit.unpatchify(tokens, patch, grid), x)
    # Token 1 is the patch to the right of token 0; in it rows, columns, channels in that order.
    right = x[0, :patch, patch : 2 * patch]
    np.testing.assert_array_equal(tokens[0, 1], right.ravel())


def step_token(d, **changes):
    return np.asarray(DiT(**TINY, **changes)._step_input(jnp.asarray(d, jnp.float32)))


def test_log2_token_counts_halvings_and_7_stands_for_0_too():
    sizes = [0, 1 / 128, 1 / 64, 1 / 2, 1]
    np.testing.assert_allclose(step_token(sizes, step_embedding="log2"), [7, 7, 6, 1, 0], atol=1e-6)
    # With M = 8 the smallest size is 1/8.
    token = step_token([0, 1 / 8, 1 / 4, 1], step_embedding="log2", max_level=3)
    np.testing.assert_allclose(token, [3, 3, 2, 0], atol=1e-6)


def test_by_default_d_is_embedded_like_t_and_0_is_not_the_smallest_size():
    np.testing.assert_array_equal(step_token([0, 1 / 128, 1]), [0, 1000 / 128, 1000])


@pytest.mark.parametrize("ignore_step", [False, True])
@pytest.mark.parametrize("step_embedding", ["d", "log2"])
def test_ignore_step_makes_d_irrelevant(ignore_step, step_embedding):
    network = DiT(**TINY, ignore_step=ignore_step, step_embedding=step_embedding)
    params = randomised(network)
    x, t, _, labels = inputs()
    one, other = (
        forward(network, params, x, t, np.full(5, d, np.float32), labels) for d in (0.0, 0.5)
    )
    assert (np.abs(one - other).max() == 0) == ignore_step


def test_methods_without_step_sizes_get_a_network_that_ignores_them():
    for name in objectives.OBJECTIVES:
        conf = config.build(f"objective={name},model=S/2", lambda conf: None, {})
        objective = config.build_objective(conf, num_classes=3)
        network = state.build_network(conf, objective, LATENTS)
        assert network.ignore_step == (name not in ("shortcut", "live_reflow", "mean_flow"))
        assert network.num_classes == 3
        assert network.max_level == (7 if name in ("shortcut", "live_reflow") else 0)


@pytest.mark.parametrize("attention", ["xla", "pallas"])
def test_what_the_backward_pass_computes_again(attention, monkeypatch):
    """FLOPs of a gradient before compilation: with "dots" layers do not count again.

    Attention does, where its backward pass needs what its forward pass had in between.
    """
    kernel = functools.partial(attention_lib.pallas, interpret=True)
    monkeypatch.setitem(attention_lib.KERNELS, "pallas", attention_lib.Kernel(kernel))
    sizes = {**TINY, "hidden_size": 128}  # wide enough that products are what counts

    def count(remat):
        network = DiT(**sizes, remat=remat, attention=attention)
        shapes = jax.eval_shape(lambda: state.init_params(network, TINY_IMAGE, 0))
        loss = jax.jit(jax.grad(lambda params: forward(network, params, *inputs()).sum()))
        return loss.lower(shapes).cost_analysis()["flops"]

    none, dots, full = map(count, ("none", "dots", "full"))
    assert none < dots < (1.1 if attention == "xla" else 1.01) * none < 1.2 * none < full


@pytest.mark.parametrize(("remat", "kernels"), [("none", 2), ("dots", 2), ("full", 3)])
def test_the_kernel_of_attention_runs_again_only_if_all_is_computed_again(
    remat, kernels, monkeypatch
):
    kernel = functools.partial(attention_lib.pallas, interpret=True)
    monkeypatch.setitem(attention_lib.KERNELS, "pallas", attention_lib.Kernel(kernel))
    network = DiT(**{**TINY, "depth": 1}, remat=remat, attention="pallas")
    shapes = jax.eval_shape(lambda: state.init_params(network, TINY_IMAGE, 0))
    gradient = jax.grad(lambda params: forward(network, params, *inputs()).sum())
    assert str(jax.make_jaxpr(gradient)(shapes)).count("pallas_call[") == kernels


# ---- initialisation ------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["zero", "xavier"])
def fresh(request):
    network = DiT(**{**TINY, "depth": 1}, modulation_init=request.param)
    return network, jax.jit(lambda: state.init_params(network, TINY_IMAGE, seed=0))()


def test_a_fresh_network_answers_zero(fresh):
    network, params = fresh
    assert np.abs(forward(network, params, *inputs())).max() == 0


def assert_uniform(kernel, fan_in, fan_out):
    bound = (6 / (fan_in + fan_out)) ** 0.5
    largest = np.abs(kernel).max()
    assert 0.97 * bound < largest <= bound, (largest, bound)


def test_block_modulation_starts_at_zero_or_as_the_released_codes(fresh):
    network, params = fresh
    kernel = params["block_0"]["modulation"]["kernel"]
    if network.modulation_init == "zero":
        assert (kernel == 0).all()
    else:
        assert_uniform(kernel, 32, 6 * 32)
    assert (params["modulation"]["kernel"] == 0).all()
    assert (params["output"]["kernel"] == 0).all()


def test_other_layers_start_as_in_dit(fresh):
    _, params = fresh
    block = params["block_0"]
    # q, k and v are Xavier-uniform each, not as one matrix of 3h outputs.
    thirds = np.split(np.asarray(block["qkv"]["kernel"]), 3, axis=1)
    for third in thirds:
        assert_uniform(third, 32, 32)
    assert (thirds[0] != thirds[1]).all() and (thirds[1] != thirds[2]).all()
    assert_uniform(block["attention_out"]["kernel"], 32, 32)
    assert_uniform(block["mlp_in"]["kernel"], 32, 128)
    assert_uniform(block["mlp_out"]["kernel"], 128, 32)
    assert_uniform(params["patch_embed"]["kernel"], 2 * 2 * 3, 32)
    for name in ("t_embed", "d_embed"):
        for layer in ("in", "out"):
            assert abs(np.std(params[name][layer]["kernel"]) - 0.02) < 0.002
    assert abs(np.std(params["label_embed"]["embedding"]) - 0.02) < 0.005
    biases = [a for path, a in jax.tree.leaves_with_path(params) if "bias" in str(path[-1])]
    assert len(biases) == 1 + 4 + 5 + 2 and all((a == 0).all() for a in biases)


# ---- precision -----------------------------------------------------------------------------------


def test_bfloat16_products_stay_close_to_float32():
    full, half = DiT(**TINY), DiT(**TINY, dtype=jnp.bfloat16)
    params = randomised(full)
    exact, rounded = (forward(network, params, *inputs()) for network in (full, half))
    assert rounded.dtype == jnp.float32
    error = np.sqrt(np.mean((rounded - exact) ** 2) / np.mean(exact**2))
    assert 1e-4 < error < 0.03  # not float32 in disguise, and no more than its 8 bits cost


@pytest.mark.parametrize("scanned", [False, True])
def test_blocks_cast_beforehand_compute_the_same_bits(scanned):
    network = DiT(**TINY, dtype=jnp.bfloat16, scan_layers=scanned)
    params = randomised(DiT(**TINY))
    params = layers.stack(params) if scanned else params

    def loss(apply, params):
        return jnp.square(apply(params, *inputs())).mean()

    def plainly(params, *args):
        return network.apply({"params": params}, *args)

    found, expected = (
        jax.jit(jax.value_and_grad(functools.partial(loss, apply)))(params)
        for apply in (state.apply_fn(network), plainly)
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert {a.dtype for a in jax.tree.leaves(found)} == {jnp.dtype("float32")}
