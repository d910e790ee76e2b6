"""Validation: the config as a whole, before any device work.

Every check here raises UserError, one sentence, for the first thing that is wrong.
"""

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any, get_args, get_type_hints

from ml_collections import ConfigDict

from shortcut_jax import averages, data, metrics, objectives, spaces
from shortcut_jax.config import OPTIONAL, build_objective, default, flatten
from shortcut_jax.data.crops import CROPS
from shortcut_jax.errors import UserError
from shortcut_jax.models import attention
from shortcut_jax.models.autoencoder import ARCHITECTURES
from shortcut_jax.models.dit import REMAT


def check(condition: bool, message: str) -> None:
    """Raises UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


def check_values(config: ConfigDict) -> None:
    """Checks every key by itself: that it exists, its type, and its range or choices.

    Raises:
      UserError: the first key that is wrong.
    """
    flat = flatten(config)
    _check_types(flat, _check_keys(flat))
    _check_ranges(flat)
    _check_choices(flat)


def validate(config: ConfigDict, image_shape: tuple[int, int, int]) -> None:
    """Checks what values that are right by themselves (`check_values`) make of each other.

    What depends on the devices is left to `check_devices`.

    Args:
      config: the config.
      image_shape: (H, W, C) of the data set.

    Raises:
      UserError: the first thing that is wrong.
    """
    _check_latents(flatten(config))
    _check_model(config.model, spaces.shape(config, image_shape))
    _check_guidance(config.objective)
    _check_metrics(config.eval, image_shape)
    averages.check(config)
    averages.check_name(config.eval.params, "eval.params")
    warmup, total = config.optimizer.warmup_steps, config.total_steps
    check(
        warmup < total,
        f"optimizer.warmup_steps={warmup} does not end before total_steps={total}; expected fewer "
        "steps of warm-up: lower it or raise total_steps.",
    )
    objective = build_objective(config, num_classes=0)
    objective.validate(config.batch_size, num_shards=1)
    check(
        config.model.step_embedding != "log2"
        or objective.num_levels > 0
        or not objective.uses_step_size,
        "model.step_embedding=log2 tells the step sizes 1, 1/2 ... 1/M apart, but "
        f"objective={config.objective.name} has steps of any size; expected d: set "
        "--config.model.step_embedding=d.",
    )
    check(
        total >= objective.num_stages,
        f"total_steps={total} is less than the {objective.num_stages} stages of objective="
        f"{config.objective.name}, of which none may be left out; expected at least that many: "
        "raise total_steps or lower objective.denoise_timesteps.",
    )
    for name in ("steps", "steps_in_loop"):
        for steps in config.eval[name]:
            objective.check_steps(steps, f"eval.{name}")


def check_devices(config: ConfigDict, num_devices: int, num_slices: int = 1) -> tuple[int, int]:
    """Checks that the mesh fits the devices and the batches fit the mesh.

    Args:
      config: the config.
      num_devices: devices over all processes.
      num_slices: slices of TPUs that these are of; 1 for all else.

    Returns:
      Sizes of the mesh axes (data, fsdp).

    Raises:
      UserError: the first thing that is wrong.
    """
    axes = mesh_shape(config.mesh, num_devices)
    shards = math.prod(axes)
    build_objective(config, num_classes=0).validate(config.batch_size, shards)
    check(
        axes[0] % num_slices == 0,
        f"mesh.data={axes[0]} is not a multiple of the {num_slices} slices, each of which "
        "has whole copies of the state; expected mesh.fsdp to stay within a slice: lower it to at "
        f"most {num_devices // num_slices}, with mesh.data=-1.",
    )
    parts = shards * config.accumulation_steps
    check(
        config.batch_size % parts == 0,
        f"accumulation_steps={config.accumulation_steps} cannot cut batch_size={config.batch_size} "
        f"on {shards} device(s) into equal parts; expected batch_size to be a multiple of {parts}: "
        "change one of them.",
    )
    check(
        config.eval.batch_size % shards == 0,
        f"eval.batch_size={config.eval.batch_size} cannot be split over {shards} devices; "
        f"use a multiple of {shards}.",
    )
    return axes


def mesh_shape(mesh: ConfigDict, num_devices: int) -> tuple[int, int]:
    """(data, fsdp) with -1 replaced by the devices that are left.

    Raises:
      UserError: the product is not the number of devices.
    """
    sizes = {axis: mesh[axis] for axis in ("data", "fsdp")}
    check(
        all(size == -1 or size > 0 for size in sizes.values())
        and list(sizes.values()).count(-1) <= 1,
        f"mesh={sizes} must hold positive sizes and at most one -1 (= the rest).",
    )
    known = math.prod(size for size in sizes.values() if size > 0)
    filled = {axis: num_devices // known if size == -1 else size for axis, size in sizes.items()}
    check(
        math.prod(filled.values()) == num_devices,
        f"mesh={sizes} does not fit {num_devices} device(s): its product must be {num_devices}; "
        "use -1 for one axis to take the rest.",
    )
    return filled["data"], filled["fsdp"]


_POSITIVE = (
    "total_steps", "batch_size", "accumulation_steps", "steps_per_dispatch", "model.patch_size",
    "model.hidden_size", "model.depth", "model.num_heads", "model.mlp_ratio", "model.time_scale",
    "optimizer.lr", "optimizer.eps", "checkpoint.every", "checkpoint.keep", "log.every",
    "eval.batch_size", "eval.grid_rows", "objective.num_pairs", "objective.pair_steps",
    "objective.reflow_steps", "objective.time_std", "data.image_size", "data.num_classes",
    "autoencoder.scale",
)  # fmt: skip
_NOT_NEGATIVE = (
    "seed", "optimizer.warmup_steps", "optimizer.weight_decay", "eval.every", "eval.seed",
    "objective.cfg_scale", "objective.flow_time_grid", "objective.bootstrap_clip",
    "objective.weight_power", "data.workers", "averages.snapshot_every",
)  # fmt: skip
_IN_0_1 = ("ema_rate", "optimizer.b1", "optimizer.b2", "objective.noise_floor")  # 1 excluded
_PROBABILITIES = ("objective.class_dropout",)
_SEEDS = ("seed", "eval.seed")
_CHOICES = {
    "autoencoder.kind": tuple(ARCHITECTURES),
    "checkpoint.copy": ("device", "host"),
    "data.crop": tuple(CROPS),
    "model.attention_scale": ("sqrt", "linear"),
    "model.attention": (attention.AUTO, *attention.KERNELS),
    "model.step_embedding": ("d", "log2"),
    "model.modulation_init": ("zero", "xavier"),
    "model.dtype": ("auto", "float32", "bfloat16"),
    "model.remat": tuple(REMAT),
    "optimizer.schedule": ("constant", "cosine"),
    "optimizer.on_nonfinite": ("stop", "skip"),
}


_KINDS = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}
_EXAMPLES = {"averages.rates": [0.9999], "averages.power": [0.05, 0.1]}  # empty by default
_TUPLES = {int: "a tuple of whole numbers", float: "a tuple of numbers", str: "a tuple of names"}


def unknown_key(key: str, known: Iterable[str]) -> str:
    """The sentence for a key that there is not, with the one that may be meant."""
    known, (section, _, name) = sorted(known), key.rpartition(".")
    inside = [k for k in known if k.startswith(f"{key}.")]
    if inside:
        return f"{key} is a section, not a key; set its keys one by one, such as {inside[0]}."
    owners = [o for o in objectives.OBJECTIVES if name in objectives.options(o)]
    if section == "objective" and owners:
        return (
            f"{key} is not a key of this objective; it is one of {' and '.join(owners)}: choose "
            f"that by the config argument, --config=FILE.py:objective={owners[0]}."
        )
    near = [k for k in known if k.rpartition(".")[2] == name]
    near = near or difflib.get_close_matches(key, known, n=1)
    meant = f"did you mean {' or '.join(near)}?" if near else "--dry_run lists all keys."
    return f"{key} is not a key of the config; {meant}"


def wrong_type(key: str, found: str, valid: Any) -> str:
    """The sentence for a value of the wrong type; `valid` is one of the right type."""
    if isinstance(valid, list):
        valid = _EXAMPLES.get(key, valid)
        kind, valid = _TUPLES[type(valid[0])], tuple(valid)
    else:
        kind = _KINDS[type(valid)]
    return f"{key}={found} is not {kind}; give one, such as {valid!r}."


def _check_keys(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a valid value for every key there may be."""
    common = {k: v for k, v in flatten(default()).items() if not k.startswith("objective.")}
    missing = sorted({*common, "objective.name"} - flat.keys())
    check(
        not missing,
        f"the config has no key {', '.join(missing[:3])}; expected every key of "
        "shortcut_jax.config.default(): make the config with shortcut_jax.config.build().",
    )
    name = flat["objective.name"]
    options = {f"objective.{key}": value for key, value in objectives.options(name).items()}
    foreign = {k for k in flat if k.startswith("objective.")} ^ {"objective.name", *options}
    check(
        not foreign,
        f"objective.name={name} does not go with the keys of another objective "
        f"({', '.join(sorted(foreign))}); choose the objective by the config argument instead, "
        f"--config=FILE.py:objective={name}.",
    )
    known = {**common, **_EXAMPLES, **flatten(OPTIONAL), **options, "objective.name": name}
    for key in flat:
        if key not in known:
            raise UserError(unknown_key(key, known))
    return known


def _check_types(flat: Mapping[str, Any], valid: Mapping[str, Any]) -> None:
    # ml_collections lets None, a bool for an int, NaN and tuples of anything pass.
    for key, value in flat.items():
        good = type(value) is type(valid[key])
        if isinstance(value, list) and good:
            value = tuple(value)
            good = all(type(v) is type(valid[key][0]) for v in value)
            check(
                len(value) > 0 or key in ("eval.metrics", *_EXAMPLES),  # no metrics: pictures alone
                f"{key} is empty; give at least one, such as {valid[key][0]!r}.",
            )
            check(
                not good or len(set(value)) == len(value),
                f"{key}={value} holds one twice; expected each once: drop the second.",
            )
        if isinstance(value, float):
            good = good and abs(value) < 2.0**127  # what float32 can hold; false for NaN
        if not good:
            raise UserError(wrong_type(key, repr(value), valid[key]))


def _check_ranges(flat: Mapping[str, Any]) -> None:
    def each(keys, holds, expected):
        for key in keys:
            if key in flat:
                check(
                    holds(flat[key]),
                    f"{key}={flat[key]} is out of range: expected {expected}; change it.",
                )

    each(_POSITIVE, lambda v: v > 0, "a value above 0")
    each(_NOT_NEGATIVE, lambda v: v >= 0, "0 or more")
    each(_IN_0_1, lambda v: 0 <= v < 1, "0 <= value < 1")
    each(_PROBABILITIES, lambda v: 0 <= v <= 1, "a probability between 0 and 1")
    each(("eval.num_samples",), lambda v: v >= 2, "2 or more, which a covariance needs")
    each(_SEEDS, lambda v: v < 2**32, "a seed below 2**32")
    whole = [key for key, value in flat.items() if type(value) is int and key not in _SEEDS]
    each(whole, lambda v: v < 2**31, "a value below 2**31")  # steps and rows are counted in int32


def _check_choices(flat: Mapping[str, Any]) -> None:
    cls = objectives.OBJECTIVES[flat["objective.name"]]
    hints = get_type_hints(cls)
    literals = {
        f"objective.{field.name}": get_args(hints[field.name])
        for field in dataclasses.fields(cls)  # type: ignore[arg-type]
    }
    for key, choices in {**_CHOICES, "data.name": tuple(data.DATASETS), **literals}.items():
        if choices and key in flat:
            check(
                flat[key] in choices,
                f"{key}={flat[key]!r} is not known; expected one of {', '.join(choices)}: "
                "choose one of them.",
            )


def _check_latents(flat: Mapping[str, Any]) -> None:
    keys = {key for key in OPTIONAL if key.startswith("autoencoder.")}
    check(
        not keys & flat.keys() or keys <= flat.keys(),
        f"the config has no key {', '.join(sorted(keys - flat.keys()))}; expected every key of the "
        "section autoencoder or none: start from a config file that has it.",
    )
    check(
        not flat.get("data.latents") or bool(keys & flat.keys()),
        f"data.latents={flat.get('data.latents')} is set, but the config has no section "
        "autoencoder, so that its network works on images; expected it empty: leave it out, or "
        "start from a config file with that section.",
    )


def _check_model(model: ConfigDict, image_shape: tuple[int, int, int]) -> None:
    height, width, _ = image_shape
    p = model.patch_size
    check(
        height == width and height % p == 0,
        f"model.patch_size={p} does not divide images of {height}x{width}; use a divisor.",
    )
    check(
        model.hidden_size % model.num_heads == 0,
        f"model.hidden_size={model.hidden_size} is not a multiple of "
        f"model.num_heads={model.num_heads}; heads must divide it.",
    )
    check(
        model.hidden_size % 4 == 0,
        f"model.hidden_size={model.hidden_size} is not a multiple of 4, which the position "
        "embedding needs (sine and cosine of row and column).",
    )
    check(
        int(model.hidden_size * model.mlp_ratio) >= 1,
        f"model.mlp_ratio={model.mlp_ratio} of model.hidden_size={model.hidden_size} is less than "
        "one unit in the MLP; expected at least one: raise it (DiT has 4).",
    )


def check_teacher(config: ConfigDict) -> None:
    """Refuses to train without a teacher where one is needed, or with one where none is.

    Not part of `validate`, because evaluation needs none.

    Raises:
      UserError: it is missing, or too many.
    """
    name, asked = config.objective.name, objectives.OBJECTIVES[config.objective.name].teacher
    check(
        bool(config.teacher) or asked == "none",
        f"teacher is empty, but objective={name} learns from a trained flow-matching model; "
        "expected the workdir or checkpoint of one: set --config.teacher=runs/flow_matching.",
    )
    check(
        not config.teacher or asked != "none",
        f"teacher={config.teacher} is set, but objective={name} has no teacher; expected it "
        "empty: leave it out, or use init_from to start from the parameters of that run.",
    )


def _check_guidance(objective: ConfigDict) -> None:
    cls = objectives.OBJECTIVES[objective.name]
    check(
        cls.uses_guidance or objective.cfg_scale in (0, 1),
        f"objective.cfg_scale={objective.cfg_scale} asks for guidance, which objective="
        f"{objective.name} has none of; expected 1 (labels) or 0 (no labels): set one of them.",
    )
    if "class_dropout" not in objective:
        return
    scale, dropout = objective.cfg_scale, objective.class_dropout
    check(
        # What is guided in reflow is the teacher (`shortcut_jax.pretrained`).
        dropout > 0 or scale in (0, 1) or cls.teacher == "pairs",
        f"objective.cfg_scale={scale} guides with the model without labels, which "
        "objective.class_dropout=0.0 never trains; expected some dropout: set it to 0.1, or "
        "cfg_scale to 1 (no guidance).",
    )
    check(
        dropout > 0 or not objective.get("bootstrap_label_dropout", False),
        "objective.bootstrap_label_dropout=True drops labels as often as in other rows, which "
        "objective.class_dropout=0.0 makes never; expected some dropout: set class_dropout to 0.1, "
        "or leave out the other.",
    )
    check(
        dropout < 1 or scale == 0,
        "objective.class_dropout=1.0 drops every label, so that none is learned, but "
        f"objective.cfg_scale={scale} samples with labels; set cfg_scale to 0 (no labels) or lower "
        "the dropout.",
    )


def _check_metrics(section: ConfigDict, image_shape: tuple[int, int, int]) -> None:
    for name in section.metrics:
        try:
            metrics.check_metric(name, image_shape)
        except UserError as error:
            raise UserError(f"eval.metrics={section.metrics}: {error}") from error
        what = f"eval.num_samples={section.num_samples}"
        metrics.check_count(name, section.num_samples, what, section)
    metrics.check_protocols(section)
