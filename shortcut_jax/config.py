"""The configuration: every key with its default, and the variants by argument.

A config is a contract: locked, every key read by something, checked as a whole before any device
work (`shortcut_jax.validation`). `configs/*.py` start from `default()` and change what their data
set needs.
"""

from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

from shortcut_jax import objectives
from shortcut_jax.errors import UserError
from shortcut_jax.models import dit

# What the released code does wherever it differs from the paper (docs/differences.md).
# The objectives add their own (`authors_code` in each).
AUTHORS_CODE = {
    "model.attention_scale": "linear",
    "model.time_scale": 1.0,
    "model.step_embedding": "log2",
    "model.modulation_init": "xavier",
    "data.crop": "authors",  # of photographs; other data sets have no such key
    "eval.params": "online",
}


def default() -> ConfigDict:
    """Every key. The values are the paper's where it has one."""
    return ConfigDict(
        {
            "seed": 0,  # of fresh parameters, of the order of the data and of all that is drawn
            "total_steps": 400_000,  # updates
            "batch_size": 256,  # over all devices
            "accumulation_steps": 1,  # parts of the batch that go through the network in turn
            "steps_per_dispatch": 1,  # updates that the host leaves the devices alone with
            "ema_rate": 0.999,  # per step; EMA parameters make bootstrap targets and samples
            "averages": {  # further averages of the parameters, to be evaluated: docs/ema.md
                "rates": (),  # EMAs of these rates per step; their names are ema_RATE
                "power": (),  # power-function EMAs of these relative widths: power_WIDTH
                "snapshot_every": 10_000,  # of those of `power`, kept to reconstruct others
            },
            "teacher": "",  # workdir or checkpoint of a flow-matching model, for what distils one
            "init_from": "",  # workdir or checkpoint to start from; "" = the teacher, or fresh
            "data": {
                "name": "digits",
                "split": "train",
                "data_dir": "",  # "" = $TFDS_DATA_DIR or ~/tensorflow_datasets
                "flip": False,  # mirror half of the images
            },
            "objective": {"name": "shortcut", **objectives.options("shortcut")},
            "model": {
                "patch_size": 2,
                **dit.SIZES["B"],
                "mlp_ratio": 4.0,
                "attention_scale": "sqrt",  # sqrt | linear: 1 / head_dim**0.5 | 1 / head_dim
                "time_scale": 1000.0,
                "step_embedding": "d",  # d | log2
                "modulation_init": "zero",  # zero | xavier
                "dtype": "auto",  # of matrix products: float32 on a CPU, bfloat16 elsewhere
                "remat": "none",  # none | full | dots: what the backward pass computes again
                # auto | xla | cudnn (GPU) | pallas (TPU); docs/attention.md
                "attention": "auto",
                "scan_layers": False,  # one compiled block, looped over: compiles faster
            },
            "optimizer": {
                "lr": 1e-4,
                "schedule": "constant",  # constant | cosine (to 0 at total_steps)
                "warmup_steps": 0,
                "b1": 0.9,
                "b2": 0.999,
                "eps": 1e-8,
                "weight_decay": 0.1,  # of every parameter
                "on_nonfinite": "stop",  # stop | skip: what a non-finite loss or gradient does
            },
            "mesh": {"data": -1, "fsdp": 1},  # devices per axis; one -1 takes the rest
            "checkpoint": {
                "every": 10_000,  # steps
                "keep": 3,  # the newest
                "copy": "device",  # device | host: steps wait for that; docs/host.md
            },
            "log": {"every": 100, "tensorboard": True},  # averages of so many steps
            "eval": {
                "every": 20_000,  # in-loop, 0 = never; the evaluation binary ignores it
                "num_samples": 50_000,
                "batch_size": 256,  # over all devices; also of the pairs that are made for reflow
                "steps": (1, 2, 4, 8, 16, 32, 64, 128),  # numbers of sampling steps
                "steps_in_loop": (1, 4, 128),
                "metrics": ("fd_digits",),
                "params": "ema",  # ema | online | a name of docs/ema.md
                "seed": 0,  # of the samples: sample i is a function of it and i
                "grid_rows": 10,  # samples in the picture
            },
        }
    )


# Keys that only the config files of some data sets add.
OPTIONAL: dict[str, Any] = {
    "data.idx_dir": "",  # fashion_mnist: folder of the published files
    # For images, docs/data.md.
    "data.builder": "",  # TFDS builder[/config][:version] prepared in data_dir, or a name of yours
    "data.image_size": 256,  # side of the square crop, pixels
    "data.crop": "adm",  # adm | authors
    "data.num_classes": 1000,  # 1 = unlabelled: every label is 0
    "data.workers": 0,  # processes that decode; 0 = threads of this process
    "data.latents": "",  # folder made by shortcut_jax.cache_latents; "" encodes every batch
    # With this section the network works on latents, docs/autoencoder.md.
    "autoencoder.kind": "sd",  # sd | tiny (for tests)
    "autoencoder.weights": "",  # path of diffusion_pytorch_model.safetensors, or "random"
    "autoencoder.scale": 0.18215,  # latents times this have variance about 1
    # For metrics of published networks, docs/metrics.md.
    "eval.protocols": ("adm",),  # adm | pytorch_fid | clean | authors | edm2 | dgm_eval
    "eval.reference": "",  # file made by `eval ref`; "" = the images of data.split
    "eval.allow_small_n": False,  # measure fewer images than a metric needs
    "eval.inception_weights": "",  # file of the FID's network; "random" for a trial without it
    "eval.inception_sha256": "",  # of that file; "" = the published one, else it is no FID
    "eval.dinov2_weights": "",  # as inception_weights, of the network of fd_dinov2
    "eval.dinov2_sha256": "",
}

# Keys of the model that say how it is computed, not what.
LAYOUT = ("model.remat", "model.scan_layers", "model.attention")

# Keys that name files of one machine. Those of weights may hold "random" instead.
PATHS = (
    "teacher", "init_from", "data.data_dir", "data.idx_dir", "data.latents", "autoencoder.weights",
    "eval.reference", "eval.inception_weights", "eval.dinov2_weights",
)  # fmt: skip

# Keys that say what a network was shown: whose images, cut how, and labelled how.
SHOWN = ("data.name", "data.builder", "data.image_size", "data.crop", "data.num_classes")

# Keys that a resumed run may change: none of them decides what is trained.
MAY_CHANGE_ON_RESUME = (
    "data.data_dir",
    "data.idx_dir",
    "data.workers",
    "data.latents",
    "autoencoder.weights",  # the same file may lie elsewhere; a checkpoint knows its sha256
    "mesh",
    "accumulation_steps",
    "steps_per_dispatch",
    *LAYOUT,
    "checkpoint",
    "log",
    "eval",
    "objective.sampler",
    "optimizer.on_nonfinite",
    "averages.snapshot_every",
    # Copied into the first checkpoint; pairs know the digest of their teacher.
    "teacher",
    "init_from",
)


# ---------------------------------------------------------------------- variants by argument


def build(
    arg: str | None,
    base: Callable[[ConfigDict], None],
    variants: Mapping[str, Callable[[ConfigDict], None]],
    by_objective: Mapping[str, Mapping[str, Any]] | None = None,
) -> ConfigDict:
    """A config file's `get_config(arg)`: defaults, then the file, then what the argument says.

    Args:
      arg: what follows the colon in --config=configs/digits.py:ARG, a comma-separated list of
        "objective=NAME", "model=SIZE/PATCH" (e.g. B/2), "authors_code", and names in `variants`.
      base: sets the file's own values.
      variants: named changes the file offers, e.g. {"small": ...}.
      by_objective: values of keys that only one objective has, e.g. {"reflow": {"num_pairs": 9}}.

    Returns:
      A locked config.

    Raises:
      UserError: an argument that is not known, naming the known ones.
    """
    config = default()
    base(config)
    words = [word.strip() for word in (arg or "").split(",") if word.strip()]
    # The objective first: its section must exist before a variant or preset sets keys in it.
    for word in sorted(words, key=lambda word: not word.startswith("objective=")):
        key, _, value = word.partition("=")
        if key == "objective" and value:
            _set_objective(config, value)
            config.objective.update((by_objective or {}).get(value, {}))
        elif key == "model" and value:
            set_model_size(config, value)
        elif word in ("authors_code", "authors_code=True"):
            _set_authors_code(config)
        elif word in variants:
            variants[word](config)
        else:
            known = ["objective=NAME", "model=SIZE/PATCH", "authors_code", *variants]
            raise UserError(
                f"--config argument {word!r} is not known; expected one of {', '.join(known)}."
            )
    config.lock()
    return config


def _set_objective(config: ConfigDict, name: str) -> None:
    options, before = objectives.options(name), objectives.options(config.objective.name)
    # What the config file has set goes for every objective that has such a key.
    shared = {k: v for k, v in config.objective.items() if k in options and v != before.get(k)}
    if not objectives.OBJECTIVES[name].uses_guidance and shared.get("cfg_scale") != 0:
        shared.pop("cfg_scale", None)
    config.objective = ConfigDict({"name": name, **options, **shared})
    config.model.update(objectives.OBJECTIVES[name].model_settings)


def set_model_size(config: ConfigDict, text: str) -> None:
    """Sets the network to SIZE/PATCH, such as B/2 (UserError if there is none)."""
    size, _, patch = text.partition("/")
    if size not in dit.SIZES or patch not in map(str, dit.PATCHES):
        raise UserError(
            f"--config argument model={text} is not SIZE/PATCH with SIZE one of "
            f"{', '.join(dit.SIZES)} and PATCH one of {', '.join(map(str, dit.PATCHES))}."
        )
    config.model.update(dit.SIZES[size], patch_size=int(patch))


def latent_images(config: ConfigDict, builder: str, num_classes: int) -> None:
    """Gives a config file its keys for 256x256 images in the latents of an autoencoder.

    There is no evaluation in the loop: 50,000 samples are the work of the evaluation binary.
    """

    def optional(section: str) -> dict[str, Any]:
        prefix = f"{section}."
        return {k.removeprefix(prefix): v for k, v in OPTIONAL.items() if k.startswith(prefix)}

    config.autoencoder = ConfigDict(optional("autoencoder"))
    config.data.update(optional("data"))
    config.eval.update(optional("eval"), every=0, metrics=("fid",))
    del config.data.idx_dir  # of fashion_mnist
    config.data.update(name="images", builder=builder, num_classes=num_classes, flip=True)
    # Compiled in half of the time or less, and trained in less memory (docs/step.md).
    config.model.update(scan_layers=True, remat="dots")


def small_latents(config: ConfigDict) -> None:
    """A variant of such a config for tests: seconds, a tiny random autoencoder, 4x4 latents."""
    config.total_steps, config.batch_size = 8, 32
    config.data.update(builder="photographs", image_size=32)
    config.autoencoder.update(kind="tiny", weights="random")
    config.model.update(hidden_size=32, depth=1, num_heads=2)
    config.checkpoint.every, config.log.every = 4, 2
    # Pictures and no FID, whose network alone takes longer than all the rest.
    config.eval.update(every=4, metrics=(), num_samples=20, batch_size=16, steps=(1, 4))
    config.eval.update(steps_in_loop=(1,), grid_rows=4)
    if config.objective.name == "reflow":
        config.objective.update(num_pairs=10, pair_steps=4)


def _set_authors_code(config: ConfigDict) -> None:
    for path, value in AUTHORS_CODE.items():
        section, key = path.split(".")
        if key in config[section]:
            config[section][key] = value
    objective = objectives.OBJECTIVES[config.objective.name]
    config.objective.update(objective.authors_code)
    config.model.update(objective.model_settings)


# ---------------------------------------------------------------------- resolved configs


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; tuples become lists, as in JSON."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping | ConfigDict | FrozenConfigDict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


def with_defaults(flat: Mapping[str, Any]) -> dict[str, Any]:
    """A flat config that an older version may have written, with keys that were added since.

    They have their defaults, unless they say what was trained: those of model, but for its layout,
    and of objective, and data.name.
    """
    added = {
        key: value
        for key, value in flatten(default()).items()
        if key in LAYOUT or not key.startswith(("model.", "objective.", "data.name"))
    }
    return {**added, **flat}


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Lines "key: old -> new" for every flat key that a resumed run may not change."""
    old = {k: v for k, v in with_defaults(old).items() if k in old or k in new}

    staged = any(_is_staged(flat) for flat in (old, new))

    def fixed(key):
        if key == "total_steps":  # more steps continue the same run if none depends on the last
            return staged or new.get("optimizer.schedule") != "constant"
        return not any(key == k or key.startswith(k + ".") for k in MAY_CHANGE_ON_RESUME)

    absent = "(absent)"
    return [
        f"{key}: {old.get(key, absent)} -> {new.get(key, absent)}"
        for key in sorted(old.keys() | new.keys())
        if fixed(key) and old.get(key, absent) != new.get(key, absent)
    ]


def _is_staged(flat: Mapping[str, Any]) -> bool:
    prefix = "objective."
    section = {k.removeprefix(prefix): v for k, v in flat.items() if k.startswith(prefix)}
    name = section.pop("name", None)
    return name is not None and objectives.build(name, 0, **section).num_stages > 1


def build_objective(config: ConfigDict, num_classes: int) -> objectives.Objective:
    """The objective of a config that `validation.check_values` accepts."""
    section = config.objective.to_dict()
    return objectives.build(section.pop("name"), num_classes, **section)
