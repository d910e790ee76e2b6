"""Network, optimizer and train state, made from the config."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from clu import metrics
from ml_collections import ConfigDict

from shortcut_jax import layers, rng
from shortcut_jax.models import attention
from shortcut_jax.models.dit import DiT
from shortcut_jax.objectives import Objective


@flax.struct.dataclass
class TrainState:
    """All that a step changes."""

    step: jax.Array  # int32, number of updates done
    params: Any
    ema: Any  # like params
    opt_state: Any
    teacher: Any  # like params, or {} where no target asks one
    metrics: dict[str, metrics.Average]  # averages since the last log
    # name -> tree like params, of the averages that `shortcut_jax.averages` tracks
    averages: dict[str, Any] = flax.struct.field(default_factory=dict)


# The parameters that every run has: name in eval.params -> field of TrainState. What else there is
# has its name in the field `averages`.
PARAMS_FIELD = {"ema": "ema", "online": "params"}


def build_network(
    config: ConfigDict,
    objective: Objective,
    image_shape: tuple[int, int, int],
    device: jax.Device | None = None,
) -> DiT:
    """The DiT of `config.model`.

    Args:
      config: of the run.
      objective: decides the labels and whether the network sees step sizes.
      image_shape: (H, W, C) of what it sees.
      device: one of those it shall run on, the first by default. On a CPU the dtype "auto" is
        float32, elsewhere bfloat16. A kernel of attention that does not run there is "xla", so
        that a trained network can be used anywhere (`run.prepare` refuses to train so).
    """
    device = device or jax.devices()[0]
    model = {key: value for key, value in config.model.items() if key != "dtype"}
    use = attention_use(config, objective, image_shape, device)
    model["attention"] = attention.choose(model["attention"], use)
    return DiT(
        **model,
        num_classes=objective.null_label,
        ignore_step=not objective.uses_step_size,
        max_level=objective.num_levels,
        residual_barrier=device.platform == "cpu",
        dtype=use.dtype,
    )


def attention_use(
    config: ConfigDict,
    objective: Objective,
    image_shape: tuple[int, int, int],
    device: jax.Device,
) -> attention.Use:
    """What the network of `build_network` attends to, and where."""
    model = config.model
    return attention.Use(
        device=device,
        dtype=product_dtype(config, device.platform),
        tokens=(image_shape[0] // model.patch_size) ** 2,
        heads=model.num_heads,
        head_dim=model.hidden_size // model.num_heads,
        forward_mode=objective.differentiates_forward,
    )


def product_dtype(config: ConfigDict, platform: str) -> jnp.dtype:
    """The type of matrix products of `model.dtype` on a platform."""
    auto = "float32" if platform == "cpu" else "bfloat16"
    return jnp.dtype(auto if config.model.dtype == "auto" else config.model.dtype)


def compiler_options(platform: str | None = None) -> dict[str, Any]:
    """Options to compile a program that differentiates the network with, for a platform.

    On a CPU XLA drops optimisation barriers before it fuses, and with them what
    `DiT.residual_barrier` is for; its option keeps them. On a GPU, without its option, sums that
    scatter, as the gradient of the table of labels is, add in another order every time.
    """
    options: dict[str, dict[str, Any]] = {
        "cpu": {"xla_disable_hlo_passes": "cse_barrier_expander"},
        "gpu": {"xla_gpu_exclude_nondeterministic_ops": True},
    }
    return options.get(platform or jax.default_backend(), {})


def apply_fn(network: DiT) -> Callable[..., Any]:
    """apply(params, x, t, d, labels) -> prediction: the network as a pure function.

    All that a block computes with its parameters it computes in `network.dtype`, and casts them.
    Doing so here, for all blocks at once, changes no bit, but what devices send each other of split
    parameters, and the gradients that a loop over the blocks collects, take half the bytes.
    """

    def apply(params: Any, *args: jax.Array) -> Any:
        cast = {
            name: jax.tree.map(lambda a: a.astype(network.dtype), part)
            for name, part in params.items()
            if layers.of_blocks(name)
        }
        return network.apply({"params": {**params, **cast}}, *args)

    return apply


def init_params(network: DiT, image_shape: tuple[int, int, int], seed: int) -> Any:
    """Fresh parameters, float32, from the stream "init": the same whether layers are scanned."""
    one = jnp.zeros(1)
    key = rng.stream(seed, "init", 0)
    unrolled = network.clone(scan_layers=False, rows=None)
    params = unrolled.init(key, jnp.zeros((1, *image_shape)), one, one, one.astype(jnp.int32))
    return layers.stack(params["params"]) if network.scan_layers else params["params"]


def build_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """AdamW with decoupled weight decay on every parameter (paper, table of hyperparameters)."""
    return optax.adamw(
        learning_rate(config),
        b1=config.optimizer.b1,
        b2=config.optimizer.b2,
        eps=config.optimizer.eps,
        weight_decay=config.optimizer.weight_decay,
    )


def learning_rate(config: ConfigDict) -> optax.Schedule:
    """Linear warm-up from 0, then constant or a cosine to zero at total_steps."""
    lr, warmup = config.optimizer.lr, config.optimizer.warmup_steps
    if config.optimizer.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, lr, warmup, config.total_steps)
    if warmup:
        return optax.linear_schedule(0.0, lr, warmup)
    return optax.constant_schedule(lr)


def fields(tree: TrainState) -> dict[str, Any]:
    """Field -> value, as a checkpoint has them; of a train state, or of the shapes of one."""
    return {field.name: getattr(tree, field.name) for field in dataclasses.fields(tree)}


def count(params: Any) -> int:
    """Number of parameters."""
    return sum(a.size for a in jax.tree.leaves(params))
