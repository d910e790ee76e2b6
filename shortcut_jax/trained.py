"""A trained model as an object that draws samples; `shortcut_jax.sampling.load` makes one."""

import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from shortcut_jax import averages, checkpoint, parameters, run, sampling, spaces, state
from shortcut_jax.errors import UserError
from shortcut_jax.objectives.base import rows
from shortcut_jax.parallel import sharding

DEFAULT_NUM = 8  # samples, where neither labels nor a number are given


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A trained network and its sampler, on all devices; `load` makes one.

    Sample i of a seed starts from the noise of sample i of an evaluation with that eval.seed.

    Attributes:
      setup: config, shape of images, classes, objective and network of the run.
      step: of the checkpoint.
      params: the parameters.
      params_sharding: tree of their shardings.
    """

    setup: run.Setup
    step: int
    params: Any
    params_sharding: Any

    def sample(
        self,
        *,
        num_steps: int,
        labels: Sequence[int] | np.ndarray | None = None,
        num: int | None = None,
        seed: int = 0,
        cfg_scale: float | None = None,
    ) -> np.ndarray:
        """Draws the samples 0, 1 ... of a seed.

        Args:
          num_steps: number of sampling steps.
          labels: class of each sample, in [0, num_classes). By default those that an evaluation
            draws uniformly: see `labels`.
          num: how many samples, if no labels are given; 8 by default.
          seed: 0 <= seed < 2**32.
          cfg_scale: scale of classifier-free guidance where it is applied while sampling; by
            default the one of the training.

        Returns:
          uint8 [num, H, W, C]. The same arguments give the same samples. Another number of samples
          or devices may round differently: that moves few pixels, by one grey level.

        Raises:
          UserError: an argument this model cannot be sampled with.
        """
        self.check(num_steps, labels, num=num, seed=seed, cfg_scale=cfg_scale)
        if labels is None:
            labels = self.labels(DEFAULT_NUM if num is None else num, seed)
        indices = np.arange(len(labels))
        return self._draw(indices, indices, 0 * indices, labels, num_steps, seed, cfg_scale)

    def interpolate(
        self,
        *,
        num: int = 16,
        label: int | None = None,
        num_steps: int = 1,
        seed: int = 0,
        cfg_scale: float | None = None,
    ) -> np.ndarray:
        """Draws samples that start from n a + sqrt(1 - n^2) b, n = 0 ... 1 (paper, interpolation).

        b and a are the noises of the samples 0 and 1 of the seed, which are therefore the first and
        the last image. What a stochastic sampler adds in each step is mixed in the same way.

        Args:
          num: how many, at least 2; n goes up in equal steps.
          label: class of all of them; by default the one that sample 0 has in an evaluation.
          num_steps, seed, cfg_scale: see `sample`.

        Returns:
          uint8 [num, H, W, C].

        Raises:
          UserError: an argument this model cannot be sampled with.
        """
        given = None if label is None else [label]
        self.check(num_steps, given, seed=seed, cfg_scale=cfg_scale)
        _check_integer("num", num, low=2)
        labels = np.full(num, self.labels(1, seed)[0] if label is None else label)
        first = np.zeros(num, int)
        n = np.linspace(0, 1, num)
        return self._draw(first, first + 1, n, labels, num_steps, seed, cfg_scale)

    def labels(self, num: int = DEFAULT_NUM, seed: int = 0) -> np.ndarray:
        """The labels [num] int32 of the samples 0 ... num-1 where none are given."""
        found = _labels(self.setup.image_shape, self.setup.num_classes, num, np.uint32(seed))
        return np.array(found)

    def check(
        self,
        num_steps: int,
        labels: Sequence[int] | np.ndarray | None = None,
        *,
        num: int | None = None,
        seed: int = 0,
        cfg_scale: float | None = None,
    ) -> None:
        """Refuses arguments of `sample` that this model cannot be sampled with (UserError)."""
        _check_integer("num_steps", num_steps)
        _check_integer("seed", seed, low=0, high=2**32 - 1)
        spaces.check_files(self.setup.config)
        self.setup.objective.check_steps(int(num_steps), "num_steps")
        if num is not None:
            _check_integer("num", num)
        if num is not None and labels is not None:
            raise UserError(
                f"num={num} is given beside {len(labels)} labels; expected one of the two: leave "
                "out num, there is one sample for each label."
            )
        if cfg_scale is not None:
            section = self.setup.config.objective
            sampling.check_cfg_scale(section, self.setup.objective, cfg_scale, num_steps)
        if labels is not None:
            self._check_labels(labels, cfg_scale)

    def _check_labels(self, labels: Sequence[int] | np.ndarray, cfg_scale: float | None) -> None:
        found, last = np.asarray(labels), self.setup.num_classes - 1
        whole = found.ndim == 1 and found.size > 0 and found.dtype.kind in "iu"
        if not whole or found.min() < 0 or found.max() > last:
            raise UserError(
                f"labels={_short(labels)} is no list of classes of {self.setup.config.data.name}; "
                f"expected whole numbers from 0 to {last}, one for each sample: change them."
            )
        if 0 in (self.setup.objective.cfg_scale, cfg_scale):
            raise UserError(
                f"labels={_short(labels)} is given, but sampling is unconditional (cfg_scale=0); "
                "expected no labels, which would change nothing: leave them out."
            )

    def _draw(
        self,
        first: np.ndarray,
        second: np.ndarray,
        n: np.ndarray,
        labels: Sequence[int] | np.ndarray,
        num_steps: int,
        seed: int,
        cfg_scale: float | None,
    ) -> np.ndarray:
        """Samples from mixtures of the noises of `first` and `second`, in batches of one shape."""
        request = {
            "first": np.asarray(first, np.uint32),
            "second": np.asarray(second, np.uint32),
            "n": np.asarray(n, np.float32),
            "labels": np.asarray(labels, np.int32),
        }
        total, devices = len(n), self.setup.mesh.size
        size = min(total, self.setup.config.eval.batch_size)
        size = -(-size // devices) * devices
        scale = self.setup.objective.cfg_scale if cfg_scale is None else float(cfg_scale)
        batches = []
        for begin in range(0, total, size):
            # The last batch is filled up and cut: every program has one shape.
            batch = {k: np.resize(a[begin : begin + size], size) for k, a in request.items()}
            images, _ = self._program(scale)(self.params, batch, seed, num_steps)
            images = sharding.to_host(self.setup.space.decode(images))
            batches.append(sampling.to_uint8(images))
        return np.concatenate(batches)[:total]

    @functools.cached_property
    def _program(self):
        setup = self.setup

        @functools.cache
        def program(cfg_scale: float):
            return sampling.make_program(
                dataclasses.replace(setup.objective, cfg_scale=cfg_scale),  # type: ignore[type-var]
                state.apply_fn(setup.network),
                self.params_sharding,
                setup.mesh,
                functools.partial(_mixture, setup.image_shape, setup.num_classes),
            )

        return program


@functools.partial(jax.jit, static_argnums=(0, 1, 2))  # compiled: the noise is left out
def _labels(image_shape, num_classes, num, seed):
    indices = jnp.arange(num, dtype=jnp.uint32)
    return sampling.initial(seed, indices, image_shape, num_classes)[1]


def _mixture(image_shape, num_classes, request, seed):
    """n a + sqrt(1 - n^2) b, of variance 1, of the noises a of `second` and b of `first`."""
    n = rows(request["n"])

    def mix(noise_of):
        return n * noise_of(request["second"]) + jnp.sqrt(1 - n**2) * noise_of(request["first"])

    x = mix(lambda indices: sampling.initial(seed, indices, image_shape, num_classes)[0])

    def noise(step):
        return mix(lambda indices: sampling.step_noise(seed, indices, step, image_shape))

    return x, request["labels"], noise


def load(
    workdir: str | os.PathLike[str],
    step: int | None = None,
    params: str = "ema",
    autoencoder: str | os.PathLike[str] | None = None,
) -> Model:
    """Reads a checkpoint of a run onto all devices, whatever the devices of its training were.

    Args:
      workdir: of the run.
      step: of the checkpoint; the newest by default.
      params: "ema", "online", or the name of another average (docs/ema.md).
      autoencoder: file of weights that decodes samples of latents, if it is not where training had
        it.

    Raises:
      UserError: there is no such run, checkpoint or average, or it cannot be read, or its network
        sees no latents and an autoencoder is given.
    """
    averages.check_name(params, "params")
    config = run.restore_config(workdir)
    if autoencoder is not None:
        _check_latents(config, workdir)
        config.autoencoder.weights = str(autoencoder)
    checkpoints = checkpoint.Checkpoints(workdir, keep=config.checkpoint.keep, read_only=True)
    step = checkpoints.choose(step)
    parameters.check(checkpoints, step, params, "params")
    setup = run.build(config, sharding.make_mesh(jax.device_count(), 1))

    model = Model(setup, step, *run.restore_params(setup, checkpoints, step, params))
    checkpoints.close()
    logging.info("Loaded the %s parameters of step %d of %s.", params, step, workdir)
    return model


def _check_latents(config: ConfigDict, workdir: str | os.PathLike[str]) -> None:
    if "autoencoder" not in config:
        raise UserError(
            f"an autoencoder is given, but the network of {workdir} works on images themselves; "
            "expected none: leave it out."
        )


def _short(labels: Sequence[int] | np.ndarray) -> str:
    return f"{np.asarray(labels).tolist()!r:.60}"


def _check_integer(name: str, value: int, low: int = 1, high: int = 2**31 - 1) -> None:
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or not low <= value <= high:
        raise UserError(
            f"{name}={value!r} is out of range; expected a whole number from {low} to {high}: "
            "change it."
        )
