"""Where the network works: on images themselves, or on an autoencoder's latents of them.

Both kinds of space have the same methods, which the trainer calls in this order: `encode` what the
pipeline delivers, before the step; `draw` x_1 from it, within the step. Samples go back through
`decode`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from shortcut_jax.errors import UserError
from shortcut_jax.models import autoencoder
from shortcut_jax.parallel import sharding
from shortcut_jax.rng import Draw
from shortcut_jax.weights import autoencoder_weights

if TYPE_CHECKING:  # TFDS is imported only when data is opened.
    from shortcut_jax.data.sources import Dataset

# Images of a device that the autoencoder works on at a time. One of 256x256 takes 64 MiB in each of
# the decoder's widest layers, and eight are 5 TFLOPs of work.
AT_ONCE = 8

Shape = tuple[int, int, int]


class Pixels:
    """The network works on the images themselves."""

    def encode(self, images: jax.Array) -> jax.Array:
        """[B, H, W, C] in [-1, 1]: what `draw` takes."""
        return images

    def draw(self, draw: Draw, images: jax.Array) -> jax.Array:
        """x_1, [B, H, W, C] float32."""
        del draw
        return images

    def decode(self, x: jax.Array) -> jax.Array:
        """Images, [B, H, W, C] float32, about in [-1, 1], of samples x."""
        return x

    def identify(self, images: Dataset) -> Dataset:
        """The same images with a fingerprint that names all that x_1 depends on."""
        return images

    def record(self) -> dict[str, Any]:
        """What a number measured on samples says about the way from x to images."""
        return {}


@dataclasses.dataclass(frozen=True, eq=False)
class Latents:
    """The network works on an autoencoder's latents, drawn from their posterior and scaled.

    The weights are read when they, or their hash, are first needed.

    Attributes:
      kind: key of `autoencoder.ARCHITECTURES`.
      weights: see `autoencoder_weights.load`.
      scale: what latents are multiplied with (0.18215 for Stable Diffusion 1.x).
      mesh: devices that a batch is split over; each has all the weights.
    """

    kind: str
    weights: str
    scale: float
    mesh: Mesh

    def encode(self, images: jax.Array) -> jax.Array:
        """Moments [B, h, w, 2c] float32 of images [B, H, W, 3] in [-1, 1].

        Mean and log-variance of the posterior, one behind the other, not scaled.
        """
        return self._encode(self._params, images)

    def draw(self, draw: Draw, moments: jax.Array) -> jax.Array:
        """x_1 [B, h, w, c] float32, of variance about 1, from the posterior of moments.

        The noise is that of the step and the row: the same whether moments come from the encoder
        or from a cache, and new whenever an image is drawn again.
        """
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        noise = jax.random.normal(draw("posterior"), mean.shape)
        return self.scale * (mean + jnp.exp(0.5 * logvar) * noise)

    def decode(self, x: jax.Array) -> jax.Array:
        """Images [B, H, W, 3] float32, about in [-1, 1], of samples x [B, h, w, c]."""
        return self._decode(self._params, x)

    def identify(self, images: Dataset) -> Dataset:
        """The same images with a fingerprint that names the weights, too."""
        fingerprint = f"{images.fingerprint}-{self.sha256[:16]}"
        return dataclasses.replace(images, fingerprint=fingerprint)

    def record(self) -> dict[str, Any]:
        """What a number measured on decoded samples says about the decoder."""
        return {"autoencoder": self.kind, "autoencoder_sha256": self.sha256}

    @property
    def sha256(self) -> str:
        """Of the file of weights."""
        return self._loaded.sha256

    @functools.cached_property
    def _loaded(self) -> autoencoder_weights.Weights:
        return autoencoder_weights.load(self.weights, self.kind)

    @functools.cached_property
    def _params(self) -> Any:
        # A run on stored latents, without evaluations, has them on no device.
        return sharding.replicate(self._loaded.params, self.mesh)

    @functools.cached_property
    def _encode(self):
        def moments(params, images):
            found = autoencoder.encode(params, images, autoencoder.ARCHITECTURES[self.kind])
            return jnp.concatenate(found, axis=-1)

        return self._by_parts(moments)

    @functools.cached_property
    def _decode(self):
        def images(params, x):
            architecture = autoencoder.ARCHITECTURES[self.kind]
            return autoencoder.decode(params, x / self.scale, architecture)

        return self._by_parts(images)

    def _by_parts(self, function):
        rows, everywhere = sharding.batch_sharding(self.mesh), sharding.replicated(self.mesh)

        def of_a_device(params, x):
            return jax.lax.map(lambda row: function(params, row[None])[0], x, batch_size=AT_ONCE)

        mapped = jax.shard_map(
            of_a_device,
            mesh=self.mesh,
            in_specs=(everywhere.spec, rows.spec),
            out_specs=rows.spec,
        )
        return jax.jit(mapped, in_shardings=(everywhere, rows), out_shardings=rows)


Space = Pixels | Latents
Encode = Callable[[jax.Array], jax.Array]
DrawX1 = Callable[[Draw, jax.Array], jax.Array]


def way_from(space: Space, holds: str) -> tuple[Encode, DrawX1]:
    """`encode` and `draw` for batches of a data set that holds "images", "moments" or "samples"."""
    nothing = Pixels()
    return (
        space.encode if holds == "images" else nothing.encode,
        nothing.draw if holds == "samples" else space.draw,
    )


def build(config: ConfigDict, mesh: Mesh) -> Space:
    """The space that a config's network works in: latents if it has a section `autoencoder`."""
    if "autoencoder" not in config:
        return Pixels()
    return Latents(**config.autoencoder, mesh=mesh)


def check_files(config: ConfigDict) -> None:
    """Raises UserError if a file that the space needs is not there."""
    if "autoencoder" in config:
        autoencoder_weights.find(config.autoencoder.weights)


def shape(config: ConfigDict, image_shape: Shape) -> Shape:
    """(H, W, C) of what the network sees, for images [H, W, C].

    Raises:
      UserError: images of this size have no latents.
    """
    if "autoencoder" not in config:
        return image_shape
    found = autoencoder.ARCHITECTURES[config.autoencoder.kind]
    height, width, channels = image_shape
    if channels != 3 or height % found.factor or width % found.factor:
        raise UserError(
            f"autoencoder.kind={config.autoencoder.kind} cannot encode images of shape "
            f"{image_shape}; expected RGB and multiples of {found.factor} pixels: change "
            "data.image_size."
        )
    return height // found.factor, width // found.factor, found.latent_channels
