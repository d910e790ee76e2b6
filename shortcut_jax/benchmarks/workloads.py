"""Runs to measure, as configs: latents of 256x256 images, of which nothing is read."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from shortcut_jax import config as config_lib

# Narrow enough for seconds on a CPU, wide enough that matrix products are what it does.
NARROW = {"hidden_size": 384, "depth": 4, "num_heads": 6}
TINY = {"hidden_size": 32, "depth": 1, "num_heads": 2}

GUIDANCE = 1.5
# name -> objective and what it changes. The first is what the others are compared with.
CONTENDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "flow_matching": ("flow_matching", {}),
    "shortcut_1_8": ("shortcut", {"bootstrap_fraction": 1 / 8, "cfg_scale": 1.0}),
    "shortcut_1_4": ("shortcut", {"bootstrap_fraction": 1 / 4, "cfg_scale": 1.0}),
    "shortcut_1_8_guided": ("shortcut", {"bootstrap_fraction": 1 / 8, "cfg_scale": GUIDANCE}),
    "shortcut_1_4_guided": ("shortcut", {"bootstrap_fraction": 1 / 4, "cfg_scale": GUIDANCE}),
}
MOST_MEMORY = "shortcut_1_4_guided"  # of them


@dataclasses.dataclass(frozen=True)
class Workload:
    """Steps of one network at one batch size, by several objectives.

    Attributes:
      name: in the names of measurements; a number in it is of rows per accelerator.
      network: see `build`.
      batch_size: over all devices; None = what fills their memory.
      contenders: keys of CONTENDERS.
    """

    name: str
    network: str | Mapping[str, Any]
    batch_size: int | None
    contenders: tuple[str, ...] = tuple(CONTENDERS)

    def configs(self, batch_size: int | None = None) -> dict[str, ConfigDict]:
        """name -> config of every contender, at its batch size or at another one."""
        size = batch_size or self.batch_size
        assert size is not None
        return contenders(self.network, size, self.contenders)


def standard(small: bool) -> list[Workload]:
    """What is measured where nobody asks for anything else: by the back end of this process."""
    few = ("flow_matching", MOST_MEMORY)
    groups = 8 * jax.device_count()  # of bootstrap_fraction = 1/8
    if small:
        return [Workload("tiny", TINY, max(16, groups), few)]
    if jax.default_backend() == "cpu":
        return [Workload("narrow", NARROW, max(32, groups))]
    devices = jax.device_count()
    fixed = [
        Workload("dit_b2/64", "B/2", 64 * devices, few),
        Workload("dit_b2/256", "B/2", 256 * devices),
        Workload("dit_xl2/32", "XL/2", 32 * devices, few),
    ]
    fill = [Workload("dit_b2/fill", "B/2", None, few), Workload("dit_xl2/fill", "XL/2", None, few)]
    return fixed + (fill if memory_limit() else [])


def memory_limit() -> int | None:
    """Bytes that programs may use on a device, or None where it does not say."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def one(small: bool) -> tuple[str, ConfigDict]:
    """Name and config of the step that stands for all of them, where one must do."""
    choice = standard(small)
    workload = next((w for w in choice if w.name == "dit_b2/256"), choice[0])
    contender = "flow_matching" if small else MOST_MEMORY  # the former compiles faster
    return workload.name, workload.configs()[contender]


def contenders(
    network: str | Mapping[str, Any],
    batch_size: int,
    names: Iterable[str] = tuple(CONTENDERS),
    overrides: Mapping[str, Any] | None = None,
) -> dict[str, ConfigDict]:
    """name -> config of the contenders of these names; see `build`."""
    return {
        name: build(
            network,
            batch_size,
            CONTENDERS[name][0],
            {f"objective.{k}": v for k, v in CONTENDERS[name][1].items()} | dict(overrides or {}),
        )
        for name in names
    }


def build(
    network: str | Mapping[str, Any],
    batch_size: int,
    objective: str = "shortcut",
    overrides: Mapping[str, Any] | None = None,
) -> ConfigDict:
    """Config of a run on latents, 32x32x4 of 1,000 classes; 4x4x4 for the network TINY.

    Args:
      network: "B/2" or another SIZE/PATCH, or keys of `config.model`.
      batch_size: over all devices, of training and of sampling.
      objective: its name.
      overrides: flat keys with other values.
    """

    def base(c: ConfigDict) -> None:
        config_lib.latent_images(c, builder="imagenet2012", num_classes=1000)
        c.autoencoder.weights = "random"
        c.objective.cfg_scale = GUIDANCE
        # XLA counts all FLOPs of unrolled blocks, of a loop over them one body.
        c.model.update(scan_layers=False, remat="none")
        if network is TINY:
            c.autoencoder.kind, c.data.image_size = "tiny", 32
        if isinstance(network, str):
            config_lib.set_model_size(c, network)
        else:
            c.model.update(network)
        c.batch_size = c.eval.batch_size = batch_size

    config = config_lib.build(f"objective={objective}", base, {})
    config.update_from_flattened_dict(dict(overrides or {}))
    return config
