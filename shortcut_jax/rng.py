"""Randomness as a function of (seed, name of the stream, index), never a stored or threaded key.

Because no key is kept anywhere, a resumed run draws what an uninterrupted one draws, and sample i
is sample i on any number of devices (design: big_vision / kauldron's named streams).
"""

import zlib
from collections.abc import Callable

import jax

Draw = Callable[[str], jax.Array]  # name of a stream -> its key at the current index


def stream(seed: jax.typing.ArrayLike, name: str, index: jax.typing.ArrayLike) -> jax.Array:
    """Key of draw number `index` (a training step or a sample) of the stream `name`.

    Args:
      seed: the run's seed; may be traced.
      name: name of the stream, e.g. "train/noise". Every kind of draw has a name of its own.
      index: step or sample index, an integer below 2**32; may be traced.

    Returns:
      A scalar typed PRNG key.
    """
    # crc32 rather than hash(): the latter differs from process to process.
    root = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
    return jax.random.fold_in(root, index)


def draws(seed: int, scope: str, index: jax.typing.ArrayLike) -> Draw:
    """The keys of one step: draws(seed, "train", step)("noise") is stream "train/noise"."""
    return lambda name: stream(seed, f"{scope}/{name}", index)
