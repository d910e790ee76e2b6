"""Batches with two kinds of rows, without moving a row between devices.

The batch is seen as groups [G, q, ...] whose first p rows are of one kind and the others of the
other. The role of a row depends on its index alone and every device has its share.
"""

import dataclasses
import fractions
import math
from typing import Any

import jax
import jax.numpy as jnp

from shortcut_jax.errors import UserError
from shortcut_jax.objectives.base import Velocity


@dataclasses.dataclass(frozen=True)
class Groups:
    """A share p/q of the rows of a batch."""

    p: int
    q: int

    @classmethod
    def of(cls, share: float, key: str, advice: str) -> "Groups":
        """The groups of a share that the config key `key` gives.

        Raises:
          UserError: the share is not a fraction p/q between 0 and 1 with q <= 64.
        """
        found = fractions.Fraction(share).limit_denominator(64)
        if not 0 < found < 1 or abs(found - share) > 1e-6:
            raise UserError(
                f"{key}={share} is not a fraction p/q between 0 and 1 with q <= 64; {advice}."
            )
        return cls(found.numerator, found.denominator)

    def check(self, batch_size: int, num_shards: int, what: str, at_least: int = 1) -> None:
        """Refuses a batch that is not whole groups on every device, or too few rows of the kind.

        Args:
          batch_size: global batch size.
          num_shards: parts the batch is sharded into.
          what: the setting that asks for the groups, for the message.
          at_least: rows of the first kind that are needed.

        Raises:
          UserError: naming the smallest batch size that works.
        """
        unit = self.q * num_shards
        smallest = unit * max(1, math.ceil(at_least / (self.p * num_shards)))
        if batch_size < smallest or batch_size % unit:
            smallest_above = max(smallest, -(-batch_size // unit) * unit)
            raise UserError(
                f"batch_size={batch_size} does not work with {what} and {num_shards} batch "
                f"shard(s): it must be a multiple of {unit} and at least {smallest}; the smallest "
                f"that works from here is {smallest_above}."
            )

    def view(self, a: jax.Array) -> jax.Array:
        """[B, ...] as [G, q, ...]."""
        return a.reshape(-1, self.q, *a.shape[1:])

    def merge(self, first: Any, others: Any) -> Any:
        """Trees of [G, p, ...] and [G, q-p, ...] to one of [B, ...], in the batch's order."""
        merged = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), first, others)
        return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), merged)


def on_groups(velocity: Velocity) -> Velocity:
    """A velocity of rows [B, ...] as one of rows [G, n, ...], all in one pass."""

    def ask(x, t, d, labels):
        v = velocity(*(a.reshape(-1, *a.shape[2:]) for a in (x, t, d, labels)))
        return v.reshape(x.shape)

    return ask
